"""What a worker does with its stage: train, commit, write the boundary above. Every step of it can be resumed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from stackwise.config import StackWiseConfig
from stackwise.data import PreparedData
from stackwise.durable import FileLock
from stackwise.errors import InterruptedRun
from stackwise.model import part_digest
from stackwise.pipeline.boundary_worker import RESUME, Emit, Stop, entering, write_above
from stackwise.pipeline.build import frozen_stage, part_state, parts_of, save_part, stage_model
from stackwise.pipeline.device import describe, make_deterministic, peak_memory
from stackwise.pipeline.fit import Swap, swap_of
from stackwise.pipeline.holding import ADAPTER
from stackwise.pipeline.job import StageJob
from stackwise.pipeline.recipe import WINDOW_CHUNKS, order_rows, stage_steps
from stackwise.pipeline.rows import HELD_OUT, choose_samples, stage_rows
from stackwise.pipeline.stage_hooks import StageHooks
from stackwise.pipeline.swapped import JobParts, committed_sources, record_directory, swapped_engine
from stackwise.store import ActivationStore, BoundaryReader, RowOrder
from stackwise.training import checkpoint
from stackwise.training.divergence import Rollback, anchor
from stackwise.training.engine import Engine, ResidentEngine
from stackwise.training.feed import Feed, ahead
from stackwise.training.lift import lifted
from stackwise.training.stage import StageModel
from stackwise.training.swap import SwappedEngine
from stackwise.training.trainer import Trainer

Weights = Callable[[str], Mapping[str, torch.Tensor]]
"""The state dict of a part, as it is committed."""

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
        frozen = [frozen_stage(one, job, config).to(device) for one in job.through]
        swap = swap_of(config, job.vocab_size, job.stage, int(describe(device)["memory"]))
        if swap is not None:
            _run_swapped(job, config, swap, below, held_out, frozen, store, device, emit, stop)
            return
        model = stage_model(job, config).to(device)
        if job.train:
            with entering(job, config, below, frozen, store, device, emit, stop) as feed:
                train_stage(job, config, model, feed, store, device, emit, stop, held_out)
        if job.writes or job.hands_held_out:
            # The head and the optimizer are done with; what remains is forward passes.
            made = {part: module for part, module in parts_of(model, job.stage).items() if part in job.stage.hands_on}
            digests = [part_digest(part_state(part, module.state_dict())) for part, module in made.items()]
            model.head, model.beyond = None, nn.ModuleList()
            gc.collect()
            if job.writes:
                write_above(job, config, [*frozen, model], below, store, digests, device, emit, stop)
            if job.hands_held_out and held_out is not None:
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

    def warn(text: str) -> None:
        emit({"event": "warning", "stage": job.stage.place, "text": text})

    if job.train:
        with (
            entering(job, config, below, frozen, store, device, emit, stop) as feed,
            contextlib.closing(swapped_engine(job, config, swap, device, warn)) as engine,
        ):
            _train(job, config, engine, partial(_swapped_weights, engine), feed, store, device, emit, stop, held_out)
    if job.writes or job.hands_held_out:
        parts = JobParts(job, config, committed_sources(job, store.stage(job.recipe_id) if job.train else None))
        row_bytes = 4 * config.row_positions * config.model.d_model
        up = partial(lifted, parts, swap.groups, row_bytes=row_bytes, memory=swap.boundaries)
        digests = [parts.digest(part) for part in job.stage.hands_on]
        if job.writes:
            write_above(job, config, up(below=frozen), below, store, digests, device, emit, stop)
        if job.hands_held_out and held_out is not None:
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
    return Feed(
        split,
        config.training.seq_len,
        choose_samples(config, split, number),
        store,
        store.rowset(rowset),
        reader,
        within_documents=config.data.within_documents,
        targets=config.objective == "custom",
    )


def train_stage(
    job: StageJob,
    config: StackWiseConfig,
    model: StageModel,
    feed: Feed,
    store: ActivationStore,
    device: torch.device,
    emit: Emit,
    stop: Stop,
    held_out: Feed | None = None,
) -> None:
    """Train a stage that is in memory from its newest checkpoint, or from the start, and commit it.

    Args:
        held_out: What it is evaluated on while it trains.
    """
    stage, settings = job.stage, config.stage_training(job.stage.depth)
    if config.training.compile:
        for block in (*model.blocks, *model.beyond):
            block.compile()
    engine = ResidentEngine(
        model,
        settings,
        seed=(config.seed, stage.depth),
        device=device,
        first_block=stage.first,
        beyond=stage.beyond,
    )
    parts = parts_of(model, stage)

    def weights(part: str) -> dict[str, torch.Tensor]:
        return part_state(part, engine.weights(parts[part]))

    _train(job, config, engine, weights, feed, store, device, emit, stop, held_out)


def _train(
    job: StageJob,
    config: StackWiseConfig,
    engine: Engine,
    weights: Weights,
    feed: Feed,
    store: ActivationStore,
    device: torch.device,
    emit: Emit,
    stop: Stop,
    held_out: Feed | None,
) -> None:
    """Take an engine from where its stage stands to the last step, and commit the stage."""
    stage, settings = job.stage, config.stage_training(job.stage.depth)
    steps = stage_steps(config, stage.depth, job.rows)
    trainer = Trainer(engine, settings, steps=steps, anchor=anchor(settings, steps, config.training.checkpoint_steps))
    saving = replace(job, checkpoints=str(record_directory(job))) if isinstance(engine, SwappedEngine) else job

    def warn(text: str) -> None:
        emit({"event": "warning", "stage": stage.place, "text": text})

    resumed = checkpoint.restore_latest(Path(saving.checkpoints), trainer, warn)
    if isinstance(engine, SwappedEngine):
        # Its steps are on the disk as they are taken; a checkpoint holds the record alone.
        resumed = engine.resume(trainer)
    if resumed:
        losses = trainer.record.losses[-RETOLD:]
        emit({"event": "resumed", "stage": stage.place, "step": trainer.step, "steps": steps, "losses": losses})
    order = RowOrder(
        job.rows,
        seed=(config.seed, stage.depth, "order"),
        chunk_rows=order_rows(config, job.rows),
        window_chunks=WINDOW_CHUNKS,
        select=stage_rows(config, feed.rowset.sample_ids, stage.depth, stage.rowset),
    )
    with StageHooks(saving, config, trainer, held_out, emit, stop) as hooks:
        while True:
            try:
                finished = _fit(trainer, feed, order, hooks)
                break
            except Rollback as back:
                hooks.roll_back(back, warn)
        if not finished:
            raise InterruptedRun(f"stage {stage.depth} stopped at step {trainer.step} of {steps}", hint=RESUME)
        if settings.keep_best:
            hooks.take_best()
    _commit(job, weights, trainer, store, device, emit)
    checkpoint.remove(Path(job.checkpoints))


def _fit(trainer: Trainer, feed: Feed, order: RowOrder, hooks: StageHooks) -> bool:
    """Train on from the trainer's step; whether the stage is finished."""
    settings = trainer.settings
    start = trainer.step * settings.accumulation
    with ahead(feed.shuffled(order, settings.batch_size, start), trainer.engine.device) as batches:
        return trainer.fit(iter(batches), waited=lambda: batches.waited, hooks=hooks)


