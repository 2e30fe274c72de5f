"""What travels between the host and a GPU: memory that it copies at the bus's full speed, and batches on their way.

PyTorch's own pinned memory rounds each tensor up to a power of two and is never given back; large pieces are taken here
in their exact size, and given back.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from stackwise.batch import Batch
from stackwise.words import size as in_bytes

PAGE = 4096
ALIGNED = 64  # bytes that each tensor of a piece begins at a multiple of
PORTABLE = 1  # cudaHostRegisterPortable of driver_types.h: pinned for all devices
AHEAD = 2  # microbatches on a GPU at most: the one that is computed on, and the next one on its way

Shapes = Mapping[str, tuple[torch.Size, torch.dtype]]
Warn = Callable[[str], object]


class HostCopy(Mapping[str, Tensor]):
    """Tensors in one piece of the host's memory, whose pages are there.

    Args:
        shapes: The shape and dtype of each.
        pin: Let a GPU copy from and to it by itself; where the system refuses that, it is ordinary memory.
        warn: Called with a line about that.

    Raises:
        MemoryError: There is too little memory.
        RuntimeError: The same, as torch says it.
    """

    def __init__(self, shapes: Shapes, *, pin: bool, warn: Warn) -> None:
        self.shapes = dict(shapes)
        places, end = {}, 0
        for name, (shape, dtype) in self.shapes.items():
            places[name] = (end, shape.numel() * dtype.itemsize)
            end += -(-places[name][1] // ALIGNED) * ALIGNED
        # Whole pages of its own: two pieces must not share one that is pinned.
        whole = torch.empty(end + 2 * PAGE, dtype=torch.uint8)
        skipped = -whole.data_ptr() % PAGE
        flat = whole[skipped : skipped + -(-end // PAGE) * PAGE]
        self.pinned = bool(pin and end and pin_memory(flat.data_ptr(), flat.numel()))
        if self.pinned:
            self._unpin = weakref.finalize(self, unpin_memory, flat.data_ptr())
            self._unpin.atexit = False
        else:
            flat.zero_()  # which takes the pages from the system, as pinning does
        if pin and end and not self.pinned:
            warn(f"{in_bytes(end)} of memory could not be pinned: copies of it go at a fraction of the bus's speed")
        self._tensors = {
            name: flat[begin : begin + size].view(self.shapes[name][1]).view(self.shapes[name][0])
            for name, (begin, size) in places.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def close(self) -> None:
        """Give the memory back; nothing may be on its way."""
        self._tensors = {}
        if self.pinned:
            self._unpin()


def pin_memory(address: int, size: int) -> bool:
    """Pin whole pages for every GPU; whether the system did."""
    done = int(torch.cuda.cudart().cudaHostRegister(address, size, PORTABLE)) == 0  # type: ignore[no-untyped-call]
    if not done:
        # The refusal would be raised by whatever is launched next: let that be this.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
    return done


def unpin_memory(address: int) -> None:
    """The inverse of `pin_memory`."""
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def pinned(batches: Iterator[Batch], warn: Warn) -> Iterator[Batch]:
    """The same batches in pinned memory; from the first that the system refuses on, in ordinary memory."""
    refused = False
    for batch in batches:
        ready = batch
        if not refused:
            try:
                ready = batch.pinned()
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    raise
                refused = True
                warn("no memory could be pinned for batches: they are copied to the GPU more slowly")
        yield ready


class Arrivals:
    """Brings microbatches to the device; to a GPU by a stream of its own, so that no copy waits for what is computed.

    The host runs ahead of a GPU, so a microbatch travels while the one before it is computed on. It runs ahead by no
    more than `AHEAD`, as each takes memory of the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        self._computed: deque[Any] = deque()
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def each(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Each batch on the device, once what is computed on the current stream may use it."""
        for batch in batches:
            yield self._brought(batch)
            if self._stream is not None:
                computed: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
                computed.record(torch.cuda.current_stream(self._device))
                self._computed.append(computed)

    def _brought(self, batch: Batch) -> Batch:
        if self._stream is None:
            return batch.to(self._device)
        while len(self._computed) >= AHEAD:
            self._computed.popleft().synchronize()
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device)
        computing.wait_stream(self._stream)
        for tensor in moved.tensors.values():
            if tensor.is_cuda:
                tensor.record_stream(computing)  # its memory is not given away while it is computed on
        return moved
