"""What a schedule moves through the store and computes beside training, said before it starts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from stackwise.config import StackWiseConfig
from stackwise.pipeline.planning.plan import Plan
from stackwise.pipeline.recipe import boundary_bytes
from stackwise.pipeline.schedule import Stage, stage_below


@dataclass
class Traffic:
    """Bytes of boundaries read and written, and FLOPs of forward passes through committed stages."""

    read: float = 0.0
    written: float = 0.0
    flops: float = 0.0

    def plain(self) -> dict[str, int]:
        """As JSON-ready data."""
        return {name: round(value) for name, value in asdict(self).items()}


def forward_flops(config: StackWiseConfig, stage: Stage) -> float:
    """FLOPs of taking a row through a stage's blocks: two a parameter and token, and the attention's two products."""
    model, positions = config.model, config.row_positions
    each = 2 * model.block_parameters * positions + 4 * positions * positions * model.d_model
    return float((stage.last - stage.first + 1) * each)


def traffic(plan: Plan, todo: Sequence[Stage]) -> Traffic:
    """What training these stages moves, where the boundaries below them that are to be stored are there."""
    below = {(stage.first, stage.rowset) for stage in plan.stages[: todo[0].place + 1]} if todo else set()
    return _Walk(plan, below).through(todo)


def separate_traffic(plan: Plan, todo: Sequence[Stage]) -> Traffic:
    """The same with every boundary stored, each written by a pass of its own: the default."""
    other = copy.copy(plan)
    other.config = plan.config.model_copy(deep=True)
    other.config.store.every, other.config.store.fuse_passes = 1, False
    other.config.training.progressive.cache_activations = True
    return traffic(other, todo)


class _Walk:
    """Goes through the schedule as the runner does, and adds up; what is there goes by (block above it, rowset)."""

    def __init__(self, plan: Plan, present: set[tuple[int, int]]) -> None:
        self._plan, self._present, self._total = plan, present, Traffic()

    def through(self, todo: Sequence[Stage]) -> Traffic:
        for stage in todo:
            if stage.reads_boundary:
                self._train(stage)
            above = self._plan.following(stage)
            if above is not None and self._plan.writes_above(stage):
                self._make(above, stage.rowset)
        return self._total

    def _train(self, stage: Stage) -> None:
        plan, number = self._plan, stage.rowset
        rows = plan.rowset(number)[1]
        settings = plan.config.stage_training(stage.depth)
        seen = float(plan.steps(stage) * settings.batch_size * settings.accumulation)
        base, through = plan.base(stage)
        self._make(base, number)
        if base is stage:
            self._read(base, seen)
        elif plan.fuses(stage):
            self._pass(base, through, rows)
            self._read(stage, max(0.0, seen - rows))
            self._write(stage, number)
        else:
            self._pass(base, through, seen)

    def _make(self, stage: Stage | None, number: int) -> None:
        """Let the boundary that enters a stage be there."""
        if stage is None or (stage.first, number) in self._present:
            return
        below = stage_below(self._plan.stages, stage)
        base, through = self._plan.base(below, train=False)
        self._make(base, number)
        self._pass(base, (*through, below), self._plan.rowset(number)[1])
        self._write(stage, number)

    def _pass(self, base: Stage | None, through: Sequence[Stage], rows: float) -> None:
        """Rows are read from a boundary (None: tokens) and go through stages."""
        self._read(base, rows)
        self._total.flops += rows * sum(forward_flops(self._plan.config, stage) for stage in through)

    def _read(self, stage: Stage | None, rows: float) -> None:
        self._total.read += rows * boundary_bytes(self._plan.config, 1) if stage is not None else 0.0

    def _write(self, stage: Stage, number: int) -> None:
        self._total.written += boundary_bytes(self._plan.config, self._plan.rowset(number)[1])
        self._present.add((stage.first, number))
