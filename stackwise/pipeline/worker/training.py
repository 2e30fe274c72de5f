"""A stage's training, from where it stands to its commit, whatever engine holds it; and its state between windows."""

from __future__ import annotations

import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from stackwise.config import StackWiseConfig, StageTraining
from stackwise.errors import InterruptedRun, StackWiseError
from stackwise.model import part_digest
from stackwise.model.experts import experts_used
from stackwise.pipeline.device import gpu_use, peak_memory
from stackwise.pipeline.job import StageJob
from stackwise.pipeline.parts import load_part, part_state, save_part
from stackwise.pipeline.schedule import ADAPTER, Stage
from stackwise.pipeline.worker.anchoring import part_of_state, with_measures
from stackwise.pipeline.worker.engines import resident
from stackwise.pipeline.worker.held_out import held_out_loss, tasks_after, tasks_before
from stackwise.pipeline.worker.order import row_order
from stackwise.pipeline.worker.stores import Stores
from stackwise.store import ActivationStore
from stackwise.training import checkpoint
from stackwise.training.anchor import FISHER, PLACE
from stackwise.training.checkpoint import Checkpoints, reason
from stackwise.training.curriculum import Routes
from stackwise.training.engine import WEIGHT, Engine, State
from stackwise.training.feed import Feed, RowGroups, ahead
from stackwise.training.ranks import Ranks, SingleProcess
from stackwise.training.stage import MeanLoss, StageModel
from stackwise.training.swap import PIECES
from stackwise.training.tasks import ADAPTATION
from stackwise.training.trainer import MEMORY, Carried, Progress, Record, Rollback, Trainer, anchor

Emit = Callable[[dict[str, Any]], None]
Stop = Callable[[], bool]

RESUME = "its state is saved; the same command goes on from there"


@dataclass(frozen=True)
class RolledOut:
    """What a stage's answers came to, before it trains on them."""

    figures: Mapping[str, float]  # kept in the stage's record
    state: Mapping[str, Tensor]  # what its next window takes up of them


@dataclass(frozen=True)
class StageContext:
    """A stage's work, and what it is done with."""

    job: StageJob
    config: StackWiseConfig
    store: ActivationStore
    device: torch.device
    emit: Emit
    stop: Stop
    feed: Feed  # what enters the stage; before its boundary is filled, what is stored below it
    held_out: Feed | None = None  # the rows that the stage is evaluated on as it trains; None: none
    routes: Routes | None = None  # the experts that its rows go to as it begins; None: they are not counted
    rolled_out: RolledOut | None = None  # the answers that it trains on; None: its rows are the data's
    groups: RowGroups | None = None  # the feed's rows in groups; None: they are in one
    ranks: Ranks = field(default_factory=SingleProcess)  # the processes that do it together
    stores: Stores = field(kw_only=True)  # theirs

    @property
    def stage(self) -> Stage:
        """The stage."""
        return self.job.stage

    @property
    def settings(self) -> StageTraining:
        """How it trains."""
        return self.config.stage_training(self.stage.depth)

    def event(self, name: str, **values: Any) -> None:
        """Emit an event of the stage."""
        self.emit({"event": name, "stage": self.stage.place, **values})

    def warn(self, text: str) -> None:
        """Emit a warning."""
        self.event("warning", text=text)


PASSES_SECONDS = 2.0  # between two events on how far a step is
REPORTED_AGAIN = 1000  # losses reported again on resuming: the last ones before a kill may have reached no one


def train_stage(context: StageContext, model: StageModel) -> None:
    """Train a stage that is in memory from its newest checkpoint, or from the start, and commit it."""
    train_and_commit(context, resident(context, model))


def part_weights(engine: Engine, part: str) -> dict[str, Tensor]:
    """The weights of a part as they are committed: a block's adapters are a part of their own."""
    return part_state(part, engine.weights(part.removeprefix(ADAPTER)))


