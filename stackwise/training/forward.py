"""The forward-only pass: rows through frozen stages, and the boundary that they leave behind, whole or on demand.

On a GPU rows come up, are computed on, go down and are written all at once: batches lie ready pinned, results leave by
a copy stream of their own into pinned memory, and threads write what has arrived. Every queue between is bounded.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stackwise.batch import Batch
from stackwise.errors import UsageError
from stackwise.host import keep_freed_memory
from stackwise.store import BoundaryReader, BoundaryWriter, Codec, Prefetcher, RowOrder
from stackwise.training.feed import Feed, ahead
from stackwise.training.stage import StageModel

Rows = npt.NDArray[np.int64]

ON_THE_WAY = 2  # batches whose results may still be on their way from a GPU while the next is computed


def forward_rows(seq_len: int) -> int:
    """Rows that go forward together. It shapes the arithmetic, so it follows from the sample's length alone."""
    return max(1, 8192 // seq_len)


def pieces(first: int, last: int, seq_len: int) -> list[tuple[int, int]]:
    """The rows [first, last) of a chunk in the ranges that go forward together, each (first, row after the last)."""
    size = forward_rows(seq_len)
    return [(at, min(at + size, last)) for at in range(first, last, size)]


@dataclass(frozen=True)
class Pass:
    """How a forward-only pass went."""

    finished: bool
    seconds: float
    waited: float  # seconds of them in which it waited for rows to come in
    blocked: float  # seconds of them in which it waited for the disk to take chunks

    @property
    def wait_fraction(self) -> float:
        """Share of the time that the pass waited for rows to come in."""
        return self.waited / self.seconds if self.seconds else 0.0

    @property
    def blocked_fraction(self) -> float:
        """Share of the time that the pass waited for the disk to take chunks."""
        return self.blocked / self.seconds if self.seconds else 0.0


def pass_through(stages: Sequence[StageModel], batch: Batch, codec: Codec) -> torch.Tensor:
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
def _landed(
    run: Callable[[Batch], list[torch.Tensor]], batches: Iterator[Batch], codecs: Sequence[Codec], device: torch.device
) -> Generator[list[torch.Tensor]]:
    """For each batch what `run` makes of it, on the CPU; on a GPU while the next batches are computed.

    Args:
        run: From a batch on `device` to one tensor for each of `codecs`.
        batches: On the CPU; pinned, for a GPU.
        codecs: What the tensors will be stored with: for bf16 they are narrowed before they travel.
    """
    if device.type != "cuda":
        for batch in batches:
            yield [x_BSD.cpu() for x_BSD in run(batch.to(device))]
        return
    leaving: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    on_the_way: deque[tuple[list[torch.Tensor], Any]] = deque()
    for batch in batches:
        states = [
            x_BSD.to(torch.bfloat16) if codec.direct and codec.decoded == "bfloat16" else x_BSD
            for x_BSD, codec in zip(run(batch.to(device)), codecs, strict=True)
        ]
        leaving.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(leaving):
            landed = [torch.empty(x_BSD.shape, dtype=x_BSD.dtype, pin_memory=True) for x_BSD in states]
            for target, x_BSD in zip(landed, states, strict=True):
                target.copy_(x_BSD, non_blocking=True)
            arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(leaving)
        for x_BSD in states:
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


def outputs(
    stages: Sequence[StageModel], batches: Iterator[Batch], codec: Codec, device: torch.device
) -> Generator[torch.Tensor]:
    """For each batch what leaves the last stage, on the CPU, as it is to be stored with `codec` (see `_landed`).

    Args:
        stages: Frozen, in evaluation mode, on `device`.
        batches: On the CPU; pinned, for a GPU.
        codec: What the rows go through at each edge between two stages, too.
        device: Where `stages` are.
    """
    for (x_BSD,) in _landed(lambda batch: [pass_through(stages, batch, codec)], batches, [codec], device):
        yield x_BSD


def _each_output(stages: Sequence[StageModel], batch: Batch, device: torch.device) -> list[torch.Tensor]:
    """What leaves each of some stages, of which each takes what the one below it computed: nothing is rounded."""
    leaving = []
    for stage in stages:
        with stage.numerics(device):
            leaving.append(stage.activations(batch))
        batch = batch.above(leaving[-1])
    return leaving


@dataclass(frozen=True)
class Known:
    """Rows of a boundary that need not be computed: those from `first` on."""

    first: int
    read: Callable[[Rows], torch.Tensor]  # from their numbers [n] to activations [n, S, D] on the CPU


@dataclass(frozen=True)
class PassControl:
    """How whoever starts a long pass follows it, and ends it early.

    Args:
        progress: Called after each chunk with the chunks that are there and all of them.
        stop: Asked before each chunk; True ends the pass, and a later one goes on from there.
    """

    progress: Callable[[int, int], None] = lambda done, total: None
    stop: Callable[[], bool] = lambda: False


MakeOutputs = Callable[[Iterator[Batch], Codec, torch.device], Generator[torch.Tensor]]
"""For each batch what leaves some stages, on the CPU, as `outputs` gives it."""


def write_boundary(
    stages: Sequence[StageModel] | MakeOutputs,
    feed: Feed,
    writer: BoundaryWriter,
    device: torch.device,
    *,
    control: PassControl = PassControl(),
    spent: float | None = None,
    known: Known | None = None,
) -> Pass:
    """Write every chunk that `writer` still lacks; reading, copies, computing and writing overlap.

    Args:
        stages: The stages that the rows go through, lowest first, on `device`; they are left in evaluation mode. Or
            what makes their outputs.
        control: Who follows the pass, and may end it.
        spent: Seconds that the chunks which are there already took to compute; None: they took as long as these.
        known: Rows that go through no stage, as they are known; None: all do.

    Returns:
        Whether the boundary is complete, and how long the pass waited for what.
    """
    make: MakeOutputs = stages if callable(stages) else partial(outputs, [stage.eval() for stage in stages])

    def one(batches: Iterator[Batch]) -> Generator[list[torch.Tensor]]:
        return ([x_BSD] for x_BSD in make(batches, writer.info.codec_object, device))

    size = forward_rows(feed.seq_len)
    read = _ahead_by(feed, size, device)
    return _write(one, read, size, [writer], control, spent, known)


def write_each(
    stages: Sequence[StageModel],
    feed: Feed,
    writers: Sequence[BoundaryWriter],
    device: torch.device,
    *,
    batch_rows: int,
    control: PassControl = PassControl(),
) -> Pass:
    """As `write_boundary`, in one pass the boundary above each stage; a stage takes what the one below it computed.

    Args:
        stages: Frozen, on `device`, lowest first.
        feed: What enters the lowest.
        writers: The boundary above each of them, all with the same rows in a chunk.
        device: Where `stages` are.
        batch_rows: Rows that go forward together.
        control: Who follows the pass, and may end it.
    """
    for stage in stages:
        stage.eval()
    codecs = [writer.info.codec_object for writer in writers]

    def each(batches: Iterator[Batch]) -> Generator[list[torch.Tensor]]:
        return _landed(lambda batch: _each_output(stages, batch, device), batches, codecs, device)

    batches = _ahead_by(feed, batch_rows, device)
    return _write(each, batches, batch_rows, writers, control)


Ranges = Sequence[tuple[int, int]]
ReadAhead = Callable[[Ranges], Prefetcher[Batch]]


def _ahead_by(feed: Feed, batch_rows: int, device: torch.device) -> ReadAhead:
    return lambda ranges: ahead(feed.sequential(ranges, batch_rows), device)


def _write(
    make: Callable[[Iterator[Batch]], Generator[list[torch.Tensor]]],
    read: ReadAhead,
    batch_rows: int,
    writers: Sequence[BoundaryWriter],
    control: PassControl,
    spent: float | None = None,
    known: Known | None = None,
) -> Pass:
    """Write every chunk that one of `writers` lacks; for each batch `make` gives what each of them is to hold."""
    keep_freed_memory()
    lacking = [set(writer.missing) for writer in writers]
    missing, total = sorted(set().union(*lacking)), writers[0].info.chunks
    ranges = [writers[0].chunk_rows_of(chunk) for chunk in missing]
    until = writers[0].info.rows if known is None else known.first
    begun, blocked, finished = time.perf_counter(), 0.0, True
    with read([(first, min(last, until)) for first, last in ranges]) as batches:
        source = make(batches)
        for done, (chunk, (first, last)) in enumerate(zip(missing, ranges, strict=True)):
            if control.stop():
                finished = False
                break
            chunk_states = [next(source) for _ in range(first, min(last, until), batch_rows)]
            if known is not None and last > until:
                chunk_states.append([known.read(np.arange(max(first, until), last))] * len(writers))
            handed = time.perf_counter()
            for writer, lacks, x_BSDs in zip(writers, lacking, zip(*chunk_states, strict=True), strict=True):
                if chunk in lacks:
                    writer.submit(chunk, torch.cat(x_BSDs), copy=False)
            blocked += time.perf_counter() - handed
            control.progress(total - len(missing) + done + 1, total)
        source.close()
        waited = batches.waited
    handed = time.perf_counter()
    for writer in writers:
        if finished:
            writer.finish(None if spent is None else spent + handed - begun)
        else:
            writer.flush()
    now = time.perf_counter()
    return Pass(finished, now - begun, waited, blocked + now - handed)


class FilledBoundary:
    """The rows of one boundary, read where they are stored and computed where they are not.

    Whoever asks cannot tell the two apart: a chunk is computed in the same batches as the pass that would have written
    it, and goes through the codec at each stage's edge. Where the boundary is kept, a chunk is published as it is
    computed; so a stage can train on a boundary while it is being written.

    Rows are computed in *pieces*, the ranges that go forward together; where the boundary is kept, in whole chunks.
    Along an order the pieces of the window in hand and of the next are in memory, the latter computed bit by bit while
    the former is trained on.

    Args:
        below: What enters the lowest of `stages`: tokens, or a boundary that is stored.
        stages: The committed stages between `below` and this boundary, lowest first, on `device`: frozen, in evaluation
            mode, and not the modules that are being trained.
        codec: What the boundary is stored with, or would be.
        device: Where `stages` are. On a GPU they compute in a stream of their own.
        stored: A reader and a writer of it where it is kept; the caller closes both.

    Attributes:
        rows_computed: Rows that were computed so far, repeats counted.
        seconds: Seconds that took.
    """

    def __init__(
        self,
        below: Feed,
        stages: Sequence[StageModel],
        *,
        codec: Codec,
        chunk_rows: int,
        device: torch.device,
        stored: tuple[BoundaryReader, BoundaryWriter] | None = None,
    ) -> None:
        self._below, self._stages, self._codec, self._device = below, list(stages), codec, device
        self._rows, self._chunk_rows = below.rowset.rows, chunk_rows
        self._reader: BoundaryReader | None
        self._writer: BoundaryWriter | None
        self._reader, self._writer = stored or (None, None)
        self._lacking = np.ones(-(-self._rows // chunk_rows), dtype=bool)
        if self._writer is not None:
            self._lacking[:] = False
            self._lacking[self._writer.missing] = True
        self._pieces: dict[int, torch.Tensor] = {}
        self._kept: set[int] | None = None
        self._unflushed: set[int] = set()
        self._lock = threading.RLock()
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the stages' weights are still coming
        self.rows_computed, self.seconds = 0, 0.0

    def read(self, rows: npt.ArrayLike) -> torch.Tensor:
        """Activations [n, seq_len, d_model] of `rows`, of the codec's decoded dtype, on the CPU.

        Raises:
            UsageError: A row is out of range.
            ChunkDamage: A stored chunk, here or below, is not what was written.
            NoSpaceError: The disk is full; what was published stays.
        """
        rows_B = np.asarray(rows, np.int64)
        if len(rows_B) and (rows_B.min() < 0 or rows_B.max() >= self._rows):
            raise UsageError(f"the boundary has rows 0 to {self._rows - 1}")
        with self._lock:
            x_BSD = self._gathered(rows_B)
            if self._kept is None:
                self._pieces.clear()
            return x_BSD

    def stream(
        self, order: RowOrder, batch_size: int, start: int = 0, every: int = 1
    ) -> Iterator[tuple[Rows, torch.Tensor]]:
        """Endless batches in the given order, as `BoundaryReader.stream`; from a complete boundary by that itself."""
        if order.rows != self._rows:
            raise UsageError(f"the order is over {order.rows} rows, the boundary has {self._rows}")
        number, window_end, todo = start, -1, list[int]()
        if self._reader is not None:
            self._reader.expect(order)
        try:
            while True:
                if self._reader is not None and not self._lacking.any():
                    self._flush()
                    self._pieces.clear()
                    yield from self._reader.stream(order, batch_size, number, every)
                with self._lock:
                    window, end = order.window_rows(number * batch_size)
                    if end != window_end:
                        following, _ = order.window_rows(end)
                        todo, window_end = self._turn(window, following), end
                    rows_B = order.batch(number, batch_size)
                    x_BSD = self._gathered(rows_B)
                yield rows_B, x_BSD
                del x_BSD
                number += every
                left = max(1, -(-(window_end - number * batch_size) // (every * batch_size)) + 1)
                share = -(-len(todo) // left)
                with self._lock:
                    self._compute(todo[:share])
                todo = todo[share:]
        finally:
            self._kept = None
            self._pieces.clear()

    @property
    def rows_held(self) -> int:
        """Rows that are in memory now."""
        return sum(len(piece) for piece in self._pieces.values())

    def _turn(self, window: Rows, following: Rows) -> list[int]:
        """Let a new window begin: drop what neither it nor the one after it needs; the pieces that one still lacks."""
        next_firsts = dict.fromkeys(self._firsts(following).tolist())
        self._kept = {*self._firsts(window).tolist(), *next_firsts}
        self._pieces = {first: piece for first, piece in self._pieces.items() if first in self._kept}
        return [first for first in next_firsts if self._is_lacking(first)]

    def _firsts(self, rows: Rows) -> Rows:
        """For each row the first row of its piece."""
        chunk_firsts = rows // self._chunk_rows * self._chunk_rows
        size = forward_rows(self._below.seq_len)
        return chunk_firsts + (rows - chunk_firsts) // size * size

    def _is_lacking(self, first: int) -> bool:
        return first not in self._pieces and bool(self._lacking[first // self._chunk_rows])

    def _gathered(self, rows_B: Rows) -> torch.Tensor:
        firsts_B = self._firsts(rows_B)
        self._compute(list(dict.fromkeys(firsts_B.tolist())))
        stored_B = np.array([first not in self._pieces for first in firsts_B.tolist()], dtype=bool)
        if stored_B.any():
            assert self._reader is not None, "what is neither computed nor stored"
            if self._unflushed & set((rows_B[stored_B] // self._chunk_rows).tolist()):
                self._flush()
            if stored_B.all():
                return self._reader.read(rows_B)
        piece = self._pieces[int(firsts_B[~stored_B][0])]
        out = torch.empty((len(rows_B), *piece.shape[1:]), dtype=piece.dtype)
        if stored_B.any() and self._reader is not None:
            out[torch.from_numpy(np.flatnonzero(stored_B))] = self._reader.read(rows_B[stored_B])
        for first in dict.fromkeys(firsts_B[~stored_B].tolist()):
            places = np.flatnonzero(firsts_B == first)
            out[torch.from_numpy(places)] = self._pieces[first][torch.from_numpy(rows_B[places] - first)]
        return out

    def _compute(self, firsts: Sequence[int]) -> None:
        """Compute the pieces of these that are neither here nor stored; publish their chunks where they are kept."""
        needed = [first for first in firsts if self._is_lacking(first)]
        if not needed:
            return
        began = time.perf_counter()
        if self._writer is None:
            spans = [piece for first in needed for piece in self._pieces_of(first // self._chunk_rows, {first})]
        else:
            spans = [
                p for chunk in dict.fromkeys(n // self._chunk_rows for n in needed) for p in self._pieces_of(chunk)
            ]
        starts = {*needed, *(self._kept or ())}
        stream = torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext()
        parts: list[torch.Tensor] = []
        with stream:
            computed = outputs(self._stages, self._batches(spans), self._codec, self._device)
            for (first, last), x_RSD in zip(spans, computed, strict=True):
                if self._writer is None:
                    self._pieces[first] = self._codec.round_trip(x_RSD)
                    continue
                parts.append(x_RSD)
                if last == self._rows or last % self._chunk_rows == 0:
                    self._publish(first // self._chunk_rows, torch.cat(parts), starts)
                    parts = []
        self.rows_computed += sum(last - first for first, last in spans)
        self.seconds += time.perf_counter() - began

    def _pieces_of(self, chunk: int, only: set[int] | None = None) -> list[tuple[int, int]]:
        """The pieces of a chunk, each (first row, row after the last); of those that begin at `only` alone."""
        first = chunk * self._chunk_rows
        of_chunk = pieces(first, min(first + self._chunk_rows, self._rows), self._below.seq_len)
        return [piece for piece in of_chunk if only is None or piece[0] in only]

    def _batches(self, spans: list[tuple[int, int]]) -> Iterator[Batch]:
        below = self._below
        for first, last in spans:
            batch = below.batch(np.arange(first, last))
            yield batch.pinned() if self._device.type == "cuda" else batch

    def _publish(self, chunk: int, x_RSD: torch.Tensor, starts: set[int]) -> None:
        """Hand a computed chunk to the writer, and keep what of it is wanted soon."""
        assert self._writer is not None
        self._writer.submit(chunk, x_RSD, copy=False)
        self._lacking[chunk] = False
        self._unflushed.add(chunk)
        stored, start = self._codec.round_trip(x_RSD), chunk * self._chunk_rows
        spans = self._pieces_of(chunk)
        whole = all(first in starts for first, _ in spans)
        for first, last in spans:
            if first in starts:
                piece = stored[first - start : last - start]
                # A view would keep all of the chunk in memory.
                self._pieces[first] = piece if whole else piece.clone()

    def _flush(self) -> None:
        if self._writer is not None and self._unflushed:
            self._writer.flush()
            self._unflushed.clear()
