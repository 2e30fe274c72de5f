"""What a worker does with its stage: train, commit, write the boundary above. Every step of it can be resumed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from stackwise.batch import SEGMENTS
from stackwise.config import StackWiseConfig
from stackwise.data import PreparedData
from stackwise.durable import FileLock
from stackwise.model import part_digest
from stackwise.pipeline.build import frozen_stage, objective_of, part_state, parts_of, stage_model
from stackwise.pipeline.device import describe, make_deterministic
from stackwise.pipeline.fit import Swap, swap_of
from stackwise.pipeline.job import StageJob
from stackwise.pipeline.rows import HELD_OUT, choose_samples
from stackwise.pipeline.worker.boundary import Emit, Stop, entering, write_above
from stackwise.pipeline.worker.swapped import JobParts, committed_sources
from stackwise.pipeline.worker.training import engaged, fuse_stage, train_and_commit, train_stage
from stackwise.store import ActivationStore, BoundaryReader
from stackwise.training.feed import Feed
from stackwise.training.lift import lifted
from stackwise.training.stage import StageModel

RETOLD = 1000
"""Losses told again on resuming: the last ones before a kill may have reached no one."""


def run_stage(job: StageJob, emit: Emit, stop: Stop) -> None:
    """Do a stage's job, telling its progress as events.

    Raises:
        InterruptedRun: `stop` said so; the state is saved.
        BusyError: Another live worker holds the stage.
        DamageError: Something that the stage reads is not what it was.
        NoSpaceError: The disk is full; everything published stays.
    """
    config = job.settings
    device = torch.device(job.device)
    if config.deterministic and device.type == "cuda":
        make_deterministic()
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(ActivationStore(Path(job.store), create=False))
        lock = Path(job.store) / "locks" / f"work-{job.recipe_id}.lock"
        stack.enter_context(FileLock(lock, f"stage {job.stage.depth}"))
        reader = stack.enter_context(store.reader(job.reads)) if job.reads else None
        below = _feed(job, config, store, reader, job.rowset, job.rowset_number)
        held_out = None
        if job.held_out is not None:
            entering_it = stack.enter_context(store.reader(job.held_out_reads)) if job.held_out_reads else None
            held_out = _feed(job, config, store, entering_it, job.held_out, HELD_OUT)
        frozen = [frozen_stage(one, job, config).to(device) for one in job.recomputed]
        if job.train and job.stage.candidates:
            assert held_out is not None, "what it unfreezes is chosen by held-out loss"
            fuse_stage(job, config, below, held_out, store, device, emit, stop)
            return
        swap = swap_of(config, job.vocab_size, job.stage, int(describe(device)["memory"]))
        if swap is not None:
            _run_swapped(job, config, swap, below, held_out, frozen, store, device, emit, stop)
            return
        model = stage_model(job, config).to(device)
        if job.train:
            with entering(job, config, below, frozen, store, device, emit, stop) as feed:
                train_stage(job, config, model, feed, store, device, emit, stop, held_out)
        if job.writes or job.writes_held_out:
            # The head and the optimizer are done with; what remains is forward passes.
            made = {
                part: module for part, module in parts_of(model, job.stage).items() if part in job.stage.forward_parts
            }
            digests = [part_digest(part_state(part, module.state_dict())) for part, module in made.items()]
            model.head, model.beyond = None, nn.ModuleList()
            gc.collect()
            if job.writes:
                write_above(job, config, [*frozen, model], below, store, digests, device, emit, stop)
            if job.writes_held_out and held_out is not None:
                write_above(job, config, [model], held_out, store, digests, device, emit, stop)


def _run_swapped(
    job: StageJob,
    config: StackWiseConfig,
    swap: Swap,
    below: Feed,
    held_out: Feed | None,
    frozen: Sequence[StageModel],
    store: ActivationStore,
    device: torch.device,
    emit: Emit,
    stop: Stop,
) -> None:
    """What `run_stage` does, with one group of the stage's parts in memory at a time."""
    if job.train:
        with (
            entering(job, config, below, frozen, store, device, emit, stop) as feed,
            engaged(device, emit, job, config) as (engine, weights),
        ):
            train_and_commit(job, config, engine, weights, feed, store, device, emit, stop, held_out)
    if job.writes or job.writes_held_out:
        parts = JobParts(job, config, committed_sources(job, store.stage(job.recipe_id) if job.train else None))
        row_bytes = 4 * config.row_positions * config.model.d_model
        up = partial(lifted, parts, swap.groups, row_bytes=row_bytes, memory=swap.boundaries)
        digests = [parts.digest(part) for part in job.stage.forward_parts]
        if job.writes:
            write_above(job, config, up(below=frozen), below, store, digests, device, emit, stop)
        if job.writes_held_out and held_out is not None:
            write_above(job, config, up(), held_out, store, digests, device, emit, stop)


def _feed(
    job: StageJob,
    config: StackWiseConfig,
    store: ActivationStore,
    reader: BoundaryReader | None,
    rowset: str,
    number: int,
) -> Feed:
    """A rowset of the job as it is stored: tokens, masks, and the boundary that is read."""
    data = PreparedData.open(Path(job.data))
    split = data.held_out if number == HELD_OUT else data.train
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