def train_and_commit(context: StageContext, engine: Engine) -> None:
    """Take an engine from where its stage stands to the last step, and commit the stage."""
    trainer = trained(context, engine)
    more = tasks_after(context, engine)
    engine.settle()
    stage = context.stage
    parts: dict[str, State] = {
        part: partial(part_weights, engine, part) for part in stage.holds if part in stage.commits
    }
    rolled_out = context.rolled_out
    more |= {} if rolled_out is None else {"rollout": dict(rolled_out.figures)}
    states = with_measures(context, engine, states_out(context, trainer))
    commit_stage(context, parts | states, trainer.step, trainer.record, gathers=engine.gathers, **more)
    engine.discard()
    if context.ranks.main:  # not before: a kill during the commit goes on from them
        checkpoint.remove(Path(context.job.checkpoints))


def trained(context: StageContext, engine: Engine) -> Trainer:
    """Take an engine from where its stage stands to the last step.

    Raises:
        InterruptedRun: Told to stop; the state is saved.
    """
    job, config, stage, settings = context.job, context.config, context.stage, context.settings
    span = job.span
    trainer = Trainer(
        engine,
        settings,
        steps=span.length,
        anchor=anchor(settings, span.length, config.training.checkpoint_steps),
        before=span.first,
        budget=span.steps,
    )
    take_up(job, trainer)  # first: a checkpoint of this window is newer, and replaces it
    ranks, directory = context.ranks, Path(job.checkpoints) / engine.checkpoints
    restored_together(ranks, trainer, partial(checkpoint.restore_latest, directory, trainer, context.warn))
    if engine.resume(trainer):
        losses = trainer.record.losses[-REPORTED_AGAIN:]
        context.event("resumed", step=trainer.step, steps=span.length, losses=losses)
    else:
        tasks_before(context, engine)
    order = row_order(context)
    with StageHooks(context, trainer) as hooks:
        while True:  # again after each rollback, from the step that it goes back to
            # This rank's first microbatch: those of all steps before are passed over, so order never needs saving.
            start = ranks.microbatch((job.rows_begin + trainer.step) * (settings.accumulation // ranks.shares))
            shuffled = context.feed.shuffled(order, settings.batch_size, start, ranks.shares)
            try:
                with ahead(shuffled, engine.device, warn=context.warn) as batches:
                    finished = trainer.fit(iter(batches), waited=lambda: batches.waited, hooks=hooks)
                break
            except Rollback as back:
                hooks.roll_back(back)
        if not finished:
            raise InterruptedRun(f"stage {stage.label} stopped at step {trainer.step} of {span.length}", hint=RESUME)
        if settings.keep_best:
            hooks.take_best()
    return trainer


def commit_stage(
    context: StageContext,
    parts: Mapping[str, State],
    steps: int,
    record: Record,
    *,
    gathers: bool = False,
    **more: Any,
) -> None:
    """Commit what a stage trained: of several ranks the main one does; it is there when this returns.

    Args:
        gathers: Whether parts become whole by all ranks (`Engine.gathers`).
    """
    job, stage = context.job, context.stage
    if not context.ranks.main:
        for _ in range(2 * gathers):  # for the digests, and for the files
            for state in parts.values():
                state()
        context.ranks.wait()
        context.stores.share_stage(job.recipe_id)
        return
    digests = {name: part_digest(state()) for name, state in parts.items()}
    description = {
        "recipe": job.recipe,
        "depth": stage.depth,
        "window": stage.window,
        "blocks": [stage.first, stage.last],
        "parts": digests,
        "trunk": job.recipe["reads"] and job.recipe["reads"]["trunk"],
        "steps": steps,
        **{
            key: value
            for key, value in asdict(record).items()
            if key != "waited" and (value or not (key.endswith("terms") or key == ADAPTATION))
        },
        "wait_fraction": record.wait_fraction,
        "peak_memory_bytes": peak_memory(context.device),
        "device": context.device.type,
    }

    def save(state: State, path: Path) -> None:  # one by one: of a swapped stage not all are in memory
        save_part(state(), path)

    files = {name: partial(save, state) for name, state in parts.items()}
    context.store.commit_stage(job.recipe_id, files, description | more)
    context.event("committed", recipe=job.recipe_id, parts=digests)
    context.ranks.wait()
    context.stores.share_stage(job.recipe_id)


def restored_together(ranks: Ranks, trainer: Trainer, restore: Callable[[checkpoint.Take], bool]) -> bool:
    """Have the main rank find a checkpoint; all ranks take up what they keep of it.

    Args:
        restore: Gives what it finds to what takes it up, and says whether anything was there.

    Returns:
        Whether anything was restored.
    """
    if ranks.size == 1:
        return restore(trainer.restore)
    chosen: list[tuple[Mapping[str, Tensor], int, Record]] = []
    restored: bool = ranks.shared(restore(lambda *state: chosen.append(state)) if ranks.main else None)
    if restored:
        tensors, about = None, None
        if chosen:
            tensors, about = chosen[-1][0], [chosen[-1][1], asdict(chosen[-1][2])]
        step, record = ranks.shared(about)
        trainer.restore(ranks.shared_tensors(tensors, trainer.engine.keeps), step, Record(**record))
    return restored


def pieces_read(observed: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """What a step of a swapped stage took of its pieces in the mean, under `pieces`; empty where there are none."""
    return {PIECES: dict(zip(("reached", "bytes"), observed[PIECES], strict=True))} if PIECES in observed else {}


class StageHooks:
    """What a stage in training reports and asks: events, checkpoints by step or clock, held-out loss, ways back."""

    def __init__(self, context: StageContext, trainer: Trainer) -> None:
        self._context, self._trainer, self.stop = context, trainer, context.stop
        self._directory = Path(context.job.checkpoints) / trainer.engine.checkpoints
        self._checkpoints = Checkpoints(self._directory, context.config.training.keep_checkpoints, context.warn)
        self._ranks = context.ranks
        self._prepared = not self._ranks.main or trainer.engine.gathers  # the main rank alone saves
        # A clock that is set back or forward must not matter.
        self._saved = time.monotonic()
        self._waited = time.perf_counter(), context.ranks.waited
        self._reported = time.monotonic()
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch_step, name="step", daemon=True)

    def __enter__(self) -> Self:
        if self._ranks.main:
            self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._over.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self._checkpoints.__exit__(kind, error, trace)
        if kind is None:
            self._emit_saved()

    def _watch_step(self) -> None:
        """Emit how far the step in hand is, where it takes long: beside it, as one pass may take minutes."""
        while not self._over.wait(PASSES_SECONDS):
            seconds, trainer = time.monotonic() - self._reported, self._trainer
            passes, done = trainer.engine.phases.passes, trainer.engine.phases.done
            if seconds >= PASSES_SECONDS and done < passes:
                of = {"step": trainer.step + 1, "steps": trainer.steps}
                self._context.event("passes", **of, done=done, total=passes, seconds=round(seconds, 1))

    def report(self, progress: Progress) -> None:
        """See `Hooks.report`: a step event."""
        self._reported = time.monotonic()
        self._emit_saved()
        if not self._prepared:
            self._prepared = True
            self._checkpoints.prepare(self._trainer)
        if self._context.stage.just_grown and len(self._trainer.record.losses) == len(progress.losses):
            self._emit_grown()
        terms = dict(progress.terms) | self._context.config.objective.figures(progress.observed)
        losses = [loss for loss in progress.losses if loss is not None]
        self._context.event(
            "step",
            step=progress.step,
            steps=progress.steps,
            losses=progress.losses,
            loss=statistics.fmean(losses) if losses else None,
            learning_rate=progress.learning_rate,
            gradient_norm=progress.gradient_norm if math.isfinite(progress.gradient_norm) else None,
            tokens_per_second=progress.tokens_per_second,
            wait_fraction=progress.wait_fraction,
            memory=peak_memory(self._trainer.engine.device),
            pid=os.getpid(),
            **({} if (use := gpu_use(self._trainer.engine.device)) is None else {"gpu_use": use}),
            **({"sync_fraction": self._sync_fraction()} if self._ranks.size > 1 else {}),
            **({"terms": terms} if terms else {}),
            **({"phases": dict(progress.phases)} if progress.phases else {}),
            **experts_used(progress.observed),
            **pieces_read(progress.observed),
        )

    def _emit_grown(self) -> None:
        """Emit loss and gradient norm just before the rack grew, and at its first step since."""
        job, record = self._context.job, self._trainer.record
        last = self._context.store.stage(job.initial[job.stage.states_in[-1]].recipe, check=False)
        if last is None:
            return
        losses = [loss for loss in last.record["losses"][-MEMORY:] if loss is not None]
        before = {"loss": statistics.fmean(losses) if losses else None, "gradient_norm": last.record["norms"][-1]}
        after = {"loss": record.losses[0], "gradient_norm": record.norms[0]}
        first, until = last.record["blocks"]
        blocks = [until - first + 1 + len(last.record["recipe"]["stage"]["lookahead"])]
        blocks.append(len(job.stage.blocks) + len(job.stage.lookahead))
        self._context.event("grown", blocks=blocks, before=before, after=after)

    def checkpoint_due(self, step: int) -> bool:
        """See `Hooks.checkpoint_due`: by `checkpoint_steps`, else by the clock, unless one is on its way."""
        training = self._context.config.training
        if training.checkpoint_steps is not None:
            return step % training.checkpoint_steps == 0
        return self._ranks.agreed("save", self._clock_says)

    def _clock_says(self) -> bool:
        minutes, waited = self._context.config.training.checkpoint_minutes, time.monotonic() - self._saved
        return self._ranks.main and waited >= 60 * minutes and not self._checkpoints.busy

    def save(self, *, wait: bool) -> None:
        """See `Hooks.save`: beside training; the checkpoints that a decision may go back to stay."""
        if not self._ranks.main:
            if self._trainer.engine.gathers:
                for _ in self._trainer.engine.state().values():
                    pass
            return
        trainer, protect = self._trainer, set()
        if trainer.anchor is not None:  # a step that diverges goes back to the newest of these
            protect.add(trainer.step // trainer.anchor * trainer.anchor)
        if trainer.settings.keep_best and trainer.record.best is not None:
            protect.add(trainer.record.best[0])
        self._checkpoints.save(trainer, protect)
        self._saved = time.monotonic()
        if wait:
            self._checkpoints.finish()
        self._emit_saved()

    def evaluate(self) -> MeanLoss:
        """See `Hooks.evaluate`."""
        assert self._context.held_out is not None, "a stage that is evaluated has held-out rows"
        begun, trainer = time.perf_counter(), self._trainer
        mean = held_out_loss(trainer.engine, self._context.held_out)
        best = trainer.record.best
        lowest = mean.total if best is None else min(mean.total, best[1])
        known = dict(mean.terms) | self._context.config.objective.figures(mean.observed)
        terms = {"terms": known} if known else {}
        seconds = time.perf_counter() - begun
        experts = experts_used(mean.observed, shares=True)
        event: dict[str, Any] = {"step": trainer.step, "nats": mean.total, "best": lowest, "seconds": seconds}
        if ADAPTATION in mean.observed:
            event[ADAPTATION] = list(mean.observed[ADAPTATION])
        self._context.event("held_out", **event, **terms, **experts)
        return mean

    def diverged(self, divergence: Mapping[str, Any]) -> None:
        """See `Hooks.diverged`: an event, with a line for people."""
        done = "the step is skipped"
        if "to" in divergence:
            done = f"back to step {divergence['to']}, at a lower learning rate"
        where = f"stage {self._context.stage.depth}, step {divergence['step']}"
        self._context.event("diverged", **divergence, text=f"{where} diverged: {divergence['why']}; {done}")

    def roll_back(self, back: Rollback) -> None:
        """Take up the checkpoint that a rollback goes to.

        Where it is damaged, an earlier one, or the start: the steps from there repeat, and so does this rollback.

        Raises:
            StackWiseError: There is none; the stage begins anew when it is run again.
        """
        trainer, before = self._trainer, self._trainer.record
        target = int(str(back.divergence["to"]))
        self._checkpoints.finish()
        restored_together(self._ranks, trainer, partial(self._gone_back, target))
        if trainer.step < target:
            return
        record = trainer.record
        record.divergences = [*before.divergences, back.divergence]
        record.seconds, record.waited, record.tokens = before.seconds, before.waited, before.tokens
        if self._ranks.main:
            checkpoint.remove(self._directory, after=target)

    def _gone_back(self, target: int, take: checkpoint.Take) -> bool:
        """Restore the checkpoint of a step, or an earlier one."""
        trainer = self._trainer
        try:
            checkpoint.restore_step(self._directory, trainer, target, take)
        except checkpoint.UNREADABLE as error:
            self._context.warn(f"the checkpoint of step {target} is damaged ({reason(error)}); an earlier one is used")
            checkpoint.remove(self._directory, after=target - 1)
            if checkpoint.restore_latest(self._directory, trainer, self._context.warn, take):
                return True
            raise StackWiseError(
                f"stage {self._context.stage.depth}: no checkpoint to go back to is sound",
                hint="run again: the stage begins anew, and comes to the same weights",
            ) from error
        return True

    def take_best(self) -> None:
        """Let the engine hold the weights of the best evaluation.

        Raises:
            StackWiseError: Their checkpoint is damaged; run again, the stage goes on from the one before.
        """
        self._checkpoints.finish()
        trainer, ended, last = self._trainer, self._trainer.record, self._trainer.step
        if ended.best is None or ended.best[0] == trainer.step:
            return
        step = ended.best[0]
        restored_together(self._ranks, trainer, partial(self._best_taken, step))
        trainer.record, trainer.step = ended, last
        self._context.event("best", step=step, nats=ended.best[1])

    def _best_taken(self, step: int, take: checkpoint.Take) -> bool:
        try:
            checkpoint.restore_step(self._directory, self._trainer, step, take)
        except checkpoint.UNREADABLE as error:
            checkpoint.remove(self._directory, after=step - 1)
            which = f"the best checkpoint of stage {self._context.stage.depth}, of step {step},"
            raise StackWiseError(
                f"{which} is damaged ({reason(error)})",
                hint="run again: the stage goes on from an earlier one, and comes to the same weights",
            ) from error
        return True

    def _sync_fraction(self) -> float:
        """Share of the time since the last report that this rank waited for others and for the wire."""
        now, waited = time.perf_counter(), self._ranks.waited
        share = (waited - self._waited[1]) / max(now - self._waited[0], 1e-9)
        self._waited = now, waited
        return min(1.0, share)

    def _emit_saved(self) -> None:
        for saved in self._checkpoints.written():
            self._context.event("checkpoint", step=saved.step, seconds=saved.stopped, written_seconds=saved.seconds)


def take_up(job: StageJob, trainer: Trainer) -> None:
    """Let a trainer that has taken no step go on where its stage's window before ended: optimizer, scale, divergences.

    Raises:
        DamageError: A state's file is missing, broken or not what was committed.
    """
    if not job.stage.states_in:
        return

    def state(name: str, part: str) -> Mapping[str, Tensor]:
        source = job.initial[name]
        tensors = load_part(source) or {}
        in_training = [other for other in job.stage.trains if other.removeprefix(ADAPTER) == part]
        if any(job.initial[other].recipe != source.recipe for other in in_training):
            # Another stage has trained it since: what lay under the mean that was committed is of the past.
            tensors = {key: value for key, value in tensors.items() if not key.startswith(WEIGHT)}
        return {key: value for key, value in tensors.items() if not key.startswith((FISHER, PLACE))}

    carried: dict[str, State] = {}
    for name in job.stage.states_in:
        part = part_of_state(name)
        carried[part] = partial(state, name, part)
    trainer.carried = Carried.from_state(carried[""]())
    trainer.engine.take_up(carried)


def states_out(context: StageContext, trainer: Trainer) -> dict[str, State]:
    """The states that a stage commits for its next window, by name, once its engine has settled."""
    stage = context.stage
    if not stage.states_out:
        return {}
    of_rollout = {} if context.rolled_out is None else context.rolled_out.state
    carried = trainer.engine.carried()
    carried[""] = partial(dict[str, Tensor], {**carried[""](), **trainer.carry().state(), **of_rollout})
    return {name: carried[part_of_state(name)] for name in stage.states_out}
