"""Runs that differ by their seed as one figure: its interval, and differences from other runs' on the same samples."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from stackwise.errors import UsageError
from stackwise.report.groups import Measured, Samples, figure, group_cells, groups, paired, plot
from tests.conftest import raises_naming

RNG = np.random.default_rng(0)
BYTES = RNG.integers(80, 120, 64).tolist()


def samples(shift: float, noise: float = 4.0, of: list[int] = BYTES) -> Samples:
    nats = np.asarray(of) * (2.0 + shift) * math.log(2) + RNG.normal(0, noise, len(of))
    return Samples(nats.tolist(), of, "byte")


def test_the_interval_of_one_run_is_that_of_the_bootstrap_of_a_ratio() -> None:
    one, other = samples(0.0), samples(0.05)
    ours = paired([(other, one)])
    bits = (np.asarray(other.nats) - np.asarray(one.nats)) / math.log(2)

    def ratio(bits: np.ndarray, sizes: np.ndarray, axis: int = -1) -> np.ndarray:
        return bits.sum(axis) / sizes.sum(axis)

    data = (bits, np.asarray(BYTES, float))
    theirs = stats.bootstrap(data, ratio, paired=True, method="percentile", rng=1).confidence_interval
    assert ours.mean == pytest.approx(other.value - one.value)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=2e-3)
    assert ours == paired([(other, one)])  # the same each time


def test_what_pairs_share_is_no_spread_of_their_difference() -> None:
    # texts differ by far more than the runs do: only samples side by side tell them apart
    hard = RNG.normal(0, 60, len(BYTES))
    first = [samples(shift, 0.5) for shift in (0.0, 0.01, 0.02)]
    second = [samples(shift + 0.1, 0.5) for shift in (0.0, 0.01, 0.02)]
    first, second = (
        [Samples((np.asarray(one.nats) + hard).tolist(), one.of, "byte") for one in runs] for runs in (first, second)
    )
    difference, alone = paired(list(zip(second, first, strict=True))), figure(first)
    assert 0.09 < difference.low < difference.mean < difference.high < 0.11
    assert alone.high - alone.low > 0.2
    with raises_naming(UsageError, "held-out"):
        paired([(samples(0.0), samples(0.0, of=[100] * 64))])


def test_runs_group_by_what_is_not_their_seed() -> None:
    runs = [
        Measured(
            f"{mode}-{seed}", {"training.mode": mode, "seed": seed, "name": f"{mode}-{seed}"}, vars(samples(shift))
        )
        for mode, shift in (("layerwise", 0.0), ("end_to_end", 0.3))
        for seed in (0, 1)
    ]
    runs.append(Measured("later", {"training.mode": "fused", "seed": 7}, vars(samples(0.0))))
    first, second, third = groups(runs)
    assert (first["runs"], first["seeds"], first["against"]) == (["layerwise-0", "layerwise-1"], 2, None)
    assert second["against"]["low"] > 0.25
    assert third["against"] is None
    assert "seed" in third["why_not"]
    columns, rows = group_cells([first, second, third])
    assert all(len(row) == len(columns) for row in rows)
    drawing = ElementTree.fromstring(plot([first, second, third]))
    assert len(drawing.findall(".//{*}circle")) == 3
    with pytest.raises(UsageError, match="evaluated"):
        plot(groups([]))


def test_runs_on_other_text_and_losses_that_are_no_numbers_stay_out_of_a_mean() -> None:
    settings = {"training.mode": "layerwise", "seed": 0}
    whole = Measured("whole", settings, vars(samples(0.0)))
    moved = Measured("moved", {**settings, "seed": 1}, vars(samples(0.0, of=BYTES[:32])))
    broken = Measured("broken", {**settings, "seed": 2}, vars(samples(0.0)) | {"nats": [None, *[1.0] * 63]})
    first, second = groups([whole, moved, broken])
    assert (first["runs"], second["runs"]) == (["whole"], ["moved"])
    assert second["against"] is None
    assert groups([broken]) == []
