"""The one trainer: the loop over a stage's steps, with what is told, saved and decided between them.

Randomness is a pure function of (seed, stage, step, microbatch), so a trainer restored at step n goes on as one that
was never stopped: its state is the engine's and the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from stackwise.config import StageTraining
from stackwise.errors import StackWiseError
from stackwise.training.engine import Engine, Stepped
from stackwise.training.optim import learning_rate
from stackwise.training.stage import Batch

REPORT_SECONDS = 0.25
"""Losses are read off the device at most this often, so that reporting never stalls it."""


@dataclass
class Progress:
    """How a stage's training stands. `losses` are those since the last report, one a step, in nats."""

    step: int
    steps: int
    losses: list[float]
    learning_rate: float
    tokens_per_second: float
    wait_fraction: float


@dataclass
class Record:
    """What training leaves behind beside the weights; a checkpoint carries it on."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    waited: float = 0.0
    tokens: int = 0

    @property
    def wait_fraction(self) -> float:
        """Share of the time that training waited for data."""
        return self.waited / self.seconds if self.seconds else 0.0


class Hooks(Protocol):
    """What a trainer tells, and asks, as it goes."""

    def report(self, progress: Progress) -> None:
        """How it stands; a few times a second."""

    def checkpoint_due(self, step: int) -> bool:
        """Whether to save after this step."""

    def save(self) -> None:
        """Save; also called before an early end."""

    def stop(self) -> bool:
        """Whether to end after this step; asked at each."""


class Trainer:
    """Takes an engine through a stage's steps.

    Args:
        engine: What holds the stage and takes its steps.
        settings: Learning rate, batch and the rest.
        steps: How many optimizer steps the stage takes.
    """

    def __init__(self, engine: Engine, settings: StageTraining, *, steps: int) -> None:
        self.engine, self.settings, self.steps = engine, settings, steps
        self.step = 0
        self.record = Record()

    def restore(self, tensors: Mapping[str, torch.Tensor], step: int, record: Record) -> None:
        """Take up the engine's state as it was at `step`."""
        self.engine.restore(tensors)
        self.step, self.record = step, record

    def train_step(self, microbatches: Sequence[Batch]) -> Stepped:
        """One optimizer step over `accumulation` microbatches, at the rate that the schedule gives."""
        microbatches = [replace(batch, step=self.step) for batch in microbatches]
        stepped = self.engine.step(microbatches, self.step, learning_rate(self.settings, self.step, self.steps))
        self.step += 1
        return stepped

    def fit(
        self,
        batches: Iterator[Batch],
        *,
        waited: Callable[[], float],
        hooks: Hooks,
    ) -> bool:
        """Train to the last step.

        Args:
            batches: Microbatches from the trainer's step on.
            waited: Seconds spent waiting for `batches` so far.
            hooks: What is told and asked as training goes.

        Returns:
            Whether the last step was reached.

        Raises:
            StackWiseError: The loss is no longer a finite number.
        """
        pending: list[Stepped] = []
        begun = reported = time.perf_counter()
        waited_before, seconds_before, tokens = self.record.waited, self.record.seconds, 0
        while self.step < self.steps:
            microbatches = [next(batches) for _ in range(self.settings.accumulation)]
            tokens += sum(batch.tokens_BS.numel() for batch in microbatches)
            pending.append(self.train_step(microbatches))
            now = time.perf_counter()
            stopping = hooks.stop() or self.step == self.steps
            saving = hooks.checkpoint_due(self.step) or stopping
            if saving or now - reported >= REPORT_SECONDS:
                losses = torch.stack([stepped.loss for stepped in pending]).tolist()
                now = time.perf_counter()
                self.record.losses += losses
                self.record.seconds = seconds_before + now - begun
                self.record.waited = waited_before + waited()
                self.record.tokens += tokens
                if not all(map(math.isfinite, losses)):
                    first = self.step - len(losses) + next(i for i, x in enumerate(losses) if not math.isfinite(x))
                    raise StackWiseError(
                        f"the loss is no longer a finite number at step {first + 1} of {self.steps}",
                        hint="lower training.learning_rate (for this stage: stages.K.training.learning_rate) or "
                        "training.grad_clip, and run again",
                    )
                rate = learning_rate(self.settings, self.step - 1, self.steps)
                speed = tokens / (now - reported)
                hooks.report(Progress(self.step, self.steps, losses, rate, speed, self.record.wait_fraction))
                pending, reported, tokens = [], now, 0
                if saving and self.step < self.steps:
                    hooks.save()
            if stopping:
                break
        return self.step >= self.steps
