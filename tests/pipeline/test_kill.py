"""Runs that end in every other way than by themselves: the next one goes on, and ends with the same weights."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.yaml_files import dump
from stackwise.pipeline.run import RunDirectory, status
from stackwise.store import ActivationStore
from tests.conftest import Micro, run
from tests.pipeline.storm import Command, Storm, retrained
from tests.pipeline.test_run import weights


@pytest.fixture(scope="module")
def reference(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A configuration file, and the weights of a run of it that nothing disturbed."""
    home = tmp_path_factory.mktemp("reference")
    config: StackWiseConfig = micro(training__steps=120, training__checkpoint_steps=10, model__dropout=0.1)
    (home / "stackwise.yaml").write_text(dump(config))
    run(config, home / "run")
    return home / "stackwise.yaml", weights(home / "run")


def goes_on(config: Path, directory: Path, expected: list[str]) -> list[dict[str, Any]]:
    again = Command(config, directory)
    code, err = again.end()
    assert code == 0, err
    assert weights(directory) == expected
    with ActivationStore(directory / "store", create=False) as store:
        assert store.verify()["damaged"] == []
    assert not list((directory / "checkpoints").glob("*/*")), "a committed stage's checkpoints are removed"
    assert retrained(directory) == []
    return again.seen


@pytest.mark.parametrize(
    ("event", "stage"),
    [
        pytest.param("training", 0, marks=pytest.mark.stress),
        pytest.param("checkpoint", 0, marks=pytest.mark.stress),
        ("writing", 0),
        ("checkpoint", 1),
    ],
)
def test_the_runner_killed(reference: tuple[Path, list[str]], tmp_path: Path, event: str, stage: int) -> None:
    config, expected = reference
    first = Command(config, tmp_path / "run")
    first.until(event, stage)
    first.process.kill()
    first.end()
    seen = goes_on(config, tmp_path / "run", expected)
    if stage == 1:
        assert [e["stage"] for e in seen if e["event"] == "reused"] == [0]


def test_a_worker_does_not_outlive_its_runner_by_a_long_step(text: Path, tmp_path: Path) -> None:
    overrides = {"data.paths": [str(text)], "training.accumulation": 20_000}  # a step of a minute and more
    config = StackWiseConfig.from_preset("micro", overrides)
    (tmp_path / "stackwise.yaml").write_text(dump(config))
    command = Command(tmp_path / "stackwise.yaml", tmp_path / "run", alone=True)
    made = [command.until("passes", 0)["done"] for _ in range(2)]
    assert 0 <= made[0] < made[1] < 20_000
    workers = [psutil.Process(pid) for pid in command.children()]
    assert workers
    command.process.kill()
    _, left = psutil.wait_procs(workers, timeout=5)
    assert left == []
    command.end()
    with ActivationStore(tmp_path / "run" / "store", create=False) as store:
        assert store.verify()["damaged"] == []


def test_the_worker_killed(reference: tuple[Path, list[str]], tmp_path: Path) -> None:
    config, expected = reference
    first = Command(config, tmp_path / "run")
    first.until("checkpoint", 1)
    os.kill(first.until("step", 1, 11)["pid"], signal.SIGKILL)
    code, err = first.end()
    assert code == 1
    assert "killed by SIGKILL" in err
    assert "go on with: stackwise run" in err
    assert status(RunDirectory(tmp_path / "run"))["stages"][1]["state"] == "failed"
    seen = goes_on(config, tmp_path / "run", expected)
    assert [e["step"] for e in seen if e["event"] == "resumed"] in [[step] for step in range(10, 120, 10)]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.stress)], ids=str)
def test_told_to_stop(reference: tuple[Path, list[str]], tmp_path: Path, number: signal.Signals) -> None:
    config, expected = reference
    first = Command(config, tmp_path / "run")
    first.until("step", 1)
    first.process.send_signal(number)
    code, err = first.end()
    assert code == 75, err
    assert f"--run {tmp_path / 'run'}" in err
    shown = status(RunDirectory(tmp_path / "run"))
    assert shown["state"] == "interrupted"
    assert [s["state"] for s in shown["stages"]] == ["done", "interrupted"]
    seen = goes_on(config, tmp_path / "run", expected)
    resumed = [e["step"] for e in seen if e["event"] == "resumed"]
    assert resumed, "the step in hand was saved"
    assert resumed[0] >= shown["stages"][1]["step"] > 0


def test_a_damaged_checkpoint_gives_way_to_the_one_before(reference: tuple[Path, list[str]], tmp_path: Path) -> None:
    config, expected = reference
    first = Command(config, tmp_path / "run")
    first.until("checkpoint", 0, 20)
    first.process.send_signal(signal.SIGTERM)
    first.end()
    newest = sorted((tmp_path / "run" / "checkpoints").glob("*/step-*"))[-1]
    with (newest / "state.safetensors").open("r+b") as file:
        file.truncate(1000)
    seen = goes_on(config, tmp_path / "run", expected)
    assert newest.name in next(e["text"] for e in seen if e["event"] == "warning")
    assert any(e["event"] == "resumed" for e in seen)


@pytest.fixture(scope="module")
def long_reference(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Three stages with many checkpoints and many chunks, and the weights of a run that nothing disturbed."""
    home = tmp_path_factory.mktemp("long-reference")
    settings = {"model.architecture.n_stacks": 3, "training.steps": 200, "training.checkpoint_steps": 10}
    config: StackWiseConfig = micro(**settings, **{"model.dropout": 0.1, "store.chunk_bytes": 500_000})
    (home / "stackwise.yaml").write_text(dump(config))
    run(config, home / "run")
    return home / "stackwise.yaml", weights(home / "run")


@pytest.mark.stress
@pytest.mark.parametrize("trial", range(4))
def test_many_kills_at_random_moments(
    long_reference: tuple[Path, list[str]], tmp_path: Path, trial: int, times: int
) -> None:
    """Runner, workers and `cache gc`, kill -9 and SIGTERM, in every phase; twenty a trial."""
    config, expected = long_reference
    storm = Storm(config, expected, tmp_path, trial)
    storm.rage(20 * times)
    assert {victim for _, victim, _ in storm.kills} >= {"runner", "worker"}
    print(f"\n{storm.kills.total()} kills in {storm.rounds} runs: {dict(storm.kills)}")
