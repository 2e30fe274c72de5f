"""How tasks (`data.tasks`) are learned: all at once, or one after the other, and what is done against forgetting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from stackwise.config.fields import Fraction, Positive, Size
from stackwise.config.kinds import Kind
from stackwise.registry import Registry

if TYPE_CHECKING:
    from stackwise.config.kinds import Fault
    from stackwise.config.schema import Settings

CONTINUALS: Registry[type[Any]] = Registry(
    "continual method",
    f"{__name__}:Continual",
    __name__,
    {"none": "AllAtOnce", "naive": "Naive", "replay": "Replay", "ewc": "EWC", "lwf": "LwF", "columns": "Columns"},
)


class Continual(Kind):
    """How tasks are learned. One after the other they are windows: a stage takes up its weights and optimizer state."""

    registry: ClassVar[Registry[Any]] = CONTINUALS
    tag: ClassVar[str] = "method"
    default: ClassVar[str] = "none"
    sequential: ClassVar[bool] = True
    """Whether a task is over before the next one begins."""
    measures: ClassVar[bool] = False
    """Whether a stage leaves something about its weights, beside them, for its next task."""

    columns: ClassVar[bool] = False
    """Whether each task has a column of its own (`model.stream`), which alone trains, from a fresh optimizer state."""

    held_bytes: ClassVar[int] = 0
    """Bytes of memory that each weight in training takes beside its state, in every task but the first."""

    def later(self) -> Mapping[str, Any]:
        """What of it shapes a stage in every task but the first, beside its rows."""
        return {}

    def earlier(self) -> Mapping[str, Any]:
        """What of it shapes what a stage leaves for its next task."""
        return {}


class AllAtOnce(Continual):
    """Rows of all tasks together: joint training, where nothing is forgotten."""

    sequential: ClassVar[bool] = False


class Naive(Continual):
    """Each task in turn, with nothing done against forgetting: what the others are compared with."""


class Replay(Continual):
    """Rows of earlier tasks among those of the new one (arXiv 1902.10486)."""

    buffer: Size = Field(256, description="samples of earlier tasks that are kept, of all tasks together")
    share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.25, description="share of a step's rows that are replayed")
    by: Literal["reservoir", "task"] = Field(
        "reservoir",
        description="which samples are kept: reservoir (any of them alike), task (as many of each task)",
    )

    def later(self) -> Mapping[str, Any]:
        """See `Continual.later`: which rows are replayed is in the rowset."""
        return {"method": self.name, "share": self.share}


class EWC(Continual):
    """Elastic weight consolidation: what a weight meant to earlier tasks holds it where it was (arXiv 1612.00796)."""

    measures: ClassVar[bool] = True
    held_bytes: ClassVar[int] = 12  # information, place, and how far it is from there, for the backward pass
    strength: Positive = Field(1000.0, description="weight of the penalty")
    samples: Size = Field(64, description="rows whose squared gradients make the Fisher information of a task")
    decay: Fraction = Field(
        1.0,
        description="what is left of the Fisher information of the tasks before at each new one; below 1 it is online "
        "EWC (arXiv 1805.06370), drawn to the newest weights; 1: to those of every task, each by its own",
    )

    def later(self) -> Mapping[str, Any]:
        return {"method": self.name, "strength": self.strength}

    def earlier(self) -> Mapping[str, Any]:
        return {"method": self.name, "samples": self.samples, "decay": self.decay}


class LwF(Continual):
    """Learning without forgetting: the stage as it was says on the new rows what it would (arXiv 1606.09282)."""

    weight: Positive = Field(1.0, description="weight of what the stage as it was says, beside the objective")
    temperature: Positive = Field(2.0, description="softens both distributions")
    top_k: Annotated[int, Field(ge=1, le=4096)] = Field(
        64, description="its likeliest tokens that are kept of a position"
    )

    def later(self) -> Mapping[str, Any]:
        return self.plain()


class Columns(Continual):
    """Progressive networks: one column of the rack for each task; earlier ones are frozen (arXiv 1606.04671)."""

    columns: ClassVar[bool] = True

    def later(self) -> Mapping[str, Any]:
        return {"method": self.name}


def continual_faults(config: Settings) -> Iterator[Fault]:
    """What tasks that are learned one after the other cannot be combined with."""
    training, key = config.training, "training.continual"
    if not config.data.tasks:
        yield key, f"{training.continual.name} learns tasks one after the other, and data.tasks names none"
    if training.windows != 1:
        yield "training.windows", "tasks are the windows: leave training.windows out, or training.continual"
    if not (config.has_windows or config.n_sections == 1) or training.plan.whole or config.grows:
        name = training.plan.name
        yield key, f"stages of {name} cannot take up the task before; set training.mode to layerwise or end_to_end"
    if config.fusions or config.adapts or training.growth or config.prepends:
        yield key, "tasks one after the other go with stages alone: leave fusion, adaptation and growth out"
    if training.continual.measures and config.precision == "fp16":
        yield key, f"{training.continual.name} squares gradients, which vanish in fp16: set precision: bf16 or fp32"
    if config.objective.reference is not None or config.objective.sequences > 1 or config.objective.rolls_out:
        yield key, f"objective {config.objective.name} is of answers: tasks in turn are of text"
    if any(config.stage_training(depth).meta is not None for depth in range(config.n_stages)):
        yield key, "training.meta learns all tasks at once: leave one of both out"
    if training.continual.columns:
        yield from _column_faults(config)
    if training.continual.name == "lwf" and config.distillation.teacher is not None:
        yield key, "lwf is its own teacher: leave distillation.teacher out"
    if training.continual.name == "replay" and any(config.stage_training(d).curriculum for d in range(config.n_stages)):
        yield key, "replay has an order of rows of its own: leave training.curriculum out"
    if training.continual.measures and config.parallel.ranks > 1:
        yield key, f"{training.continual.name} measures weights on one rank: leave parallel out"


def _column_faults(config: Settings) -> Iterator[Fault]:
    """What a column a task cannot be combined with."""
    training, tasks, key = config.training, len(config.data.tasks), "training.continual"
    if tasks and config.model.stream.columns != tasks:
        text = f"{config.model.stream.columns} columns, and data.tasks has {tasks} tasks"
        yield "model.stream", f"{text}: leave model.stream out, it follows the tasks"
    if config.init.weights is not None:
        yield "init.weights", "columns start from fresh weights: leave one of the two out"
    if training.save_fused_checkpoints:
        yield "training.save_fused_checkpoints", "no model format has columns: leave one of the two out"
    if training.adapters is not None or training.progressive.enabled:
        yield key, "columns train as they are: leave training.adapters and training.progressive out"
    settings = [config.stage_training(depth) for depth in range(config.n_stages)]
    if any(s.precision for s in config.stages.values()) or any(
        one.quantization is not None or one.products != "full" for one in settings
    ):
        text = "leave training.quantization, training.products and stages.K.precision out"
        yield key, f"columns are in the run's precision: {text}"
