"""Sections of the whole rack that train in turn, a window of the rows a round: exactly, swapped, killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stackwise.pipeline.run import RunDirectory
from tests.conftest import Micro, run
from tests.pipeline.storm import killed
from tests.pipeline.test_run import weights

TURNS: dict[str, Any] = {
    "training__mode": {"name": "in_turn", "block_size": 1},
    "training__windows": 2,
    "training__steps": 20,
}


def test_swapped_and_resident_are_the_same(micro: Micro, tmp_path: Path) -> None:
    """Experts, a mean of the weights and the optimizer's state go from a round to the next, each from its own file."""
    ffn = {"kind": "moe", "experts": 8, "expert_dim": 8, "at": [1]}
    for swap in ("never", "always"):
        run(
            micro(
                **TURNS | {"training__steps": 8},
                model__ffn=ffn,
                training__ema=0.9,
                training__swap=swap,
                store__path=str(tmp_path / swap / "store"),
            ),
            tmp_path / swap,
        )
    assert weights(tmp_path / "never") == weights(tmp_path / "always")


def test_a_round_changes_its_section_alone_and_goes_on_where_the_round_before_left_it(
    micro: Micro, tmp_path: Path
) -> None:
    events = run(micro(**TURNS), tmp_path / "run")
    stages = RunDirectory(tmp_path / "run").manifest()["stages"]
    assert [(stage["depth"], stage["window"]) for stage in stages] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    parts = [event["parts"] for event in events if event["event"] == "committed"]
    sections = [{"front", "block.0"}, {"block.1"}]
    weights_of = [{name for name in part if not name.startswith("state")} for part in parts]
    assert weights_of == [section | {"head"} for section in (*sections, *sections)]
    assert len({part["head"] for part in parts}) == 4, "the head trains in every turn"


def test_a_killed_run_ends_with_the_same_weights(micro: Micro, tmp_path: Path) -> None:
    config = micro(**TURNS | {"training__steps": 80}, training__checkpoint_steps=4)
    run(config, tmp_path / "undisturbed")
    killed(config, tmp_path / "run", 1, 2)
    assert weights(tmp_path / "run") == weights(tmp_path / "undisturbed")
