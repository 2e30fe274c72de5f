"""Hidden states of a pretrained model at chosen depths, written into a store with few parts in memory at a time.

A hidden state is a boundary like any other: its trunk is the front and the blocks below it, named by their weights'
digests and by what a forward pass computes. So it is found again wherever the same weights saw the same rows, and every
chunk that was published is there for good. All rows go through one group of parts before the next group is loaded;
between two groups they wait in a boundary too, of exactly the numbers that were computed, which is dropped in the end.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from stackwise.batch import TOKENS
from stackwise.config import StackWiseConfig
from stackwise.config.loading import build
from stackwise.data import Split, is_prepared, prepare, require_samples
from stackwise.durable import FileLock
from stackwise.errors import InterruptedRun, UsageError
from stackwise.files import expanded
from stackwise.identity import Hex, content_id
from stackwise.objectives import CLMObjective, RuntimeObjective
from stackwise.pipeline.device import describe, memory, resolve_device
from stackwise.pipeline.job import Source
from stackwise.pipeline.parts import make_block, make_front
from stackwise.pipeline.recipe import LOSSLESS, forward_specification, lossless_codec, trunk_id
from stackwise.pipeline.rows import choose_samples, put_rows
from stackwise.pipeline.schedule import FRONT, block_part
from stackwise.pretrained.checkpoint import Checkpoint
from stackwise.store import ActivationStore, BoundaryInfo, BoundaryWriter, codec_named, default_chunk_rows
from stackwise.store.dataset import BoundaryDataset, put_tokens
from stackwise.training.feed import Feed, RowSource
from stackwise.training.forward import PassControl, forward_rows, write_each
from stackwise.training.stage import StageModel

SEQ_LEN = 512
"""Tokens of a row where nothing says otherwise, or the most that the model takes."""

SHARE = 0.5
"""Of the memory that is free, how much the weights of a group may take."""


class Options(TypedDict, total=False):
    """How hidden states are captured; all of it may be left out."""

    codec: str
    """Their codec, `bf16` by default."""
    dtype: str
    """What is computed in: auto (fp32 on a CPU), fp32, bf16, fp16."""
    seq_len: int
    """Tokens of a row; by default 512, or the most that the model takes."""
    batch_size: int
    """Rows that go forward together; by default about 8,192 tokens. It shapes the rounding, so it is in the ids."""
    rows: int
    """At most so many rows, drawn at random; by default all there are."""
    device: str
    """Where to compute: auto, cpu, mps, cuda, cuda:N."""
    memory: int
    """Bytes that the weights of parts may take at once, if that is not less than the largest part."""


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
class Request:
    """A pass of a capture, for another process: where it reads and writes, the capture's options, and the pass."""

    model: str
    data: list[str]
    store: str
    options: Options
    through: Pass


Spread = Callable[[Request, Callable[[], bool]], None]
"""Has a pass computed by `write_share`, in shares that are all of it, and returns when they are there. It calls the
second about once a second; True: end, what is published stays."""


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


def capture(
    model: Path | str,
    data: Sequence[Path | str],
    *,
    at: Iterable[int],
    store: Path | str,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
    spread: Spread | None = None,
    **options: Unpack[Options],
) -> Captured:
    """Write the hidden states of a pretrained model into a store, or find them there.

    Published chunks survive kill -9; the same call goes on from them. Depth K is what leaves block K-1, as in
    `hidden_states[K]` of `transformers` (which puts the last one through the final norm); 0 is the embedding.

    Args:
        model: A checkpoint of Hugging Face's layout, or a StackWise export.
        data: Files and folders of text, or of rows of tokens; or one prepared data set, whose training side is taken.
        at: Depths, from 0 to the number of blocks.
        store: The store's directory; made where there is none.
        progress: Told how far it is.
        stop: Asked before each chunk; True ends early.
        spread: What has passes computed elsewhere, shares of their chunks at once; None: here.
        options: See `Options`.

    Raises:
        NotFound: There is no checkpoint, or no such data.
        UsageError: A depth that the model has not, a codec that is not known, data or a checkpoint that cannot be used.
        InterruptedRun: `stop` said so; what is published stays.
        BusyError: Another process captures the same.
        NoSpaceError: The disk is full; what is published stays.
    """
    for name in ("seq_len", "batch_size", "rows"):
        number = options.get(name, 1)
        if not isinstance(number, int) or number < 1:
            raise UsageError(f"training.{name} is {number}, not 1 or more")
    if (dtype := options.get("dtype", "auto")) not in ("auto", *LOSSLESS):
        raise UsageError(f"--dtype: {dtype} is not one of auto, {', '.join(LOSSLESS)}")
    halt = stop or (lambda: False)
    checkpoint = Checkpoint(expanded(str(model)))
    depths = _checked_depths(at, checkpoint.description.n_blocks)
    with _opened(checkpoint, data, store, progress or (lambda _: None), halt, options) as work:
        digests = list[Hex]()
        for part in (FRONT, *map(block_part, range(depths[-1]))):
            _check(halt)
            digests.append(checkpoint.digest(part))
            work.report(Progress("reading weights", len(digests), depths[-1] + 1))
        forward = _forward(checkpoint, work.config, work.batch_rows)
        work.trunks = [trunk_id(forward, digests[: depth + 1], {}) for depth in range(depths[-1] + 1)]
        where = work.store.path
        lock = where / "locks" / f"work-{content_id('capture', [digests[0], work.feed.rowset.id])}.lock"
        with FileLock(lock, f"a capture into {where}"):
            if spread is not None:
                paths = [str(expanded(str(path)).absolute()) for path in data]
                place = str(checkpoint.directory.absolute()), paths, str(where.absolute())
                work.spread = lambda through, look: spread(Request(*place, options, through), look)
            return work.run(depths)


