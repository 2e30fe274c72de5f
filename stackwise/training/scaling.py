"""Loss scaling: half precision's small gradients kept in its range (arXiv 1710.03740, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from stackwise.errors import StackWiseError

FIRST, HIGHEST = 2.0**16, 2.0**24
GROWTH_STEPS = 2000
"""Steps without an overflow after which a dynamic scale doubles; at an overflow it halves."""
MOST_OVERFLOWS = 40
"""Steps in a row that overflow before training is given up."""


class LossScale:
    """The factor that the loss has while gradients are taken. A step whose gradients overflow is not taken.

    Args:
        setting: `training.loss_scale`: a constant, or dynamic.
    """

    def __init__(self, setting: Literal["dynamic"] | float) -> None:
        self.dynamic = setting == "dynamic"
        self.scale = FIRST if setting == "dynamic" else float(setting)
        self._good = self._bad = 0

    def taken(self) -> None:
        """A step's gradients were finite."""
        self._bad, self._good = 0, self._good + 1
        if self.dynamic and self._good == GROWTH_STEPS:
            self.scale, self._good = min(2.0 * self.scale, HIGHEST), 0

    def overflowed(self) -> None:
        """A step's gradients were not.

        Raises:
            StackWiseError: So were those of many steps before it.
        """
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
        return {"scaler/state": torch.tensor([self.scale, self._good, self._bad], dtype=torch.float64)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave."""
        scale, good, bad = tensors["scaler/state"].tolist()
        self.scale, self._good, self._bad = scale, int(good), int(bad)
