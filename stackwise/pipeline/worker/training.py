"""A stage's training, from where it stands to its commit: in memory, swapped, or in the phases of adaptive fusion."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stackwise.config import StackWiseConfig
from stackwise.errors import InterruptedRun
from stackwise.model import part_digest
from stackwise.pipeline.build import load_part, part_state, parts_of, save_part, stage_model
from stackwise.pipeline.device import describe, peak_memory
from stackwise.pipeline.fit import swap_of
from stackwise.pipeline.job import Source, StageJob
from stackwise.pipeline.recipe import WINDOW_CHUNKS, order_rows
from stackwise.pipeline.rows import stage_rows
from stackwise.pipeline.schedule import ADAPTER, HEAD
from stackwise.pipeline.worker.adaptive import Means, Weights, fuse_adaptively
from stackwise.pipeline.worker.boundary import RESUME, Emit, Stop
from stackwise.pipeline.worker.carrying import State, left, take_up
from stackwise.pipeline.worker.hooks import StageHooks, held_out_loss
from stackwise.pipeline.worker.swapped import record_directory, swapped_engine
from stackwise.store import ActivationStore, RowOrder
from stackwise.training import checkpoint
from stackwise.training.divergence import Rollback, anchor
from stackwise.training.engine import Engine, ResidentEngine
from stackwise.training.feed import Feed, ahead
from stackwise.training.stage import StageModel
from stackwise.training.swap import SwappedEngine
from stackwise.training.trainer import Record, Trainer

RETOLD = 1000
"""Losses told again on resuming: the last ones before a kill may have reached no one."""


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
    engine, weights = _resident(job, config, model, device)
    train_and_commit(job, config, engine, weights, feed, store, device, emit, stop, held_out)


def _resident(
    job: StageJob, config: StackWiseConfig, model: StageModel, device: torch.device
) -> tuple[Engine, Weights]:
    """The engine of a stage that is in memory, and the weights it holds."""
    stage = job.stage
    if config.training.compile:
        for block in (*model.blocks, *model.beyond):
            block.compile()
    engine = ResidentEngine(
        model,
        config.stage_training(stage.depth),
        seed=job.seed(config),
        device=device,
        first_block=stage.first,
        beyond=stage.lookahead,
    )
    parts = parts_of(model, stage)

    def weights(part: str) -> dict[str, torch.Tensor]:
        return part_state(part, engine.weights(parts[part]))

    return engine, weights


def train_and_commit(
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
    trainer = _trained(job, config, engine, feed, emit, stop, held_out)
    engine.settle()
    parts: dict[str, State] = {
        part: partial(weights, part) for part in job.stage.holds if part in job.stage.commits
    } | left(job.stage, trainer)
    _commit(job, parts, trainer.step, trainer.record, store, device, emit)
    checkpoint.remove(Path(job.checkpoints))


def _trained(
    job: StageJob,
    config: StackWiseConfig,
    engine: Engine,
    feed: Feed,
    emit: Emit,
    stop: Stop,
    held_out: Feed | None,
) -> Trainer:
    """Take an engine from where its stage stands to the last step."""
    stage, settings = job.stage, config.stage_training(job.stage.depth)
    steps = job.span.length
    trainer = Trainer(
        engine,
        settings,
        steps=steps,
        anchor=anchor(settings, steps, config.training.checkpoint_steps),
        before=job.span.first,
        budget=job.span.steps,
    )
    take_up(job, trainer)
    saving = replace(job, checkpoints=str(record_directory(job))) if isinstance(engine, SwappedEngine) else job

    warn = partial(_warn, job, emit)
    resumed = checkpoint.restore_latest(Path(saving.checkpoints), trainer, warn)
    if isinstance(engine, SwappedEngine):
        # Its steps are on the disk as they are taken; a checkpoint holds the record alone.
        resumed = engine.resume(trainer)
    if resumed:
        losses = trainer.record.losses[-RETOLD:]
        emit({"event": "resumed", "stage": stage.place, "step": trainer.step, "steps": steps, "losses": losses})
    order = RowOrder(
        job.rows,
        seed=job.order(config),
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
            raise InterruptedRun(f"stage {stage.label} stopped at step {trainer.step} of {steps}", hint=RESUME)
        if settings.keep_best:
            hooks.take_best()
    return trainer


def _fit(trainer: Trainer, feed: Feed, order: RowOrder, hooks: StageHooks) -> bool:
    """Train on from the trainer's step; whether the stage is finished."""
    settings = trainer.settings
    start = trainer.step * settings.accumulation
    with ahead(feed.shuffled(order, settings.batch_size, start), trainer.engine.device) as batches:
        return trainer.fit(iter(batches), waited=lambda: batches.waited, hooks=hooks)


