"""The host's memory: how much there is, what of it a process may have, by the machine, its container and its limits."""

from __future__ import annotations

import ctypes
import functools
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

FROM_HEAP, KEPT = 32 << 20, 128 << 20
"""Bytes of the largest piece that comes from the heap (glibc takes no more), and of free heap that stays."""
_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h

CGROUP, GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Memory:
    """A limit, and how much of it is used."""

    limit: int  # most bytes that this process can hold
    used: int  # bytes that it holds, in the same measure
    what: str  # what is limited, in words

    @property
    def room(self) -> int:
        """Bytes left."""
        return self.limit - self.used


def host_memory() -> Memory:
    """The limit of the host's memory that this process meets first."""
    return min(_limits(), key=lambda limit: limit.room)


def host_total() -> int:
    """Bytes of memory of this machine, or of the container that this process runs in where that has fewer."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _groups())])


def process_bytes(key: str) -> int:
    """An entry in bytes of what Linux says of this process's memory, such as VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def killed_for_memory() -> int:
    """How many processes of this control group the kernel has killed for want of memory."""
    try:
        events = dict(line.split() for line in (CGROUP / "memory.events").read_text().splitlines())
        return int(events.get("oom_kill", 0))
    except (OSError, ValueError):
        return 0


def _limits() -> Iterator[Memory]:
    info = psutil.Process().memory_info()
    yield Memory(info.rss + psutil.virtual_memory().available, info.rss, "memory")
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY:
        yield Memory(space, info.vms, "address space (ulimit -v)")
    data = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if data != resource.RLIM_INFINITY and sys.platform == "linux":
        yield Memory(data, process_bytes("VmData"), "data memory (ulimit -d)")
    for _, room in _groups():
        yield Memory(info.rss + room, info.rss, "memory of its control group")


def _groups() -> Iterator[tuple[int, int]]:
    """(limit, room) in bytes of each control group around this process that has a limit, of either version of Linux.

    What the kernel could drop of a group's cached files counts as room.
    """
    try:
        lines = GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = CGROUP, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the host's, and its own group is the root that it sees.
        inner = root / path.strip("/")
        for group in dict.fromkeys([*(g for g in (inner, *inner.parents) if g.is_relative_to(root)), root]):
            try:
                limit = int((group / names[0]).read_text())  # "max": none
                used = int((group / names[1]).read_text())
                stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                cached = int(stat.get(names[2], 0))
            except (OSError, ValueError):
                continue
            if limit < 1 << 60:  # the first version's word for none
                yield limit, max(0, limit - used + cached)


@functools.cache
def keep_freed_memory() -> None:
    """Let this process use again what one batch freed for the next one.

    By itself glibc gives the memory of each block's intermediate results back, and gets it anew, page by page: a tenth
    of a forward pass on a CPU. Other libraries of C are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP, FROM_HEAP)
        mallopt(_TRIM, KEPT)
