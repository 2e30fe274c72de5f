"""Counter-based random numbers: splitmix64 on a grid of (row, position). No state, no order, no loop.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014); constants by Stafford.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stackwise.identity import derive_seed

Keys = NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: Keys) -> Keys:
    """The output function of splitmix64: a bijection of 64-bit numbers whose every bit depends on every bit."""
    z = x ^ (x >> np.uint64(30))
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def child(keys: Keys, index: Keys | int) -> Keys:
    """The key `index` under each key: element `index` of the stream that a key starts."""
    steps = np.asarray(index, dtype=np.uint64) + np.uint64(1)
    with np.errstate(over="ignore"):
        return mix(np.asarray(keys + steps * GOLDEN))


def seed_key(*parts: int | str) -> np.uint64:
    """A key that is a pure function of its parts."""
    return np.uint64(derive_seed(*parts))


def sample_keys(seed: np.uint64, sample_ids: NDArray[np.uint8]) -> Keys:
    """A key for each sample.

    Args:
        seed: From `seed_key`.
        sample_ids: [n, 16]: the ids' bytes.

    Raises:
        ValueError: Another shape or dtype.
    """
    if sample_ids.ndim != 2 or sample_ids.shape[1] != 16 or sample_ids.dtype != np.uint8:
        raise ValueError(f"sample ids are uint8 [n, 16], not {sample_ids.dtype} {list(sample_ids.shape)}")
    halves = np.ascontiguousarray(sample_ids).view("<u8").astype(np.uint64, copy=False)
    return mix(mix(halves[:, 0] ^ seed) ^ halves[:, 1])


def uniform(keys: Keys) -> NDArray[np.float64]:
    """Numbers in [0, 1), from the upper 53 bits of each key."""
    return np.asarray((keys >> np.uint64(11)).astype(np.float64) * 2.0**-53)
