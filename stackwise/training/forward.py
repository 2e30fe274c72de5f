"""The forward-only pass that writes the boundary above a stage."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import torch

from stackwise.store import BoundaryWriter
from stackwise.training.feed import Feed, ahead
from stackwise.training.stage import StageModel


def forward_rows(seq_len: int) -> int:
    """Rows that go forward together. It shapes the arithmetic, so it follows from the sample's length alone."""
    return max(1, 8192 // seq_len)


@torch.no_grad()
def write_boundary(
    model: StageModel,
    feed: Feed,
    writer: BoundaryWriter,
    device: torch.device,
    *,
    progress: Callable[[int, int], None],
    stop: Callable[[], bool],
) -> bool:
    """Write every chunk that `writer` still lacks; reading, computing and writing overlap.

    Args:
        model: The stage, on `device`.
        feed: What enters the stage.
        writer: The boundary above it.
        device: Where `model` is.
        progress: Told the chunks written and the chunks in all.
        stop: Asked after each chunk; True ends early, and a later call goes on from there.

    Returns:
        Whether the boundary is complete.
    """
    model.eval()
    missing, total = list(writer.missing), writer.info.chunks
    ranges = [writer.chunk_rows_of(chunk) for chunk in missing]
    rows = forward_rows(feed.seq_len)
    finished = True
    with ahead(feed.sequential(ranges, rows), device) as batches, _ChunkWriter(writer) as out:
        source = iter(batches)
        for done, (chunk, (first, last)) in enumerate(zip(missing, ranges, strict=True)):
            if stop():
                finished = False
                break
            parts: list[torch.Tensor] = []
            for _ in range(first, last, rows):
                batch = next(source).to(device)
                with model.numerics(device):
                    parts.append(model.activations(batch))
            out.put(chunk, torch.cat(parts).cpu())
            progress(total - len(missing) + done + 1, total)
    if finished:
        writer.finish()
    return finished


class _ChunkWriter:
    """Writes chunks in a thread of its own, two at most waiting, so that fsync and compute overlap."""

    def __init__(self, writer: BoundaryWriter) -> None:
        self._writer = writer
        self._chunks: queue.Queue[tuple[int, torch.Tensor] | None] = queue.Queue(maxsize=2)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="boundary-writer", daemon=True)

    def __enter__(self) -> _ChunkWriter:
        self._thread.start()
        return self

    def put(self, chunk: int, x_RSD: torch.Tensor) -> None:
        self._raise()
        self._chunks.put((chunk, x_RSD))

    def __exit__(self, *exception: object) -> None:
        self._chunks.put(None)
        self._thread.join()
        if exception[0] is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        # After an error the queue is still emptied, so that `put` never waits for a thread that is gone.
        while (item := self._chunks.get()) is not None:
            if self._error is None:
                try:
                    self._writer.write_chunk(*item)
                except BaseException as error:
                    self._error = error
