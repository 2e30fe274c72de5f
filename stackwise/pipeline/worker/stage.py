"""What a worker does: its stage trained, committed, the boundary above written; after the last, held-out evaluation."""

from __future__ import annotations

import contextlib
import gc
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from stackwise.batch import SEGMENTS
from stackwise.config import StackWiseConfig
from stackwise.data import PreparedData
from stackwise.durable import FileLock
from stackwise.errors import InterruptedRun
from stackwise.model import part_digest
from stackwise.pipeline.build import (
    JobParts,
    committed_sources,
    frozen_stage,
    objective_of,
    part_state,
    parts_of,
    stage_model,
)
from stackwise.pipeline.committed.generate import generate
from stackwise.pipeline.committed.load import load_rack
from stackwise.pipeline.committed.use import evaluate_rack, export_rack
from stackwise.pipeline.device import describe, make_deterministic
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.job import FinishJob, StageJob
from stackwise.pipeline.rows import HELD_OUT, choose_samples
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.worker.adaptive import fuse_stage
from stackwise.pipeline.worker.boundary import entering, write_above
from stackwise.pipeline.worker.context import Emit, StageContext, Stop
from stackwise.pipeline.worker.training import engine_of, train_and_commit, train_stage
from stackwise.store import ActivationStore, BoundaryReader
from stackwise.training.feed import Feed
from stackwise.training.swap_parts import grouped_outputs

PROGRESS_SECONDS = 0.25
"""Between two events on how far the evaluation is."""


def run_stage(job: StageJob, emit: Emit, stop: Stop) -> None:
    """Do a stage's job, emitting its progress as events. Every step of it can be resumed.

    Raises:
        InterruptedRun: `stop` said so; the state is saved.
        BusyError: Another live worker holds the stage.
        DamageError: Something that the stage reads is not what it was.
        NoSpaceError: The disk is full; everything published stays.
    """
    config, device = job.settings, torch.device(job.device)
    if config.deterministic and device.type == "cuda":
        make_deterministic()
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(ActivationStore(Path(job.store), create=False))
        lock = Path(job.store) / "locks" / f"work-{job.recipe_id}.lock"
        stack.enter_context(FileLock(lock, f"stage {job.stage.depth}"))
        reader = stack.enter_context(store.reader(job.reads)) if job.reads else None
        context = StageContext(
            job, config, store, device, emit, stop, _feed(job, config, store, reader, job.rowset_number)
        )
        if job.held_out is not None:
            entering_it = stack.enter_context(store.reader(job.held_out_reads)) if job.held_out_reads else None
            context = replace(context, held_out=_feed(job, config, store, entering_it, HELD_OUT))
        if job.train and job.stage.candidates:
            fuse_stage(context)
        elif Estimate(config, job.vocab_size, job.stage).swap(int(describe(device)["memory"])) is None:
            _run_resident(context)
        else:
            _run_swapped(context)


def _run_resident(context: StageContext) -> None:
    """The stage in memory: train it, then write boundaries with what it has become."""
    job, config, device = context.job, context.config, context.device
    frozen = [frozen_stage(below, job, config).to(device) for below in job.recomputed]
    model = stage_model(job, config).to(device)
    if job.train:
        with entering(context, frozen) as above:
            train_stage(above, model)
    if job.writes or job.writes_held_out:
        # The head and the optimizer are done with; what remains is forward passes.
        modules = {
            part: module for part, module in parts_of(model, job.stage).items() if part in job.stage.forward_parts
        }
        digests = [part_digest(part_state(part, module.state_dict())) for part, module in modules.items()]
        model.head, model.beyond = None, nn.ModuleList()
        gc.collect()
        if job.writes:
            write_above(context, [*frozen, model], digests)
        if job.writes_held_out and context.held_out is not None:
            write_above(replace(context, feed=context.held_out), [model], digests)


def _run_swapped(context: StageContext) -> None:
    """The same with one group of the stage's parts in memory at a time."""
    job, config, device = context.job, context.config, context.device
    frozen = [frozen_stage(below, job, config).to(device) for below in job.recomputed]
    if job.train:
        with entering(context, frozen) as above, engine_of(above) as engine:
            train_and_commit(above, engine)
    if job.writes or job.writes_held_out:
        committed = context.store.stage(job.recipe_id) if job.train else None
        parts = JobParts(job, config, committed_sources(job, committed))
        swap = Estimate(config, job.vocab_size, job.stage).swap(int(describe(device)["memory"]))
        assert swap is not None, "a stage that is swapped"
        row_bytes = 4 * config.row_positions * config.model.d_model
        outputs = partial(grouped_outputs, parts, swap.groups, row_bytes=row_bytes, memory=swap.boundaries)
        digests = [parts.digest(part) for part in job.stage.forward_parts]
        if job.writes:
            write_above(context, outputs(below=frozen), digests)
        if job.writes_held_out and context.held_out is not None:
            write_above(replace(context, feed=context.held_out), outputs(), digests)


def _feed(
    job: StageJob, config: StackWiseConfig, store: ActivationStore, reader: BoundaryReader | None, number: int
) -> Feed:
    """A rowset of the job as it is stored: tokens, masks, named columns, and the boundary that is read."""
    data = PreparedData.open(Path(job.data))
    held_out = number == HELD_OUT
    rowset = job.held_out if held_out else job.rowset
    assert rowset is not None, "a job that reads held-out rows names them"
    split = data.held_out if held_out else data.train
    objective = objective_of(config, job.mask_token, job.vocab_size, job.stage)
    segments = (SEGMENTS,) if config.data.within_documents else ()
    return Feed.stored(
        store,
        store.rowset(rowset),
        split,
        choose_samples(config, split, number),
        config.training.seq_len,
        columns=(*segments, *objective.inputs),
        reader=reader,
    )


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
    emit({"event": "fill", **generate(rack, None)})
    if job.export is not None:
        out = export_rack(rack, Path(job.export), overwrite=True)
        emit({"event": "exported", "directory": str(out)})
