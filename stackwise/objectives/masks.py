"""Which positions are masked and what they show: mask plans, schedules, the counter-based numbers below. No torch here.

Random numbers are splitmix64 on a grid of (row, position): no state, no order, no loop (Steele, Lea, Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014; constants by Stafford).

Shapes in names: n rows, L positions of a sample, M masks of a sample, P patterns of a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stackwise.errors import UsageError
from stackwise.identity import derive_seed, digest

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]
ScheduleType = Literal["linear", "exponential", "cosine"]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
CHUNK = 1 << 15
"""Grid elements worked on at a time: they stay in the processor's cache."""


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


class MaskScheduler:
    """The masked fraction over time or depth.

    `linear`: in equal steps. `exponential`: in equal ratios (geometric). `cosine`: half a cosine, slow at both ends.

    Args:
        min_fraction: At time 0.
        max_fraction: At time 1.
        schedule_type: The shape between.

    Raises:
        UsageError: Fractions outside (0, 1], the smaller above the larger, or a shape that does not exist.
    """

    def __init__(
        self, min_fraction: float = 0.15, max_fraction: float = 0.90, schedule_type: ScheduleType = "linear"
    ) -> None:
        for name, value in (("min_fraction", min_fraction), ("max_fraction", max_fraction)):
            if not 0.0 < value <= 1.0:
                raise UsageError(f"{name} {value} is outside (0, 1]")
        if min_fraction > max_fraction:
            raise UsageError(f"min_fraction {min_fraction} is above max_fraction {max_fraction}")
        if schedule_type not in ("linear", "exponential", "cosine"):
            raise UsageError(f"mask schedule {schedule_type!r} is none of linear, exponential, cosine")
        self.min_fraction, self.max_fraction = float(min_fraction), float(max_fraction)
        self.schedule_type: ScheduleType = schedule_type

    @overload
    def fraction(self, t: float) -> float: ...
    @overload
    def fraction(self, t: Floats) -> Floats: ...
    def fraction(self, t: float | Floats) -> float | Floats:
        """The fraction at time t in [0, 1]; a number for a number, an array for an array.

        Raises:
            UsageError: A time outside [0, 1].
        """
        time = np.asarray(t, dtype=np.float64)
        if not np.all((time >= 0.0) & (time <= 1.0)):
            raise UsageError("time runs from 0 to 1")
        low, high = self.min_fraction, self.max_fraction
        if self.schedule_type == "linear":
            value = low + (high - low) * time
        elif self.schedule_type == "exponential":
            value = low * (high / low) ** time
        else:
            value = low + (high - low) * (1.0 - np.cos(np.pi * time)) / 2.0
        return value if isinstance(t, np.ndarray) else float(value)

    def for_depth(self, k: int, n: int) -> float:
        """The fraction of stage k of n: the smallest at the first, the largest at the last; of one, that of time 1/2.

        Raises:
            UsageError: There is no such stage.
        """
        self._check_stage(k, n)
        return self.fraction(k / (n - 1) if n > 1 else 0.5)

    def window(self, k: int, n: int) -> tuple[float, float]:
        """The fractions from … to that belong to stage k of n, where time is depth. They meet, and cover all.

        Raises:
            UsageError: There is no such stage.
        """
        self._check_stage(k, n)
        return self.fraction(k / n), self.fraction((k + 1) / n)

    @staticmethod
    def _check_stage(k: int, n: int) -> None:
        if not 0 <= k < n:
            raise UsageError(f"there is no stage {k} of {n}")


