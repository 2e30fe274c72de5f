"""The one trainer: the loop over a stage's steps, with what is reported, saved and decided between them.

Randomness is a pure function of (seed, stage, step, microbatch), so a trainer restored at step n goes on as one that
was never stopped: its state is the engine's, the step and the record. Whatever is decided follows from these.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from stackwise.batch import Batch
from stackwise.config import StageTraining
from stackwise.config.choices import Skip
from stackwise.errors import StackWiseError
from stackwise.training.engine import LOWER_RATE, Engine, Stepped
from stackwise.training.optim import learning_rate
from stackwise.training.stage import MeanLoss
from stackwise.training.tasks import ADAPTATION

REPORT_SECONDS = 0.25  # losses are read off the device at most this often, so that reporting never stalls it
MEMORY = 32  # losses that the running median is taken over
LEAST = 8  # losses before which there is no median to go by


@dataclass
class Progress:
    """Progress of a stage's training.

    Args:
        terms: Where the loss has several, the mean of each since the last report.
        observed: Of what is only looked at, the means since the last report.
        phases: Seconds of `forward`, `backward` and `optimizer` since the last report.
    """

    step: int
    steps: int
    losses: list[float | None]  # those since the last report, one a step, in nats; None for a step that was refused
    learning_rate: float
    gradient_norm: float  # of the last step, before clipping
    tokens_per_second: float
    wait_fraction: float
    terms: Mapping[str, float] = field(default_factory=dict)
    observed: Mapping[str, Sequence[float]] = field(default_factory=dict)
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Record:
    """What training leaves behind beside the weights; a checkpoint carries it on.

    Args:
        held_out: (step, mean held-out loss in nats), at each evaluation.
        divergences: What diverged, and what was done: step, why, action; of a rollback the step gone back to.
        terms: Where the loss has several terms, each one's mean in every step; None where it is not known.
        held_out_terms: The same of evaluations: (step, mean) by term.
        adaptation: Of evaluations on tasks held out the query loss before the inner steps and after each: (step,
            nats).
        norms: Gradient norms of the first step and the last, before clipping; None where it is no finite number.
    """

    losses: list[float | None] = field(default_factory=list)  # one a step, in nats; None for a step that was refused
    seconds: float = 0.0
    waited: float = 0.0
    tokens: int = 0
    held_out: list[tuple[int, float]] = field(default_factory=list)
    divergences: list[dict[str, Any]] = field(default_factory=list)
    terms: dict[str, list[float | None]] = field(default_factory=dict)
    held_out_terms: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    adaptation: list[tuple[int, list[float]]] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)

    @property
    def wait_fraction(self) -> float:
        """Share of the time that training waited for data."""
        return self.waited / self.seconds if self.seconds else 0.0

    @property
    def best(self) -> tuple[int, float] | None:
        """The evaluation with the lowest loss, the first of equal ones."""
        return min(self.held_out, key=lambda entry: entry[1], default=None)

    @property
    def rollbacks(self) -> int:
        """How often training went back."""
        return sum(one["action"] == "rollback" for one in self.divergences)

    def add(self, losses: Sequence[float | None], terms: Mapping[str, Sequence[float | None]]) -> None:
        """Add some steps; terms of steps before that are not known are filled up."""
        for name, means in terms.items():
            known = self.terms.setdefault(name, [])
            known += [*[None] * (len(self.losses) - len(known)), *means]
        self.losses += losses

    def correct(self, losses: Sequence[float | None], held_out: Iterable[tuple[int, float]]) -> None:
        """Say of the steps that were done what is known of them, where that is other steps than are recorded.

        Args:
            losses: Of every step done; None: it was refused.
            held_out: More evaluations.
        """
        done = len(losses)
        self.losses = list(losses)
        self.terms = {name: means[:done] for name, means in self.terms.items()}
        self.held_out = sorted({step: loss for step, loss in (*self.held_out, *held_out) if step <= done}.items())
        self.held_out_terms = {
            name: [one for one in means if one[0] <= done] for name, means in self.held_out_terms.items()
        }
        self.divergences = [entry for entry in self.divergences if entry["step"] <= done]
        recorded = {entry["step"] for entry in self.divergences}
        refused = [step for step, loss in enumerate(losses, 1) if loss is None and step not in recorded]
        self.divergences += [{"step": step, "why": "reported before a kill", "action": "skip"} for step in refused]


@dataclass(frozen=True)
class Carried:
    """What a trainer takes over from the stage's windows before, beside the engine's state."""

    rollbacks: int = 0  # how often training went back, at a lower learning rate each time
    losses: Sequence[float | None] = ()  # the last ones; None for a step that was refused

    def state(self) -> dict[str, torch.Tensor]:
        """As tensors, to be committed."""
        losses = [math.nan if loss is None else loss for loss in self.losses]
        return {"rollbacks": torch.tensor([self.rollbacks]), "losses": torch.tensor(losses, dtype=torch.float64)}

    @classmethod
    def from_state(cls, tensors: Mapping[str, torch.Tensor]) -> Carried:
        """The inverse of `state`."""
        losses = [None if math.isnan(loss) else loss for loss in tensors["losses"].tolist()]
        return cls(int(tensors["rollbacks"]), losses)


class Hooks(Protocol):
    """What a trainer calls as it goes: to report, and to ask."""

    def report(self, progress: Progress) -> None:
        """Report progress; called a few times a second."""

    def checkpoint_due(self, step: int) -> bool:
        """Whether to save after this step."""

    def save(self, *, wait: bool) -> None:
        """Save; also called before an early end. With `wait`, return when it is on the disk."""

    def stop(self) -> bool:
        """Whether to end after this step; asked at each."""

    def evaluate(self) -> MeanLoss:
        """The mean loss on held-out rows; asked where `training.eval_every` says."""

    def diverged(self, divergence: Mapping[str, Any]) -> None:
        """A step was refused."""


class Trainer:
    """Takes an engine through a stage's steps.

    Args:
        steps: How many optimizer steps it takes; all below counts these.
        anchor: Steps between the checkpoints that a rollback goes back to.
        before: Steps that the stage has taken already, in windows before this one.
        budget: Those that it takes in all, over which learning rates are spread; None: `steps`.
    """

    def __init__(
        self,
        engine: Engine,
        settings: StageTraining,
        *,
        steps: int,
        anchor: int | None = None,
        before: int = 0,
        budget: int | None = None,
    ) -> None:
        self.engine, self.settings, self.steps, self.anchor = engine, settings, steps, anchor
        self.before, self.budget = before, before + steps if budget is None else budget
        self.step = 0
        self.record = Record()
        self.carried = Carried()

    @property
    def finished(self) -> bool:
        """Whether the last step is done, or held-out loss has not fallen for `training.patience` evaluations."""
        record, patience = self.record, self.settings.patience
        if self.step >= self.steps or patience is None or record.best is None:
            return self.step >= self.steps
        return sum(step > record.best[0] for step, _ in record.held_out) >= patience

    def restore(self, tensors: Mapping[str, torch.Tensor], step: int, record: Record) -> None:
        """Take up the engine's state as it was at `step`."""
        self.engine.restore(tensors)
        self.step, self.record = step, record

    def carry(self) -> Carried:
        """What a later window takes over."""
        losses = [*self.carried.losses, *self.record.losses][-MEMORY:]
        return Carried(self.carried.rollbacks + self.record.rollbacks, losses)

    def rate(self, step: int) -> float:
        """The learning rate of a step: that of the schedule, lowered at every rollback."""
        lowered = self.settings.divergence.lowered(self.carried.rollbacks + self.record.rollbacks)
        return learning_rate(self.settings, self.before + step, self.budget) * lowered

    def train_step(self, microbatches: Iterable[Batch], watch: Watch | None = None) -> Stepped:
        """One optimizer step over this rank's microbatches, at the rate that the schedule gives."""
        # Counted over all windows: the rate and the random draws of a step follow from its number.
        number = self.before + self.step
        accept = None if watch is None else watch.accept
        stepped = self.engine.step(microbatches, number, self.rate(self.step), accept)
        self.step += 1
        return stepped

    def fit(self, batches: Iterator[Batch], *, waited: Callable[[], float], hooks: Hooks) -> bool:
        """Train to the last step.

        Args:
            waited: Seconds spent waiting for `batches` so far.

        Returns:
            Whether the stage is finished.

        Raises:
            StackWiseError: The loss is no longer a finite number, or training diverged too often.
            Rollback: It is to go on from the checkpoint that this names.
        """
        settings, ranks = self.settings, self.engine.ranks
        policy, losses = settings.divergence, [*self.carried.losses, *self.record.losses]
        watch = Watch(policy, losses) if isinstance(policy, Skip) else None
        pending: list[tuple[Stepped, bool]] = []
        begun = reported = time.perf_counter()
        waited_before, seconds_before, tokens = self.record.waited, self.record.seconds, 0

        def drawn() -> Iterator[Batch]:
            nonlocal tokens
            for _ in range(settings.accumulation // ranks.shares):
                batch = next(batches)
                tokens += ranks.shares * batch.tokens_BS.numel()
                yield batch

        if self._at_anchor():
            hooks.save(wait=False)
        # Of a run that ended between a checkpoint and its evaluation.
        self._evaluate(hooks)
        while not self.finished:
            stepped = self.train_step(drawn(), watch)
            refused = watch is not None and watch.verdict is not None
            pending.append((stepped, refused))
            if watch is not None and refused:
                self._refused(watch, hooks)
            now = time.perf_counter()
            evaluating = self._evaluation_due()
            # All ranks end after the same step: one that went on alone would wait for the others without end.
            stopping = ranks.agreed("stop", hooks.stop) or self.step == self.steps
            saving = hooks.checkpoint_due(self.step) or stopping or evaluating or self._at_anchor()
            if saving or now - reported >= REPORT_SECONDS:
                losses, terms = self._read(pending)
                now = time.perf_counter()  # once more: reading waited for the device to finish its steps
                self.record.add(losses, terms)
                self.record.seconds = seconds_before + now - begun
                self.record.waited = waited_before + waited()
                self.record.tokens += tokens
                for number, loss in enumerate(losses, self.step - len(losses) + 1):
                    if loss is not None and not math.isfinite(loss):
                        text = f"the loss is no longer a finite number at step {number} of {self.steps}"
                        raise StackWiseError(text, hint=f"{LOWER_RATE}, and run again")
                rate, norm = self.rate(self.step - 1), float(pending[-1][0].gradient_norm)
                for value in [float(pending[0][0].gradient_norm)] * (not self.record.norms) + [norm]:
                    # The first stays in its place, the newest takes that of the one before.
                    self.record.norms[1:] = [value if math.isfinite(value) else None]
                speed = tokens / (now - reported)
                waiting, means = self.record.wait_fraction, {name: _mean(some) for name, some in terms.items()}
                known = {name: mean for name, mean in means.items() if mean is not None}
                observed = self._observed(pending)
                phases = self.engine.phases.take()
                hooks.report(
                    Progress(self.step, self.steps, losses, rate, norm, speed, waiting, known, observed, phases)
                )
                pending, reported, tokens = [], now, 0
                # The last step is not saved but committed; an evaluation never comes before the checkpoint of its step
                # is safe.
                if saving and (self.step < self.steps or evaluating):
                    hooks.save(wait=evaluating or stopping)
            if stopping and self.step < self.steps:
                break
            self._evaluate(hooks)
        return self.finished

    def _at_anchor(self) -> bool:
        return self.anchor is not None and self.step % self.anchor == 0

    def _evaluation_due(self) -> bool:
        every, held_out = self.settings.eval_every, self.record.held_out
        if not self.settings.evaluates or not self.step or (held_out and held_out[-1][0] >= self.step):
            return False
        return self.step == self.steps or (every is not None and self.step % every == 0)

    def _evaluate(self, hooks: Hooks) -> None:
        if self._evaluation_due():
            mean = hooks.evaluate()
            self.record.held_out.append((self.step, mean.total))
            if ADAPTATION in mean.observed:
                self.record.adaptation.append((self.step, list(mean.observed[ADAPTATION])))
            for name, value in mean.terms.items():
                self.record.held_out_terms.setdefault(name, []).append((self.step, value))

    def _refused(self, watch: Watch, hooks: Hooks) -> None:
        """A step was refused: go on without it, or back."""
        times = len(self.record.divergences)
        if times >= watch.policy.limit:
            before = f"after {times} {'rollbacks' if watch.policy.goes_back else 'skips'}"
            raise StackWiseError(
                f"step {self.step} diverged ({watch.verdict}), {before}",
                hint=f"{LOWER_RATE}, or raise training.divergence.limit, and run again",
            )
        divergence: dict[str, Any] = {"step": self.step, "why": watch.verdict, "action": watch.policy.name}
        if self.anchor is not None:
            # Of the steps before: were this one an anchor, its weights would be those that diverged.
            divergence["to"] = (self.step - 1) // self.anchor * self.anchor
        hooks.diverged(divergence)
        if self.anchor is not None:
            raise Rollback(divergence)
        self.record.divergences.append(divergence)

    def _read(self, pending: list[tuple[Stepped, bool]]) -> tuple[list[float | None], dict[str, list[float | None]]]:
        """The losses of some steps and the means of their terms, read off the device at once."""

        def read(tensors: list[torch.Tensor]) -> list[float | None]:
            values = torch.stack(tensors).tolist()
            return [None if refused else value for value, (_, refused) in zip(values, pending, strict=True)]

        names = [name for name, mean in pending[0][0].terms.items() if not mean.ndim]
        return read([stepped.loss for stepped, _ in pending]), {
            name: read([stepped.terms[name] for stepped, _ in pending]) for name in names
        }

    def _observed(self, pending: list[tuple[Stepped, bool]]) -> dict[str, list[float]]:
        """The means over some steps of what is only looked at."""
        names = [name for name, mean in pending[0][0].terms.items() if mean.ndim]
        return {name: torch.stack([stepped.terms[name] for stepped, _ in pending]).mean(0).tolist() for name in names}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


class Rollback(Exception):
    """The stage goes back to its last good checkpoint, as `training.divergence` wishes."""

    def __init__(self, divergence: dict[str, Any]) -> None:
        super().__init__(divergence["why"])
        self.divergence = divergence


class Watch:
    """Judges steps by `training.divergence` (skip or rollback): a step is not taken where its loss or gradient is no
    finite number, or where the loss explodes.

    The verdict follows from the losses of the steps before alone, so that it repeats, also after a kill.

    Args:
        losses: Those of the steps before; None for a step that was not taken.
    """

    def __init__(self, policy: Skip, losses: Sequence[float | None]) -> None:
        self.policy = policy
        self._recent = deque((x for x in losses if x is not None), maxlen=MEMORY)
        self.verdict: str | None = None

    def accept(self, loss: float, norm: float) -> bool:
        """Whether a step is taken; `verdict` then says why not."""
        factor, self.verdict = self.policy.factor, None
        if not math.isfinite(loss):
            self.verdict = "its loss is no finite number"
        elif not math.isfinite(norm):
            self.verdict = "its gradient is no finite number"
        elif len(self._recent) >= LEAST and loss > factor * (median := statistics.median(self._recent)):
            self.verdict = f"its loss {loss:.4g} is more than {factor:g} times the median before it, {median:.4g}"
        else:
            self._recent.append(loss)
        return self.verdict is None


def anchor(settings: StageTraining, steps: int, checkpoint_steps: int | None) -> int | None:
    """Steps between the checkpoints that a rollback may go back to; None: no rollback.

    A function of the settings alone: checkpoints by the clock are no targets, or a run would not repeat.
    """
    if not settings.divergence.goes_back:
        return None
    return checkpoint_steps or max(1, -(-steps // 20))
