"""Evaluation called in one line: what is measured, and how, by keyword."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from numpy.typing import ArrayLike
from torch import nn

from stackwise import evaluation
from stackwise.evaluation import HeldOut, Measure, StageModules
from stackwise.objectives import RuntimeObjective


def evaluate(
    front: nn.Module,
    stages: Iterable[StageModules],
    tokens_NS: ArrayLike,
    bytes_N: ArrayLike,
    *,
    objective: RuntimeObjective,
    **settings: Any,
) -> dict[str, Any]:
    samples, how = (
        {field.name: settings.pop(field.name) for field in dataclasses.fields(sort) if field.name in settings}
        for sort in (HeldOut, Measure)
    )
    held_out = HeldOut(tokens_NS, bytes_N, **samples)  # type: ignore[arg-type]
    return evaluation.evaluate(front, stages, held_out, objective, Measure(**how), **settings)
