"""torchao's fake quantizers for weights in training (`pip install stackwise[quantization]`).

Its scales are ours where zero is the middle of the grid and a channel or a group shares one. It multiplies by 1 / s
where we divide by s, so a weight halfway between two codes (a group's largest is) may get the other one; and a weight
that is clipped gets no gradient, where ours passes it straight through.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@functools.cache
def torchao_rounding(bits: int, group: int | None) -> Callable[[Tensor], Tensor]:
    """What shows a weight [O, I] as symmetric integers, by torchao's `QATConfig`.

    Args:
        group: Neighbours in a row that share a scale; None: all of the row.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it tells of kernels that this machine lacks, and that are not used here
    try:
        from torchao.quantization import PerAxis, PerGroup, quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        granularity = PerAxis(0) if group is None else PerGroup(group)
        weights = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), granularity, is_symmetric=True)
        holder = nn.Sequential(nn.Linear(group or 2, 1, bias=False, device="meta"))
        quantize_(holder, QATConfig(weight_config=weights, step="prepare"))
    finally:
        logging.disable(before)
    quantizer: Any = holder[0].weight_fake_quantizer

    def rounded(weight_OI: Tensor) -> Tensor:
        rounded_OI: Tensor = quantizer(weight_OI.float())
        return rounded_OI.to(weight_OI.dtype)

    return rounded
