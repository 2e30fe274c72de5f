"""What a stage in training tells and asks: events, checkpoints by step or by the clock, held-out loss, ways back."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from stackwise.config import StackWiseConfig
from stackwise.errors import StackWiseError
from stackwise.pipeline.device import peak_memory
from stackwise.pipeline.job import StageJob
from stackwise.training import checkpoint
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.divergence import Rollback
from stackwise.training.engine import Engine
from stackwise.training.feed import Feed, ahead
from stackwise.training.forward import forward_rows
from stackwise.training.stage import MeanLoss
from stackwise.training.trainer import Progress, Trainer

Emit = Callable[[dict[str, Any]], None]
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)


class StageHooks:
    """Connects a stage's trainer with its job.

    Args:
        job: The job.
        config: Its configuration.
        trainer: The trainer.
        held_out: The rows that the stage is evaluated on as it trains; None: none.
        emit: Told the events.
        stop: Asked whether to end.
    """

    def __init__(
        self,
        job: StageJob,
        config: StackWiseConfig,
        trainer: Trainer,
        held_out: Feed | None,
        emit: Emit,
        stop: Callable[[], bool],
    ) -> None:
        self._job, self._config, self._trainer, self._held_out = job, config, trainer, held_out
        self._emit, self.stop = emit, stop
        self._directory = Path(job.checkpoints)
        self._checkpoints = Checkpoints(self._directory, config.training.keep_checkpoints)
        self._prepared = False
        # A clock that is set back or forward must not matter.
        self._saved = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._checkpoints.__exit__(kind, error, trace)
        if kind is None:
            self._tell_saved()

    def report(self, progress: Progress) -> None:
        """A step event."""
        self._tell_saved()
        if not self._prepared:
            self._prepared = True
            self._checkpoints.prepare(self._trainer)
        taken = [loss for loss in progress.losses if loss is not None]
        self._tell(
            "step",
            step=progress.step,
            steps=progress.steps,
            losses=progress.losses,
            loss=statistics.fmean(taken) if taken else None,
            learning_rate=progress.learning_rate,
            gradient_norm=progress.gradient_norm if math.isfinite(progress.gradient_norm) else None,
            tokens_per_second=progress.tokens_per_second,
            wait_fraction=progress.wait_fraction,
            **({"terms": dict(progress.terms)} if progress.terms else {}),
            memory=peak_memory(self._trainer.engine.device),
            pid=os.getpid(),
        )

    def checkpoint_due(self, step: int) -> bool:
        """By `checkpoint_steps`, else by the clock, unless one is on its way."""
        every = self._config.training.checkpoint_steps
        if every is not None:
            return step % every == 0
        waited = time.monotonic() - self._saved
        return waited >= 60 * self._config.training.checkpoint_minutes and not self._checkpoints.busy

    def save(self, *, wait: bool) -> None:
        """Save beside training; the checkpoints that a decision may go back to stay."""
        trainer, protect = self._trainer, set()
        if trainer.anchor is not None:
            protect.add(trainer.step // trainer.anchor * trainer.anchor)
        if trainer.settings.keep_best and trainer.record.best is not None:
            protect.add(trainer.record.best[0])
        self._checkpoints.save(trainer, protect)
        self._saved = time.monotonic()
        if wait:
            self._checkpoints.finish()
        self._tell_saved()

    def evaluate(self) -> MeanLoss:
        """The mean loss on the held-out rows."""
        assert self._held_out is not None, "a stage that is evaluated has held-out rows"
        begun, trainer = time.perf_counter(), self._trainer
        mean = held_out_loss(trainer.engine, self._held_out)
        loss, terms = mean.total, {"terms": dict(mean.terms)} if mean.terms else {}
        best = trainer.record.best
        lowest = loss if best is None else min(loss, best[1])
        self._tell("held_out", step=trainer.step, nats=loss, best=lowest, seconds=time.perf_counter() - begun, **terms)
        return mean

    def diverged(self, told: Mapping[str, Any]) -> None:
        """A divergence event, with a line for people."""
        step, why = told["step"], told["why"]
        done = f"back to step {told['to']}, at a lower learning rate" if "to" in told else "the step is skipped"
        self._tell("diverged", **told, text=f"stage {self._job.stage.depth}, step {step} diverged: {why}; {done}")

    def roll_back(self, back: Rollback, warn: Callable[[str], None]) -> None:
        """Take up the checkpoint that a rollback goes to.

        Where it is damaged, an earlier one, or the start: the steps from there repeat, and so does this rollback.

        Raises:
            StackWiseError: There is none; the stage begins anew when it is run again.
        """
        trainer, before, target = self._trainer, self._trainer.record, int(str(back.told["to"]))
        self._checkpoints.finish()
        try:
            checkpoint.restore_step(self._directory, trainer, target)
        except _UNREADABLE as error:
            warn(f"the checkpoint of step {target} is damaged ({error}); an earlier one is used")
            checkpoint.remove(self._directory, after=target - 1)
            if checkpoint.restore_latest(self._directory, trainer, warn):
                return
            raise StackWiseError(
                f"stage {self._job.stage.depth}: no checkpoint to go back to is sound",
                hint="run again: the stage begins anew, and comes to the same weights",
            ) from error
        record = trainer.record
        record.divergences = [*before.divergences, back.told]
        record.seconds, record.waited, record.tokens = before.seconds, before.waited, before.tokens
        checkpoint.remove(self._directory, after=target)

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
        try:
            checkpoint.restore_step(self._directory, trainer, step)
        except _UNREADABLE as error:
            checkpoint.remove(self._directory, after=step - 1)
            raise StackWiseError(
                f"the best checkpoint of stage {self._job.stage.depth}, of step {step}, is damaged ({error})",
                hint="run again: the stage goes on from an earlier one, and comes to the same weights",
            ) from error
        trainer.record, trainer.step = ended, last
        self._tell("best", step=step, nats=ended.best[1])

    def _tell_saved(self) -> None:
        for saved in self._checkpoints.told():
            self._tell("checkpoint", step=saved.step, seconds=saved.stopped, written_seconds=saved.seconds)

    def _tell(self, event: str, **values: Any) -> None:
        self._emit({"event": event, "stage": self._job.stage.place, **values})


def held_out_loss(engine: Engine, held_out: Feed) -> MeanLoss:
    """The mean loss of an engine's weights on held-out rows, in nats."""
    batch_size = forward_rows(held_out.seq_len)  # it shapes the sum, so it is not a setting
    with ahead(held_out.sequential([(0, held_out.rowset.rows)], batch_size), engine.device) as batches:
        return engine.evaluate(batches)
