"""The forward-only pass: rows through frozen stages, and the boundary that they leave behind.

On a GPU rows come up, are computed on, go down and are written all at once: batches lie ready pinned, results leave by
a copy stream of their own into pinned memory, and threads write what has arrived. Every queue between is bounded.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from stackwise.batch import Batch
from stackwise.store import BoundaryWriter, Codec
from stackwise.training.feed import Feed, ahead
from stackwise.training.stage import StageModel

ON_THE_WAY = 2
"""Batches whose results may still be on their way from a GPU while the next is computed."""


def forward_rows(seq_len: int) -> int:
    """Rows that go forward together. It shapes the arithmetic, so it follows from the sample's length alone."""
    return max(1, 8192 // seq_len)


def pieces(first: int, last: int, seq_len: int) -> list[tuple[int, int]]:
    """The rows [first, last) of a chunk in the ranges that go forward together, each (first, row after the last)."""
    size = forward_rows(seq_len)
    return [(at, min(at + size, last)) for at in range(first, last, size)]


@dataclass(frozen=True)
class Pass:
    """How a forward-only pass went.

    Args:
        finished: Whether the boundary is complete.
        seconds: How long the pass took.
        waited: Seconds of them in which it waited for rows to come in.
        blocked: Seconds of them in which it waited for the disk to take chunks.
    """

    finished: bool
    seconds: float
    waited: float
    blocked: float

    @property
    def wait_fraction(self) -> float:
        """Share of the time that the pass waited for rows to come in."""
        return self.waited / self.seconds if self.seconds else 0.0

    @property
    def blocked_fraction(self) -> float:
        """Share of the time that the pass waited for the disk to take chunks."""
        return self.blocked / self.seconds if self.seconds else 0.0


def through(stages: Sequence[StageModel], batch: Batch, codec: Codec) -> torch.Tensor:
    """The activations [B, S, D] that leave the last of some frozen stages, on their device.

    At each edge between two of them the rows go through `codec`, as if they had been stored and read again.
    """
    device = batch.tokens_BS.device
    for stage in stages[:-1]:
        with stage.numerics(device):
            x_BSD = stage.activations(batch)
        batch = batch.above(codec.round_trip(x_BSD).to(device))
    with stages[-1].numerics(device):
        return stages[-1].activations(batch)


@torch.no_grad()
def outputs(
    stages: Sequence[StageModel], batches: Iterator[Batch], codec: Codec, device: torch.device
) -> Generator[torch.Tensor]:
    """For each batch what leaves the last stage, on the CPU; on a GPU while the next batches are computed.

    Args:
        stages: Frozen, in evaluation mode, on `device`.
        batches: On the CPU; pinned, for a GPU.
        codec: What the rows will be stored with: bf16 is narrowed before it travels.
        device: Where `stages` are.
    """
    if device.type != "cuda":
        for batch in batches:
            yield through(stages, batch.to(device), codec).cpu()
        return
    leaving: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    on_the_way: deque[tuple[torch.Tensor, Any]] = deque()
    for batch in batches:
        x_BSD = through(stages, batch.to(device), codec)
        if codec.base == "bf16":
            x_BSD = x_BSD.to(torch.bfloat16)
        leaving.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(leaving):
            landed = torch.empty(x_BSD.shape, dtype=x_BSD.dtype, pin_memory=True)
            landed.copy_(x_BSD, non_blocking=True)
            arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(leaving)
        x_BSD.record_stream(leaving)  # its memory is not given away while it travels
        on_the_way.append((landed, arrived))
        if len(on_the_way) > ON_THE_WAY:
            landed, arrived = on_the_way.popleft()
            arrived.synchronize()
            yield landed
    while on_the_way:
        landed, arrived = on_the_way.popleft()
        arrived.synchronize()
        yield landed


Outputs = Callable[[Iterator[Batch], Codec, torch.device], Generator[torch.Tensor]]
"""For each batch what leaves some stages, on the CPU, as `outputs` gives it."""


def write_boundary(
    stages: Sequence[StageModel] | Outputs,
    feed: Feed,
    writer: BoundaryWriter,
    device: torch.device,
    *,
    progress: Callable[[int, int], None],
    stop: Callable[[], bool],
    spent: float | None = None,
) -> Pass:
    """Write every chunk that `writer` still lacks; reading, copies, computing and writing overlap.

    Args:
        stages: The stages that the rows go through, lowest first, on `device`; they are left in evaluation mode. Or
            what makes their outputs.
        feed: What enters the lowest.
        writer: The boundary above the highest.
        device: Where `stages` are.
        progress: Told the chunks handed to the writer and the chunks in all.
        stop: Asked before each chunk; True ends early, and a later call goes on from there.
        spent: Seconds that the chunks which are there already took to compute; None: they took as long as these.

    Returns:
        Whether the boundary is complete, and how long the pass waited for what.
    """
    make: Outputs = stages if callable(stages) else partial(outputs, [stage.eval() for stage in stages])
    missing, total = list(writer.missing), writer.info.chunks
    ranges = [writer.chunk_rows_of(chunk) for chunk in missing]
    begun, blocked, finished = time.perf_counter(), 0.0, True
    with ahead(feed.sequential(ranges, forward_rows(feed.seq_len)), device) as batches:
        source = make(batches, writer.info.codec_object, device)
        for done, (chunk, (first, last)) in enumerate(zip(missing, ranges, strict=True)):
            if stop():
                finished = False
                break
            x_RSD = torch.cat([next(source) for _ in pieces(first, last, feed.seq_len)])
            handed = time.perf_counter()
            writer.submit(chunk, x_RSD, copy=False)
            blocked += time.perf_counter() - handed
            progress(total - len(missing) + done + 1, total)
        source.close()
        waited = batches.waited
    handed = time.perf_counter()
    if finished:
        writer.finish(None if spent is None else spent + handed - begun)
    else:
        writer.flush()
    now = time.perf_counter()
    return Pass(finished, now - begun, waited, blocked + now - handed)
