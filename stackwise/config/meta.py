"""Meta-learning: weights that a few steps on a few rows of a new task adapt (`training.meta`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from stackwise.config.fields import Fraction, Positive, Section, Size, Small

if TYPE_CHECKING:
    from stackwise.config.schema import Settings
    from stackwise.config.training import StageTraining


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
