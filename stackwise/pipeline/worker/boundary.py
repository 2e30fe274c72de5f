"""What a worker does about boundaries: fill the one that enters its stage, write the one above. Each can be resumed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from stackwise.errors import InterruptedRun
from stackwise.pipeline.recipe import boundary_chunk_rows, codec_name, trunk_id
from stackwise.pipeline.worker.context import RESUME, StageContext
from stackwise.store import BoundaryWriter, codec_named
from stackwise.training.feed import RowSource
from stackwise.training.forward import FilledBoundary, MakeOutputs, Pass, write_boundary
from stackwise.training.stage import StageModel


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
        chunk_rows = boundary_chunk_rows(config, below.rowset.rows)
        filled = FilledBoundary(below, frozen, codec=codec, chunk_rows=chunk_rows, device=device)
        yield replace(context, feed=below.above(RowSource(trunk, filled.read, filled.stream)))
        return
    with (
        boundary_writer(context, trunk, depth, job.stage.first) as writer,
        context.store.reader(writer.info.id) as reader,
    ):
        begun, info = time.perf_counter(), writer.info
        about = {"stage": place, "boundary": info.id, "depth": depth, "chunks": len(writer.missing)}
        context.emit({"event": "filling", **about, "above": job.stage.label})
        filled = FilledBoundary(
            below, frozen, codec=codec, chunk_rows=info.chunk_rows, device=device, stored=(reader, writer)
        )
        yield replace(context, feed=below.above(RowSource(info.id, filled.read, filled.stream)))
        writer.flush()
        progress = _progress(context, place)
        done = write_boundary(frozen, below, writer, device, progress=progress, stop=context.stop, spent=filled.seconds)
        if not done.finished:
            raise InterruptedRun(f"stage {depth} stopped while filling boundary {depth}", hint=RESUME)
        _emit_written(context, place, writer, time.perf_counter() - begun, done)


def write_above(context: StageContext, stages: Sequence[StageModel] | MakeOutputs, digests: list[str]) -> None:
    """Write what the boundary above a stage still lacks, of the rows that enter it.

    Args:
        context: The stage's.
        stages: What the rows go through, the stage itself last; or what makes its outputs.
        digests: Of the parts that the stage passes on.

    Raises:
        InterruptedRun: Told to stop.
    """
    job, stage, begun = context.job, context.stage, time.perf_counter()
    trunk = trunk_id(job.forward, [*job.trunk_digests, *digests], stage.precisions(stage.trunk_above))
    above = stage.depth + 1
    with boundary_writer(context, trunk, above, stage.last + 1) as writer, _uncompiled(context):
        context.event("writing", boundary=writer.info.id, depth=above, chunks=writer.info.chunks)
        progress = _progress(context, stage.place)
        done = write_boundary(stages, context.feed, writer, context.device, progress=progress, stop=context.stop)
        if not done.finished:
            raise InterruptedRun(f"stage {stage.depth} stopped while writing boundary {above}", hint=RESUME)
        _emit_written(context, stage.place, writer, time.perf_counter() - begun, done)


def _uncompiled(context: StageContext) -> contextlib.AbstractContextManager[Any]:
    """What is stored must not depend on which pass made it, and those without training compile nothing."""
    if not context.config.training.compile:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def boundary_writer(context: StageContext, trunk: str, depth: int, blocks: int) -> BoundaryWriter:
    """A writer of the boundary that enters stage `depth`, above so many blocks; it goes on with one begun before."""
    store, config, rowset = context.store, context.config, context.feed.rowset
    codec = codec_name(config.store)
    begun = store.find(trunk=trunk, rowset=rowset.id, codec=codec)
    return store.writer(
        trunk=trunk,
        rowset=rowset.id,
        depth=depth,
        seq_len=config.row_positions,
        d_model=config.model.d_model,
        codec=codec,
        chunk_rows=begun.chunk_rows if begun is not None else boundary_chunk_rows(config, rowset.rows),
        attributes={"blocks_below": blocks},
    )


def _progress(context: StageContext, place: int) -> Callable[[int, int], None]:
    return lambda done, total: context.emit({"event": "boundary", "stage": place, "done": done, "total": total})


def _emit_written(context: StageContext, place: int, writer: BoundaryWriter, seconds: float, done: Pass) -> None:
    info = writer.info
    context.emit(
        {
            "event": "written",
            "stage": place,
            "boundary": info.id,
            "depth": info.depth,
            "bytes": info.disk_bytes,
            "rows": info.rows,
            "seconds": seconds,
            "wait_fraction": done.wait_fraction,
            "blocked_fraction": done.blocked_fraction,
        }
    )
