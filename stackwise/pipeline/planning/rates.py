"""What this machine reaches, measured once (`stackwise doctor --measure`) and kept: products, copies, its disk."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from stackwise import durable, files
from stackwise.errors import StackWiseError
from stackwise.host import host_total
from stackwise.pipeline.device import ask, python_command
from stackwise.pipeline.planning.machines import MACHINES, Disk, Machine
from stackwise.pipeline.planning.trace import cache_directory

Rates = dict[str, float | str]
"""By name: `device`, `name`, `memory`; FLOP/s as `products fp32`, `products bf16`, `training` (what a block in training
reaches); bytes a second as `copies`, `memory copies`, `disk read`, `disk read cached`, `disk write`; `base`, bytes that
a worker takes for itself."""

FILE_BYTES, PIECE, LONGEST = 512 << 20, 8 << 20, 4.0
"""Of the file that the disk is measured with: bytes, bytes at a time, and seconds that it may take."""


def rates_file() -> Path:
    """Where measured rates are kept."""
    return cache_directory() / "rates.json"


def known_rates() -> Rates | None:
    """What was measured; None: nothing was."""
    try:
        rates = files.read_json(rates_file())
    except (OSError, ValueError, StackWiseError):
        return None
    needed = {"device", "memory", "training", "disk read", "disk write", "copies", "memory copies", "base"}
    return rates if isinstance(rates, dict) and needed <= rates.keys() else None


def this_machine() -> Machine:
    """This machine: as measured, else its device by name with rated figures, or those of a CPU by its cores."""
    free = shutil.disk_usage(Path.cwd()).free
    rates = known_rates()
    if rates is None:
        cores = os.cpu_count() or 1
        machine = replace(MACHINES["cpu"], name=f"this machine ({cores} cores)", flops=cores * 5e10)
        source = "not measured: `stackwise doctor --measure` does"
        if card := _card():
            machine = replace(card, source=f"{card.source}; {source}")
            return replace(machine, ram=host_total(), disk=replace(Disk(), size=free))
        return replace(machine, source=source, ram=host_total(), memory=host_total(), disk=replace(Disk(), size=free))
    number = {key: float(value) for key, value in rates.items() if not isinstance(value, str)}
    kind = str(rates["device"])
    return Machine(
        name=f"this machine ({rates['name']})",
        kind=kind,
        memory=number["memory"] if kind == "cuda" else host_total(),
        flops=number["training"],
        bandwidth=number["memory copies"],
        host=number["copies"],
        source="measured",
        # Training in 8 bits is taken to come as near to its products as training does to those in 16.
        fp8=number["training"] * number.get("products fp8", 0.0) / number["products bf16"],
        ram=host_total(),
        disk=Disk(number["disk read"], number["disk write"], free),
        reached=1.0,
        base=number["base"],
    )


def _card() -> Machine | None:
    """The registry's entry of the GPU that the driver names; None: there is none, or it is unknown."""
    try:
        name, memory = ask("gpu", "name,memory.total")[0]
    except (ValueError, IndexError):
        return None
    plain = name.lower().replace(" ", "")
    close = [m for m in MACHINES.values() if m.kind == "cuda" and m.name.partition("-")[0] in plain]
    best = min(close, key=lambda m: abs(m.memory - float(memory) * (1 << 20)), default=None)
    return None if best is None else replace(best, name=f"this machine ({name.strip()})")


def measure(directory: Path, progress: Callable[[str], None] = lambda _: None) -> Rates:
    """Measure this machine and keep what comes out.

    Args:
        directory: On the disk that is measured; a file of at most 512 MiB is made there, and removed.

    Raises:
        NoSpaceError: The disk is too small for that.
    """
    progress("disk")
    rates: Rates = dict(_disk(directory))
    progress("products and copies")
    done = subprocess.run(
        python_command("stackwise.pipeline.planning.products"), capture_output=True, text=True, check=False
    )
    try:
        rates |= json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise StackWiseError(
            f"products could not be measured: {last}", hint="`stackwise doctor` checks torch"
        ) from None
    path = rates_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_json(path, rates)
    return rates


def _disk(directory: Path) -> dict[str, float]:
    """Bytes a second of durable writing, and of reading without and with the page cache."""
    path, piece = directory / f".stackwise-rate-{secrets.token_hex(4)}", os.urandom(PIECE)
    with durable.explain_full_disk(directory):
        try:
            begun = time.perf_counter()
            size = 0
            with open(path, "xb", buffering=0) as file:
                while size < FILE_BYTES and time.perf_counter() - begun < LONGEST:
                    size += file.write(piece)
                    if size % (8 * PIECE) == 0:  # what only lies in the cache is not written
                        os.fsync(file.fileno())
                os.fsync(file.fileno())
            rates = {"disk write": size / (time.perf_counter() - begun)}
            for name in ("disk read", "disk read cached"):
                rates[name] = size / _read(path, drop=name == "disk read")
        finally:
            path.unlink(missing_ok=True)
    return rates


def _read(path: Path, *, drop: bool) -> float:
    buffer = bytearray(PIECE)
    with open(path, "rb", buffering=0) as file:
        if drop and hasattr(os, "posix_fadvise"):  # its pages are clean by now, and leave the cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begun = time.perf_counter()
        while file.readinto(buffer):
            pass
        return max(time.perf_counter() - begun, 1e-9)