def write_share(request: Request, share: tuple[int, int]) -> None:
    """Write a share of the chunks of a pass, as `capture` asks for it: the k-th of n, by (k, n).

    Raises:
        StackWiseError: As `capture`; what is published stays, and the same call goes on.
    """
    checkpoint, through = Checkpoint(Path(request.model)), request.through
    with _opened(checkpoint, request.data, request.store, lambda _: None, lambda: False, request.options) as work:
        work.trunks = through["trunks"]
        work.write(share, through["start"], through["edges"], through["first"])


@contextlib.contextmanager
def _opened(
    checkpoint: Checkpoint,
    data: Sequence[Path | str],
    store: Path | str,
    report: Callable[[Progress], None],
    stop: Callable[[], bool],
    options: Options,
) -> Iterator[PartwiseCapture]:
    """A capture that has opened what it reads and writes, and knows of no trunk yet."""
    codec_named(options.get("codec", "bf16"))
    config = _configuration(checkpoint, data, options)
    split = _samples(checkpoint, config, report, stop)
    batch_rows = options.get("batch_size") or forward_rows(config.training.seq_len)
    with ActivationStore(expanded(str(store))) as opened:
        rowset, _ = put_rows(config, split, opened, 0)
        feed = Feed.stored(
            opened, opened.rowset(rowset), split, choose_samples(config, split, 0), config.training.seq_len
        )
        yield PartwiseCapture(checkpoint, config, opened, feed, [], batch_rows, report, stop, options.get("memory"))


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
        _check(self.stop)
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
            _check(lambda: True)
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


def _check(stop: Callable[[], bool]) -> None:
    if stop():
        raise InterruptedRun("interrupted; what was captured is saved", hint="the same command goes on from there")


def _checked_depths(at: Iterable[int], n_blocks: int) -> list[int]:
    depths = sorted(set(at))
    wrong = [depth for depth in depths if isinstance(depth, bool) or not 0 <= depth <= n_blocks]
    if wrong or not depths:
        fault = f"the model has no depth {wrong[0]}" if wrong else "no depth is named"
        raise UsageError(f"--at: {fault}", hint=f"depths go from 0, the embedding, to {n_blocks}, above the last block")
    return depths


def _configuration(checkpoint: Checkpoint, data: Sequence[Path | str], options: Options) -> StackWiseConfig:
    """What a run over this model and these data would be configured as: its rows and its ids are then the same."""
    about = checkpoint.description
    seq_len = options.get("seq_len") or min(SEQ_LEN, about.max_seq_len)
    if seq_len > about.max_seq_len:
        raise UsageError(f"training.seq_len: the model takes at most {about.max_seq_len} tokens, not {seq_len}")
    training = {
        "objective": "clm",
        "seq_len": seq_len,
        "rows": options.get("rows"),
    }
    tokenizer = checkpoint.tokenizer_json
    values = {
        "model": about.model,
        "training": training,
        "data": {"paths": [str(path) for path in data]} | ({} if tokenizer is None else {"tokenizer": str(tokenizer)}),
        "store": {"codec": options.get("codec", "bf16")},
        "precision": options.get("dtype", "auto"),
        "device": options.get("device", "auto"),
    }
    config = build(StackWiseConfig, values, source="capture")
    if config.precision == "auto":
        config.precision = describe(resolve_device(config.device))["precision"]
    return config


def _samples(
    checkpoint: Checkpoint, config: StackWiseConfig, report: Callable[[Progress], None], stop: Callable[[], bool]
) -> Split:
    """The samples of the data: of text all there are, of a prepared data set those to train on.

    Raises:
        UsageError: There is no tokenizer for text, ids that the model does not know, or less than one sample.
    """

    def progress(phase: str, done: int, total: int | None) -> None:
        _check(stop)
        report(Progress(phase, done, total))

    is_ready, known = any(map(is_prepared, map(expanded, config.data.paths))), checkpoint.tokenizer_json is not None
    if not known and not is_ready:
        raise UsageError(
            f"{checkpoint.directory} has no tokenizer.json to make tokens of text",
            hint="put one there, or name a prepared data set (`stackwise data prepare --tokenizer FILE`)",
        )
    prepared, _ = prepare(config.data, progress=progress, all_held_out=known)
    split = prepared.train if is_ready else prepared.held_out
    used = np.flatnonzero(split.counts)
    if len(used) and used[-1] >= checkpoint.description.vocab_size:
        raise UsageError(
            f"data.paths: the data has the id {used[-1]}, the model knows {checkpoint.description.vocab_size}",
            hint="prepare it with the tokenizer of the model",
        )
    require_samples(split, config.training.seq_len, "the data")
    return split


def _forward(checkpoint: Checkpoint, config: StackWiseConfig, batch_rows: int) -> dict[str, Any]:
    """What a forward pass computes beside its weights. Of a causal model it is that of a run from this checkpoint."""
    forward = forward_specification(config, checkpoint.description.vocab_size, 0, "")
    forward["training"] = {"objective": forward["training"]["objective"] | {"causal": checkpoint.description.causal}}
    usual = batch_rows == forward_rows(config.training.seq_len)
    return forward | ({} if usual else {"batch_rows": batch_rows})
