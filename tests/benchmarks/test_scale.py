"""The model of many GPUs against what it must come to at one, and against its simulation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.scale import Site, Training, estimate, simulate
from stackwise.config import StackWiseConfig
from stackwise.errors import UsageError

TRAINING = Training(StackWiseConfig.from_preset("llama-70b"))


@pytest.mark.parametrize("gpu_hours", [50_000.0, 500.0])
def test_the_simulation_loses_what_the_formula_says(gpu_hours: float) -> None:
    stage = estimate(TRAINING, replace(Site(64), gpu_hours=gpu_hours))
    lost = simulate(stage, stage.plain, failures=200 if gpu_hours < 1000 else 60, seed=1)
    assert lost == pytest.approx(stage.lost(stage.plain), rel=0.15)


def test_one_gpu_has_no_wire_and_many_divide_all() -> None:
    one, some, many = (estimate(TRAINING, replace(Site(gpus), spread=0.0)) for gpus in (1, 8, 64))
    assert one.plain == one.ordered == pytest.approx(0.0, abs=0.1)
    assert one.compute == pytest.approx(8 * some.compute) == pytest.approx(64 * many.compute)
    assert some.forward == some.whole == many.whole == pytest.approx(8 * many.forward)
    assert many.days(0.0, many.forward)["compute"] == pytest.approx(one.days(0.0, 0.0)["compute"] / 64)
    with pytest.raises(UsageError):
        estimate(TRAINING, Site(7))
