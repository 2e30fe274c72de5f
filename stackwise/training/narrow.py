"""The 16-bit copies of a stage's weights: made once a step, with gradients that go straight into the wide ones.

Autocast keeps its copies of weights too (`stage.casts_held`), but from the second microbatch on their gradients are
added up last of all: a graph is gone through newest first, and the copies are as old as the step. Until then all the
16-bit gradients of a pass are alive, and then each is made a wide tensor before it is added. Here a copy is a leaf: its
gradient is there when its product is, is added to the weight's own in place, and is freed before the next one is made.
The numbers are the same, bit for bit: a 16-bit number is widened exactly, and microbatches are added in their order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.model.projections import QuantizedLinear, projections
from stackwise.training.stage import NARROW, StageModel


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
