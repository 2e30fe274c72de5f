"""How tensors travel between the host's memory, files and the device while the device computes.

Memory is lent from a ring of buffers, pinned for a GPU, each used again once the last tensor in it is gone. To and from
a GPU go streams of their own: a copy up is there when the thread that asked for it goes on, and one down waits for what
was computed until then, so the stream that computes waits for neither.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stackwise.training.pinned import PAGE, pin_memory, unpin_memory

Pin = Callable[[int, int], bool]  # makes so many bytes at an address ones that a GPU copies by itself; whether it could


class Buffers:
    """Host memory that is used again. What it holds, lent or idle, is never more than was lent at once.

    Args:
        pin: Pins a buffer where that is of use.
        unpin: The opposite, by address.
    """

    def __init__(self, pin: Pin | None = None, unpin: Callable[[int], object] | None = None) -> None:
        self._pin, self._unpin = pin, unpin
        self._lock = threading.Lock()
        self._returned: deque[np.ndarray] = deque()  # a collector may return one at any moment, so without the lock
        self._idle: list[np.ndarray] = []  # the one that waited longest first
        self._lent = 0
        self.most = 0
        """Bytes lent at once at most."""

    def lend(self, nbytes: int) -> Tensor:
        """Memory, uint8 [nbytes], that begins with a page; it comes back when no tensor uses it any more."""
        size = max(PAGE, -(-nbytes // PAGE) * PAGE)
        with self._lock:
            buffer = self._taken(size)
            self._lent += buffer.nbytes
            self.most = max(self.most, self._lent)
        memory = buffer[:nbytes]
        weakref.finalize(memory, self._returned.append, buffer).atexit = False
        return torch.from_numpy(memory)

    def like(self, tensor: Tensor) -> Tensor:
        """Memory for a tensor of this shape and dtype."""
        return self.lend(tensor.nbytes).view(tensor.dtype).view(tensor.shape)

    def _taken(self, size: int) -> np.ndarray:
        while self._returned:
            back = self._returned.popleft()
            self._lent -= back.nbytes
            self._idle.append(back)
        fitting = [at for at, one in enumerate(self._idle) if size <= one.nbytes <= size + size // 4]
        if fitting:
            return self._idle.pop(min(fitting, key=lambda at: self._idle[at].nbytes))
        most = max(self.most, self._lent + size)
        while self._idle and self._lent + sum(one.nbytes for one in self._idle) + size > most:
            self._idle.pop(0)
        region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            region.madvise(mmap.MADV_HUGEPAGE)
        buffer = np.frombuffer(region, np.uint8)
        if self._pin is not None and self._pin(buffer.ctypes.data, size) and self._unpin is not None:
            weakref.finalize(buffer, self._unpin, buffer.ctypes.data).atexit = False
        return buffer


class Lane:
    """The way to a device that has the host's memory: nothing is copied, and nothing waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers = self._buffers()

    def _buffers(self) -> Buffers:
        return Buffers()

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Inside, a thread copies to the device; at the end the copies are there."""
        yield

    def use(self, tensors: Iterable[Tensor]) -> None:
        """Called by the thread that computes, before it uses what another one has sent."""

    def mark(self) -> Any:
        """A moment: what the calling thread has had computed so far."""
        return None

    def down(self, tensors: Mapping[str, Tensor], mark: Any) -> dict[str, Tensor]:
        """Tensors as they are after a moment, in the host's memory, contiguous; there when this returns."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


class CudaLane(Lane):
    """The way to a GPU and back: two streams, and pinned memory."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._up: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._down: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def _buffers(self) -> Buffers:
        return Buffers(pin_memory, unpin_memory)

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """See `Lane.sending`."""
        with torch.cuda.stream(self._up):
            yield
            arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._up)
        arrived.synchronize()

    def use(self, tensors: Iterable[Tensor]) -> None:
        """See `Lane.use`: their memory is not given away while the stream that computes may read it."""
        computing = torch.cuda.current_stream(self.device)
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(computing)

    def mark(self) -> Any:
        """See `Lane.mark`."""
        computed: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        computed.record(torch.cuda.current_stream(self.device))
        return computed

    def down(self, tensors: Mapping[str, Tensor], mark: Any) -> dict[str, Tensor]:
        """See `Lane.down`; whoever calls holds the tensors until it returns."""
        landed: dict[str, Tensor] = {}
        with torch.cuda.stream(self._down):
            self._down.wait_event(mark)
            for name, tensor in tensors.items():
                landed[name] = tensor.detach()
                if tensor.is_cuda:
                    landed[name] = self.buffers.like(tensor).copy_(tensor.detach(), non_blocking=True)
            arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._down)
        arrived.synchronize()
        return landed


def lane_to(device: torch.device) -> Lane:
    """The way to a device."""
    return CudaLane(device) if device.type == "cuda" else Lane(device)


def seed_generator(device: torch.device, seed: int) -> None:
    """Seed what draws on a device, and on the CPU, to the numbers that `torch.manual_seed` gives.

    That one formats a stack trace for each kind of device that this process does not use: 0.1 ms a call and more.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def generator_state(device: torch.device) -> Tensor:
    """The state of the generator that draws on a device."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.get_rng_state()


def set_generator(device: torch.device, state: Tensor) -> None:
    """Let the generator that draws on a device go on from a state."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.set_rng_state(state)
