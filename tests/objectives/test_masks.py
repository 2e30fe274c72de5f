"""Masks: exact counts, their distribution, the plan as a pure function, the schedule and its windows."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise.errors import UsageError
from stackwise.objectives import FixedMaskAssigner, MaskScheduler, no_masks, uniform_masks
from tests.conftest import raises_naming


def sample_ids(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 16), dtype=np.uint8)


def test_no_torch_is_loaded() -> None:
    code = "import sys; from stackwise.objectives import FixedMaskAssigner, corrupt; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@given(st.integers(1, 200), st.integers(0, 2**64 - 1), st.data())
@settings(max_examples=60, deadline=None)
def test_counts_are_exact(length: int, key: int, data: st.DataObject) -> None:
    counts = np.array(data.draw(st.lists(st.integers(0, length), min_size=1, max_size=5)))
    keys = np.array([(key + i) % 2**64 for i in range(len(counts))], dtype=np.uint64)
    masks = uniform_masks(keys, counts, length)
    assert masks.shape == (len(counts), length)
    assert np.array_equal(masks.sum(1), counts)


def test_every_pattern_is_equally_likely() -> None:
    keys = np.random.default_rng(0).integers(0, 2**64, 60_000, dtype=np.uint64)
    masks = uniform_masks(keys, 3, 6)
    codes = masks @ (1 << np.arange(6))
    patterns, seen = np.unique(codes, return_counts=True)
    assert len(patterns) == 20  # 6 choose 3
    expected = len(keys) / 20
    chi2 = ((seen - expected) ** 2 / expected).sum()
    assert chi2 < 43.8, "the patterns are not uniform (chi-squared, 19 degrees of freedom, p = 0.001)"


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.arange(1000, dtype=np.uint64)
    whole = uniform_masks(keys, keys.astype(np.int64) % 33, 32)
    monkeypatch.setattr("stackwise.objectives.masks.CHUNK", 64)
    assert np.array_equal(uniform_masks(keys, keys.astype(np.int64) % 33, 32), whole)


def test_known_masks_stay_what_they_are() -> None:
    """Stored boundaries rest on these: a change is a new numerics version."""
    ids = np.arange(48, dtype=np.uint8).reshape(3, 16)
    plan = FixedMaskAssigner(MaskScheduler(), 16, masks_per_sample=2, seed=1)
    packed = np.packbits(plan.assign(ids), axis=-1)
    assert [[row.tobytes().hex() for row in sample] for sample in packed] == KNOWN


KNOWN = [["ffcc", "1046"], ["cdd5", "0439"], ["d7c9", "003a"]]


def test_fraction_shapes() -> None:
    t = np.linspace(0, 1, 101)
    for kind in ("linear", "exponential", "cosine"):
        scheduler = MaskScheduler(0.15, 0.9, kind)  # type: ignore[arg-type]
        fractions = scheduler.fraction(t)
        assert fractions[0] == pytest.approx(0.15)
        assert fractions[-1] == pytest.approx(0.9)
        assert np.all(np.diff(fractions) > 0)
        assert isinstance(scheduler.fraction(0.5), float)
    assert MaskScheduler(0.15, 0.9).fraction(0.5) == pytest.approx(0.525)
    assert MaskScheduler(0.1, 0.9, "exponential").fraction(0.5) == pytest.approx(0.3)
    cosine = MaskScheduler(0.1, 0.9, "cosine")
    assert cosine.fraction(0.5) == pytest.approx(0.5)
    assert cosine.fraction(0.1) - 0.1 < 0.04
    assert [MaskScheduler(0.2, 0.8).for_depth(k, 3) for k in range(3)] == pytest.approx([0.2, 0.5, 0.8])
    assert MaskScheduler(0.2, 0.8).for_depth(0, 1) == pytest.approx(0.5)
    windows = [MaskScheduler(0.2, 0.8).window(k, 3) for k in range(3)]
    assert windows[0][0] == pytest.approx(0.2)
    assert windows[2][1] == pytest.approx(0.8)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(windows))


@pytest.mark.parametrize(
    "arguments", [(0.0, 0.9), (0.2, 1.1), (-0.1, 0.5), (0.9, 0.2), (0.1, 0.9, "square"), (float("nan"), 0.9)]
)
def test_bad_schedules(arguments: tuple[float, ...]) -> None:
    with pytest.raises(UsageError):
        MaskScheduler(*arguments)  # type: ignore[arg-type]


def test_bad_plans_and_masks() -> None:
    scheduler = MaskScheduler()
    with raises_naming(UsageError, "seq_len 0"):
        FixedMaskAssigner(scheduler, 0)
    with raises_naming(UsageError, "mask_pool 3", "masks_per_sample 4"):
        FixedMaskAssigner(scheduler, 8, masks_per_sample=4, pool=3)
    plan = FixedMaskAssigner(scheduler, 8, masks_per_sample=2)
    with pytest.raises(UsageError, match="masks 0 to 1"):
        plan.masks(sample_ids(1), 2)
    with raises_naming(ValueError, "[2, 8]", "[n, 16]"):
        plan.masks(np.zeros((2, 8), dtype=np.uint8))
    with pytest.raises(UsageError):
        scheduler.fraction(1.5)
    with raises_naming(UsageError, 9, 8):
        uniform_masks(np.zeros(1, dtype=np.uint64), 9, 8)
    with raises_naming(UsageError, "stage 3", "of 3"):
        scheduler.window(3, 3)


@pytest.mark.parametrize("pool", [0, 64])
@pytest.mark.parametrize("kind", ["linear", "exponential", "cosine"])
def test_plan_hits_its_fractions(kind: str, pool: int) -> None:
    scheduler = MaskScheduler(0.15, 0.9, kind)  # type: ignore[arg-type]
    plan = FixedMaskAssigner(scheduler, 64, masks_per_sample=4, pool=pool, seed=3)
    ids = sample_ids(800)
    masks = plan.assign(ids)
    assert masks.shape == (800, 4, 64)
    for m in range(4):
        assert np.array_equal(masks[:, m].sum(1), plan.counts(ids, m))
        assert np.array_equal(masks[:, m], plan.masks(ids, m))
    want = scheduler.fraction((np.arange(10_000) + 0.5) / 10_000)
    got = masks.mean(-1).ravel()
    assert got.mean() == pytest.approx(want.mean(), abs=0.02)
    assert np.quantile(got, [0.1, 0.5, 0.9]) == pytest.approx(np.quantile(want, [0.1, 0.5, 0.9]), abs=0.04)
    assert got.min() >= 0.15 - 0.5 / 64
    assert got.max() <= 0.9 + 0.5 / 64
    # Stratified: of a sample's four masks one lies in each quarter of time.
    edges, rounding = scheduler.fraction(np.linspace(0, 1, 5)), 0.5 / 64 + 1e-9
    ranked = np.sort(masks.mean(-1), axis=1)
    assert (ranked >= edges[:-1] - rounding).all()
    assert (ranked <= edges[1:] + rounding).all()
    # No position is favoured (a pool is a small sample), and mask 0 alone meets every fraction.
    assert masks.mean((0, 1)).std() < (0.1 if pool else 0.02)
    assert masks[:, 0].mean() == pytest.approx(want.mean(), abs=0.03)


def test_plan_is_a_function_of_sample_and_mask_alone() -> None:
    ids = sample_ids(50)
    plan = FixedMaskAssigner(MaskScheduler(), 32, masks_per_sample=3, seed=1)
    again = FixedMaskAssigner(MaskScheduler(), 32, masks_per_sample=3, seed=1)
    order = np.random.default_rng(1).permutation(50)
    assert np.array_equal(plan.masks(ids, 1)[order], again.masks(ids[order], 1))
    mixed = np.arange(50) % 3
    assert np.array_equal(plan.masks(ids, mixed)[7], plan.masks(ids[7:8], 1)[0])
    other = FixedMaskAssigner(MaskScheduler(), 32, masks_per_sample=3, seed=2)
    assert not np.array_equal(plan.masks(ids), other.masks(ids))


def test_masks_differ_between_samples_and_masks() -> None:
    masks = FixedMaskAssigner(MaskScheduler(), 64, masks_per_sample=2).assign(sample_ids(500))
    assert len(np.unique(masks.reshape(1000, 64), axis=0)) == 1000


def test_pool_holds_so_many_patterns() -> None:
    plan = FixedMaskAssigner(MaskScheduler(), 64, masks_per_sample=3, pool=10)
    masks = plan.assign(sample_ids(400))
    assert len(np.unique(masks.reshape(-1, 64), axis=0)) == 10
    distinct = [len(np.unique(sample, axis=0)) for sample in masks]
    assert min(distinct) == 3, "a sample meets the same pattern twice"


@pytest.mark.parametrize("kind", ["linear", "exponential", "cosine"])
@pytest.mark.parametrize("n_stages", [1, 3, 5])
def test_depth_windows_share_the_rows_out(kind: str, n_stages: int) -> None:
    scheduler = MaskScheduler(0.15, 0.9, kind)  # type: ignore[arg-type]
    plan = FixedMaskAssigner(scheduler, 256, seed=5)
    counts = plan.counts(sample_ids(3000))
    stages = plan.stage_of(counts, n_stages)
    inside = np.stack([plan.in_window(counts, k, n_stages) for k in range(n_stages)])
    assert (inside.sum(0) == 1).all(), "a row belongs to no stage, or to two"
    assert np.array_equal(stages, inside.argmax(0))
    shares = np.bincount(stages, minlength=n_stages) / 3000
    assert shares == pytest.approx(np.full(n_stages, 1 / n_stages), abs=0.05)
    for k in range(n_stages - 1):
        assert counts[stages == k].max() <= counts[stages == k + 1].min()


def test_windows_of_ones_own() -> None:
    windows = [(0.1, 0.6), (0.4, 0.95)]
    plan = FixedMaskAssigner(MaskScheduler(), 100, windows=windows)
    counts = np.array([15, 45, 70])
    assert plan.in_window(counts, 0, 2).tolist() == [True, True, False]
    assert plan.in_window(counts, 1, 2).tolist() == [False, True, True]
    assert plan.stage_of(counts, 2).tolist() == [0, 0, 1]
    with raises_naming(UsageError, "2 fraction", "3 stages"):
        plan.stage_of(counts, 3)
    with raises_naming(UsageError, 0.4):
        FixedMaskAssigner(MaskScheduler(), 100, windows=[(0.1, 0.4), (0.5, 0.95)])
    with pytest.raises(UsageError, match="upwards"):
        FixedMaskAssigner(MaskScheduler(), 100, windows=[(0.9, 0.1)])


def test_no_masks() -> None:
    assert no_masks(3, 5).shape == (3, 5)
    assert not no_masks(3, 5).any()
