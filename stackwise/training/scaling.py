"""Whether a step moves the weights: the scale of the loss in half precision, and what clips a gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from stackwise.errors import StackWiseError

if TYPE_CHECKING:
    from stackwise.training.engine import Accept

FIGURES = SCALER, CLIP = "scaler/state", "clip/last"  # what an engine's state has beside tensors of parameters
FIRST_SCALE, HIGHEST_SCALE = 2.0**16, 2.0**24
GROWTH_STEPS = 2000  # steps without an overflow after which a dynamic scale doubles; at an overflow it halves
MOST_OVERFLOWS = 40  # steps in a row that overflow before training is given up


def judged(loss: Tensor, norm: Tensor, scale: LossScale | None, accept: Accept | None) -> tuple[bool, bool]:
    """Whether a step moves the weights, and whether `accept` refused it.

    Raises:
        StackWiseError: Half precision overflows however the loss is scaled.
    """
    if scale is None and accept is None:  # nothing has to be read off the device
        return True, False
    over = scale is not None and math.isfinite(float(loss)) and not math.isfinite(float(norm))
    # That gradients overflow is the scale's affair: the step is then judged by its loss alone.
    refused = accept is not None and not accept(float(loss), 0.0 if over else float(norm))
    if over and scale is not None:
        scale.overflowed()
    return not (over or refused), refused


class LastNorm:
    """The gradient norm of the last step taken, which clips the next one (`training.clip_by`: last).

    An update is then known before the whole gradient is. It is not exact: a gradient that grows suddenly is clipped a
    step late. The first step is clipped by its own norm.
    """

    def __init__(self) -> None:
        self.norm: Tensor | None = None

    def instead_of(self, norm: Tensor) -> Tensor:
        """What clips a step that has this norm."""
        return norm if self.norm is None else self.norm.to(norm)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {CLIP: torch.tensor(math.nan if self.norm is None else float(self.norm), dtype=torch.float64)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave."""
        norm = tensors[CLIP]
        self.norm = None if math.isnan(float(norm)) else norm.clone()


class LossScale:
    """The factor that the loss has while gradients are taken, so that those of half precision stay in its range.

    Source: mixed precision training (arXiv 1710.03740), section 3.2. A step whose gradients overflow is not taken.
    """

    def __init__(self, setting: Literal["dynamic"] | float) -> None:
        self.dynamic = setting == "dynamic"
        self.scale = FIRST_SCALE if setting == "dynamic" else float(setting)
        self._good = self._bad = 0

    def taken(self) -> None:
        """A step's gradients were finite."""
        self._bad, self._good = 0, self._good + 1
        if self.dynamic and self._good == GROWTH_STEPS:
            self.scale, self._good = min(2.0 * self.scale, HIGHEST_SCALE), 0

    def overflowed(self) -> None:
        """A step's gradients were not. Raises StackWiseError: so were those of many steps before it."""
        self._bad, self._good = self._bad + 1, 0
        if self.dynamic:
            self.scale /= 2.0
        if self._bad == MOST_OVERFLOWS:
            raise StackWiseError(
                f"the gradients of {MOST_OVERFLOWS} steps in a row overflow float16, the last at loss scale "
                f"{2 * self.scale if self.dynamic else self.scale:g}",
                hint="set precision: bf16" + ("" if self.dynamic else ", or training.loss_scale: dynamic"),
            )

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {SCALER: torch.tensor([self.scale, self._good, self._bad], dtype=torch.float64)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave."""
        scale, good, bad = tensors[SCALER].tolist()
        self.scale, self._good, self._bad = scale, int(good), int(bad)


def clip_factor(limit: float, norm: Tensor) -> float:
    """What gradients are multiplied by, as `clip_grads_with_norm_` has it."""
    return float(torch.clamp(limit / (norm + 1e-6), max=1.0))
