"""What a block computes in, where that differs from its surroundings: precision by stack."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions that say what a block computes in; the others leave it to its surroundings."""

P = ParamSpec("P")


class _Computes(Protocol):
    compute: torch.dtype | None


B = TypeVar("B", bound=_Computes)
Forward = Callable[Concatenate[B, Tensor, P], Tensor]


def in_own_precision(forward: Forward[B, P]) -> Forward[B, P]:
    """Let a forward pass run under autocast to the module's `compute`; None: as its surroundings do.

    float32 switches the surroundings' autocast off. The residual stream keeps the dtype it came in either way.
    """

    @functools.wraps(forward)
    def wrapped(self: B, x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        if self.compute is None:
            return forward(self, x, *args, **kwargs)
        narrow: Any = None if self.compute is torch.float32 else self.compute
        with torch.autocast(x.device.type, dtype=narrow, enabled=narrow is not None):
            return forward(self, x, *args, **kwargs)

    return wrapped
