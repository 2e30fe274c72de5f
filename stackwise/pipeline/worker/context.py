"""What the work on one stage needs, as one object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stackwise.config import StackWiseConfig, StageTraining
from stackwise.pipeline.job import StageJob
from stackwise.pipeline.schedule import Stage
from stackwise.store import ActivationStore
from stackwise.training.feed import Feed

Emit = Callable[[dict[str, Any]], None]
Stop = Callable[[], bool]

RESUME = "its state is saved; the same command goes on from there"


@dataclass(frozen=True)
class StageContext:
    """A stage's work, and what it is done with.

    Args:
        job: What is to be done.
        config: Its configuration.
        store: Where boundaries and committed stages are.
        device: Where to compute.
        emit: Takes events.
        stop: Whether to end; asked often.
        feed: What enters the stage; before its boundary is filled, what is stored below it.
        held_out: The rows that the stage is evaluated on as it trains; None: none.
    """

    job: StageJob
    config: StackWiseConfig
    store: ActivationStore
    device: torch.device
    emit: Emit
    stop: Stop
    feed: Feed
    held_out: Feed | None = None

    @property
    def stage(self) -> Stage:
        """The stage."""
        return self.job.stage

    @property
    def settings(self) -> StageTraining:
        """How it trains."""
        return self.config.stage_training(self.stage.depth)

    def event(self, name: str, **values: Any) -> None:
        """Emit an event of the stage."""
        self.emit({"event": name, "stage": self.stage.place, **values})

    def warn(self, text: str) -> None:
        """Emit a warning."""
        self.event("warning", text=text)
