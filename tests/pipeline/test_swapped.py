"""Runs whose stages are swapped end with the weights of runs whose stages are resident."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stackwise.config.unused import unused_settings
from stackwise.config.yaml_files import dump
from stackwise.errors import UsageError
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.schedule import schedule
from tests.conftest import Micro, run
from tests.pipeline.storm import kill_worker
from tests.pipeline.test_kill import Command, goes_on
from tests.pipeline.test_ranks import same, stopped
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
    roomy = Estimate(config, 258, stage).swap(1 << 40)
    assert roomy is not None
    assert swaps[1] == replace(roomy, direct=True), "a large machine's page cache keeps its files"
    assert not roomy.direct
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


def test_ranks_divide_a_swapped_stage(micro: Micro, tmp_path: Path) -> None:
    """The same artefacts as one process makes in memory; a rank that is killed, and another number that goes on."""
    values: dict[str, Any] = {**SMALL, **END_TO_END, "model__dropout": 0.1, "training__accumulation": 4}
    values |= {"training__eval_every": 3, "training__checkpoint_steps": 2, "training__steps": 20}
    alone = run(micro(**values, training__swap="never"), tmp_path / "alone")
    swapped: dict[str, Any] = {**values, "training__swap": "always", "training__swap_parts": 2}
    stopped(micro(**swapped, parallel__data=2), tmp_path / "ranks", 1, signal.SIGKILL)
    events = run(micro(**swapped, parallel__data=4), tmp_path / "ranks")
    assert named(events, "resumed")[0]["step"] > 0
    same(tmp_path / "ranks", tmp_path / "alone")
    assert [e["recipe"] for e in named(events, "committed")] == [e["recipe"] for e in named(alone, "committed")]
    assert not list((tmp_path / "ranks" / "checkpoints").glob("*/*"))


@pytest.mark.stress
def test_ranks_have_a_swapped_stage_on_disks_of_their_own(micro: Micro, tmp_path: Path) -> None:
    """Four disks; two ranks go on with what is on them."""
    values: dict[str, Any] = {**SMALL, **END_TO_END, "training__accumulation": 4, "training__steps": 30}
    values["training__row_groups"] = 4
    run(micro(**values, training__swap="never"), tmp_path / "alone")
    swapped: dict[str, Any] = {**values, "training__swap": "always", "training__checkpoint_steps": 2}
    swapped["store__path"] = str(tmp_path / "disk-{rank}" / "store")
    stopped(micro(**swapped, parallel__data=4), tmp_path / "ranks", 1, signal.SIGKILL)
    assert all(list((tmp_path / f"disk-{rank}" / "store.swap").rglob("head-*")) for rank in range(4))
    events = run(micro(**swapped, parallel__data=2), tmp_path / "ranks")
    assert named(events, "resumed")[0]["step"] > 0
    assert weights(tmp_path / "ranks") == weights(tmp_path / "alone")
    assert not list(tmp_path.glob("disk-*/store.swap/*/rank-*-of-2"))


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"parallel__shard": 2}, "parallel.data alone"),
        ({"parallel__data": 2, "training__optimizer": "muon"}, "adamw"),
        ({"parallel__data": 2, "model__ffn": {"kind": "moe", "experts": 4}}, "experts"),
    ],
)
def test_what_ranks_cannot_swap_is_refused(micro: Micro, setting: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=r"training\.swap") as caught:
        micro(**setting, training__accumulation=4, training__swap="always")
    assert why in caught.value.message + str(caught.value.hint)
