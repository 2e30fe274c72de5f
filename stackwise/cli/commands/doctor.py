"""`stackwise doctor`: looks at this machine. It works whatever is not installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

from stackwise import words
from stackwise.cli.options import as_json
from stackwise.cli.output import Styled, print_json, say, say_all
from stackwise.errors import StackWiseError, line_of
from stackwise.files import user_cache
from stackwise.version import __version__

State = Literal["ok", "missing", "optional", "note"]

MARKS = {"ok": "green", "missing": "red", "optional": "dim", "note": "yellow"}
MODULES = {"pyyaml": "yaml", "tensorboardx": "tensorboardX"}
"""Import names that differ from their distribution's."""
FALLBACK = ("click", "lmdb", "numcodecs", "numpy", "psutil", "pydantic", "PyYAML", "rich", "safetensors")
"""What is needed, where the installation does not say."""
EXTRAS = {
    "arrow": "parquet files and Hugging Face data set folders",
    "wandb": "Weights & Biases (tracking.trackers: wandb)",
    "clearml": "ClearML (tracking.trackers: clearml)",
    "mlflow": "MLflow (tracking.trackers: mlflow)",
    "slurm": "jobs of a batch system (stackwise run --engine slurm)",
    "ray": "tasks of a Ray cluster (stackwise run --engine ray)",
}
SCRATCH_BYTES = 2 << 30
"""Less free disk than this is worth a word."""


@dataclass(frozen=True)
class Check:
    """One thing looked at: `missing` is needed and not there, `optional` is not there and not needed."""

    name: str
    state: State
    found: str
    hint: str | None = None


def needed(name: str, there: object, found: str, hint: str) -> Check:
    """A check of what StackWise cannot do without."""
    return Check(name, "ok", found) if there else Check(name, "missing", found, hint)


@click.command()
@click.option(
    "--measure", "measures", is_flag=True, help="Measure products, copies and this disk, for `stackwise plan`."
)
@as_json
def doctor(measures: bool, as_json: bool) -> None:
    """Check this machine: packages, devices, memory, disk. Exit code 1 where something needed is missing.

    --measure takes some ten seconds and at most 512 MiB of this directory's disk; what comes out is kept in the cache
    directory, and `stackwise plan` (--gpu auto) goes by it.
    """
    here = Path.cwd()
    if measures:
        _measure(here, as_json)
        return
    checks = [*_python(), *_packages(), *_devices(), *_memory(), *_disk(here), _cache(), *_extras()]
    missing = [check for check in checks if check.state == "missing"]
    if as_json:
        print_json({"ok": not missing, "checks": [asdict(check) for check in checks]})
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            hint = f"  ({check.hint})" if check.hint else ""
            say(Styled(f"{check.state:8}", MARKS[check.state]), f"  {check.name:{width}}  {check.found}{hint}")
    if missing:
        names = ", ".join(check.name for check in missing)
        raise StackWiseError(
            f"{words.plural(len(missing), 'thing')} that StackWise needs: {names}", hint=missing[0].hint
        )


def _measure(directory: Path, as_json: bool) -> None:
    """Measure what the machine reaches, keep it, show it."""
    from stackwise.cli.drawing import Table, phases
    from stackwise.pipeline.planning.rates import measure, rates_file

    with phases() as bar:
        rates = measure(directory, lambda phase: bar(phase, 0, None))
    if as_json:
        print_json(rates)
        return
    table = Table("measured", "", right=(1,))
    for name, value in rates.items():
        if isinstance(value, str):
            shown = value
        elif name in ("memory", "base"):
            shown = words.size(value)
        else:
            shown = (
                f"{value / 1e9:.3g} GFLOP/s" if name.startswith(("products", "training")) else f"{words.size(value)}/s"
            )
        table.add_row(name, shown)
    say_all(table.lines())
    say(f"kept in {rates_file()}; `stackwise plan` goes by it")


