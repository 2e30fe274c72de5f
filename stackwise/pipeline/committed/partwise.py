"""All rows through a pretrained model, one group of its parts in memory at a time."""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from stackwise.batch import TOKENS
from stackwise.config import StackWiseConfig
from stackwise.errors import InterruptedRun
from stackwise.identity import Hex, content_id
from stackwise.objectives import CLMObjective, RuntimeObjective
from stackwise.pipeline.device import memory, resolve_device
from stackwise.pipeline.job import Source
from stackwise.pipeline.parts import make_block, make_front
from stackwise.pipeline.recipe import lossless_codec
from stackwise.pipeline.schedule import FRONT, block_part
from stackwise.pretrained.checkpoint import Checkpoint
from stackwise.store import ActivationStore, BoundaryInfo, BoundaryWriter, codec_named, default_chunk_rows
from stackwise.store.dataset import BoundaryDataset, put_tokens
from stackwise.training.feed import Feed, RowSource
from stackwise.training.forward import PassControl, write_each
from stackwise.training.stage import StageModel

SHARE = 0.5
"""Of the memory that is free, how much the weights of a group may take."""


class Pass(TypedDict):
    """All rows through neighbouring parts."""

    trunks: list[Hex]
    """By depth, what computed the hidden states there."""
    start: Hex | None
    """The boundary that rows come from; None: tokens."""
    first: int
    """Its depth; -1: tokens."""
    edges: list[tuple[int, str, int]]
    """What is written: its depth, codec and rows of a chunk, of each boundary."""


@dataclass(frozen=True)
class Progress:
    """How far a capture is.

    Args:
        phase: What is done now, in words.
        done: How much of it.
        total: How much there is, where that is known.
        tokens: Tokens that each of these stands for; 0: they are bytes of data that is prepared.
    """

    phase: str
    done: int
    total: int | None
    tokens: int = 0


@dataclass(frozen=True)
class Captured:
    """What is in the store after a capture.

    Args:
        store: The store's directory.
        boundaries: By depth, the boundary that holds its hidden states.
        tokens: Tokens in the rows.
        computed: Tokens that were computed by this call, through all parts; 0: everything was there.
        seconds: How long that took.
    """

    store: Path
    boundaries: dict[int, BoundaryInfo]
    tokens: int
    computed: float
    seconds: float

    def dataset(self, at: int, batch_size: int, *, seed: int = 0, batches: int | None = None) -> BoundaryDataset:
        """The hidden states at a depth in shuffled batches, tokens beside them (see `ActivationStore.dataset`)."""
        with ActivationStore(self.store, create=False) as store:
            return store.dataset(self.boundaries[at].id, batch_size, seed=seed, batches=batches)

    def plain(self) -> dict[str, Any]:
        """As `stackwise capture --json` prints it."""
        keys = ("id", "rows", "shape", "codec", "logical_bytes", "disk_bytes")
        boundaries = {at: info.as_dict() for at, info in self.boundaries.items()}
        return {
            "store": str(self.store),
            "boundaries": [{"at": at} | {key: about[key] for key in keys} for at, about in boundaries.items()],
            "tokens": self.tokens,
            "tokens_per_second": self.computed / self.seconds if self.computed else 0.0,
        }


