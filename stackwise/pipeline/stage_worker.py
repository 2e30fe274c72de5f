"""What a worker does with its stage: train, commit, write the boundary above. Every step of it can be resumed."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stackwise.config import StackWiseConfig
from stackwise.data import PreparedData
from stackwise.durable import FileLock
from stackwise.errors import InterruptedRun
from stackwise.model import part_digest
from stackwise.pipeline.build import parts_of, save_part, stage_model
from stackwise.pipeline.device import make_deterministic, peak_memory
from stackwise.pipeline.job import StageJob
from stackwise.pipeline.recipe import WINDOW_CHUNKS, codec_name, order_rows, stage_steps, trunk_id
from stackwise.pipeline.rows import choose_samples, stage_rows
from stackwise.store import CODECS, ActivationStore, BoundaryInfo, BoundaryReader, RowOrder
from stackwise.training import checkpoint
from stackwise.training.engine import Engine, ResidentEngine
from stackwise.training.feed import Feed, ahead
from stackwise.training.forward import write_boundary
from stackwise.training.stage import StageModel
from stackwise.training.trainer import Progress, Trainer

Emit = Callable[[dict[str, Any]], None]
Stop = Callable[[], bool]

RETOLD = 1000
"""Losses told again on resuming: the last ones before a kill may have reached no one."""
RESUME = "its state is saved; the same command goes on from there"


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
        data = PreparedData.open(Path(job.data))
        model = stage_model(job, config).to(device)
        if job.train:
            feed = _feed(config, data, store, reader, job.rowset, job.stage.rowset)
            train_stage(job, config, model, feed, store, device, emit, stop)
        if job.writes_rowset is not None:
            # The head and the optimizer are done with; what remains is one forward pass.
            digests = [part_digest(module) for module in _passed_on(model, job).values()]
            model.head, model.beyond = None, nn.ModuleList()
            gc.collect()
            feed = _feed(config, data, store, reader, job.writes_rowset, job.writes_number)
            write_above(job, config, model, feed, store, digests, device, emit, stop)


def _passed_on(model: StageModel, job: StageJob) -> dict[str, nn.Module]:
    return {name: module for name, module in parts_of(model, job.stage).items() if name in job.stage.hands_on}


def _feed(
    config: StackWiseConfig,
    data: PreparedData,
    store: ActivationStore,
    reader: BoundaryReader | None,
    rowset: str,
    number: int,
) -> Feed:
    return Feed(
        data.train,
        config.training.seq_len,
        choose_samples(config, data.train, number),
        store,
        store.rowset(rowset),
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


def write_above(
    job: StageJob,
    config: StackWiseConfig,
    model: StageModel,
    feed: Feed,
    store: ActivationStore,
    digests: list[str],
    device: torch.device,
    emit: Emit,
    stop: Stop,
) -> None:
    """Write what the boundary above a stage still lacks."""
    stage, clock = job.stage, time.perf_counter()
    trunk = trunk_id(job.forward, [*job.trunk_digests, *digests])
    codec = codec_name(config.store)
    begun = store.find(trunk=trunk, rowset=feed.rowset.id, codec=codec)
    with store.writer(
        trunk=trunk,
        rowset=feed.rowset.id,
        depth=stage.depth + 1,
        seq_len=config.row_positions,
        d_model=config.model.d_model,
        codec=codec,
        chunk_rows=boundary_chunk_rows(config, feed.rowset.rows, begun),
        attributes={"blocks_below": stage.last + 1},
    ) as writer:
        emit({"event": "writing", "stage": stage.place, "boundary": writer.info.id, "chunks": writer.info.chunks})
        done = write_boundary(
            model,
            feed,
            writer,
            device,
            progress=lambda done, total: emit(
                {"event": "boundary", "stage": stage.place, "done": done, "total": total}
            ),
            stop=stop,
        )
    if not done.finished:
        raise InterruptedRun(f"stage {stage.depth} stopped while writing boundary {stage.depth + 1}", hint=RESUME)
    info = next(info for info in store.boundaries() if info.id == writer.info.id)
    emit(
        {
            "event": "written",
            "stage": stage.place,
            "boundary": info.id,
            "bytes": info.disk_bytes,
            "rows": info.rows,
            "seconds": time.perf_counter() - clock,
            "wait_fraction": done.wait_fraction,
            "blocked_fraction": done.blocked_fraction,
        }
    )


def boundary_chunk_rows(config: StackWiseConfig, rows: int, begun: BoundaryInfo | None) -> int:
    """Rows in a chunk on disk: those of a boundary that was begun before, else by `store.chunk_bytes`."""
    if begun is not None:
        return begun.chunk_rows
    row_bytes = CODECS[codec_name(config.store)].row_bytes(config.row_positions, config.model.d_model)
    fitting = max(1, config.store.chunk_bytes // row_bytes)
    return min(rows, 1 << (fitting.bit_length() - 1))
