"""Differences between runs that were measured on the same held-out samples, by a paired bootstrap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stackwise.errors import UsageError
from stackwise.identity import generator

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Samples:
    """What a rack said of held-out samples, as an evaluation has it (`by_sample`).

    Args:
        nats: Of each sample.
        of: Bytes or tokens that they are of, by sample.
        unit: byte or token.
    """

    nats: Sequence[float]
    of: Sequence[int]
    unit: str

    def sums(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The figure's two sums, by sample: bits and bytes, or nats and tokens."""
        scale = 1 / math.log(2) if self.unit == "byte" else 1.0
        return np.asarray(self.nats, np.float64) * scale, np.asarray(self.of, np.float64)

    @property
    def value(self) -> float:
        """Bits a byte, or nats a token."""
        bits_N, of_N = self.sums()
        return float(bits_N.sum() / max(of_N.sum(), 1))


@dataclass(frozen=True)
class Interval:
    """A figure, or a difference of two, and its 95% interval."""

    mean: float
    low: float
    high: float


def figure(runs: Sequence[Samples]) -> Interval:
    """The mean over runs of bits a byte (nats a token), and its interval over runs and samples."""
    return _interval([run.sums() for run in runs], None)


def paired(pairs: Sequence[tuple[Samples, Samples]]) -> Interval:
    """The mean difference, first less second, of pairs of runs: of the same seed, say.

    In each of 2,000 draws the pairs are drawn anew, and so are the held-out samples, the same ones for all pairs
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13); the interval is
    that of percentiles. One pair says nothing of how seeds differ: the interval is then that of the samples alone.

    Raises:
        UsageError: The runs were not measured on the same samples.
    """
    for one, other in pairs:
        if one.unit != other.unit or list(one.of) != list(other.of):
            raise UsageError("the runs were measured on other held-out samples", hint="evaluate them on the same text")
    return _interval([one.sums() for one, _ in pairs], [other.sums() for _, other in pairs])


Sums = tuple[NDArray[np.float64], NDArray[np.float64]]


def _interval(runs: Sequence[Sums], others: Sequence[Sums] | None) -> Interval:
    bits_RN = np.stack([bits for bits, _ in runs])
    if others is not None:
        bits_RN = bits_RN - np.stack([bits for bits, _ in others])
    of_RN = np.stack([of for _, of in runs])
    count, samples = bits_RN.shape
    rng = generator(0, "bootstrap", count, samples)  # the same table each time
    drawn = np.empty(DRAWS)
    for draw in range(DRAWS):
        runs_R, samples_N = rng.integers(count, size=count), rng.integers(samples, size=samples)
        at = np.ix_(runs_R, samples_N)
        drawn[draw] = (bits_RN[at].sum(1) / np.maximum(of_RN[at].sum(1), 1)).mean()
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    mean = float((bits_RN.sum(1) / np.maximum(of_RN.sum(1), 1)).mean())
    return Interval(mean, float(low), float(high))
