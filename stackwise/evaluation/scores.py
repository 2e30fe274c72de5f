"""From the surprise at each position to the figures: losses, accuracies, bits per byte with their error.

Shapes in names: N samples, S positions, R draws of the bound, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass
class Scores:
    """What a stage said at each position of every sample.

    Attributes:
        nats_NS: -log probability of the target; only where it was scored.
        hits_NS: Whether the likeliest token was the target.
    """

    nats_NS: Floats
    hits_NS: NDArray[np.bool_]

    @classmethod
    def empty(cls, samples: int, length: int) -> Scores:
        """Nothing scored yet."""
        return cls(np.zeros((samples, length)), np.zeros((samples, length), dtype=np.bool_))

    def take(self, other: Scores, samples: slice | NDArray[np.bool_]) -> None:
        """Take over some samples' figures."""
        self.nats_NS[samples], self.hits_NS[samples] = other.nats_NS[samples], other.hits_NS[samples]

    def over(self, masks_NS: NDArray[np.bool_]) -> tuple[float, float]:
        """Mean nats and accuracy over the positions of a mask."""
        count = max(1, int(masks_NS.sum()))
        return float(self.nats_NS[masks_NS].sum() / count), float(self.hits_NS[masks_NS].sum() / count)


def bits_per_byte(nats_N: Floats, bytes_N: ArrayLike) -> tuple[float | None, float | None]:
    """Bits a byte over all samples, and its standard error: that of a ratio of sums over independent samples.

    Strata make the true error smaller, so this one is on the safe side.

    Args:
        nats_N: Nats of each sample.
        bytes_N: Bytes of text in each.

    Returns:
        None for both where no bytes are known, and for the error of a single sample.
    """
    sizes_N = np.asarray(bytes_N, dtype=np.float64)
    total = sizes_N.sum()
    if total <= 0:
        return None, None
    rate = nats_N.sum() / total
    n = len(nats_N)
    bits = float(rate / math.log(2))
    if n < 2:
        return bits, None
    spread = np.square(nats_N - rate * sizes_N).sum()
    return bits, float(math.sqrt(spread * n / (n - 1)) / total / math.log(2))


def figures(
    by_fraction: Mapping[str, tuple[float, float]], nats_N: Floats | None, bytes_N: ArrayLike, tokens: int
) -> dict[str, Any]:
    """The shape that every figure of an evaluation has, plain data.

    Args:
        by_fraction: Loss in nats and accuracy, by masked fraction.
        nats_N: Nats of each sample, of a bound or a likelihood; None where there is neither.
        bytes_N: Bytes of text in each sample.
        tokens: Tokens that the nats are of.
    """
    bits, error = (None, None) if nats_N is None else bits_per_byte(nats_N, bytes_N)
    return {
        "bits_per_byte": bits,
        "bits_per_byte_error": error,
        "loss": {key: loss for key, (loss, _) in by_fraction.items()},
        "accuracy": {key: accuracy for key, (_, accuracy) in by_fraction.items()},
        "tokens": tokens,
        "bytes": int(np.sum(bytes_N)),
    }


def unigram(counts_V: ArrayLike, targets_NS: NDArray[np.int64], vocab_size: int) -> Scores:
    """What the training side's token frequencies say, each count raised by one.

    Args:
        counts_V: How often each token occurs in training; shorter than the vocabulary, the rest is 0.
        targets_NS: What each position is to say.
        vocab_size: Token ids that share the probability.
    """
    counts = np.zeros(vocab_size)
    given = np.asarray(counts_V, dtype=np.float64)[:vocab_size]
    counts[: len(given)] = given
    nats_V = math.log(counts.sum() + vocab_size) - np.log(counts + 1.0)
    return Scores(nats_V[targets_NS], targets_NS == int(counts.argmax()))
