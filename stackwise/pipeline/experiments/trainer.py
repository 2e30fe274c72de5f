"""A trainer that counts in epochs: a StackWise run, and its metrics."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from stackwise.config import StackWiseConfig
from stackwise.config.loading import build
from stackwise.config.yaml_files import dump, parse_yaml
from stackwise.data import prepare
from stackwise.errors import InterruptedRun, UsageError
from stackwise.pipeline.decisions import forward_flops
from stackwise.pipeline.events import Event, read_log
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.schedule import schedule
from stackwise.store import ActivationStore

CROSS_ENTROPY = "cross_entropy"  # the term's name in `objectives/objective.py`, which imports torch
PHASES = ("forward", "backward", "optimizer")
METRICS = (
    *(f"{split}_{kind}" for split in ("train", "val") for kind in ("losses", "ce_losses", "aux_losses")),
    *("tokens_per_sec", "steps", "current_step", "timing_breakdown", "expert_stats_history"),
)


class _Tensor(Protocol):
    requires_grad: bool

    def numel(self) -> int: ...


class _Module(Protocol):
    def parameters(self) -> Iterable[_Tensor]: ...


def count_parameters(model: _Module) -> int:
    """Parameters of a module that train; one that two parts share counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class Trainer:
    """Trains what a configuration describes as an ordinary run, which resumes, and counts in epochs.

    The configuration stands for the model, both data loaders, the optimizer and the device.

    Args:
        config: Everything but `training.steps`, `rows`, `eval_every` and `patience`, which follow from epochs.
        directory: The run's; a run of the same settings that is there goes on, or is taken as it is.
        model_name: What the run is called.
        early_stopping_patience: Evaluations without a lower held-out loss after which a stage ends, and takes its best
            weights; 0: it never ends early.
        gating_temp_schedule: `start`, `end`, `epochs` of the routers' temperature; None: as the configuration says.
        observe: Called with every event, as `stackwise run --json` prints them.

    Attributes:
        train_losses, val_losses: Nats by epoch and by evaluation, all terms together; train_ce_losses, val_ce_losses:
            the cross entropy of them; train_aux_losses, val_aux_losses: what routers add. Of several stages one after
            the other, the lowest first.
        tokens_per_sec, steps: By epoch. current_step: Steps taken so far.
        timing_breakdown: Seconds by epoch of `forward`, `backward`, `optimizer`; empty where they were not measured.
        best_val_loss, patience_counter, stopped_early: Of the last stage.
        expert_stats_history: By evaluation: `step`, and by block `entropy`, `least`, `most`, `dropped`, `shares`.

    Raises:
        UsageError: The configuration is faulty, or leaves the batch to be found.
    """

    def __init__(
        self,
        config: StackWiseConfig,
        directory: str | Path,
        *,
        model_name: str = "model",
        early_stopping_patience: int = 0,
        gating_temp_schedule: Mapping[str, float] | None = None,
        observe: Callable[[Event], None] | None = None,
    ) -> None:
        if early_stopping_patience < 0:
            raise UsageError(f"early_stopping_patience is {early_stopping_patience}: 0 switches it off")
        more: dict[str, Any] = {"name": model_name}
        if early_stopping_patience:
            # What is judged is the best model, not the one that training had gone on with for nothing.
            more |= {"training.patience": early_stopping_patience, "training.keep_best": True}
            more |= {"training.eval_every": 1}  # until epochs are known
        if gating_temp_schedule is not None:
            more |= {"model.ffn.temperature": dict(gating_temp_schedule)}
        self.model_name, self.early_stopping_patience = model_name, early_stopping_patience
        self.config = build(StackWiseConfig, parse_yaml(dump(config), "configuration"), more)
        if not self.config.training.batch_size:
            raise UsageError("training.batch_size: auto leaves the length of an epoch open", hint="give a number")
        self.run = RunDirectory(Path(directory))
        self._observe = observe or (lambda event: None)
        self._rows: int | None = None
        self._vocab_size = 0
        self._courses: list[Course] = []
        self._best = -1  # the place of the last stage's best evaluation among all
        self._clear()

    def _clear(self) -> None:
        self.train_losses: list[float | None] = []
        self.val_losses: list[float | None] = []
        self.train_ce_losses: list[float | None] = []
        self.val_ce_losses: list[float | None] = []
        self.train_aux_losses: list[float | None] = []
        self.val_aux_losses: list[float | None] = []
        self.tokens_per_sec: list[float | None] = []
        self.steps: list[int] = []
        self.current_step = 0
        self.timing_breakdown: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.best_val_loss, self.patience_counter, self.stopped_early = math.inf, 0, False
        self.expert_stats_history: list[dict[str, Any]] = []

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a pass over the rows; a step that they do not fill is left out."""
        self._prepare()
        rows = min(self._rows or 0, self.config.training.rows or self._rows or 0)
        if rows < self._step_rows:
            raise UsageError(f"training.batch_size: {rows} rows do not fill a step of {self._step_rows}")
        return rows // self._step_rows

    @property
    def vocab_size(self) -> int:
        """Token ids that the model knows."""
        self._prepare()
        return self._vocab_size

    def _prepare(self) -> None:
        if self._rows is None:
            config = self.config
            columns = tuple(config.objective.inputs)
            data, _ = prepare(config.data, model_vocab=config.model.vocab_size, columns=columns)
            self._rows = data.train.n_samples(config.training.seq_len) * config.training.masks_per_sample
            self._vocab_size = config.model.vocab_size or data.tokenizer.vocab_size

    @property
    def _step_rows(self) -> int:
        training = self.config.training
        return (training.batch_size or 1) * training.accumulation

    def settings(self, num_epochs: float, eval_every: float = 1) -> StackWiseConfig:
        """The run's configuration.

        Raises:
            UsageError: Less than a step.
        """
        steps = round(num_epochs * self.steps_per_epoch)
        if steps < 1 or eval_every <= 0:
            raise UsageError(f"num_epochs {num_epochs:g}, eval_every {eval_every:g}: there is nothing to do")
        config = self.config.model_copy(deep=True)
        config.training.steps, config.training.tokens = steps, None
        config.training.rows = self.steps_per_epoch * self._step_rows  # a pass is an epoch
        config.training.eval_every = max(1, round(eval_every * self.steps_per_epoch))
        return config.validate()

    def train(self, num_epochs: float, eval_every: float = 1) -> None:
        """Train, or go on; afterwards the attributes hold the metrics.

        Raises:
            InterruptedRun: It was stopped, and its state saved: the same call goes on.
            StackWiseError: As `stackwise run`.
        """
        config = self.settings(num_epochs, eval_every)
        try:
            Runner(config, self.run, self._observe).run()
        finally:
            self._read(config)

    def train_epoch(self, num_epochs: float = 1, eval_every: float = 1) -> dict[str, float | None]:
        """Train until one more evaluation is done; nothing that was trained beyond it is lost.

        Args:
            num_epochs: Those of the whole training, over which the learning rate is spread.
            eval_every: Epochs between evaluations.

        Returns:
            `loss`, `ce_loss`, `aux_loss`, `tokens_per_sec`, `forward_time`, `backward_time`, `optimizer_time` of the
            newest epoch that is whole.
        """
        config, stopped = self.settings(num_epochs, eval_every), False

        def observe(event: Event) -> None:
            nonlocal stopped
            self._observe(event)
            if event["event"] == "held_out":
                stopped = True
                runner.stop("an epoch is done")

        runner = Runner(config, self.run, observe)
        try:
            runner.run()
        except InterruptedRun:
            if not stopped:
                raise
        finally:
            self._read(config)
        newest: dict[str, Sequence[float | None]] = {
            "loss": self.train_losses,
            "ce_loss": self.train_ce_losses,
            "aux_loss": self.train_aux_losses,
            "tokens_per_sec": self.tokens_per_sec,
            **{f"{phase}_time": self.timing_breakdown[phase] for phase in PHASES},
        }
        return {key: values[-1] if values else None for key, values in newest.items()}

    def evaluate(self) -> dict[str, float | None]:
        """Held-out `loss`, `ce_loss`, `aux_loss` of the weights committed; before that of the newest ones.

        Raises:
            UsageError: Nothing was evaluated yet.
        """
        if not self.val_losses:
            raise UsageError(f"{self.run.path}: nothing is trained yet", hint="train() or train_epoch() first")
        at = self._best if self.early_stopping_patience else -1
        return {
            "loss": self.val_losses[at],
            "ce_loss": self.val_ce_losses[at],
            "aux_loss": self.val_aux_losses[at],
        }

    def get_metrics(self) -> dict[str, Any]:
        """All metrics, by the names of the attributes."""
        values = {name: getattr(self, name) for name in METRICS}
        best = self.best_val_loss if math.isfinite(self.best_val_loss) else None
        return values | {"best_val_loss": best, "stopped_early": self.stopped_early}

    @property
    def epoch_flops(self) -> float:
        """Products of an epoch of every stage: forward, and twice as much backward, the heads' too."""
        return self.steps_per_epoch * sum(self._step_flops())

    def flops(self) -> float:
        """Products of the training steps taken, counted as `epoch_flops` does."""
        return sum(n * len(course.losses) for n, course in zip(self._step_flops(), self._courses, strict=False))

    def _step_flops(self) -> list[float]:
        config = self.config
        head = 2 * config.row_positions * self.vocab_size * config.model.d_model
        return [3 * self._step_rows * (forward_flops(config, stage) + head) for stage in schedule(config)]

    @property
    def seconds(self) -> float:
        """Seconds of training, of the stages committed."""
        return sum(course.seconds for course in self._courses)

    def parameters(self, *, active: bool = False) -> int:
        """Parameters of the rack; active: those that a token goes through."""
        model, length = self.config.model, self.config.training.seq_len
        blocks = model.total(lambda block: block.active_parameters if active else block.block_parameters)
        head = model.head_parameters(self.vocab_size, shared=model.tie_embeddings)
        return blocks + model.front_parameters(self.vocab_size, length) + head

    def _read(self, config: StackWiseConfig) -> None:
        """The metrics from the run's log and its committed stages."""
        self._clear()
        self._courses = courses(self.run) if self.run.config_file.exists() else []
        for course in self._courses:
            self._add(course)
        if not self._courses or not self._courses[-1].held_out:
            return
        last = [event["nats"] for event in _ordered(self._courses[-1].held_out)]
        self.best_val_loss = min(last)
        best = last.index(self.best_val_loss)
        self._best = len(self.val_losses) - len(last) + best
        self.patience_counter = len(last) - 1 - best
        patience = self.early_stopping_patience
        ended = len(self._courses[-1].losses) < (config.training.steps or 0)
        self.stopped_early = bool(patience) and ended and self.patience_counter >= patience

    def _add(self, course: Course) -> None:
        """A stage's epochs; the last one may be shorter."""
        length, done = self.steps_per_epoch, len(course.losses)
        self.current_step += done
        for first in range(1, done + 1, length):
            steps = range(first, min(first + length, done + 1))
            total, plain = mean(course.losses.get(n) for n in steps), mean(course.plain.get(n) for n in steps)
            self.train_losses.append(total)
            self.train_ce_losses.append(plain)
            self.train_aux_losses.append(None if total is None or plain is None else total - plain)
            reports = [course.reports[n] for n in sorted(course.reports) if n in steps]
            self.tokens_per_sec.append(mean(report["tokens_per_second"] for report in reports))
            self.steps.append(len(steps))
            for phase in PHASES:
                seconds = [report["phases"][phase] for report in reports if "phases" in report]
                self.timing_breakdown[phase] += [sum(seconds)] if seconds else []
        for event in _ordered(course.held_out):
            plain = event.get("terms", {}).get(CROSS_ENTROPY, event["nats"])
            self.val_losses.append(event["nats"])
            self.val_ce_losses.append(plain)
            self.val_aux_losses.append(None if plain is None else event["nats"] - plain)
            if "experts" in event:
                self.expert_stats_history.append({"step": event["step"], "experts": event["experts"]})


