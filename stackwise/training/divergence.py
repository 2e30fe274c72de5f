"""When a step is not to be taken: its loss or gradient is no finite number, or the loss explodes.

The verdict follows from the losses of the steps before it alone, so that it repeats, also after a kill.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from stackwise.config import StageTraining
from stackwise.errors import StackWiseError

MEMORY = 32
"""Losses that the running median is taken over."""
LEAST = 8
"""Losses before which there is no median to go by."""


class Rollback(Exception):
    """The stage goes back to its last good checkpoint, as `training.on_divergence` wishes.

    Args:
        told: What happened; what is kept of it in the record.
    """

    def __init__(self, told: dict[str, object]) -> None:
        super().__init__(told["why"])
        self.told = told


class Watch:
    """Judges steps by `training.on_divergence` (skip or rollback).

    Args:
        settings: The bound on the loss, and how often it may happen.
        losses: Those of the steps before; None for a step that was not taken.
    """

    def __init__(self, settings: StageTraining, losses: Sequence[float | None]) -> None:
        self._settings = settings
        self._recent = deque((x for x in losses if x is not None), maxlen=MEMORY)
        self.verdict: str | None = None

    def accept(self, loss: float, norm: float) -> bool:
        """Whether a step is taken; `verdict` then says why not."""
        factor, self.verdict = self._settings.divergence_factor, None
        if not math.isfinite(loss):
            self.verdict = "its loss is no finite number"
        elif not math.isfinite(norm):
            self.verdict = "its gradient is no finite number"
        elif len(self._recent) >= LEAST and loss > factor * (median := statistics.median(self._recent)):
            self.verdict = f"its loss {loss:.4g} is more than {factor:g} times the median before it, {median:.4g}"
        else:
            self._recent.append(loss)
        return self.verdict is None

    def too_often(self, times: int, step: int) -> StackWiseError:
        """The error that ends a stage which diverges again and again."""
        policy = self._settings.on_divergence
        return StackWiseError(
            f"step {step} diverged ({self.verdict}), after {times} {'skips' if policy == 'skip' else 'rollbacks'}",
            hint="lower training.learning_rate (for this stage: stages.K.training.learning_rate) or "
            "training.grad_clip, or raise training.divergence_limit, and run again",
        )


def anchor(settings: StageTraining, steps: int, checkpoint_steps: int | None) -> int | None:
    """Steps between the checkpoints that a rollback may go back to; None: no rollback.

    A function of the settings alone: checkpoints by the clock are no targets, or a run would not repeat.
    """
    if settings.on_divergence != "rollback":
        return None
    return checkpoint_steps or max(1, -(-steps // 20))