def _commit(
    job: StageJob, weights: Weights, trainer: Trainer, store: ActivationStore, device: torch.device, emit: Emit
) -> None:
    stage, record = job.stage, trainer.record
    trained = [name for name in stage.holds if name in stage.commits]
    trainer.engine.settle()
    digests = {name: part_digest(weights(name)) for name in trained}
    store.commit_stage(
        job.recipe_id,
        {name: partial(_save, weights, name) for name in trained},
        {
            "recipe": job.recipe,
            "depth": stage.depth,
            "window": stage.window,
            "blocks": [stage.first, stage.last],
            "parts": digests,
            "trunk": job.recipe["reads"] and job.recipe["reads"]["trunk"],
            "steps": trainer.step,
            "losses": record.losses,
            "held_out": record.held_out,
            "divergences": record.divergences,
            "seconds": record.seconds,
            "tokens": record.tokens,
            "wait_fraction": record.wait_fraction,
            "peak_memory_bytes": peak_memory(device),
            "device": device.type,
        },
    )
    emit({"event": "committed", "stage": stage.place, "recipe": job.recipe_id, "parts": digests})


def _swapped_weights(engine: SwappedEngine, part: str) -> dict[str, torch.Tensor]:
    return part_state(part, engine.weights(part.removeprefix(ADAPTER)))


def _save(weights: Weights, part: str, path: Path) -> None:
    save_part(weights(part), path)
