"""Runs whose stages are swapped end with the weights of runs whose stages are resident."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from stackwise.config.unused import unused_settings
from stackwise.config.yaml_files import dump
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.schedule import schedule
from tests.conftest import Micro, run
from tests.pipeline.storm import kill_worker
from tests.pipeline.test_kill import Command, goes_on
from tests.pipeline.test_run import named, weights

SMALL: dict[str, Any] = {"training__steps": 6, "training__accumulation": 2, "training__grad_clip": 0.3}
END_TO_END: dict[str, Any] = {"training__mode": "end_to_end"}
FUSED: dict[str, Any] = {"training__mode": "fused", "training__fusion_mode": "trainable"}
BLOCKWISE: dict[str, Any] = {"training__mode": "blockwise"}
FOUR: dict[str, Any] = {"training__block_size": 2, "model__architecture__n_stacks": 4}
MODES = [
    {**END_TO_END, "model__dropout": 0.1},
    pytest.param({**FUSED, "model__tie_embeddings": False, "precision": "bf16"}, marks=pytest.mark.stress),
    pytest.param(
        {**BLOCKWISE, **FOUR, "training__tied_head": "frozen", "model__dropout": 0.1}, marks=pytest.mark.stress
    ),
    pytest.param({**END_TO_END, "model__tie_embeddings": False, "precision": "bf16"}, marks=pytest.mark.stress),
    pytest.param(FUSED, marks=pytest.mark.stress),
    pytest.param({**BLOCKWISE, "data__within_documents": True}, marks=pytest.mark.stress),
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_swapped_and_resident_are_the_same(micro: Micro, tmp_path: Path, mode: dict[str, Any]) -> None:
    mode = {**SMALL, **mode}
    resident = run(micro(**mode, training__swap="never"), tmp_path / "resident")
    events = run(micro(**mode, training__swap="always", training__swap_parts=2), tmp_path / "swapped")
    assert not any("is swapped" in event["text"] for event in named(resident, "note"))
    assert any("is swapped" in event["text"] for event in named(events, "note"))
    assert weights(tmp_path / "swapped") == weights(tmp_path / "resident")
    assert [e["recipe"] for e in named(events, "committed")] == [e["recipe"] for e in named(resident, "committed")]
    assert [e["boundary"] for e in named(events, "written")] == [e["boundary"] for e in named(resident, "written")]
    assert named(events, "evaluation")[0]["result"] == named(resident, "evaluation")[0]["result"]
    assert not list((tmp_path / "swapped" / "checkpoints").glob("*/*"))


def test_auto_swaps_what_does_not_fit(micro: Micro) -> None:
    config = micro(training__mode="end_to_end", model__architecture__n_stacks=16, model__d_model=512)
    (stage,) = schedule(config)
    assert Estimate(config, 258, stage).swap(1 << 40) is None
    swaps = [Estimate(config, 258, stage).swap(memory) for memory in (3 << 28, 1 << 29, 1 << 20)]
    groups = [swap.groups for swap in swaps if swap is not None]
    assert groups == sorted(groups)
    assert 1 < groups[0] < groups[-1] == 16
    assert swaps[0] is not None
    assert swaps[0].memory <= 3 << 28
    config.training.memory = 1 << 29
    assert Estimate(config, 258, stage).swap(1 << 40) == swaps[1]
    config.training.swap = "never"
    assert Estimate(config, 258, stage).swap(1 << 20) is None
    config.training.swap_parts = 3
    assert any("swap_parts" in line for line in unused_settings(config))


def test_a_worker_killed_in_a_swapped_stage(micro: Micro, tmp_path: Path) -> None:
    values: dict[str, Any] = {"training__mode": "end_to_end", "model__dropout": 0.1, "training__steps": 40}
    run(micro(**values, training__swap="never"), tmp_path / "resident")
    config = tmp_path / "stackwise.yaml"
    config.write_text(dump(micro(**values, training__swap="always", training__swap_parts=2)))
    kill_worker(micro(**values, training__swap="always", training__swap_parts=2), tmp_path / "run", 0, 3)
    second = Command(config, tmp_path / "run")
    second.until("step", 0, 6)
    second.process.send_signal(signal.SIGTERM)
    assert second.end()[0] == 75
    seen = goes_on(config, tmp_path / "run", weights(tmp_path / "resident"))
    assert named(seen, "resumed")[0]["step"] >= 6