def uniform_masks(keys: Keys, counts: ArrayLike, length: int) -> Bools:
    """Masks with an exact number of True each, every such pattern equally likely.

    Each position gets a number that follows from (key, position); the smallest `count` are masked.

    Args:
        keys: uint64 [n].
        counts: How many positions of each row, 0 … length; one number, or [n].
        length: Positions of a row, 1 … 65536.

    Returns:
        bool [n, length].

    Raises:
        UsageError: A count or length out of range.
    """
    n = len(keys)
    counts_n = np.broadcast_to(np.asarray(counts, dtype=np.int64), (n,))
    if not 1 <= length <= 1 << 16:
        raise UsageError(f"a sample of {length} positions cannot be masked: 1 to 65536 can")
    if n and (counts_n.min() < 0 or counts_n.max() > length):
        raise UsageError(f"{int(counts_n.min())} … {int(counts_n.max())} masked positions of {length}")
    # The position in the low bits makes a row's numbers distinct, so that the count is exact whatever they are.
    bits = np.uint64((1 << (length - 1).bit_length()) - 1)
    positions_L = np.arange(length, dtype=np.uint64)
    masks_nL = np.empty((n, length), dtype=np.bool_)
    rows = max(1, CHUNK // length)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        grid = child(keys[part, None], positions_L)
        grid &= ~bits
        grid |= positions_L
        ordered = np.sort(grid, axis=1)
        some = counts_n[part]
        last = np.take_along_axis(ordered, np.maximum(some - 1, 0)[:, None], axis=1)
        np.less_equal(grid, last, out=masks_nL[part])
        masks_nL[part][some == 0] = False
    return masks_nL


def no_masks(n: int, length: int) -> Bools:
    """The empty pattern for every row: what a causal objective trains under. bool [n, length]."""
    return np.zeros((n, length), dtype=np.bool_)


class FixedMaskAssigner:
    """The mask plan: every sample keeps its masks, whatever the order, batch or process it is met in.

    Mask m of a sample is a pure function of (seed, sample id, m). A sample's masks are spread over the schedule: each
    falls into another of `masks_per_sample` equal spans of time, and over many samples times are uniform.

    Args:
        scheduler: Time to fraction.
        seq_len: Positions of a sample.
        masks_per_sample: Masks that each sample is seen under.
        pool: Distinct patterns to draw from; 0: a fresh one for each row.
        seed: The run's seed.
        windows: Fractions from … to of each stage, where time is depth; they may overlap. None: the scheduler's.

    Raises:
        UsageError: Numbers out of range, a pool smaller than the masks of a sample, windows that are upside down or
            that leave a fraction untrained.
    """

    def __init__(
        self,
        scheduler: MaskScheduler,
        seq_len: int,
        masks_per_sample: int = 1,
        pool: int = 0,
        seed: int = 0,
        windows: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        if seq_len < 1 or masks_per_sample < 1 or pool < 0:
            raise UsageError(f"seq_len {seq_len}, masks_per_sample {masks_per_sample}, mask_pool {pool}: out of range")
        if pool and pool < masks_per_sample:
            raise UsageError(f"mask_pool {pool} is smaller than masks_per_sample {masks_per_sample}")
        self.scheduler, self.seq_len, self.masks_per_sample = scheduler, seq_len, masks_per_sample
        self.pool, self.seed = pool, seed
        self.windows = None if windows is None else tuple((float(a), float(b)) for a, b in windows)
        if self.windows is not None:
            self._check_windows(self.windows)
        self._key = seed_key(seed, "mask plan")
        self._pool_keys = child(np.full(pool, seed_key(seed, "mask pool"), np.uint64), np.arange(pool, dtype=np.uint64))

    def _check_windows(self, windows: Sequence[tuple[float, float]]) -> None:
        if any(not 0.0 <= low < high <= 1.0 for low, high in windows):
            raise UsageError(f"fraction windows run upwards within 0 … 1, not {list(windows)}")
        reached = self.scheduler.min_fraction
        for low, high in sorted(windows):
            if low > reached:
                break
            reached = max(reached, high)
        if reached < self.scheduler.max_fraction:
            raise UsageError(
                f"no stage trains on fractions just above {reached:g}", hint="widen the window of a stage to hold them"
            )

    def _rows(self, sample_ids: NDArray[np.uint8], m: ArrayLike) -> tuple[Keys, Ints, Floats]:
        """For each row: its key, its span of time, and where in the span it falls, in [0, 1)."""
        samples = sample_keys(self._key, sample_ids)
        index = np.broadcast_to(np.asarray(m, dtype=np.int64), samples.shape)
        if index.size and (index.min() < 0 or index.max() >= self.masks_per_sample):
            raise UsageError(f"a sample has masks 0 to {self.masks_per_sample - 1}, not {int(index.max())}")
        keys = child(samples, index.astype(np.uint64))
        # The spans are dealt out from another start for each sample, so that mask 0 alone meets all times too.
        spans = np.asarray((samples >> np.uint64(33)).astype(np.int64) + index) % self.masks_per_sample
        return keys, spans, uniform(child(keys, 0))

    def _patterns(self, spans: Ints, within: Floats) -> Ints:
        """The pool's pattern of each row: spans hold patterns of their own, so no sample meets one twice."""
        first = spans * self.pool // self.masks_per_sample
        size = (spans + 1) * self.pool // self.masks_per_sample - first
        return np.asarray(first + (within * size).astype(np.int64))

    def _counts(self, time: Floats) -> Ints:
        counts = np.floor(self.scheduler.fraction(time) * self.seq_len + 0.5).astype(np.int64)
        return np.clip(counts, 1, self.seq_len)

    def _pool_counts(self) -> Ints:
        offsets = uniform(child(self._pool_keys, 0))
        return self._counts((np.arange(self.pool) + offsets) / self.pool)

    def counts(self, sample_ids: NDArray[np.uint8], m: ArrayLike = 0) -> Ints:
        """How many positions mask m of each sample covers: exactly so many of seq_len, at least one.

        Args:
            sample_ids: uint8 [n, 16].
            m: Which of the sample's masks; one number, or [n].

        Returns:
            int64 [n].

        Raises:
            UsageError: There is no such mask.
        """
        _, spans, within = self._rows(sample_ids, m)
        if self.pool:
            return self._pool_counts()[self._patterns(spans, within)]
        return self._counts((spans + within) / self.masks_per_sample)

    def masks(self, sample_ids: NDArray[np.uint8], m: ArrayLike = 0) -> Bools:
        """Mask m of each sample, with exactly `counts` True.

        Args:
            sample_ids: uint8 [n, 16].
            m: Which of the sample's masks; one number, or [n].

        Returns:
            bool [n, seq_len].

        Raises:
            UsageError: There is no such mask.
        """
        keys, spans, within = self._rows(sample_ids, m)
        if not self.pool:
            return uniform_masks(child(keys, 1), self._counts((spans + within) / self.masks_per_sample), self.seq_len)
        chosen, place = np.unique(self._patterns(spans, within), return_inverse=True)
        patterns = uniform_masks(child(self._pool_keys[chosen], 1), self._pool_counts()[chosen], self.seq_len)
        return patterns[place]

    def assign(self, sample_ids: NDArray[np.uint8]) -> Bools:
        """All masks of each sample, bool [n, masks_per_sample, seq_len]."""
        n, per_sample = len(sample_ids), self.masks_per_sample
        rows = self.masks(np.repeat(sample_ids, per_sample, axis=0), np.tile(np.arange(per_sample), n))
        return rows.reshape(n, per_sample, self.seq_len)

    def in_window(self, counts: ArrayLike, stage: int, n_stages: int) -> Bools:
        """Where time is depth: whether a stage trains on rows with so many masked positions.

        Windows are closed below and open above; the highest is closed above too.

        Args:
            counts: Masked positions, [n].
            stage: The stage's depth.
            n_stages: How many stages there are.

        Returns:
            bool [n].

        Raises:
            UsageError: There is no such stage.
        """
        low, high = self.window(stage, n_stages)
        fraction = np.asarray(counts, dtype=np.float64) / self.seq_len
        # Rounding to whole positions may leave the schedule's range by half a position: the outer windows take it in.
        below = fraction >= low if low > self.scheduler.min_fraction else np.ones_like(fraction, dtype=np.bool_)
        above = fraction < high if high < self.scheduler.max_fraction else np.ones_like(fraction, dtype=np.bool_)
        return np.asarray(below & above)

    def stage_of(self, counts: ArrayLike, n_stages: int) -> Ints:
        """Where time is depth: the stage that trains on each row; where windows overlap, the lowest.

        Args:
            counts: Masked positions, [n].
            n_stages: How many stages there are.

        Returns:
            int64 [n].
        """
        inside = np.stack([self.in_window(counts, stage, n_stages) for stage in range(n_stages)])
        return np.asarray(inside.argmax(axis=0), dtype=np.int64)

    def window(self, stage: int, n_stages: int) -> tuple[float, float]:
        """Where time is depth: the masked fractions that a stage trains on, from … to.

        Raises:
            UsageError: There is no such stage, or there are windows for another number of them.
        """
        if self.windows is None or not 0 <= stage < n_stages:
            return self.scheduler.window(stage, n_stages)
        if len(self.windows) != n_stages:
            raise UsageError(f"{len(self.windows)} fraction windows for {n_stages} stages")
        return self.windows[stage]


def token_sample_ids(tokens_BS: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Ids made of the tokens themselves, for callers that have no sample ids. uint8 [B, 16]."""
    rows = np.ascontiguousarray(tokens_BS, dtype="<i8")
    ids = b"".join(bytes.fromhex(digest(row)) for row in rows)
    return np.frombuffer(ids, dtype=np.uint8).reshape(-1, 16)


def corrupt(
    tokens_BS: NDArray[np.int64],
    masks_BS: NDArray[np.bool_],
    sample_ids: NDArray[np.uint8] | None,
    *,
    mask_token_id: int,
    vocab_size: int,
    shares: tuple[float, float] = (0.8, 0.1),
    seed: int = 0,
) -> NDArray[np.int64]:
    """Tokens as masked-language modelling shows them: a pure function of (seed, sample, mask).

    Source: BERT (arXiv 1810.04805), 3.1: of the positions selected, 80% show the mask token, 10% a random token, 10%
    themselves.

    Args:
        tokens_BS: The tokens.
        masks_BS: The positions selected.
        sample_ids: uint8 [B, 16]; None: made of the tokens.
        mask_token_id: Shown at a share of the positions selected, and never as a random token.
        vocab_size: Random tokens are uniform over the others.
        shares: Of the positions selected: showing the mask token, showing a random one; the rest shows itself.
        seed: The run's seed.

    Returns:
        int64 [B, S].

    Raises:
        UsageError: Shares that are negative or sum to more than 1.
    """
    check_shares(*shares)
    mask_share, random_share = shares
    length = tokens_BS.shape[1]
    samples = sample_keys(
        seed_key(seed, "corruption"), token_sample_ids(tokens_BS) if sample_ids is None else sample_ids
    )
    positions_S = np.arange(length, dtype=np.uint64)
    weights_S = child(np.full(length, seed_key("mask fingerprint"), np.uint64), positions_S)
    with np.errstate(over="ignore"):
        fingerprints_B = np.where(masks_BS, weights_S, np.uint64(0)).sum(axis=1, dtype=np.uint64)
    keys_BS = child(mix(samples ^ fingerprints_B)[:, None], positions_S)
    draw_BS = uniform(keys_BS)
    # One of the other tokens: counted as if the mask token were not there.
    other_BS = (child(keys_BS, 0) % np.uint64(max(1, vocab_size - 1))).astype(np.int64)
    if 0 <= mask_token_id < vocab_size:
        other_BS += other_BS >= mask_token_id
    shown_BS = np.where(masks_BS & (draw_BS < mask_share), mask_token_id, tokens_BS)
    random_BS = masks_BS & (draw_BS >= mask_share) & (draw_BS < mask_share + random_share)
    return np.asarray(np.where(random_BS, other_BS, shown_BS), dtype=np.int64)


def check_shares(mask_share: float, random_share: float) -> None:
    """Refuse shares that cannot be.

    Raises:
        UsageError: Negative, or more than 1 together.
    """
    if mask_share < 0 or random_share < 0 or mask_share + random_share > 1.0 + 1e-9:
        raise UsageError(f"mlm shares {mask_share} (mask) and {random_share} (random) are not shares of a whole")
