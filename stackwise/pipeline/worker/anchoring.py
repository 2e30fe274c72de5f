"""Elastic weight consolidation in a stage: weights are held to what its state says, and measured for its next task."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from stackwise.batch import Batch
from stackwise.config import StackWiseConfig
from stackwise.config.continual import EWC
from stackwise.errors import InterruptedRun
from stackwise.pipeline.events import Pace
from stackwise.pipeline.job import StageJob
from stackwise.pipeline.parts import load_part
from stackwise.pipeline.schedule import ADAPTER, STATE
from stackwise.training.anchor import FISHER, PLACE, Anchored, consolidated
from stackwise.training.engine import Engine, State

if TYPE_CHECKING:
    from stackwise.pipeline.worker.training import StageContext


def part_of_state(state: str) -> str:
    """The part that a state is of; an empty name: of the trainer."""
    return state.removeprefix(STATE).partition(".")[2]


def measured_before(job: StageJob, part: str) -> dict[str, Tensor]:
    """What the task before left of a part beside its optimizer's state; empty where it left nothing."""
    for name in job.stage.states_in:
        if part_of_state(name) == part:
            tensors = load_part(job.initial[name]) or {}
            return {key: value for key, value in tensors.items() if key.startswith((FISHER, PLACE))}
    return {}


def anchor_part(job: StageJob, config: StackWiseConfig, part: str, module: nn.Module) -> None:
    """Hold a part of a stage to what it was, where its task before measured that."""
    method = config.training.continual
    if part.startswith(ADAPTER) or not isinstance(method, EWC):
        return
    if tensors := measured_before(job, part):
        module.anchored = Anchored(tensors, method.strength)  # type: ignore[assignment]


def with_measures(context: StageContext, engine: Engine, states: Mapping[str, State]) -> dict[str, State]:
    """The states that a stage commits for its next task, with what that is held to; its engine has settled.

    Raises:
        InterruptedRun: Told to stop.
    """
    method = context.config.training.continual
    if not isinstance(method, EWC) or not states:
        return dict(states)
    fisher = engine.squared_gradients(_rows(context, method.samples))

    def state(name: str) -> dict[str, Tensor]:
        part, tensors = part_of_state(name), dict(states[name]())
        if part in fisher:
            weights, before = engine.weights(part), measured_before(context.job, part)
            tensors |= consolidated(fisher[part], weights, before, method.decay)
        return tensors

    return {name: partial(state, name) for name in states}


def _rows(context: StageContext, samples: int) -> list[Batch]:
    """Rows of the task alone, spread over all of them, each a batch of its own."""
    new = context.job.rows - context.job.replayed
    rows = np.unique(np.linspace(0, new - 1, min(samples, new)).astype(np.int64))
    batches, pace = list[Batch](), Pace()
    for number, row in enumerate(rows):
        if context.stop():
            raise InterruptedRun(f"stage {context.stage.label} stopped while its weights were measured")
        batches.append(context.feed.batch(np.array([row])))
        if pace.due():
            context.event("boundary", done=number, total=len(rows))
    return batches
