"""Sections of sizes of their own, and a joint phase at the end of one schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stackwise.errors import ConfigError
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.schedule import schedule
from tests.conftest import Micro
from tests.pipeline.test_growth import parts
from tests.pipeline.test_passes import run_stages
from tests.pipeline.test_run import named, weights

JOINT: dict[str, Any] = {
    "model__architecture__n_stacks": 4,
    "precision": "fp32",
    "training__block_sizes": [2, 1, 1],
    "training__fusion": {"strategy": "trainable", "share": 0.25},
}


def test_the_rack_trains_on_together_where_its_sections_stopped(micro: Micro, tmp_path: Path) -> None:
    for swap in ("never", "always"):
        events = run_stages(micro(**JOINT, training__swap=swap), tmp_path / swap)
    rows = status(RunDirectory(tmp_path / "never"))["stages"]
    assert [(row["blocks"], row["steps"]) for row in rows] == [([0, 1], 15), ([2, 2], 15), ([3, 3], 15), ([0, 3], 5)]
    assert weights(tmp_path / "never") == weights(tmp_path / "always")
    rates = {event["stage"]: event["learning_rate"] for event in named(events, "step")}
    assert len({rates[stage] for stage in range(3)}) == 1
    assert rates[3] < rates[0], "one schedule: the last stage goes on where the others stopped"
    moments = parts(tmp_path / "never", 1)["state.1.block.2"]
    assert {name.split("/")[1] for name in moments} == {"exp_avg", "exp_avg_sq", "step"}
    assert all(int(value) == 15 for name, value in moments.items() if "/step/" in name)
    assert {f"state.{n}.block.{b}" for n, b in ((0, 0), (0, 1), (1, 2), (2, 3))} == {
        stage.starts_from[state]
        for stage in schedule(micro(**JOINT))[-1:]
        for state in stage.states_in
        if ".block." in state
    }


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"training__block_sizes": [2, 1]}, r"training.mode.block_sizes: \[2, 1\] are 3 blocks, and the model has 4"),
        ({"training__n_stages": 2}, "training.mode.n_stages: block_sizes say"),
        ({"training__fusion": {"strategy": "trainable", "share": 0.5, "steps": 4}}, "training.fusion.share: .* one of"),
        ({"training__fusion": {"strategy": "hierarchical", "share": 0.5}}, "training.fusion.share: hierarchical has"),
        ({"training__windows": 2}, "training.fusion.share: one schedule"),
        ({"training__fusion": {"strategy": "trainable", "share": 1.5}}, "training.fusion.share: must be less than 1.0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_a_line(micro: Micro, settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        micro(**JOINT | settings)
