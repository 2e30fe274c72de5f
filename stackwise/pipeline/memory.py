"""How much memory a worker may use and how much it uses, by the limit that it meets first. Imports no torch."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import torch

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """A limit, and how much of it is used.

    Args:
        limit: Most bytes that this process can hold.
        used: Bytes that it holds, in the same measure.
        what: What is limited, in words.
    """

    limit: int
    used: int
    what: str

    @property
    def room(self) -> int:
        """Bytes left."""
        return self.limit - self.used

    def plain(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self)


def memory(device: torch.device | None = None) -> Memory:
    """The memory that a computation on `device` runs out of first; None: the host's."""
    if device is not None and device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return Memory(free + reserved, used, "GPU memory")
    return min(_host(), key=lambda each: each.room)


def _host() -> list[Memory]:
    process = psutil.Process()
    info = process.memory_info()
    found = [Memory(info.rss + psutil.virtual_memory().available, info.rss, "memory")]
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY:
        found.append(Memory(space, info.vms, "address space (ulimit -v)"))
    data = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if data != resource.RLIM_INFINITY and sys.platform == "linux":
        found.append(Memory(data, status("VmData"), "data memory (ulimit -d)"))
    if (group := _group_room()) is not None:
        found.append(Memory(info.rss + group, info.rss, "memory of its control group"))
    return found


def status(key: str) -> int:
    """An entry in bytes of what Linux says of this process's memory, such as VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _group_room() -> int | None:
    """Bytes that the control group has left, what the kernel could drop of it included; None: it has no limit."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return None


def killed_for_memory() -> int:
    """How many processes of this control group the kernel has killed for want of memory."""
    try:
        events = dict(line.split() for line in (CGROUP / "memory.events").read_text().splitlines())
        return int(events.get("oom_kill", 0))
    except (OSError, ValueError):
        return 0


OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "can't start new thread")
"""What a RuntimeError of PyTorch, or of the interpreter, says then."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(said in text for said in OUT_OF_MEMORY)
