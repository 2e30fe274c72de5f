"""What a worker does: its stage trained, committed, the boundary above written; after the last, held-out evaluation."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stackwise.batch import SEGMENTS, TASKS
from stackwise.config import StackWiseConfig
from stackwise.data import PreparedData
from stackwise.durable import FileLock
from stackwise.errors import InterruptedRun, UsageError
from stackwise.host import host_total
from stackwise.model import part_digest
from stackwise.pipeline.committed.generate import generate
from stackwise.pipeline.committed.load import load_rack
from stackwise.pipeline.committed.use import evaluate_rack, export_rack
from stackwise.pipeline.device import describe, make_deterministic
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.job import FinishJob, StageJob
from stackwise.pipeline.parts import committed_sources, frozen_stage, objective_of, part_state, parts_of, stage_model
from stackwise.pipeline.recipe import boundary_chunk_rows, codec_name, trunk_id
from stackwise.pipeline.rows import HELD_OUT, choose_samples
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.worker.adaptive import fuse_adaptively
from stackwise.pipeline.worker.engines import engine_of
from stackwise.pipeline.worker.job_parts import JobParts
from stackwise.pipeline.worker.past import beside_past
from stackwise.pipeline.worker.replayed import replayed_rows
from stackwise.pipeline.worker.rollouts import with_rollout
from stackwise.pipeline.worker.stores import Stores, place_of
from stackwise.pipeline.worker.teaching import beside_teacher
from stackwise.pipeline.worker.training import (
    RESUME,
    Emit,
    StageContext,
    Stop,
    train_and_commit,
    train_stage,
)
from stackwise.pretrained.writing import ExportOptions
from stackwise.store import ActivationStore, BoundaryReader, BoundaryWriter, codec_named
from stackwise.training.feed import Feed, RowSource
from stackwise.training.forward import FilledBoundary, Known, MakeOutputs, write_boundary
from stackwise.training.ranks import Ranks, SingleProcess
from stackwise.training.stage import StageModel
from stackwise.training.swap_outputs import grouped_outputs
from stackwise.training.tasks import DataTasks, PermutedTasks

PROGRESS_SECONDS = 0.25  # between two events on how far the evaluation is


def run_stage(job: StageJob, emit: Emit, stop: Stop, device: torch.device, ranks: Ranks | None = None) -> None:
    """Do a stage's job, emitting its progress as events. Every step of it can be resumed.

    Of several ranks, each of which calls this, the main one holds the stage, saves and commits.

    Raises:
        InterruptedRun: `stop` said so; the state is saved.
        BusyError: Another live worker holds the stage.
        DamageError: Something that the stage reads is not what it was.
        NoSpaceError: The disk is full; everything published stays.
    """
    config, ranks = job.settings, ranks or SingleProcess()
    if config.deterministic and device.type == "cuda":
        make_deterministic()
    with contextlib.ExitStack() as stack:
        place = place_of(job, config, ranks)
        store = stack.enter_context(ActivationStore(place.path, create=ranks.rank > 0))
        lock = Path(job.store) / "locks" / f"work-{job.recipe_id}.lock"
        if ranks.main:
            stack.enter_context(FileLock(lock, f"stage {job.stage.depth}"))
        _compare_data(job, ranks)
        stores = Stores(store, place, ranks)
        job = stores.level(job, config)
        reader = stack.enter_context(store.reader(job.reads)) if job.reads else None
        context = StageContext(
            job,
            config,
            store,
            device,
            emit,
            stop,
            _feed(job, config, store, reader, job.rowset_number),
            ranks=ranks,
            stores=stores,
        )
        if job.held_out is not None:
            entering_it = stack.enter_context(store.reader(job.held_out_reads)) if job.held_out_reads else None
            context = replace(context, held_out=_feed(job, config, store, entering_it, HELD_OUT))
        context = stack.enter_context(beside_teacher(context))
        context = stack.enter_context(with_rollout(context))
        if job.train and job.stage.candidates:
            fuse_adaptively(context)
        else:
            _train_and_write(context)


def _compare_data(job: StageJob, ranks: Ranks) -> None:
    """Raises UsageError: a rank has other data at the same place."""
    for rank, data in enumerate(every := ranks.gathered(PreparedData.open(Path(job.data)).id)):
        if data != every[0]:
            raise UsageError(
                f"data.paths: rank {rank} has other data at {job.data} than rank 0",
                hint="give every host the same text, or a disk that all of them see",
            )


def _train_and_write(context: StageContext) -> None:
    """Train a stage, in memory, swapped or divided; then write boundaries with what it has become."""
    job, config, device = context.job, context.config, context.device
    grouping = Estimate(config, job.vocab_size, job.stage, device.type).grouping(
        int(describe(device)["memory"]), host_total()
    )
    frozen = [frozen_stage(below, job, config).to(device) for below in job.recomputed]
    model = stage_model(job, config).to(device) if grouping is None else None
    if job.train:
        with entering(context, frozen) as entered, beside_past(entered, model) as above:
            if model is not None:
                train_stage(above, model)
            else:
                with engine_of(above) as engine:
                    train_and_commit(above, engine)
    if not job.writes and not job.writes_held_out:
        return
    # What is frozen has the digest of its file, however it is held.
    sources = committed_sources(job, context.store.stage(job.recipe_id) if job.train else None)
    outputs: Callable[[Sequence[StageModel]], Sequence[StageModel] | MakeOutputs]
    if model is not None:
        # The head and the optimizer are done with; what remains is forward passes.
        modules = parts_of(model, job.stage)
        digests = [
            sources[part].digest or part_digest(part_state(part, modules[part].state_dict()))
            for part in job.stage.forward_parts
        ]
        model.head, model.beyond = None, nn.ModuleList()
        outputs = partial(_above, model)
    else:
        assert grouping is not None, "a stage that is not in memory goes in groups"
        parts = JobParts(job, config, sources)
        digests = [parts.digest(part) for part in job.stage.forward_parts]
        row_bytes = 4 * config.row_positions * config.model.d_model
        outputs = partial(
            grouped_outputs, parts, grouping.groups, row_bytes, grouping.boundaries, most_pieces=grouping.pieces
        )
    gc.collect()
    if job.writes:
        write_above(context, outputs(frozen), digests)
    if job.writes_held_out and context.held_out is not None:
        write_above(replace(context, feed=context.held_out), outputs([]), digests)


def _above(model: StageModel, below: Sequence[StageModel]) -> Sequence[StageModel]:
    return [*below, model]


def _feed(
    job: StageJob, config: StackWiseConfig, store: ActivationStore, reader: BoundaryReader | None, number: int
) -> Feed:
    """A rowset of the job as it is stored: tokens, masks, named columns, and the boundary that is read."""
    data = PreparedData.open(Path(job.data))
    held_out = number == HELD_OUT
    rowset = job.rowset if number == job.rowset_number else job.held_out
    assert rowset is not None, "a job that reads held-out rows names them"
    split = data.held_out if held_out else data.train
    objective = objective_of(config, job.mask_token, job.vocab_size, job.stage)
    segments = (SEGMENTS,) if config.data.within_documents else ()
    samples_R = choose_samples(config, split, number)
    feed = Feed.stored(
        store,
        store.rowset(rowset),
        split,
        samples_R,
        config.training.seq_len,
        columns=(*segments, *objective.inputs),
        reader=reader,
    )
    settings = config.stage_training(job.stage.depth)
    if held_out and job.stage.column is not None:  # rows in training are all of the newest task
        task_R = torch.from_numpy(split.sample_tasks(config.training.seq_len)[samples_R].astype(np.int64))
        of_row = RowSource(data.id, lambda rows_B: task_R[torch.from_numpy(rows_B)])
        feed = replace(feed, sources={**feed.sources, TASKS: of_row})
    if settings.meta is None:
        return feed
    how = settings.meta, config.seed, settings.batch_size
    if split.tasks:
        task_R = split.sample_tasks(config.training.seq_len)[samples_R]
        return replace(feed, tasks=DataTasks(*how, task_R, len(split.tasks)))
    used_U = np.setdiff1d(np.flatnonzero(data.train.counts), [data.separator_id])
    return replace(feed, tasks=PermutedTasks(*how, used_U, job.vocab_size))


def run_finish(job: FinishJob, emit: Emit, stop: Stop) -> None:
    """What follows the last stage: held-out evaluation, a passage filled in, the export if asked; each an event.

    Raises:
        InterruptedRun: `stop` said so; what is committed stays, and the same command goes on.
    """
    rack = load_rack(RunDirectory(Path(job.run)), torch.device(job.device))
    begun = emitted = time.perf_counter()
    emit({"event": "evaluating", "samples": rack.config.evaluation.samples})

    def progress(done: int, total: int) -> None:
        nonlocal emitted
        if stop():
            raise InterruptedRun("stopped during the evaluation", hint="the same command evaluates again")
        if time.perf_counter() - emitted > PROGRESS_SECONDS:
            emitted = time.perf_counter()
            emit({"event": "evaluating", "done": done, "total": total})

    result = evaluate_rack(rack, rack.data.held_out, progress)
    emit({"event": "evaluation", "reused": False, "result": result, "seconds": time.perf_counter() - begun})
    if stop():
        raise InterruptedRun("stopped after the evaluation", hint="the same command goes on")
    if rack.config.objective.evaluated != "pairs":  # scores are no text
        emit({"event": "fill", **generate(rack, None)})
    if job.export is not None:
        out = export_rack(rack, Path(job.export), ExportOptions(overwrite=True)).directory
        emit({"event": "exported", "directory": str(out)})


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
        context.ranks.wait()  # what others published is not written again
        _write(replace(context, feed=below), place, frozen, writer, begun, filled.seconds)


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
    with (
        boundary_writer(context, trunk, above, stage.last + 1) as writer,
        _uncompiled(context),
        replayed_rows(context) as known,
    ):
        context.event("writing", boundary=writer.info.id, depth=above, chunks=writer.info.chunks)
        _write(context, stage.place, stages, writer, begun, known=known)


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


def _write(
    context: StageContext,
    place: int,
    stages: Sequence[StageModel] | MakeOutputs,
    writer: BoundaryWriter,
    begun: float,
    spent: float | None = None,
    known: Known | None = None,
) -> None:
    """Write what a boundary lacks, emitting how far it is, and at the end what it took; each rank a share of chunks."""
    store_place = context.stores.place
    writer.share = store_place.share
    info = writer.info

    def progress(done: int, total: int) -> None:
        context.emit({"event": "boundary", "stage": place, "done": done, "total": total})

    done = write_boundary(
        stages, context.feed, writer, context.device, progress=progress, stop=context.stop, spent=spent, known=known
    )
    if not context.ranks.every(done.finished):
        raise InterruptedRun(f"stage {context.stage.depth} stopped while writing boundary {info.depth}", hint=RESUME)
    if store_place.leads:
        writer.share = (0, 1)
        writer.finish(done.seconds)
    context.ranks.wait()
    info = writer.info  # as it is now that all is published
    written = {"boundary": info.id, "depth": info.depth, "bytes": info.disk_bytes, "rows": info.rows}
    written |= {} if known is None else {"replayed": info.rows - known.first}
    waits = {"wait_fraction": done.wait_fraction, "blocked_fraction": done.blocked_fraction}
    context.emit({"event": "written", "stage": place, **written, "seconds": time.perf_counter() - begun, **waits})
