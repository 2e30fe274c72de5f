"""How tasks (`data.tasks`) are learned: all at once, or one after the other, and what is done against forgetting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stackwise.config.fields import Fraction, Positive, Size
from stackwise.config.kinds import Kind
from stackwise.registry import Registry

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
        """See `Continual.later`."""
        return {"method": self.name, "strength": self.strength}

    def earlier(self) -> Mapping[str, Any]:
        """See `Continual.earlier`."""
        return {"method": self.name, "samples": self.samples, "decay": self.decay}


class LwF(Continual):
    """Learning without forgetting: the stage as it was says on the new rows what it would (arXiv 1606.09282)."""

    weight: Positive = Field(1.0, description="weight of what the stage as it was says, beside the objective")
    temperature: Positive = Field(2.0, description="softens both distributions")
    top_k: Annotated[int, Field(ge=1, le=4096)] = Field(
        64, description="its likeliest tokens that are kept of a position"
    )

    def later(self) -> Mapping[str, Any]:
        """See `Continual.later`."""
        return self.plain()


class Columns(Continual):
    """Progressive networks: one column of the rack for each task; earlier ones are frozen (arXiv 1606.04671)."""

    columns: ClassVar[bool] = True

    def later(self) -> Mapping[str, Any]:
        """See `Continual.later`."""
        return {"method": self.name}