def _ordered(events: Mapping[int, Event]) -> list[Event]:
    return [events[step] for step in sorted(events)]


@dataclass
class Course:
    """One stage's way, by its steps from 1; losses in nats.

    Args:
        losses: Of training, the auxiliary ones of the blocks included; None: the step was refused.
        plain: The same without the auxiliary ones.
        held_out: Events of evaluations.
        reports: Step events, those of neighbouring reports in one.
    """

    recipe: str | None = None
    losses: dict[int, float | None] = field(default_factory=dict)
    plain: dict[int, float | None] = field(default_factory=dict)
    held_out: dict[int, dict[str, Any]] = field(default_factory=dict)
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0  # of training, once it is committed

    def observe(self, event: dict[str, Any]) -> None:
        """Take up an event of the log; a step that was taken again after a kill replaces what it was before."""
        step: int = event.get("step", 0)
        match event["event"]:
            case "step":
                plain = event.get("terms", {}).get(CROSS_ENTROPY)
                for number, loss in enumerate(event["losses"], step - len(event["losses"]) + 1):
                    self.losses[number], self.plain[number] = loss, loss if plain is None else plain
                self.reports[step] = event
            case "held_out":
                self.held_out[step] = event

    def commit(self, record: dict[str, Any]) -> None:
        """Take up the record of a committed stage."""
        self.seconds = record["seconds"]
        self.losses = dict(enumerate(record["losses"], 1))
        self.plain = dict(enumerate(record.get("terms", {}).get(CROSS_ENTROPY, record["losses"]), 1))
        plain = dict(record.get("held_out_terms", {}).get(CROSS_ENTROPY, ()))
        apart = CROSS_ENTROPY in record.get("terms", {})  # blocks have losses of their own
        logged, self.held_out = self.held_out, {}
        for step, nats in record["held_out"]:
            known = {"terms": {CROSS_ENTROPY: plain.get(step)}} if apart else {}
            self.held_out[step] = known | logged.get(step, {}) | {"step": step, "nats": nats}


def courses(run: RunDirectory) -> list[Course]:
    """The courses of a run's stages, lowest first; of those that have not begun none.

    Two sources: the run's log, which knows a stage as it goes, and the record that it is committed with, which has
    every step's terms whatever happened to the runner. The record wins.
    """
    by_stage: dict[int, Course] = {}
    for event, _ in read_log(run.events_file):
        if not isinstance(number := event.get("stage"), int):
            continue
        if event["event"] == "training" and event["recipe"] != by_stage.get(number, Course()).recipe:
            by_stage[number] = Course(event["recipe"])  # what was logged of another one is over
        by_stage.setdefault(number, Course()).observe(event)
    manifest = run.manifest()
    recipes = {n: stage["recipe"] for n, stage in enumerate(manifest["stages"]) if stage["recipe"] is not None}
    if recipes:
        with ActivationStore(run.store_path(run.config()), create=False) as store:
            for number, recipe in recipes.items():
                if (committed := store.stage(recipe, check=False)) is not None:
                    by_stage.setdefault(number, Course(recipe)).commit(committed.record)
    return [by_stage[number] for number in sorted(by_stage)]


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is known; None: nothing is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