def _python() -> Iterator[Check]:
    yield Check("stackwise", "ok", __version__)
    python = f"{platform.python_version()} ({sys.executable})"
    yield needed("python", sys.version_info >= (3, 11), python, "3.11 or newer")
    yield needed("system", os.name == "posix", platform.platform(), "Linux or macOS")


def _packages() -> Iterator[Check]:
    for name, required in requirements():
        try:
            version = importlib.metadata.version(name)
            # Present is not enough: a broken binary shows only when it is imported.
            importlib.import_module(MODULES.get(name.lower(), name.lower().replace("-", "_")))
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "missing", "not installed", f"pip install '{name}{required}'")
        except Exception as error:  # whatever a broken package raises
            state = f"{version}, but it does not import: {line_of(error, '')}"
            yield Check(name, "missing", state, f"pip install --force-reinstall {name}")
        else:
            yield Check(name, "ok", version)


def requirements(extra: str | None = None) -> list[tuple[str, str]]:
    """(name, version wanted) of what StackWise needs, or of an extra."""
    try:
        lines = importlib.metadata.requires("stackwise") or []
    except importlib.metadata.PackageNotFoundError:
        return [(name, "") for name in FALLBACK] if extra is None else []
    requirements = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        of = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        match = re.match(r"\s*([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(.*)", requirement)
        if match and (of[1] if of else None) == extra:
            requirements.append((match[1], match[2].strip().strip("()")))
    return requirements


def _devices() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check("cpu", "ok", f"{platform.machine()}, {cores} cores")
    try:
        import torch
    except Exception:  # said among the packages already
        return
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        yield Check(f"cuda:{index}", "ok", f"{properties.name}, {words.size(properties.total_memory)}, {bf16}")
    if torch.backends.mps.is_available():
        yield Check("mps", "ok", "Apple GPU")
    elif Path("/dev/nvidia0").exists() and not torch.cuda.is_available():
        cuda = torch.version.cuda
        why = "this build of torch is for CPUs alone" if cuda is None else f"its driver does not fit CUDA {cuda}"
        yield Check("gpu", "note", "there is one that torch cannot use", why)
    elif not torch.cuda.is_available():
        yield Check("gpu", "optional", "none; training runs on the CPU")


def _memory() -> Iterator[Check]:
    try:
        import psutil
    except Exception:  # said among the packages already
        return
    memory = psutil.virtual_memory()
    yield Check("memory", "ok", f"{words.size(memory.total)}, {words.size(memory.available)} available")


def _disk(directory: Path) -> Iterator[Check]:
    free = shutil.disk_usage(directory).free
    if not os.access(directory, os.W_OK):
        yield Check("directory", "note", f"{directory} cannot be written", "run where it can, or name --run DIR")
    low = free < SCRATCH_BYTES
    yield Check("disk", "note" if low else "ok", f"{words.size(free)} free at {directory}", "little" if low else None)
    try:
        from stackwise.errors import UsageError
        from stackwise.store.layout import file_system, refuse_network
    except Exception:  # a package is missing, which is said already
        return
    kind = file_system(directory) or "unknown"
    try:
        refuse_network(directory)
    except UsageError as error:
        yield Check("file system", "note", f"{kind}: a store's index cannot be here", error.hint)
    else:
        yield Check("file system", "ok", f"{kind}, local")


def _cache() -> Check:
    directory = existing = user_cache()
    while not existing.exists() and existing != existing.parent:  # what there is of it decides who may write
        existing = existing.parent
    writable = os.access(existing, os.W_OK)
    state = str(directory) if writable else f"{directory} cannot be written"
    return needed("cache directory", writable, state, "set XDG_CACHE_HOME, or data.cache_dir")


def _extras() -> Iterator[Check]:
    for extra, purpose in EXTRAS.items():
        missing = []
        for name, _ in requirements(extra):
            try:
                yield Check(name, "ok", f"{importlib.metadata.version(name)} ({purpose})")
            except importlib.metadata.PackageNotFoundError:
                missing.append(name)
        if missing:
            hint = f"pip install 'stackwise[{extra}]'"
            yield Check(", ".join(missing), "optional", f"not installed ({purpose})", hint)
