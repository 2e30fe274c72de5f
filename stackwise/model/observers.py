"""Observers: the range of what enters a layer, measured on some batches (arXiv 1712.05877, section 3.1).

An observer sees one batch after another and then says one range, [lowest, highest]. What it holds does not grow with
the batches, but for a percentile's tails.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from stackwise.config.training import Quantization


class Observer(Protocol):
    """Measures a range."""

    def add(self, x: Tensor) -> None:
        """See one more batch, of any shape."""

    def span(self) -> Tensor:
        """The lowest and the highest value of the range, float32 [2]."""


class MinMax:
    """The extremes of all batches."""

    def __init__(self) -> None:
        self._span: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """See `Observer.add`."""
        span = torch.stack(x.detach().float().aminmax())
        self._span = span if self._span is None else self._joined(self._span, span)

    def span(self) -> Tensor:
        """See `Observer.span`."""
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


class Percentile:
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
        """See `Observer.add`."""
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
        """See `Observer.span`."""
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
