"""What a worker does with its stage: train, commit, write the boundary above. Every step of it can be resumed."""

from __future__ import annotations

import contextlib
import gc
import os
import time
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
from stackwise.pipeline.build import frozen_stage, parts_of, save_part, stage_model
from stackwise.pipeline.device import make_deterministic, peak_memory
from stackwise.pipeline.job import StageJob
from stackwise.pipeline.recipe import WINDOW_CHUNKS, order_rows, stage_steps
from stackwise.pipeline.rows import choose_samples, stage_rows
from stackwise.store import ActivationStore, BoundaryReader, RowOrder
from stackwise.training import checkpoint
from stackwise.training.engine import Engine, ResidentEngine
from stackwise.training.feed import Feed, ahead
from stackwise.training.stage import StageModel
from stackwise.training.trainer import Progress, Trainer

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
        below = _feed(job, config, store, reader)
        frozen = [frozen_stage(one, job, config).to(device) for one in job.through]
        model = stage_model(job, config).to(device)
        if job.train:
            with entering(job, config, below, frozen, store, device, emit, stop) as feed:
                train_stage(job, config, model, feed, store, device, emit, stop)
        if job.writes:
            # The head and the optimizer are done with; what remains is one forward pass.
            digests = [part_digest(module) for module in _passed_on(model, job).values()]
            model.head, model.beyond = None, nn.ModuleList()
            gc.collect()
            write_above(job, config, [*frozen, model], below, store, digests, device, emit, stop)


def _passed_on(model: StageModel, job: StageJob) -> dict[str, nn.Module]:
    return {name: module for name, module in parts_of(model, job.stage).items() if name in job.stage.hands_on}


def _feed(job: StageJob, config: StackWiseConfig, store: ActivationStore, reader: BoundaryReader | None) -> Feed:
    """The job's rows as they are stored: tokens, masks, and the boundary that is read."""
    data = PreparedData.open(Path(job.data))
    return Feed(
        data.train,
        config.training.seq_len,
        choose_samples(config, data.train, job.rowset_number),
        store,
        store.rowset(job.rowset),
        reader,
        within_documents=config.data.within_documents,
        targets=config.objective == "custom",
    )


class _Hooks:
    """A stage's training as events, checkpoints by step or by the clock."""

    def __init__(self, job: StageJob, config: StackWiseConfig, trainer: Trainer, emit: Emit, stop: Stop) -> None:
        self._job, self._config, self._trainer, self._emit = job, config, trainer, emit
        self.stop = stop
        self._saved = time.monotonic()

    def report(self, progress: Progress) -> None:
        self._emit(
            {
                "event": "step",
                "stage": self._job.stage.place,
                "step": progress.step,
                "steps": progress.steps,
                "losses": progress.losses,
                "loss": sum(progress.losses) / len(progress.losses),
                "learning_rate": progress.learning_rate,
                "tokens_per_second": progress.tokens_per_second,
                "wait_fraction": progress.wait_fraction,
                "memory": peak_memory(self._trainer.engine.device),
                "pid": os.getpid(),
            }
        )

    def checkpoint_due(self, step: int) -> bool:
        every = self._config.training.checkpoint_steps
        if every is not None:
            return step % every == 0
        return time.monotonic() - self._saved >= 60 * self._config.training.checkpoint_minutes

    def save(self) -> None:
        begun = time.perf_counter()
        checkpoint.save(Path(self._job.checkpoints), self._trainer)
        self._saved = time.monotonic()
        seconds = time.perf_counter() - begun
        self._emit(
            {"event": "checkpoint", "stage": self._job.stage.place, "step": self._trainer.step, "seconds": seconds}
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
) -> None:
    """Train a stage from its newest checkpoint, or from the start, and commit it."""
    stage, settings = job.stage, config.stage_training(job.stage.depth)
    steps = stage_steps(config, stage.depth, job.rows)
    if config.training.compile:
        for block in (*model.blocks, *model.beyond):
            block.compile()
    engine = ResidentEngine(model, settings, seed=(config.seed, stage.depth), device=device, first_block=stage.first)
    trainer = Trainer(engine, settings, steps=steps)
    directory = Path(job.checkpoints)

    def warn(text: str) -> None:
        emit({"event": "warning", "stage": stage.place, "text": text})

    if checkpoint.restore_latest(directory, trainer, warn):
        losses = trainer.record.losses[-RETOLD:]
        emit({"event": "resumed", "stage": stage.place, "step": trainer.step, "steps": steps, "losses": losses})
    order = RowOrder(
        job.rows,
        seed=(config.seed, stage.depth, "order"),
        chunk_rows=order_rows(config, job.rows),
        window_chunks=WINDOW_CHUNKS,
        select=stage_rows(config, feed.rowset.sample_ids, stage.depth, stage.rowset),
    )
    start = trainer.step * settings.accumulation
    with ahead(feed.shuffled(order, settings.batch_size, start), device) as batches:
        hooks = _Hooks(job, config, trainer, emit, stop)
        finished = trainer.fit(iter(batches), waited=lambda: batches.waited, hooks=hooks)
    if not finished:
        raise InterruptedRun(f"stage {stage.depth} stopped at step {trainer.step} of {steps}", hint=RESUME)
    _commit(job, model, trainer, store, device, emit)
    checkpoint.remove(directory)


def _commit(
    job: StageJob, model: StageModel, trainer: Trainer, store: ActivationStore, device: torch.device, emit: Emit
) -> None:
    stage, record = job.stage, trainer.record
    trained = {name: module for name, module in parts_of(model, stage).items() if name in stage.trains}
    trainer.engine.settle()
    digests = {name: part_digest(trainer.engine.weights(module)) for name, module in trained.items()}
    store.commit_stage(
        job.recipe_id,
        {name: partial(_save, trainer.engine, module) for name, module in trained.items()},
        {
            "recipe": job.recipe,
            "depth": stage.depth,
            "window": stage.window,
            "blocks": [stage.first, stage.last],
            "parts": digests,
            "trunk": job.recipe["reads"] and job.recipe["reads"]["trunk"],
            "steps": trainer.step,
            "losses": record.losses,
            "seconds": record.seconds,
            "tokens": record.tokens,
            "wait_fraction": record.wait_fraction,
            "peak_memory_bytes": peak_memory(device),
            "device": device.type,
        },
    )
    emit({"event": "committed", "stage": stage.place, "recipe": job.recipe_id, "parts": digests})


def _save(engine: Engine, module: nn.Module, path: Path) -> None:
    save_part(engine.weights(module), path)
