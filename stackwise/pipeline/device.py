"""Where to compute, resolved on the machine that computes."""

from __future__ import annotations

import os
import resource
import sys
from typing import Any

import psutil
import torch

from stackwise.errors import UsageError
from stackwise.pipeline.memory import status


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU.

    Raises:
        UsageError: The device that was asked for is not there.
    """
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


def describe(device: torch.device) -> dict[str, Any]:
    """The device's name, memory in bytes, and the precision that `auto` means on it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        return {"device": "cuda", "name": properties.name, "memory": properties.total_memory, "precision": precision}
    name = f"{os.cpu_count()} CPU cores" if device.type == "cpu" else "Apple GPU"
    return {"device": device.type, "name": name, "memory": psutil.virtual_memory().total, "precision": "fp32"}


def prepare_imports() -> torch.optim.Optimizer:
    """Have torch import what it otherwise imports with the first parameters and the first optimizer.

    That is its compiler's front end, some 800 modules: 1.5 s of a worker that has been given its job, or none of one
    that waits for it. Nothing is computed, and no GPU is asked for.
    """
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    return torch.optim.AdamW(module.to_empty(device="cpu").parameters())


def warm_up() -> None:
    """`prepare_imports`, and a first step: on the CPU, as nothing is taken of a GPU that another worker uses."""
    optimizer = prepare_imports()
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.sum().backward()
    optimizer.step()


def make_deterministic() -> None:
    """Only kernels that repeat bit for bit, where PyTorch has them; a warning names the others."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Every `torch.empty` would be filled with NaN otherwise: it costs bandwidth and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held on the device; on a CPU, its largest resident size.

    Of a process that was forked, what it shares with the one it is a copy of counts too.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # where `ru_maxrss` would begin with the size of whoever started this process
        return status("VmHWM")
    else:  # noqa: RET505 - of which mypy knows that it is for other systems
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
