"""What a step in 16 bits takes: copies of its weights, the scale of its loss; what clips a gradient.

Autocast keeps its copies of weights too (`stage.casts_held`), but from the second microbatch on their gradients are
added up last of all: a graph is gone through newest first, and the copies are as old as the step. Until then all the
16-bit gradients of a pass are alive, and then each is made a wide tensor before it is added. Here a copy is a leaf: its
gradient is there when its product is, is added to the weight's own in place, and is freed before the next one is made.
The numbers are the same, bit for bit: a 16-bit number is widened exactly, and microbatches are added in their order.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from stackwise.errors import StackWiseError
from stackwise.model.projections import QuantizedLinear, projections
from stackwise.training.stage import NARROW, StageModel

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


@contextlib.contextmanager
def narrow_weights(model: StageModel) -> Iterator[None]:
    """Within it, linear layers that compute in 16 bits have 16-bit weights; float32 weights must stay as they are.

    Layers that a block keeps wide, weights in formats of their own and those that ranks share out stay as they are:
    autocast casts what is left.
    """
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    copies: dict[int, nn.Parameter] = {}  # a weight that several layers share has one
    for block in (*model.blocks, *model.beyond):
        dtype: torch.dtype | None = getattr(block, "compute", None) or NARROW.get(model.precision)
        # Where a block's weights are held to what they were, the loss is of the wide ones.
        if dtype is None or dtype not in NARROW.values() or getattr(block, "anchored", None) is not None:
            continue
        for layer in projections(block).values():
            if isinstance(layer, QuantizedLinear) and (layer.form is not None or layer.multiply is not None):
                continue
            for name in ("weight", "bias"):
                p = layer._parameters.get(name)
                if type(p) is nn.Parameter and p.dtype is torch.float32:
                    places.append((layer, name, p))
                    if id(p) not in copies:
                        copies[id(p)] = _copy(p, dtype)
    for layer, name, p in places:
        layer._parameters[name] = copies[id(p)]
    try:
        yield
    finally:
        for layer, name, p in places:
            layer._parameters[name] = p


def _copy(p: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    copy = nn.Parameter(p.detach().to(dtype), requires_grad=p.requires_grad)
    if p.requires_grad:
        hook: Any = copy.register_post_accumulate_grad_hook
        hook(partial(_hand_over, p))
    return copy


@torch.no_grad()
def _hand_over(p: nn.Parameter, copy: Tensor) -> None:
    """Add a copy's gradient to the weight's own, and free it."""
    gradient, copy.grad = copy.grad, None
    assert gradient is not None
    p.grad = gradient.to(p.dtype) if p.grad is None else p.grad.add_(gradient)
    for hook in (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values():  # as if autograd had added it
        hook(p)
