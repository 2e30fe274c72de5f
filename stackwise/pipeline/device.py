"""This machine: where to compute, how much memory there is and which limit is met first, how Python processes start.

Imports no torch: what needs it imports it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import stackwise
from stackwise.errors import BusyError, UsageError
from stackwise.host import Memory, host_memory, host_total, process_bytes
from stackwise.text import printable
from stackwise.words import size as in_bytes

if TYPE_CHECKING:
    import torch

DRIVER_SECONDS = 10.0  # that nvidia-smi may take
MIB = 1 << 20
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "can't start new thread")
"""What a RuntimeError of PyTorch, or of the interpreter, says then."""


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this package in a Python process of its own.

    Neither the current directory nor the module's is searched for imports (-P): files that lie there are not ours.
    """
    root = str(Path(stackwise.__file__).parent.parent)
    if root in map(os.path.abspath, filter(None, sys.path[1:])):
        return [sys.executable, "-P", "-m", module, *arguments]
    # A checkout that is used from within: what -P leaves out is where the package is.
    start = (
        "import runpy, sys; sys.path.append(sys.argv.pop(1)); runpy.run_module(sys.argv.pop(1), None, '__main__', True)"
    )
    return [sys.executable, "-P", "-c", start, root, module, *arguments]


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU. Raises UsageError: the device that was asked for is not there."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise UsageError(f"device {name}: this machine has no such GPU", hint="set device: auto or device: cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device mps: this machine has none", hint="set device: auto or device: cpu")
    return device


def describe(device: torch.device | None) -> dict[str, Any]:
    """The kind of a device (None: the CPU), its name, memory in bytes, and the precision that `auto` means on it."""
    if device is not None and device.type == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(device)
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        known = {"device": "cuda", "name": properties.name, "memory": properties.total_memory, "precision": precision}
        # What Triton's kernels need, of which a compiled block consists there.
        compiles = properties.major >= 7 and importlib.util.find_spec("triton") is not None
        return known | {"devices": torch.cuda.device_count(), "compiles": compiles}
    kind = "cpu" if device is None else device.type
    name = f"{os.cpu_count()} CPU cores" if kind == "cpu" else "Apple GPU"
    return {"device": kind, "name": name, "memory": host_total(), "precision": "fp32"}


def cpu_alone(device: str) -> bool:
    """Whether a device, as in the configuration, can be none but the CPU, on Linux; torch is not imported to tell."""
    return sys.platform == "linux" and (device == "cpu" or (device == "auto" and built_for_cpu()))


@functools.cache
def built_for_cpu() -> bool:
    """Whether PyTorch was built for no device but the CPU, by what its package says."""
    spec = importlib.util.find_spec("torch")
    version = Path(spec.origin).parent / "version.py" if spec is not None and spec.origin is not None else None
    if version is None or not version.is_file():
        return False
    built = dict(re.findall(r"^(cuda|hip|rocm|xpu)\b[^=\n]*= *(.+)$", version.read_text(), re.MULTILINE))
    return "cuda" in built and set(built.values()) == {"None"}


def warm_up() -> None:
    """A first step: what torch makes at its first is there when a job comes.

    On the CPU, as nothing is taken of a GPU that another worker uses.
    """
    import torch

    from stackwise.training.optim import eager

    weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = eager(torch.optim.AdamW)([weight])
    weight.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def make_deterministic() -> None:
    """On a GPU only kernels that repeat bit for bit: the others raise (see `cannot_repeat`).

    Only without warnings do flash and memory-efficient attention take their ordered backward passes; cuDNN's has none,
    and is not chosen then.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=False)
    # Every `torch.empty` would be filled with NaN otherwise: it costs bandwidth and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def memory(device: torch.device | None = None) -> Memory:
    """The memory that a computation on `device` runs out of first; None: the host's."""
    if device is not None and device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return Memory(free + reserved, used, "GPU memory")
    return host_memory()


def gpu_use(device: torch.device) -> float | None:
    """The share of the driver's last sample, a second or less, in which a GPU computed.

    None: it is no GPU, or its driver is not asked (nvidia-ml-py, in the extra `gpu`).
    """
    if device.type != "cuda":
        return None
    import torch

    try:
        return torch.cuda.utilization(device) / 100
    except Exception:  # whatever the driver's library comes up with: a figure is not worth a stage
        return None


def cannot_repeat(error: BaseException) -> bool:
    """Whether an error says that PyTorch has no kernel that repeats bit for bit for something."""
    return isinstance(error, RuntimeError) and "does not have a deterministic implementation" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(phrase in text for phrase in OUT_OF_MEMORY)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held on the device; on a CPU, its largest resident size.

    Of a process that was forked, what it shares with the one it is a copy of counts too.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # where `ru_maxrss` would begin with the size of whoever started this process
        return process_bytes("VmHWM")
    else:  # noqa: RET505 - of which mypy knows that it is for other systems
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def ask(query: str, fields: str, card: str | None = None) -> list[list[str]]:
    """Rows of what nvidia-smi says; none where it is not there, fails or hangs.

    Args:
        query: `gpu` or `compute-apps`.
        fields: Names, between commas.
        card: Index or UUID; None: all.
    """
    command = ["nvidia-smi", f"--query-{query}={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [*command, *(["-i", card] if card is not None else [])],
            capture_output=True,
            text=True,
            timeout=DRIVER_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return (
        [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines()] if not done.returncode else []
    )


def check_free(device: str, needed: int) -> None:
    """Refuse a card whose memory other processes hold.

    Args:
        device: As of a plan, `cuda` or `cuda:N`; any other has no card.
        needed: Bytes that the largest stage takes.

    Raises:
        BusyError: What is free beside them does not hold `needed`.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return
    index = int(number or 0)
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    card = visible[index] if index < len(visible) else str(index)
    try:
        ((used, total),) = ((int(a) * MIB, int(b) * MIB) for a, b in ask("gpu", "memory.used,memory.total", card))
    except ValueError:  # unknown to the driver, or a field is "[N/A]"
        return
    import psutil

    mine = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    others, held_by_us = [], 0
    for row in ask("compute-apps", "pid,used_memory,process_name", card):
        if len(row) < 3 or not (row[0].isdigit() and row[1].isdigit()):
            continue
        if int(row[0]) in mine:
            held_by_us += int(row[1]) * MIB
        else:
            others.append(f"process {row[0]} ({printable(row[2])}) {in_bytes(int(row[1]) * MIB)}")
    held = max(0, used - held_by_us)
    if needed <= total - held or needed > total:  # what no empty card holds is another matter
        return
    who = "; ".join(others) or "by processes that this one does not see"
    raise BusyError(
        f"device {device}: {in_bytes(held)} of its {in_bytes(total)} are held by others ({who}), and the largest stage "
        f"takes about {in_bytes(needed)}",
        hint=f"wait for them, name another device, or set training.memory to what is free: {total - held}",
    )
