"""Adaptive fusion: the section whose unfreezing gains most on held-out loss trains, and a kill changes nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.choices import AdaptiveFusion
from stackwise.config.unused import unused_settings
from stackwise.errors import ConfigError, StackWiseError
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.schedule import schedule
from stackwise.report import write
from tests.conftest import Micro, raises_naming, run
from tests.pipeline.test_modes import committed
from tests.pipeline.test_run import named, weights

ADAPTIVE: dict[str, Any] = {
    "model__dropout": 0.1,
    "training__steps": 8,
    "training__checkpoint_steps": 4,
    "training__fusion__strategy": "adaptive",
    "training__fusion__steps": 30,
    "training__fusion__rounds": 2,
    "training__fusion__probe_steps": 4,
    "stages__2__training__learning_rate": 1e-3,
    "evaluation__samples": 8,
}


@pytest.fixture(scope="module")
def fused(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("adaptive") / "run"
    return directory, run(micro(**ADAPTIVE), directory)


def test_the_section_that_gains_most_trains_alone(fused: tuple[Path, list[dict[str, Any]]]) -> None:
    directory, events = fused
    *below, last = committed(directory)
    rounds = last.record["fusion"]["rounds"]
    probes = named(events, "probe")
    assert [(e["round"], e["blocks"]) for e in probes] == [(r, [k, k]) for r in range(2) for k in range(2)]
    before = last.record["fusion"]["before"]
    chosen = []
    for number, each in enumerate(rounds):
        assert [probe["gain"] for probe in each["probes"]] == [before - probe["nats"] for probe in each["probes"]]
        assert each["probes"] == [
            {key: e[key] for key in ("blocks", "nats", "gain")} for e in probes if e["round"] == number
        ]
        best = max(each["probes"], key=lambda probe: probe["gain"])
        assert each["chosen"] == best["blocks"]
        chosen.append(best["blocks"])
        assert each["kept"] == (each["nats"] < before)
        before = min(before, each["nats"])
    assert [e["blocks"] for e in named(events, "unfrozen")] == chosen
    start: dict[str, str] = {}
    for stage in below:
        start |= stage.record["parts"]
    parts = {f"block.{first}" for first, _ in chosen} | {"head"} | ({"front"} if [0, 0] in chosen else set())
    assert set(last.record["parts"]) == parts, "what a probe trained is thrown away"
    assert all(last.record["parts"][part] != start[part] for part in parts)
    assert rounds[-1]["nats"] < last.record["fusion"]["before"]
    assert len(last.record["losses"]) == last.record["steps"] == 30
    assert [e["step"] for e in named(events, "step") if e["stage"] == 2][-1] == 30


def test_what_does_not_lower_held_out_loss_is_not_kept(micro: Micro, tmp_path: Path) -> None:
    hurts = {"training__fusion__steps": 8, "training__fusion__rounds": 1, "training__fusion__probe_steps": 1}
    config = micro(**ADAPTIVE | hurts | {"stages__2__training__learning_rate": 3.0})
    events = run(config, tmp_path / "run")
    *below, last = committed(tmp_path / "run")
    (only,) = last.record["fusion"]["rounds"]
    assert only["nats"] > last.record["fusion"]["before"]
    assert only["kept"] is False
    assert last.record["parts"] == {"head": below[-1].record["parts"]["head"]}
    assert named(events, "fused")[0]["gain"] < 0
    assert "trained blocks" not in status(RunDirectory(tmp_path / "run"))["stages"][2]["reason"]


def test_the_choice_is_shown(fused: tuple[Path, list[dict[str, Any]]]) -> None:
    directory, events = fused
    shown = status(RunDirectory(directory))["stages"]
    first, second = (e["blocks"][0] for e in named(events, "unfrozen"))
    assert shown[2]["reason"].endswith(f"; trained blocks {first}, then {second}")
    assert "trained blocks" not in shown[0]["reason"]
    page = write(RunDirectory(directory)).read_text()
    assert "Stage 2, round 2: blocks" in page


@pytest.mark.parametrize(
    ("event", "number", "swap"),
    [
        ("probe", 2, "auto"),
        pytest.param("checkpoint", 1, "auto", marks=pytest.mark.stress),
        pytest.param("unfrozen", 2, "auto", marks=pytest.mark.stress),
        pytest.param("probe", 1, "always", marks=pytest.mark.stress),
    ],
)
def test_killed_in_it_and_swapped_the_weights_are_the_same(
    micro: Micro, fused: tuple[Path, list[dict[str, Any]]], tmp_path: Path, event: str, number: int, swap: str
) -> None:
    directory, expected = tmp_path / "run", weights(fused[0])
    shutil.copytree(fused[0], directory)
    shutil.rmtree(directory / "store" / "stages" / committed(fused[0])[2].recipe)
    config, seen = micro(**ADAPTIVE, training__swap=swap), list[dict[str, Any]]()

    def kill(told: dict[str, Any]) -> None:
        seen.append(told)
        if told["event"] == event and len(named(seen, event)) == number:
            os.kill(next(e["pid"] for e in reversed(seen) if "pid" in e), signal.SIGKILL)

    with contextlib.suppress(StackWiseError):  # the worker may have been done before it was killed
        Runner(config, RunDirectory(directory), kill).run()
    before = [(e["round"], e["blocks"]) for e in named(seen, "probe")]
    again = run(config, directory)
    assert weights(directory) == expected
    assert not list((directory / "checkpoints").glob("*/*"))
    assert named(seen, event)
    done = {(e["round"], e["blocks"][0]) for e in named(again, "resumed") if "round" in e}
    assert len(done) <= len(before)
    trained = [e["step"] for e in named(again, "step") if e["stage"] == 2]
    assert min(trained, default=30) > 4 * (len(before) - 1), "a finished probe is not done again"


def test_a_section_at_a_time_is_in_memory_as_one_that_trains(micro: Micro) -> None:
    adaptive = micro(**ADAPTIVE, model__d_model=256)
    whole = micro(**ADAPTIVE | {"training__fusion__strategy": "trainable"}, model__d_model=256)
    (stage, all_of_it) = (schedule(config)[2] for config in (adaptive, whole))
    sections = [stage.unfreezing(*section) for section in stage.candidates]
    assert [section.trains for section in sections] == [
        ("front", "block.0", "head"),
        ("block.1", "head"),
    ]
    most = max(Estimate(adaptive, 258, section).memory for section in sections)
    of_stage, of_all = Estimate(adaptive, 258, stage), Estimate(whole, 258, all_of_it)
    assert of_stage.memory == most < of_all.memory
    assert of_stage.state_bytes(gradients=True) < of_all.state_bytes(gradients=True)
    swap, swapped = of_stage.swap(1 << 27), of_all.swap(1 << 27)
    assert swap is None or (swapped is not None and swap.memory <= swapped.memory)


def test_a_budget_is_shared_by_rounds_and_probes() -> None:
    assert AdaptiveFusion(rounds=3, probe_steps=5).allotment(100, 4) == [(5, 13), (5, 13), (5, 14)]
    assert AdaptiveFusion().allotment(100, 5) == [(5, 75)]
    assert AdaptiveFusion().allotment(6, 5) == [(1, 1)]


def test_budgets_that_cannot_be_and_settings_in_vain(micro: Micro) -> None:
    def configured(**fusion: Any) -> StackWiseConfig:
        shape: Any = {"architecture": {"n_stacks": 3}}
        training: Any = {"mode": "layerwise", "fusion": {"strategy": "adaptive", **fusion}}
        return StackWiseConfig(model=shape, training=training).validate()

    with raises_naming(ConfigError, "training.fusion.steps"):
        configured()
    with raises_naming(ConfigError, "training.fusion", "3 sections"):
        configured(steps=12, probe_steps=4)
    said = unused_settings(micro(training__fusion__strategy="trainable", training__fusion__rounds=2))
    assert [line.split()[0] for line in said] == ["training.fusion.rounds"]
