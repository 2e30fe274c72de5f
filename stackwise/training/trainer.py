"""The one trainer: steps over batches, with gradients exact over accumulated microbatches.

Every draw is a pure function of (seed, stage, step, microbatch), so a trainer restored at step n goes on as one
that was never stopped: its state is the weights, the optimizer's moments and the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from stackwise.config import StageTraining
from stackwise.errors import StackWiseError
from stackwise.identity import derive_seed
from stackwise.training.optim import learning_rate, make_optimizer
from stackwise.training.stage import Batch, StageModel

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
    """Trains what of a `StageModel` requires gradients.

    Args:
        model: The stage, on its device.
        settings: Learning rate, batch, clipping and the rest.
        steps: How many optimizer steps the stage takes.
        seed: The parts that its randomness follows from, such as (seed, stage).
        device: Where `model` is.
    """

    def __init__(
        self,
        model: StageModel,
        settings: StageTraining,
        *,
        steps: int,
        seed: tuple[int | str, ...],
        device: torch.device,
    ) -> None:
        self.model, self.settings, self.steps, self.seed, self.device = model, settings, steps, seed, device
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.parameters.values(), settings)
        self.step = 0
        self.record = Record()

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments by name; with `step` and `record`, all that a checkpoint needs."""
        tensors = {f"weight/{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state.get(p, {}).items()}
        return tensors

    def restore(self, tensors: dict[str, torch.Tensor], step: int, record: Record) -> None:
        """Take up the state that `state` gave, in place: no second copy of the weights is made."""
        for name, p in self.parameters.items():
            p.data.copy_(tensors.pop(f"weight/{name}"))
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for key in list(tensors):
            kind, _, name = key.partition("/")
            moments.setdefault(name, {})[kind] = tensors.pop(key)
        for name, p in self.parameters.items():
            if name in moments:
                self.optimizer.state[p] = {
                    kind: value if kind == "step" and value.device == p.device else value.to(p.device)
                    for kind, value in moments[name].items()
                }
        self.step, self.record = step, record

    def train_step(self, microbatches: list[Batch] | Iterator[Batch]) -> torch.Tensor:
        """One optimizer step over `accumulation` microbatches.

        The gradient is that of the mean loss over all their scored positions, however these fall into the
        microbatches.

        Returns:
            The mean loss, a scalar on the device: reading it waits for the device.
        """
        rate = learning_rate(self.settings, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.device)
        scored = 0
        for number, cpu_batch in enumerate(microbatches):
            batch = cpu_batch.to(self.device)
            torch.manual_seed(derive_seed(*self.seed, self.step, number, "dropout"))
            with self.model.numerics(self.device):
                loss, count = self.model(batch)
            # Scaled by a constant now and by the true count below, which is known only at the last microbatch.
            (loss / batch.tokens_BS.numel()).backward()
            total += loss.detach()
            scored += int(count)
            nominal = batch.tokens_BS.numel()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if gradients and scored:
            torch._foreach_mul_(gradients, nominal / scored)
            if self.settings.grad_clip > 0:
                torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total / max(scored, 1)

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
        self.model.train()
        pending: list[torch.Tensor] = []
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
                losses = torch.stack(pending).tolist()
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
