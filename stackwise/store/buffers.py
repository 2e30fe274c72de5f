"""Batch buffers that are used again as soon as nothing refers to the batch, and never before.

Fresh memory costs as much to fault in as a batch costs to copy. A batch is a torch tensor over a numpy view of a
buffer; when the last tensor over that view dies, wherever it was kept (autograd included), the buffer is free.
"""

from __future__ import annotations

import mmap
import os
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

_IDLE = 6
_SMALL = 1 << 16


class BufferPool:
    """Buffers of whatever sizes are asked for; a few idle ones of the latest size are kept."""

    def __init__(self) -> None:
        self._idle: list[tuple[int, Any]] = []
        self._pid = os.getpid()

    def tensor(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """An uninitialised CPU tensor of a torch dtype ("bfloat16")."""
        import torch

        target: torch.dtype = getattr(torch, dtype)
        size = int(np.prod(shape)) * target.itemsize
        if size < _SMALL:
            return torch.empty(shape, dtype=target)
        view = self._take(size)  # this very object: a slice of it would keep only the buffer, not the view, alive
        return torch.from_numpy(view).view(target).view(shape)

    def _take(self, size: int) -> npt.NDArray[np.uint8]:
        if self._pid != os.getpid():  # a fork's copy of an idle buffer is its own, but starts afresh all the same
            self._idle, self._pid = [], os.getpid()
        base = None
        while self._idle:
            length, candidate = self._idle.pop()
            if length == size:
                base = candidate
                break
        if base is None:
            base = _allocate(size)
        view = base.view()
        weakref.finalize(view, _give_back, self._idle, size, base).atexit = False
        return view


def _give_back(idle: list[tuple[int, Any]], size: int, base: Any) -> None:
    if len(idle) < _IDLE:
        idle.append((size, base))


def _allocate(size: int) -> npt.NDArray[np.uint8]:
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(area, np.uint8)


def bits_of(x: torch.Tensor) -> npt.NDArray[Any]:
    """A contiguous CPU tensor's memory as a numpy array of the same shape (bfloat16 as uint16)."""
    import torch

    return x.view(torch.uint16).numpy() if x.dtype is torch.bfloat16 else x.numpy()
