"""The boundaries of a job: what enters its stage, stored or filled on demand, and what is written above it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from stackwise.errors import InterruptedRun, NotFound
from stackwise.pipeline.division import group_attributes
from stackwise.pipeline.recipe import boundary_chunk_rows, codec_name, trunk_id
from stackwise.pipeline.worker.stores import Stores
from stackwise.pipeline.worker.training import RESUME, StageContext
from stackwise.store import BoundaryReader, BoundaryWriter, Rowset, boundary_id_of, codec_named
from stackwise.training.feed import Feed, RowGroups, RowSource
from stackwise.training.forward import FilledBoundary, Known, MakeOutputs, Pass, PassControl, Rows, write_boundary
from stackwise.training.stage import StageModel


def stored_activations(
    stack: contextlib.ExitStack, stores: Stores, groups: RowGroups | None, boundary: str | None
) -> RowSource | None:
    """What enters a stage, as it is stored: of rows in groups those that this rank's store keeps. Every rank calls it.

    Args:
        boundary: It, or that of the first group; None: the stage reads tokens.
    """

    def source(one: str) -> RowSource:
        reader = stack.enter_context(stores.store.reader(one))
        return RowSource(reader.info.id, reader.read, reader.stream)

    if boundary is None or groups is None:
        return None if boundary is None else source(boundary)
    boundaries = stores.group_boundaries(groups, boundary)
    stores.collect(boundaries, needed=True)
    keeps = stores.place.keeps
    return groups.joined(boundary, [source(one) if keeps(group) else None for group, one in enumerate(boundaries)])


@contextlib.contextmanager
def entering(context: StageContext, frozen: Sequence[StageModel]) -> Iterator[StageContext]:
    """The same work with what enters the stage: what is stored, or what `frozen` stages make of it on demand.

    Where the job fills the boundary, what training did not ask for is written when the block ends well.

    Raises:
        InterruptedRun: Told to stop while the rest was written.
    """
    if not frozen:
        yield context
        return
    job, config, below, device = context.job, context.config, context.feed, context.device
    codec, depth, place = codec_named(codec_name(config.store)), job.stage.depth, job.recomputed[-1].stage.place
    trunk = trunk_id(job.forward, job.trunk_digests, job.stage.precisions(job.stage.trunk))
    if not job.fills:
        filled = [
            None
            if feed is None
            else FilledBoundary(
                feed, frozen, codec=codec, chunk_rows=boundary_chunk_rows(config, feed.rowset.rows), device=device
            )
            for feed in _group_feeds(context)
        ]
        yield replace(context, feed=below.above(_joined(context, trunk, filled)))
        return
    with contextlib.ExitStack() as stack:
        targets = _targets(stack, context, trunk, depth, job.stage.first)
        begun, head = time.perf_counter(), targets.head
        missing = sum(len(one.writer.missing) for one in targets.groups)
        context.emit(
            {
                "event": "filling",
                "stage": place,
                "boundary": head,
                "depth": depth,
                "chunks": missing,
                "above": job.stage.label,
            }
        )
        by_group: dict[int, FilledBoundary] = {}
        for one in targets.groups:
            info = one.writer.info
            stored = stack.enter_context(context.store.reader(info.id)), one.writer
            by_group[one.group] = FilledBoundary(
                one.feed, frozen, codec=codec, chunk_rows=info.chunk_rows, device=device, stored=stored
            )
        count = 1 if context.groups is None else len(context.groups.rowsets)
        filled = [by_group.get(group) for group in range(count)]
        yield replace(context, feed=below.above(_joined(context, head, filled)))
        for one in targets.groups:
            one.writer.flush()
        context.ranks.wait()  # what others published is not written again
        _write(replace(context, feed=below), place, frozen, targets, begun, {g: f.seconds for g, f in by_group.items()})


def _joined(context: StageContext, digest: str, filled: Sequence[FilledBoundary | None]) -> RowSource:
    sources = [None if one is None else RowSource(digest, one.read, one.stream) for one in filled]
    if context.groups is not None:
        return context.groups.joined(digest, sources)
    assert sources[0] is not None, "rows in one group are here"
    return sources[0]


def _group_feeds(context: StageContext) -> list[Feed | None]:
    """The rows of each group as they enter the job, where its store keeps them."""
    groups = context.groups
    if groups is None:
        return [context.feed]
    keeps = context.stores.place.keeps
    return [groups.feed(context.feed, group) if keeps(group) else None for group in range(len(groups.rowsets))]


def write_above(context: StageContext, stages: Sequence[StageModel] | MakeOutputs, digests: list[str]) -> None:
    """Write what the boundary above a stage still lacks, of the rows that enter it.

    Args:
        stages: What the rows go through, the stage itself last; or what makes its outputs.
        digests: Of the parts that the stage passes on.

    Raises:
        InterruptedRun: Told to stop.
    """
    job, stage, begun = context.job, context.stage, time.perf_counter()
    trunk = trunk_id(job.forward, [*job.trunk_digests, *digests], stage.precisions(stage.trunk_above))
    above = stage.depth + 1
    with contextlib.ExitStack() as stack, _uncompiled(context), _replayed_rows(context) as known:
        targets = _targets(stack, context, trunk, above, stage.last + 1)
        chunks = sum(one.writer.info.chunks for one in targets.groups)
        context.event("writing", boundary=targets.head, depth=above, chunks=chunks)
        _write(context, stage.place, stages, targets, begun, known=known)


def _uncompiled(context: StageContext) -> contextlib.AbstractContextManager[Any]:
    """What is stored must not depend on which pass made it, and those without training compile nothing."""
    if not context.config.training.compile:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextlib.contextmanager
def _replayed_rows(context: StageContext) -> Iterator[Known | None]:
    """The rows of a boundary above a stage that earlier tasks' boundaries have; None: there are none.

    A row is that of the earliest of them, in which it was computed: so what a task replays is the same bits however
    many tasks lie between.

    Raises:
        NotFound: A boundary of an earlier task is gone, or lacks a row.
    """
    job = context.job
    if not job.known or not job.replayed or context.feed.rowset.id != job.rowset:
        yield None
        return
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(context.store.reader(boundary)) for boundary in job.known]
        rowsets = [context.store.rowset(reader.info.rowset) for reader in readers]

        def read(rows_B: Rows) -> torch.Tensor:
            places = [_lender(rowsets, context.feed.rowset, int(row)) for row in rows_B]
            return _read_lent(readers, places)

        yield Known(job.rows - job.replayed, read)


def _lender(rowsets: list[Rowset], replaying: Rowset, row: int) -> tuple[int, int]:
    """The first of some rowsets that has a row of another one, and which row of it that is."""
    pair = bytes(replaying.sample_ids[row]), bytes(replaying.mask_ids[row])
    for number, rowset in enumerate(rowsets):
        with contextlib.suppress(NotFound):
            return number, rowset.row(*pair)
    raise NotFound(f"row {row} is replayed, and no earlier task had it", hint="run again with another store.path")


def _read_lent(readers: list[BoundaryReader], places: list[tuple[int, int]]) -> torch.Tensor:
    where, rows = np.array(places, np.int64), dict[int, torch.Tensor]()
    for number, reader in enumerate(readers):
        at = np.flatnonzero(where[:, 0] == number)
        if len(at):
            rows |= zip(at.tolist(), reader.read(where[at, 1]), strict=True)
    return torch.stack([rows[place] for place in range(len(places))])


@dataclass(frozen=True)
class _Group:
    """What a rank writes of a boundary: all rows, with other ranks chunk by chunk, or a group of them."""

    group: int
    feed: Feed
    writer: BoundaryWriter


@dataclass(frozen=True)
class _Targets:
    """What a rank writes of a boundary, which is complete when that of its first group is."""

    head: str  # the boundary of the first group
    depth: int
    groups: list[_Group]


def _targets(stack: contextlib.ExitStack, context: StageContext, trunk: str, depth: int, blocks: int) -> _Targets:
    """Writers of the boundary that enters stage `depth`, above so many blocks; they go on with what was begun."""
    store, config, groups, place = context.store, context.config, context.groups, context.stores.place
    codec = codec_name(config.store)

    def writer(feed: Feed, group: dict[str, Any]) -> BoundaryWriter:
        begun = store.find(trunk=trunk, rowset=feed.rowset.id, codec=codec)
        rows = feed.rowset.rows
        return stack.enter_context(
            store.writer(
                trunk=trunk,
                rowset=feed.rowset.id,
                depth=depth,
                seq_len=config.row_positions,
                d_model=config.model.d_model,
                codec=codec,
                chunk_rows=begun.chunk_rows if begun is not None else boundary_chunk_rows(config, rows),
                attributes={"blocks_below": blocks} | group,
            )
        )

    if groups is None:
        whole = writer(context.feed, {})
        whole.share = place.share
        return _Targets(whole.info.id, depth, [_Group(0, context.feed, whole)])
    rowsets = [rowset.id for rowset in groups.rowsets]
    boundaries = [boundary_id_of(trunk, rowset, codec) for rowset in rowsets]
    context.stores.collect(boundaries, needed=False)  # what ranks of another number have written
    targets = list[_Group]()
    for number in reversed(range(context.ranks.share, len(rowsets), context.ranks.shares)):
        feed = groups.feed(context.feed, number)
        target = _Group(number, feed, writer(feed, group_attributes(trunk, rowsets, codec, number)))
        target.writer.share = place.alike
        target.writer.completes = number > 0  # the first says that all are: it waits for those of other ranks
        targets.append(target)
    return _Targets(boundaries[0], depth, targets)


def _write(
    context: StageContext,
    place: int,
    stages: Sequence[StageModel] | MakeOutputs,
    targets: _Targets,
    begun: float,
    spent: Mapping[int, float] | None = None,
    known: Known | None = None,
) -> None:
    """Write what a boundary lacks, emitting how far it is, and at the end what it took; each rank a share of it.

    Args:
        spent: By group, the seconds that what is there already took.
    """
    share = context.stores.place.share if context.groups is None else context.stores.place.alike
    passes = list[Pass]()
    for at, one in enumerate(targets.groups):

        def progress(done: int, total: int, at: int = at) -> None:
            done, total = at * total + done, len(targets.groups) * total  # groups have about as many chunks each
            context.emit({"event": "boundary", "stage": place, "done": done, "total": total})

        took = None if spent is None else spent.get(one.group, 0.0)
        control = PassControl(progress, context.stop)
        passes.append(
            write_boundary(stages, one.feed, one.writer, context.device, control=control, spent=took, known=known)
        )
        if not passes[-1].finished:
            break
    if not context.ranks.every(all(one.finished for one in passes)):
        raise InterruptedRun(f"stage {context.stage.depth} stopped while writing boundary {targets.depth}", hint=RESUME)
    for last in (False, True):
        for one, done in zip(targets.groups, passes, strict=True):
            if share[0] == 0 and last == (one.group == 0):
                one.writer.share, one.writer.completes = (0, 1), True
                one.writer.finish(done.seconds)
        context.ranks.wait()
    infos = [one.writer.info for one in targets.groups]  # as they are now that all is published
    if context.groups is not None:
        of_ranks = context.ranks.gathered(sum(info.disk_bytes for info in infos) if share[0] == 0 else 0)
        size = sum(of_ranks)
    else:
        size = infos[0].disk_bytes
    seconds = max(sum(one.seconds for one in passes), 1e-9)
    waits = {
        "wait_fraction": sum(one.wait_fraction * one.seconds for one in passes) / seconds,
        "blocked_fraction": sum(one.blocked_fraction * one.seconds for one in passes) / seconds,
    }
    written = {"boundary": targets.head, "depth": targets.depth, "bytes": size, "rows": context.feed.rowset.rows}
    written |= {} if known is None else {"replayed": context.feed.rowset.rows - known.first}
    context.emit({"event": "written", "stage": place, **written, "seconds": time.perf_counter() - begun, **waits})
