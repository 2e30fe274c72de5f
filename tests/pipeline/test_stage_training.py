"""Runs whose stages evaluate, end early, go back and skip: killed anywhere, they end with the same weights."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from stackwise.config.unused import unused_settings
from stackwise.config.yaml_files import dump
from stackwise.errors import ConfigError, UsageError
from stackwise.pipeline.library import UnifiedTrainer
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.runner.manifest import EventLog
from stackwise.store import ActivationStore
from stackwise.training import checkpoint
from tests.conftest import Micro, raises_naming, run
from tests.pipeline.test_kill import Command, goes_on
from tests.pipeline.test_run import named, weights

HEEDING = {
    "training.steps": 60,
    "training.eval_every": 10,
    "training.patience": 4,
    "training.keep_best": True,
    "training.ema": 0.9,
    "training.optimizer": "muon",
    "training.checkpoint_steps": 5,
    "model.dropout": 0.1,
    "stages": {1: {"training": {"optimizer": "adamw8bit", "on_divergence": "rollback", "learning_rate": 3.0,
                                "lr_schedule": "constant", "warmup": 0.4, "grad_clip": 0.0, "rollback_factor": 0.3,
                                "divergence_factor": 1.3, "divergence_limit": 20}}},
}  # fmt: skip
"""Everything that decides something inside a stage; the second stage begins at a rate that is far too high."""


@pytest.fixture(scope="module")
def reference(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[dict[str, Any]]]:
    """A configuration file, the weights of an undisturbed run of it, and its events."""
    home = tmp_path_factory.mktemp("heeding")
    config = micro(**HEEDING)
    (home / "stackwise.yaml").write_text(dump(config))
    events = run(config, home / "run")
    return home / "stackwise.yaml", weights(home / "run"), events


def test_what_was_evaluated_and_what_diverged_is_told(
    reference: tuple[Path, list[str], list[dict[str, Any]]],
) -> None:
    home, _, events = reference
    told = named(events, "held_out")
    for depth in (0, 1):
        assert {e["step"] for e in told if e["stage"] == depth} >= {10, 20}
    diverged = [e for e in events if e["event"] == "diverged"]
    assert diverged
    assert {e["stage"] for e in diverged} == {1}
    assert all(e["to"] % 5 == 0 and "median" in e["text"] for e in diverged)
    steps = [e for e in events if e["event"] == "step"]
    assert all(e["gradient_norm"] > 0 and e["tokens_per_second"] > 0 and e["memory"] > 0 for e in steps)
    # A checkpoint of its step came before every evaluation.
    saved: set[tuple[int, int]] = set()
    for event in events:
        if event["event"] == "checkpoint":
            saved.add((event["stage"], event["step"]))
        assert event["event"] != "held_out" or (event["stage"], event["step"]) in saved
    kept = RunDirectory(home.parent / "run").manifest()["stages"]
    assert [stage["held_out"]["nats"] for stage in kept] == [
        next(e["nats"] for e in reversed(told) if e["stage"] == depth) for depth in (0, 1)
    ]
    assert [stage["divergences"] for stage in kept] == [0, len(diverged)]
    # Held-out rows went up beside the others: nothing was made a second time.
    assert not named(events, "recomputing")
    with ActivationStore(home.parent / "run" / "store", create=False) as store:
        assert len(store.boundaries()) == 2
        record = store.stage(str(status(RunDirectory(home.parent / "run"))["stages"][1]["recipe"]))
        assert record is not None
        assert record.record["divergences"]
        assert record.record["held_out"][0][0] == 10


@pytest.mark.parametrize(
    ("event", "stage", "at"),
    [
        ("held_out", 0, 20),
        pytest.param("diverged", 1, 0, marks=pytest.mark.stress),
        pytest.param("held_out", 1, 20, marks=pytest.mark.stress),
    ],
)
def test_a_run_that_decides_and_is_killed_ends_the_same(
    reference: tuple[Path, list[str], list[dict[str, Any]]], tmp_path: Path, event: str, stage: int, at: int
) -> None:
    config, expected, _ = reference
    first = Command(config, tmp_path / "run")
    first.until(event, stage, at)
    first.process.kill()
    first.end()
    goes_on(config, tmp_path / "run", expected)


def test_the_best_weights_are_committed(micro: Micro, tmp_path: Path) -> None:
    wild = {"training.learning_rate": 0.3, "training.lr_schedule": "constant", "training.grad_clip": 0.0}
    settings = {"training.steps": 30, "training.eval_every": 3, "training.mode": "end_to_end", **wild}
    events = run(micro(**settings, **{"training.keep_best": True}), tmp_path / "best")
    told = {e["step"]: e["nats"] for e in named(events, "held_out")}
    step = min(told, key=lambda key: told[key])
    assert step < 30, "the rate is so high that it does not end at its best"
    (best,) = named(events, "best")
    assert (best["step"], best["nats"]) == (step, told[step])
    run(micro(**settings), tmp_path / "last")
    assert weights(tmp_path / "best") != weights(tmp_path / "last")


def test_settings_that_shape_nothing_are_in_no_recipe(micro: Micro, tmp_path: Path) -> None:
    run(micro(), tmp_path / "run")
    looking = micro(**{"training.eval_every": 10, "training.keep_checkpoints": 4})
    assert not named(run(looking, tmp_path / "run"), "training")


def test_settings_given_in_vain_are_said_and_contradictions_refused(micro: Micro) -> None:
    config = micro(
        **{
            "training.tokens": 1000, "training.muon_momentum": 0.9, "training.loss_scale": 8.0, "precision": "fp32",
            "training.rollback_factor": 0.1, "training.divergence_factor": 9.0,
            "stages": {1: {"training": {"muon_momentum": 0.8, "optimizer": "muon", "rollback_factor": 0.9}}},
        }
    )  # fmt: skip
    said = "\n".join(unused_settings(config))
    for key in ("tokens", "muon_momentum", "loss_scale", "rollback_factor", "divergence_factor"):
        assert f"training.{key}" in said
    assert "stages.1.training.rollback_factor" in said
    assert "stages.1.training.muon_momentum" not in said
    with raises_naming(ConfigError, "training.patience"):
        micro(**{"training.patience": 2})
    with raises_naming(ConfigError, "block 7"):
        micro(**{"training.block_learning_rates": {7: 1e-4}})
    with raises_naming(UsageError, "held-out"):
        UnifiedTrainer(micro(**{"training.eval_every": 2})).train_all_layers([], [object()])  # type: ignore[list-item]


def test_a_clock_that_is_set_back_does_not_stop_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with EventLog(RunDirectory(tmp_path)) as log:
        for number in range(8):
            log({"event": "step", "stage": 0, "step": number + 1, "losses": [1.0], "time": 1e9 - 3600 * number})
            now += 0.4
        lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["losses"]) for line in lines] == [4, 4]


def test_a_budget_in_tokens(micro: Micro, tmp_path: Path) -> None:
    events = run(micro(**{"training.steps": None, "training.tokens": 10 * 16 * 32}), tmp_path / "run")
    assert [e["steps"] for e in named(events, "training")] == [10, 10]


def test_half_precision_through_the_pipeline(micro: Micro, tmp_path: Path) -> None:
    config = micro(**{"training.progressive.enabled": True, "training.progressive.new_stack_precision": "half"})
    assert config.precision == "fp16"
    events = run(config, tmp_path / "run")
    losses = [loss for e in events if e["event"] == "step" and e["stage"] == 0 for loss in e["losses"]]
    assert losses[-1] < losses[0]
    assert not list((tmp_path / "run" / "checkpoints").glob("*/*"))
    assert checkpoint.KEPT == 2
