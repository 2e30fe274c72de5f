"""What a worker does about boundaries: fill the one that enters its stage, write the one above. Each can be resumed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from stackwise.config import StackWiseConfig
from stackwise.errors import InterruptedRun
from stackwise.pipeline.job import StageJob
from stackwise.pipeline.recipe import boundary_chunk_rows, codec_name, trunk_id
from stackwise.store import CODECS, ActivationStore, BoundaryWriter
from stackwise.training.feed import Feed, RowSource
from stackwise.training.fill import FilledBoundary
from stackwise.training.forward import Outputs, Pass, write_boundary
from stackwise.training.stage import StageModel

Emit = Callable[[dict[str, Any]], None]
Stop = Callable[[], bool]

RESUME = "its state is saved; the same command goes on from there"


@contextlib.contextmanager
def entering(
    job: StageJob,
    config: StackWiseConfig,
    below: Feed,
    frozen: Sequence[StageModel],
    store: ActivationStore,
    device: torch.device,
    emit: Emit,
    stop: Stop,
) -> Iterator[Feed]:
    """What enters the job's stage: `below` itself, or what `frozen` stages make of it on demand.

    Where the job fills the boundary, what training did not ask for is written when the block ends well.

    Raises:
        InterruptedRun: `stop` said so while the rest was written.
    """
    if not frozen:
        yield below
        return
    codec = codec_name(config.store)
    rows, depth, place = below.rowset.rows, job.stage.depth, job.recomputed[-1].stage.place
    trunk = trunk_id(job.forward, job.trunk_digests, job.stage.precisions(job.stage.trunk))
    if not job.fills:
        chunk_rows = boundary_chunk_rows(config, rows)
        source = FilledBoundary(below, frozen, codec=CODECS[codec], chunk_rows=chunk_rows, device=device)
        yield below.above(RowSource(trunk, source.read, source.stream))
        return
    with (
        boundary_writer(store, config, below, trunk, depth, job.stage.first) as writer,
        store.reader(writer.info.id) as reader,
    ):
        begun, info = time.perf_counter(), writer.info
        emit(
            {
                "event": "filling",
                "stage": place,
                "boundary": info.id,
                "depth": depth,
                "chunks": len(writer.missing),
                "above": job.stage.label,
            }
        )
        source = FilledBoundary(
            below, frozen, codec=CODECS[codec], chunk_rows=info.chunk_rows, device=device, stored=(reader, writer)
        )
        yield below.above(RowSource(info.id, source.read, source.stream))
        writer.flush()
        progress = _progress(emit, place)
        done = write_boundary(frozen, below, writer, device, progress=progress, stop=stop, spent=source.seconds)
        if not done.finished:
            raise InterruptedRun(f"stage {depth} stopped while filling boundary {depth}", hint=RESUME)
        _tell_written(emit, place, writer, time.perf_counter() - begun, done)


def write_above(
    job: StageJob,
    config: StackWiseConfig,
    stages: Sequence[StageModel] | Outputs,
    below: Feed,
    store: ActivationStore,
    digests: list[str],
    device: torch.device,
    emit: Emit,
    stop: Stop,
) -> None:
    """Write what the boundary above a stage still lacks.

    Args:
        job: The stage's.
        config: The configuration.
        stages: What the rows go through, the job's stage last; or what makes its outputs.
        below: What enters the first of them.
        store: Where the boundary goes.
        digests: Of the parts that the job's stage passes on.
        device: Where `stages` are.
        emit: Told how it goes.
        stop: Asked before each chunk.

    Raises:
        InterruptedRun: `stop` said so.
    """
    stage, begun = job.stage, time.perf_counter()
    trunk = trunk_id(job.forward, [*job.trunk_digests, *digests], job.stage.precisions(job.stage.trunk_above))
    with boundary_writer(store, config, below, trunk, stage.depth + 1, stage.last + 1) as writer:
        emit(
            {
                "event": "writing",
                "stage": stage.place,
                "boundary": writer.info.id,
                "depth": stage.depth + 1,
                "chunks": writer.info.chunks,
            }
        )
        done = write_boundary(stages, below, writer, device, progress=_progress(emit, stage.place), stop=stop)
        if not done.finished:
            raise InterruptedRun(f"stage {stage.depth} stopped while writing boundary {stage.depth + 1}", hint=RESUME)
        _tell_written(emit, stage.place, writer, time.perf_counter() - begun, done)


def boundary_writer(
    store: ActivationStore, config: StackWiseConfig, rows: Feed, trunk: str, depth: int, blocks: int
) -> BoundaryWriter:
    """A writer of the boundary that enters stage `depth`, above so many blocks; it goes on with one begun before."""
    codec = codec_name(config.store)
    begun = store.find(trunk=trunk, rowset=rows.rowset.id, codec=codec)
    return store.writer(
        trunk=trunk,
        rowset=rows.rowset.id,
        depth=depth,
        seq_len=config.row_positions,
        d_model=config.model.d_model,
        codec=codec,
        chunk_rows=begun.chunk_rows if begun is not None else boundary_chunk_rows(config, rows.rowset.rows),
        attributes={"blocks_below": blocks},
    )


def _progress(emit: Emit, place: int) -> Callable[[int, int], None]:
    return lambda done, total: emit({"event": "boundary", "stage": place, "done": done, "total": total})


def _tell_written(emit: Emit, place: int, writer: BoundaryWriter, seconds: float, done: Pass) -> None:
    info = writer.info
    emit(
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