@dataclass
class PartwiseCapture:
    """One capture: what it reads, what it writes, and how far it is."""

    checkpoint: Checkpoint
    config: StackWiseConfig
    store: ActivationStore
    feed: Feed
    trunks: list[Hex]
    batch_rows: int
    report: Callable[[Progress], None]
    stop: Callable[[], bool]
    memory: int | None = None
    objective: RuntimeObjective | None = None
    """What is shown of each row, and how attention looks; None: the tokens, in the model's own direction."""
    between: set[Hex] = field(default_factory=set)
    """Boundaries that are there for this capture alone."""
    spread: Callable[[Pass, Callable[[], bool]], None] | None = None
    """What has a pass computed elsewhere; None: it is computed here."""

    def __post_init__(self) -> None:
        self.device = resolve_device(self.config.device)
        self.codec = self.config.store.codec or "bf16"
        self.exact = lossless_codec(self.config.precision)
        self.computed, self.seconds = 0.0, 0.0

    def run(self, depths: list[int]) -> Captured:
        """Write what is missing, pass by pass."""
        rows, seq_len = self.feed.rowset.rows, self.feed.seq_len
        beside = put_tokens(self.store, self.feed.rowset.id, seq_len, self.feed.sources[TOKENS].read)
        with contextlib.ExitStack() as leases:
            # Held from the first, so that `cache gc` in another process leaves what is being written.
            writers = {depth: leases.enter_context(self._writer(depth, self.codec)) for depth in depths}
            ids = sorted({beside, *(writer.info.id for writer in writers.values())})
            self.store.register_run(f"capture {content_id('capture', ids)}", recipes=[], boundaries=ids)
            while missing := [depth for depth in depths if writers[depth].info.state != "complete"]:
                self._pass(missing, writers)
            infos = {depth: writer.info for depth, writer in writers.items()}
        used = {name for run in self.store.runs().values() for name in run["boundaries"]}
        for name in self.between - used:  # another capture may have begun one of them for itself
            self.store.drop(name)
        return Captured(self.store.path, infos, rows * seq_len, self.computed * seq_len, self.seconds)

    def _pass(self, missing: list[int], writers: dict[int, BoundaryWriter]) -> None:
        """All rows through one group of parts, from the highest depth that is there in full."""
        start, chunk_rows = self._below(missing[0]), writers[missing[0]].info.chunk_rows
        first = -1 if start is None else start[0]
        end = self._last_that_fits(first, missing[-1])
        # A boundary that a run began is chunked its own way: its rows go forward in other batches.
        taps = [d for d in missing if d <= end and writers[d].info.chunk_rows == chunk_rows]
        rest = [d for d in missing if d > end]
        goes_on = rest and (self._below(rest[0]) or (-1,))[0] < end
        end = end if goes_on or not taps else taps[-1]
        edges = [(depth, writers[depth]) for depth in taps]
        with contextlib.ExitStack() as stack:
            if goes_on and not (taps and taps[-1] == end and self._is_exact(self.codec)):
                edges.append((end, stack.enter_context(self._between(end, chunk_rows))))
            if self.spread is None:
                self._compute(edges, None if start is None else start[1], first)
                return
            self._spread_out(edges, None if start is None else start[1], first)

    def _spread_out(self, edges: Sequence[tuple[int, BoundaryWriter]], start: Hex | None, first: int) -> None:
        """Have a pass computed elsewhere, and finish what it wrote."""
        assert self.spread is not None
        writers, end = [writer for _, writer in edges], edges[-1][0]
        left, begun = self._left(writers), time.perf_counter()

        def look() -> bool:
            self._report(writers, first, end)
            return self.stop()

        edges_by_depth = [(depth, writer.info.codec, writer.info.chunk_rows) for depth, writer in edges]
        self.spread({"trunks": self.trunks, "start": start, "edges": edges_by_depth, "first": first}, look)
        check_stop(self.stop)
        for writer in writers:
            writer.finish()
        self._count(left, writers[0].info.chunk_rows, begun, (end - first) / len(self.trunks))

    def write(
        self, share: tuple[int, int], start: Hex | None, edges: Sequence[tuple[int, str, int]], first: int
    ) -> None:
        """Write a share of a pass's chunks: see `write_share`."""
        with contextlib.ExitStack() as stack:
            writers = [
                (depth, stack.enter_context(self._writer(depth, codec, chunk_rows)))
                for depth, codec, chunk_rows in edges
            ]
            for _, writer in writers:
                writer.share = share
            self._compute(writers, start, first)

    def _compute(self, edges: Sequence[tuple[int, BoundaryWriter]], start: Hex | None, first: int) -> None:
        """Rows go from a boundary (None: tokens), at depth `first`, to those above it."""
        with contextlib.ExitStack() as stack:
            feed = self.feed
            if start is not None:
                reader = stack.enter_context(self.store.reader(start))
                feed = feed.above(RowSource(reader.info.id, reader.read, reader.stream))
            stages = [self._stage(low, high) for low, high in itertools.pairwise([first, *(d for d, _ in edges)])]
            self._write(stages, feed, [writer for _, writer in edges], first, edges[-1][0])

    def _write(self, stages: list[StageModel], feed: Feed, writers: list[BoundaryWriter], first: int, end: int) -> None:
        self._report(writers, first, end)
        left, begun = self._left(writers), time.perf_counter()
        control = PassControl(lambda done, total: self._report(writers, first, end, total - done), self.stop)
        done = write_each(stages, feed, writers, self.device, batch_rows=self.batch_rows, control=control)
        if not done.finished:
            check_stop(lambda: True)
        self._count(left, writers[0].info.chunk_rows, begun, (end - first) / len(self.trunks))

    def _left(self, writers: Sequence[BoundaryWriter]) -> int:
        """Chunks that one of them lacks."""
        return len(set().union(*(writer.missing for writer in writers)))

    def _report(self, writers: Sequence[BoundaryWriter], first: int, end: int, left: int | None = None) -> None:
        """Report how far a pass is, by the chunks that are left."""
        info = writers[0].info
        blocks = f"blocks {max(0, first)} to {end - 1}" if end else "the embedding"
        done = info.chunks - (self._left(writers) if left is None else left)
        rows = self.feed.rowset.rows
        self.report(Progress(blocks, min(rows, done * info.chunk_rows), rows, self.feed.seq_len))

    def _count(self, chunks: int, chunk_rows: int, begun: float, share: float) -> None:
        """Note what was computed of a pass that lacked so many chunks, a share of all parts, and how long it took."""
        self.seconds += time.perf_counter() - begun
        self.computed += min(self.feed.rowset.rows, chunks * chunk_rows) * share

    def _stage(self, low: int, high: int) -> StageModel:
        """The parts above depth `low` up to depth `high`; depth -1 is the tokens."""
        about, front = self.checkpoint.description, None
        if low < 0:
            front = make_front(self.config, about.vocab_size, self._source(FRONT))
        parts = [block_part(index) for index in range(max(0, low), high)]
        blocks = [make_block(self.config, part, {part: self._source(part)}).to(self.device) for part in parts]
        objective = self.objective
        if objective is None:
            objective = CLMObjective()
            objective.causal = about.causal  # what it shows is the tokens themselves, either way
        stage = StageModel(front, blocks, None, objective, self.config.precision)
        return stage.requires_grad_(False).eval().to(self.device)

    def _source(self, part: str) -> Source:
        names = self.checkpoint.names(part)
        return Source(str(self.checkpoint.directory), self.checkpoint.digest(part), names=names)

    def _last_that_fits(self, first: int, last: int) -> int:
        """The depth up to which parts above depth `first` fit into memory together; one part always does.

        Where an earlier call ended a group, so does this one: what it wrote there is of use.
        """
        model = self.config.model
        gc.collect()  # the group before this one
        limit = self.memory or int(memory(self.device).room * SHARE)
        block, end = 4 * max(model.at(place).block_parameters for place in range(model.n_blocks)), first + 1
        if first < 0:
            limit -= 4 * self.checkpoint.description.vocab_size * model.d_model
        end = min(last, max(end, max(0, first) + max(0, limit) // block))
        begun = [d for d in range(first + 1, end) if (info := self._found(d, self.exact)) and info.state == "writing"]
        return max(begun, default=end)

    def _below(self, depth: int) -> tuple[int, Hex] | None:
        """The highest depth up to `depth` whose exact hidden states are all there; None: the tokens."""
        codecs = {self.exact, "fp32"} | ({self.codec} if self._is_exact(self.codec) else set())
        for below in range(depth, -1, -1):
            for codec in codecs:
                if (info := self._found(below, codec)) is not None and info.state == "complete":
                    return below, info.id
        return None

    def _is_exact(self, codec: str) -> bool:
        """Whether a codec keeps what is computed, bit for bit."""
        kept = codec_named(codec)
        return kept.lossless and kept.decoded in ("float32", codec_named(self.exact).decoded)

    def _found(self, depth: int, codec: str) -> BoundaryInfo | None:
        return self.store.find(trunk=self.trunks[depth], rowset=self.feed.rowset.id, codec=codec)

    def _writer(self, depth: int, codec: str, chunk_rows: int | None = None) -> BoundaryWriter:
        seq_len, d_model = self.feed.seq_len, self.config.model.d_model
        begun = self._found(depth, codec)
        if chunk_rows is None:
            rows = self.feed.rowset.rows
            # By the size in bf16 whatever the codec is, and in whole batches: rows are batched alike in every pass.
            few = default_chunk_rows(seq_len, d_model, 2, rows)
            chunk_rows = min(rows, -(-few // self.batch_rows) * self.batch_rows)
        return self.store.writer(
            trunk=self.trunks[depth],
            rowset=self.feed.rowset.id,
            depth=depth,
            seq_len=seq_len,
            d_model=d_model,
            codec=codec,
            chunk_rows=chunk_rows if begun is None else begun.chunk_rows,
            attributes={"blocks_below": depth},
        )

    def _between(self, depth: int, chunk_rows: int) -> BoundaryWriter:
        """A writer of what the next group reads, which is dropped in the end."""
        begun = self._found(depth, self.exact)
        if begun is not None and begun.chunk_rows != chunk_rows:
            self.store.drop(begun.id)
        writer = self._writer(depth, self.exact, chunk_rows)
        self.between.add(writer.info.id)
        return writer


def check_stop(stop: Callable[[], bool]) -> None:
    """Raises InterruptedRun: the capture was asked to end."""
    if stop():
        raise InterruptedRun("interrupted; what was captured is saved", hint="the same command goes on from there")
