"""Commands that look: `stackwise status`, `report`, `doctor`. The last one works whatever is not installed."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import click

from stackwise import words
from stackwise.cli.options import as_json, find_run, run_option, watch_option
from stackwise.cli.output import Styled, print_json, say, show
from stackwise.cli.tables import status_table
from stackwise.errors import StackWiseError
from stackwise.version import __version__


@click.command()
@run_option
@watch_option
@as_json
def status(run: str | None, watch: bool, as_json: bool) -> None:
    """Show run status: each stage's state, step and loss, and why it trains or is reused."""
    from stackwise.pipeline.run import held_by_live_process
    from stackwise.pipeline.run import status as state_of

    directory = find_run(run)
    still_changing = (lambda: held_by_live_process(directory)) if watch else None
    show(lambda: state_of(directory), status_table, still_changing, as_json=as_json)


@click.command()
@run_option
def report(run: str | None) -> None:
    """Write report.html into the run's directory: one file that opens offline. Any state of a run will do."""
    from stackwise import report as reports

    say(reports.write(find_run(run)))


@click.command()
@as_json
def doctor(as_json: bool) -> None:
    """Check this machine: packages, devices, memory, disk. Exit code 1 where something needed is missing."""
    checks = examine()
    missing = [check for check in checks if check.state == "missing"]
    if as_json:
        print_json({"ok": not missing, "checks": [check.plain() for check in checks]})
    else:
        _show(checks)
    if missing:
        names = ", ".join(check.name for check in missing)
        raise StackWiseError(
            f"{words.plural(len(missing), 'thing')} that StackWise needs: {names}", hint=missing[0].hint
        )


def _show(checks: list[Check]) -> None:
    width = max(len(check.name) for check in checks)
    for check in checks:
        hint = f"  ({check.hint})" if check.hint else ""
        say(Styled(f"{check.state:8}", MARKS[check.state]), f"  {check.name:{width}}  {check.found}{hint}")


State = Literal["ok", "missing", "optional", "note"]

MARKS = {"ok": "green", "missing": "red", "optional": "dim", "note": "yellow"}
MODULES = {"pyyaml": "yaml", "tensorboardx": "tensorboardX"}
"""Import names that differ from their distribution's."""
FALLBACK = ("click", "lmdb", "numcodecs", "numpy", "psutil", "pydantic", "PyYAML", "rich", "safetensors")
"""What is needed, where the installation does not say."""
EXTRAS = {
    "arrow": "parquet files and Hugging Face data set folders",
    "wandb": "Weights & Biases (tracking.trackers: wandb)",
    "mlflow": "MLflow (tracking.trackers: mlflow)",
    "slurm": "jobs of a batch system (stackwise run --engine slurm)",
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

    def plain(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self)


def examine(directory: Path | None = None) -> list[Check]:
    """Look at this machine.

    Args:
        directory: Where runs would be; by default here.
    """
    here = (directory or Path.cwd()).absolute()
    return [*_python(), *_packages(), *_devices(), *_memory(), *_disk(here), _cache(), *_extras()]


def _python() -> Iterator[Check]:
    yield Check("stackwise", "ok", __version__)
    version = platform.python_version()
    enough = sys.version_info >= (3, 11)
    yield Check(
        "python", "ok" if enough else "missing", f"{version} ({sys.executable})", None if enough else "3.11 or newer"
    )
    supported = os.name == "posix"
    yield Check(
        "system", "ok" if supported else "missing", platform.platform(), None if supported else "Linux or macOS"
    )


def _packages() -> Iterator[Check]:
    import importlib.metadata  # here, as status does without

    for name, wanted in _requirements():
        try:
            version = importlib.metadata.version(name)
            # Present is not enough: a broken binary shows only when it is imported.
            importlib.import_module(MODULES.get(name.lower(), name.lower().replace("-", "_")))
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "missing", "not installed", f"pip install '{name}{wanted}'")
        except Exception as error:  # whatever a broken package raises
            line = (str(error).splitlines() or [""])[0]
            yield Check(
                name, "missing", f"{version}, but it does not import: {line}", f"pip install --force-reinstall {name}"
            )
        else:
            yield Check(name, "ok", version)


def _requirements(extra: str | None = None) -> list[tuple[str, str]]:
    """(name, version wanted) of what StackWise needs, or of an extra."""
    import importlib.metadata

    try:
        lines = importlib.metadata.requires("stackwise") or []
    except importlib.metadata.PackageNotFoundError:
        return [(name, "") for name in FALLBACK] if extra is None else []
    found = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        of = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        if (of.group(1) if of else None) != extra:
            continue
        match = re.match(r"\s*([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(.*)", requirement)
        if match:
            found.append((match.group(1), match.group(2).strip().strip("()")))
    return found


def _devices() -> Iterator[Check]:
    cores = f"{_cores()} cores"
    yield Check("cpu", "ok", f"{platform.machine()}, {cores}")
    try:
        import torch
    except Exception:  # said among the packages already
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
            yield Check(f"cuda:{index}", "ok", f"{properties.name}, {words.size(properties.total_memory)}, {bf16}")
    elif torch.backends.mps.is_available():
        yield Check("mps", "ok", "Apple GPU")
    elif (why := _idle_gpu(torch.version.cuda)) is not None:
        yield Check("gpu", "note", "there is one that torch cannot use", why)
    else:
        yield Check("gpu", "optional", "none; training runs on the CPU")


def _idle_gpu(cuda: str | None) -> str | None:
    """Why a GPU that the system has is not used; None where there is none."""
    if not Path("/dev/nvidia0").exists():
        return None
    return "this build of torch is for CPUs alone" if cuda is None else f"its driver does not fit CUDA {cuda}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> Iterator[Check]:
    try:
        import psutil
    except Exception:
        return
    memory = psutil.virtual_memory()
    yield Check("memory", "ok", f"{words.size(memory.total)}, {words.size(memory.available)} available")


def _disk(directory: Path) -> Iterator[Check]:
    free = shutil.disk_usage(directory).free
    writable = os.access(directory, os.W_OK)
    if not writable:
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
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = existing = Path(base).expanduser() / "stackwise"
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if os.access(existing, os.W_OK):
        return Check("cache directory", "ok", str(directory))
    return Check(
        "cache directory", "missing", f"{directory} cannot be written", "set XDG_CACHE_HOME, or data.cache_dir"
    )


def _extras() -> Iterator[Check]:
    import importlib.metadata

    for extra, purpose in EXTRAS.items():
        missing = []
        for name, _ in _requirements(extra):
            try:
                version = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                missing.append(name)
            else:
                yield Check(name, "ok", f"{version} ({purpose})")
        if missing:
            yield Check(
                ", ".join(missing), "optional", f"not installed ({purpose})", f"pip install 'stackwise[{extra}]'"
            )