def _commit(
    job: StageJob,
    weights: Mapping[str, State],
    steps: int,
    record: Record,
    store: ActivationStore,
    device: torch.device,
    emit: Emit,
    **told: Any,
) -> None:
    """Commit what a stage trained.

    Args:
        weights: Of each part what makes its state dict.
        steps: Steps taken.
        record: Of the training.
        told: What else is kept with the stage.
    """
    stage = job.stage
    digests = {name: part_digest(state()) for name, state in weights.items()}
    store.commit_stage(
        job.recipe_id,
        {name: partial(_save, state) for name, state in weights.items()},
        {
            "recipe": job.recipe,
            "depth": stage.depth,
            "window": stage.window,
            "blocks": [stage.first, stage.last],
            "parts": digests,
            "trunk": job.recipe["reads"] and job.recipe["reads"]["trunk"],
            "steps": steps,
            "losses": record.losses,
            "held_out": record.held_out,
            "divergences": record.divergences,
            "seconds": record.seconds,
            "tokens": record.tokens,
            "wait_fraction": record.wait_fraction,
            "peak_memory_bytes": peak_memory(device),
            "device": device.type,
        }
        | ({"terms": record.terms} if record.terms else {})
        | told,
    )
    emit({"event": "committed", "stage": stage.place, "recipe": job.recipe_id, "parts": digests})


def _swapped_weights(engine: SwappedEngine, part: str) -> dict[str, torch.Tensor]:
    return part_state(part, engine.weights(part.removeprefix(ADAPTER)))


def _save(state: Callable[[], Mapping[str, torch.Tensor]], path: Path) -> None:
    save_part(state(), path)


def fuse_stage(
    job: StageJob,
    config: StackWiseConfig,
    feed: Feed,
    held_out: Feed,
    store: ActivationStore,
    device: torch.device,
    emit: Emit,
    stop: Stop,
) -> None:
    """Train a stage that unfreezes one section at a time, and commit what of it trained."""

    def fit(phase: StageJob, settings: StackWiseConfig, engine: Engine, tell: Emit) -> Trainer:
        return _trained(phase, settings, engine, feed, tell, stop, held_out)

    means = Means(partial(engaged, device, emit), fit, partial(held_out_loss, held_out=held_out), emit)
    fused = fuse_adaptively(job, config, job.span.steps, means)
    files = {HEAD: job.initial[HEAD]} | fused.parts
    weights = {part: partial(_loaded, files[part]) for part in job.stage.holds if part in files}
    _commit(job, weights, fused.steps, fused.record, store, device, emit, fusion=fused.told)
    checkpoint.remove(Path(job.checkpoints))


@contextlib.contextmanager
def engaged(
    device: torch.device, emit: Emit, job: StageJob, config: StackWiseConfig
) -> Iterator[tuple[Engine, Weights]]:
    """The engine of a job's stage, swapped where it does not fit."""
    swap = swap_of(config, job.vocab_size, job.stage, int(describe(device)["memory"]))
    if swap is None:
        yield _resident(job, config, stage_model(job, config).to(device), device)
        return
    warn = partial(_warn, job, emit)
    with contextlib.closing(swapped_engine(job, config, swap, device, warn)) as engine:
        yield engine, partial(_swapped_weights, engine)


def _warn(job: StageJob, emit: Emit, text: str) -> None:
    emit({"event": "warning", "stage": job.stage.place, "text": text})


def _loaded(source: Source) -> Mapping[str, torch.Tensor]:
    tensors = load_part(source)
    assert tensors is not None, "what is fused was trained before"
    return tensors
