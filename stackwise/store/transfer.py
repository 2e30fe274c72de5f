"""Batches on a GPU, copied by a stream of their own while the last one is computed on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from stackwise.store.order import RowOrder, Rows
from stackwise.store.records import BoundaryInfo

if TYPE_CHECKING:
    import torch

Batch = tuple[Rows, "torch.Tensor"]

_AHEAD = 2


class RowReader(Protocol):
    """What batches are read by: a `BoundaryReader`."""

    info: BoundaryInfo

    def read(self, rows: Rows, out: torch.Tensor | None = None) -> torch.Tensor:
        """Activations of `rows`, into `out` where it is given."""
        ...

    def stream(self, order: RowOrder, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """Endless batches in the given order."""
        ...


def to_device(reader: RowReader, order: RowOrder, batch_size: int, start: int, device: torch.device) -> Iterator[Batch]:
    """`BoundaryReader.stream`, with the activations on `device`.

    On a CUDA device rows are read straight into pinned buffers; a copy stream moves them, `_AHEAD` batches before
    they are asked for. A pinned buffer is read into again only after its copy has ended, and the memory of a batch
    on the device is not given to another while the consumer's stream still uses it.
    """
    import torch

    if device.type != "cuda":
        for rows, x in reader.stream(order, batch_size, start):
            yield rows, x.to(device)
        return
    info = reader.info
    shape = (batch_size, info.seq_len, info.d_model)
    dtype: torch.dtype = getattr(torch, info.dtype)
    with torch.cuda.device(device):
        copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        pinned = [torch.empty(shape, dtype=dtype, pin_memory=True) for _ in range(_AHEAD + 1)]
        copied: list[Any] = [None] * len(pinned)
        ready: deque[tuple[Any, torch.Tensor, Any]] = deque()
        number = start
        while True:
            while len(ready) <= _AHEAD:
                slot = number % len(pinned)
                if copied[slot] is not None:
                    copied[slot].synchronize()
                rows = order.batch(number, batch_size)
                reader.read(rows, out=pinned[slot])
                with torch.cuda.stream(copying):
                    x = pinned[slot].to(device, non_blocking=True)
                    copied[slot] = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    copied[slot].record(copying)
                ready.append((rows, x, copied[slot]))
                number += 1
            rows, x, event = ready.popleft()
            current = torch.cuda.current_stream(device)
            current.wait_event(event)
            x.record_stream(current)
            yield rows, x
