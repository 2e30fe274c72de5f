"""Hidden states of a pretrained model at chosen depths, written into a store with few parts in memory at a time.

A hidden state is a boundary like any other: its trunk is the front and the blocks below it, named by their weights'
digests and by what a forward pass computes. So it is found again wherever the same weights saw the same rows, and every
chunk that was published is there for good. All rows go through one group of parts before the next group is loaded;
between two groups they wait in a boundary too, of exactly the numbers that were computed, which is dropped in the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from stackwise.config import StackWiseConfig
from stackwise.config.loading import build
from stackwise.data import Split, is_prepared, prepare, require_samples
from stackwise.durable import FileLock
from stackwise.errors import UsageError
from stackwise.files import expanded
from stackwise.identity import Hex, content_id
from stackwise.pipeline.committed.partwise import Captured, PartwiseCapture, Pass, Progress, check_stop
from stackwise.pipeline.device import describe, resolve_device
from stackwise.pipeline.recipe import LOSSLESS, forward_specification, trunk_id
from stackwise.pipeline.rows import choose_samples, put_rows
from stackwise.pipeline.schedule import FRONT, block_part
from stackwise.pretrained.checkpoint import Checkpoint
from stackwise.store import ActivationStore, codec_named
from stackwise.training.feed import Feed
from stackwise.training.forward import forward_rows

SEQ_LEN = 512
"""Tokens of a row where nothing says otherwise, or the most that the model takes."""


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
            check_stop(halt)
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
        check_stop(stop)
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
