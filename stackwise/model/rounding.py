"""Weights and activations as the forward pass sees them while they train for a format, and their gradients.

Quantization-aware training: arXiv 1712.05877; the gradient passes straight through: arXiv 1308.3432. An observer
measures the range of what enters a layer (arXiv 1712.05877, section 3.1): it sees one batch after another and then says
one range, [lowest, highest]. What it holds does not grow with the batches, but for a percentile's tails.

Shapes in names: I inputs, O outputs; `…` any leading dimensions.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stackwise.config.training import Quantization
from stackwise.model.formats import Format, Integers


class FakeQuantized(torch.autograd.Function):
    """A weight as its format would store it; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, codec: Format) -> Tensor:
        """What the class is about."""
        outputs, inputs = weight_OI.shape
        return codec.unpack(codec.pack(weight_OI), outputs, inputs, weight_OI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Its gradient: see the class."""
        return gradients[0], None


def learned_grid(codec: Integers, steps: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
    """The grid that learned scales and zero points stand for: positive scales, whole zero points within the codes."""
    # A scale that training drives to zero or below would turn the grid around.
    scales = steps.clamp(min=torch.finfo(torch.float32).tiny)
    return scales, torch.zeros_like(scales) if zeros is None else zeros.detach().round().clamp(codec.low, codec.high)


class Learned(torch.autograd.Function):
    """A weight on a grid whose scales and zero points train too (LSQ, arXiv 1902.08153; LSQ+, arXiv 2004.09576).

    Where w / s + z is within the codes, the weight's gradient passes straight through, and the scale gets
    round(w / s) - w / s of it; where it is clipped, the weight gets none, the scale q - z, the zero point -s. The
    scale's is divided by the square root of (weights of the group times the highest code): LSQ's section 2.2.
    """

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, steps: Tensor, zeros: Tensor | None, codec: Integers) -> Tensor:
        """What the class is about."""
        scales, whole = learned_grid(codec, steps, zeros)
        ctx.save_for_backward(weight_OI, scales, whole)
        ctx.codec = codec
        outputs, inputs = weight_OI.shape
        return codec.unpack(codec.pack_on(weight_OI, scales, whole), outputs, inputs, weight_OI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        """Its gradient: see the class."""
        weight_OI, scales, whole = ctx.saved_tensors
        codec: Integers = ctx.codec
        groups, gradient = codec.grouped(weight_OI.float()), codec.grouped(gradients[0].float())
        place = groups / scales[:, None]
        codes = place.round() + whole[:, None]
        inside = (codes >= codec.low) & (codes <= codec.high)
        clipped = codes.clamp(codec.low, codec.high) - whole[:, None]
        factor = 1.0 / math.sqrt(groups.shape[1] * codec.high)
        steps = (gradient * torch.where(inside, clipped - place, clipped)).sum(1) * factor
        zeros = (gradient * torch.where(inside, 0.0, -scales[:, None])).sum(1) if ctx.needs_input_grad[2] else None
        inside_OI = inside.reshape(len(weight_OI), -1)[:, : weight_OI.shape[1]]
        return gradients[0] * inside_OI, steps, zeros, None


class RoundedTokens(torch.autograd.Function):
    """Activations on a grid that spans each token's extremes, so that no row depends on another: straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codec: Integers) -> Tensor:
        """What the class is about."""
        tokens = x.reshape(-1, x.shape[-1]).float()
        scales, zeros = codec.scales(tokens)
        codes = (tokens / scales[:, None]).round_().add_(zeros[:, None]).clamp_(codec.low, codec.high)
        return codes.sub_(zeros[:, None]).mul_(scales[:, None]).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Its gradient: see the class."""
        return gradients[0], None


def rounded_in_range(x: Tensor, span: Tensor, codec: Integers) -> Tensor:
    """Activations on one grid for all of them, which spans a fixed range.

    What is outside of the range is clipped, and gets no gradient; what is inside gets it straight through.

    Args:
        x: Of any shape.
        span: The lowest and the highest value, [2].
        codec: Bits and symmetry of the grid.
    """
    scales, zeros = codec.spanning(span[:1].float(), span[1:].float())
    rounded = torch.fake_quantize_per_tensor_affine(x.float(), scales, zeros.int(), codec.low, codec.high)
    return rounded.to(x.dtype)


@functools.cache
def torchao_rounding(bits: int, group: int | None) -> Callable[[Tensor], Tensor]:
    """What shows a weight [O, I] as symmetric integers, by torchao's `QATConfig` (the extra `quantization`).

    Its scales are ours where zero is the middle of the grid and a channel or a group shares one. It multiplies by 1 / s
    where we divide by s, so a weight halfway between two codes (a group's largest is) may get the other one; and a
    weight that is clipped gets no gradient, where ours passes it straight through.

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


class Observer(Protocol):
    """Measures a range."""

    def add(self, x: Tensor) -> None:
        """See one more batch, of any shape."""

    def span(self) -> Tensor:
        """The lowest and the highest value of the range, float32 [2]."""


class MinMax(Observer):
    """The extremes of all batches."""

    def __init__(self) -> None:
        self._span: Tensor | None = None

    def add(self, x: Tensor) -> None:
        span = torch.stack(x.detach().float().aminmax())
        self._span = span if self._span is None else self._joined(self._span, span)

    def span(self) -> Tensor:
        assert self._span is not None
        return self._span

    def _joined(self, before: Tensor, span: Tensor) -> Tensor:
        return torch.stack((torch.minimum(before[0], span[0]), torch.maximum(before[1], span[1])))


class MovingAverage(MinMax):
    """A moving average of each batch's extremes, which begins with those of the first.

    Args:
        share: Share of the average that a batch replaces.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    def _joined(self, before: Tensor, span: Tensor) -> Tensor:
        return torch.lerp(before, span, self._share)


class Percentile(Observer):
    """The percentiles p and 100 - p of all values, exactly, interpolated linearly between two values.

    Args:
        percentile: p, above 50.
        batches: How many of them will come; of each as many values.
    """

    def __init__(self, percentile: float, batches: int) -> None:
        self._percentile, self._batches, self._seen = percentile, batches, 0
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def add(self, x: Tensor) -> None:
        values = x.detach().flatten().float()
        self._seen += len(values)
        # All that is above the percentile, were every batch as long as this one, and the value below.
        self._low = self._tail(self._low, values, len(values), largest=False)
        self._high = self._tail(self._high, values, len(values), largest=True)

    def _tail(self, tail: Tensor | None, values: Tensor, length: int, *, largest: bool) -> Tensor:
        above = math.ceil(length * self._batches * (1 - self._percentile / 100)) + 2
        joined = values if tail is None else torch.cat((tail, values))
        return joined.topk(min(above, len(joined)), largest=largest).values

    def span(self) -> Tensor:
        assert self._low is not None
        assert self._high is not None
        place = (self._seen - 1) * (1 - self._percentile / 100)  # counted from the end
        whole = math.floor(place)
        ends = (
            tail[min(whole, len(tail) - 1)].lerp(tail[min(whole + 1, len(tail) - 1)], place - whole)
            for tail in (self._low, self._high)
        )
        return torch.stack(list(ends))


def observer(settings: Quantization) -> Observer:
    """What measures the range that settings ask for."""
    if settings.activations_range == "moving_average":
        return MovingAverage(settings.averaging)
    if settings.activations_range == "percentile":
        return Percentile(settings.percentile, settings.calibration)
    return MinMax()
