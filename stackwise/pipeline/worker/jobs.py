"""What a worker does: its stage trained, committed, the boundary above written; after the last, held-out evaluation."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from stackwise.batch import SEGMENTS, TASKS
from stackwise.config import StackWiseConfig
from stackwise.data import PreparedData
from stackwise.durable import FileLock
from stackwise.errors import InterruptedRun, StackWiseError
from stackwise.model import part_digest
from stackwise.pipeline.committed.generate import generate
from stackwise.pipeline.committed.load import load_rack
from stackwise.pipeline.committed.use import evaluate_rack, export_rack
from stackwise.pipeline.device import make_deterministic
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.events import Pace
from stackwise.pipeline.job import FinishJob, StageJob
from stackwise.pipeline.parts import committed_sources, frozen_stage, objective_of, part_state, parts_of, stage_model
from stackwise.pipeline.rows import HELD_OUT, choose_samples
from stackwise.pipeline.run import RunDirectory, store_place
from stackwise.pipeline.worker.adaptive import fuse_adaptively
from stackwise.pipeline.worker.boundaries import entering, stored_activations, write_above
from stackwise.pipeline.worker.engines import JobParts, engine_of, memory_of
from stackwise.pipeline.worker.past import beside_past
from stackwise.pipeline.worker.rollouts import with_rollout
from stackwise.pipeline.worker.stores import Stores, place_of
from stackwise.pipeline.worker.teaching import beside_teacher
from stackwise.pipeline.worker.training import (
    Emit,
    StageContext,
    Stop,
    train_and_commit,
    train_stage,
)
from stackwise.pretrained.writing import ExportOptions
from stackwise.store import ActivationStore, ChunkDamage
from stackwise.training.feed import Feed, RowSource
from stackwise.training.forward import MakeOutputs
from stackwise.training.ranks import Ranks, SingleProcess
from stackwise.training.stage import StageModel
from stackwise.training.swap_outputs import grouped_outputs
from stackwise.training.tasks import DataTasks, PermutedTasks


def run_stage(job: StageJob, emit: Emit, stop: Stop, device: torch.device, ranks: Ranks | None = None) -> None:
    """Do a stage's job, emitting its progress as events. Every step of it can be resumed.

    Of several ranks, each of which calls this, the main one holds the stage, saves and commits.

    Raises:
        InterruptedRun: `stop` said so; the state is saved.
        BusyError: Another live worker holds the stage.
        DamageError: Something that the stage reads is not what it was.
        NoSpaceError: The disk is full; everything published stays.
    """
    try:
        _run_stage(job, emit, stop, device, ranks or SingleProcess())
    except ChunkDamage as damage:
        # A group of rows that this rank alone keeps: the runner, which has it made again, cannot see its store.
        path = store_place(job.settings.store.path or job.store, ranks.rank if ranks is not None else 0)
        with contextlib.suppress(StackWiseError), ActivationStore(path, create=False) as store:
            if store.boundary(damage.boundary).head != damage.boundary:
                store.drop_one(damage.boundary)
        raise


def _run_stage(job: StageJob, emit: Emit, stop: Stop, device: torch.device, ranks: Ranks) -> None:
    config = job.settings
    if config.deterministic and device.type == "cuda":
        make_deterministic()
    with contextlib.ExitStack() as stack:
        place = place_of(job, config, ranks)
        store = stack.enter_context(ActivationStore(place.path, create=ranks.rank > 0))
        lock = Path(job.store) / "locks" / f"work-{job.recipe_id}.lock"
        if ranks.main:  # which alone commits; by recipe, so that runs over one store do not train a stage twice
            stack.enter_context(FileLock(lock, f"stage {job.stage.depth}"))
        stores = Stores(store, place, ranks)
        job = stores.level(job, config)
        groups = stores.groups(job, config)
        entering_it = stored_activations(stack, stores, groups, job.reads)
        context = StageContext(
            job,
            config,
            store,
            device,
            emit,
            stop,
            _feed(job, config, store, entering_it, job.rowset_number),
            groups=groups,
            ranks=ranks,
            stores=stores,
        )
        if job.held_out is not None:
            entering_it = stored_activations(stack, stores, None, job.held_out_reads)
            context = replace(context, held_out=_feed(job, config, store, entering_it, HELD_OUT))
        context = stack.enter_context(beside_teacher(context))
        context = stack.enter_context(with_rollout(context))
        if job.train and job.stage.candidates:  # what it trains follows from trials of its sections
            fuse_adaptively(context)
        else:
            _train_and_write(context)


def _train_and_write(context: StageContext) -> None:
    """Train a stage, in memory, swapped or divided; then write boundaries with what it has become."""
    job, config, device = context.job, context.config, context.device
    grouping = Estimate(config, job.vocab_size, job.stage, device.type).grouping(*memory_of(context))
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
        write_above(replace(context, feed=context.held_out, groups=None), outputs([]), digests)


def _above(model: StageModel, below: Sequence[StageModel]) -> Sequence[StageModel]:
    return [*below, model]


def _feed(
    job: StageJob, config: StackWiseConfig, store: ActivationStore, activations: RowSource | None, number: int
) -> Feed:
    """A rowset of the job as it is stored: tokens, masks, named columns, and the activations that enter the stage."""
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
    )
    if activations is not None:
        feed = feed.above(activations)
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
    begun, pace = time.perf_counter(), Pace()
    emit({"event": "evaluating", "samples": rack.config.evaluation.samples})

    def progress(done: int, total: int) -> None:
        if stop():
            raise InterruptedRun("stopped during the evaluation", hint="the same command evaluates again")
        if pace.due():
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
