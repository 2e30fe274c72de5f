"""How tasks are learned: all at once, or one after the other (`data.tasks`), and what is done against forgetting.

And meta-learning: weights that a few steps on a few rows of a new task adapt (`training.meta`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from stackwise.config.fields import Fraction, Positive, Section, Size, Small
from stackwise.config.kinds import Kind
from stackwise.registry import Registry

if TYPE_CHECKING:
    from stackwise.config.kinds import Fault
    from stackwise.config.schema import Settings
    from stackwise.config.training import StageTraining


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


class Meta(Section):
    """Every microbatch is a task: the weights adapt to its first rows (support), and its other rows (query) judge."""

    method: Literal["maml", "fomaml", "reptile", "joint"] = Field(
        "fomaml",
        description="what gradient trains: maml (of the query loss through the inner steps), fomaml (at the adapted "
        "weights), reptile (all inner steps and the query's, added up), joint (no inner steps: all rows at once)",
    )
    inner_steps: Small = Field(3, description="steps of gradient descent on the support rows")
    inner_rate: Positive = Field(0.1, description="rate of these steps")
    support: Size = Field(4, description="rows that the weights adapt to; the others of training.batch_size judge")
    query: Size | None = Field(None, description="rows that judge; null: what training.batch_size leaves")
    permutations: Annotated[int, Field(ge=2, le=1 << 24)] = Field(
        64, description="training tasks, where data.tasks names none: in each, tokens stand for other tokens"
    )
    permuted: Fraction = Field(1.0, description="share of the tokens in use that a task permutes")
    held_out: Small | None = Field(
        None,
        description="tasks that training never sees, and that are adapted to on held-out rows: so many further "
        "permutations, or of data.tasks the last ones; null: 8, or of data.tasks one",
    )

    def specification(self, *, judged: bool) -> dict[str, Any]:
        """What of it shapes a stage's result.

        Args:
            judged: Whether a stage ends, or is chosen, by the loss on tasks held out.
        """
        unused = set() if judged else {"held_out"}
        if self.method == "joint":
            unused |= set() if judged else {"inner_steps", "inner_rate", "support"}
        return self.model_dump(exclude=unused | {"query"})

    def tasks_held_out(self, *, by_data: bool) -> int:
        """How many tasks are held out."""
        return self.held_out or (1 if by_data else 8)

    @property
    def adapts(self) -> bool:
        """Whether training takes inner steps."""
        return self.method != "joint"

    @property
    def second_order(self) -> bool:
        """Whether the gradient goes through the inner steps."""
        return self.method == "maml"

    @property
    def adds_steps(self) -> bool:
        """Whether the inner steps' own gradients are part of the gradient."""
        return self.method == "reptile"

    def rows_kept(self, rows: int) -> float:
        """The rows of a task whose activations lie in memory at once: in how many such rows its passes come to."""
        query = rows - self.support
        if not self.adapts:
            return rows
        return query + 2.9 * self.inner_steps * self.support if self.second_order else max(self.support, query)

    def work(self, rows: int) -> float:
        """What a task of so many rows takes of compute, in rows of plain training."""
        query = rows - self.support
        # The backward pass through an inner step goes through its forward and its backward pass: 2 (1 + 2) beside them.
        return query + self.support * self.inner_steps * (3 if self.second_order else 1) if self.adapts else rows

    @property
    def weights_kept(self) -> int:
        """Copies of what trains that lie in memory at once beside it: adapted weights, and inner gradients."""
        if not self.adapts:
            return 0
        return self.inner_steps + 2 if self.second_order else 2 + self.adds_steps

    def faults(self, settings: StageTraining) -> Iterator[tuple[str, str]]:
        """What of it cannot be with a stage's other settings, by its own keys."""
        rows = settings.batch_size
        if not rows:
            yield "support", "batch_size: auto finds no size for tasks: set training.batch_size to support + query rows"
        elif self.support >= rows:
            text = f"{self.support} rows of a task of {rows} leave none to judge by"
            yield "support", f"{text}: lower it, or raise training.batch_size"
        elif self.query is not None and self.support + self.query != rows:
            needed = self.support + self.query
            text = f"support and query are {needed} rows of a task, and training.batch_size is {rows}"
            yield "query", f"{text}: set training.batch_size: {needed}, or leave query out"


def meta_faults(config: Settings) -> Iterator[tuple[str, str]]:
    """Every contradiction of `training.meta` to the other settings."""
    for depth in range(config.n_stages):
        settings = config.stage_training(depth)
        if (meta := settings.meta) is None:
            continue
        overrides = config.stages.get(depth)
        alone = overrides is not None and "meta" in overrides.training.model_fields_set
        key = f"stages.{depth}.training.meta" if alone else "training.meta"
        before = [(f"{key}.{name}", text) for name, text in meta.faults(settings)]
        before += [(key, text) for text in _without_inner_steps(config, settings)]
        if before:
            yield from before
            return  # the other stages are like it


def _without_inner_steps(config: Settings, settings: StageTraining) -> Iterator[str]:
    """Settings that have no inner steps."""
    from stackwise.config.precision import stack_precision  # it imports this module

    training = config.training
    if "fp16" in (config.precision, *(stack_precision(config, depth) for depth in range(config.n_sections))):
        yield "inner steps have no loss scale, which fp16 needs: set precision: bf16"
    if settings.products != "full":
        yield "products in fp8 have no second gradient: leave training.products out"
    if training.compile:
        yield "inner steps run on changed copies of the weights, not on compiled blocks: leave training.compile out"
    if settings.activation_checkpointing:
        yield "inner steps cannot recompute a block with changed weights: leave activation_checkpointing out"
    if config.objective.reference is not None or config.objective.sequences > 1:
        yield f"{config.objective.name} scores pairs by a reference: choose another training.objective"
    if config.distillation.teacher is not None:
        yield "a teacher knows no tasks: leave distillation.teacher out"
    if settings.curriculum is not None:
        yield "a curriculum orders rows by hardness, tasks by chance: leave one of both out"
    if config.parallel.ranks > config.parallel.data:
        yield "inner steps need whole weights on each rank: of parallel only data divides the tasks of a step"
    if training.swap == "always":
        yield "inner steps change every part of the stage at once, and a swapped stage holds one: leave swap out"
