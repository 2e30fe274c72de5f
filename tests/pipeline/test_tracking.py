"""Figures reach TensorBoard, Weights & Biases and MLflow once each, whatever ends the run; trackers stop no run."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.unused import unused_settings
from stackwise.config.yaml_files import dump
from stackwise.errors import UsageError
from stackwise.pipeline.run import with_absolute_paths
from stackwise.pipeline.tracking import trackers
from stackwise.pipeline.tracking.event_file import EventFile
from stackwise.pipeline.tracking.following import Follower
from stackwise.pipeline.tracking.trackers import Point, RunInfo
from tests.conftest import Micro, run
from tests.pipeline import trackers_files
from tests.pipeline.test_kill import Command
from tests.pipeline.test_run import named


class Memory:
    """A tracker that remembers, and fails when told to: at all, or as soon as it is sent figures."""

    name = "memory"

    def __init__(self) -> None:
        self.runs: dict[str, list[Point]] = {}
        self.closed: list[str] = []
        self.broken = self.mute = False
        self.begun = 0
        self._now = ""

    def open(self, about: RunInfo, number: int, known: str | None) -> str:
        if self.broken:
            raise ConnectionError("no route")
        self.begun += known is None
        self._now = known or f"run-{number}"
        self.runs.setdefault(self._now, [])
        return self._now

    def log(self, points: list[Point]) -> None:
        if self.broken or self.mute:
            raise ConnectionError("no route")
        self.runs[self._now] += points

    def close(self, state: str) -> None:
        self.closed.append(state)

    def steps(self, key: str, stage: int, name: str = "loss") -> list[int]:
        return [p.step for p in self.runs[key] if p.stage == stage and p.name == name]


class Log:
    """A log of events, written as a run would."""

    def __init__(self, path: Path) -> None:
        self.path, self.tracker, self.warnings = path, Memory(), list[str]()

    def add(self, event: str, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"time": 1.0, "event": event, **values}) + "\n")

    def train(self, stage: int, first: int, last: int, recipe: str | None = None) -> None:
        if recipe is not None:
            self.add("training", stage=stage, recipe=recipe, steps=100)
        losses = [float(n) for n in range(first, last + 1)]
        self.add("step", stage=stage, step=last, steps=100, losses=losses, loss=1.0, learning_rate=0.1, gradient_norm=2)

    def follow(self) -> None:
        """One sitting, to its end."""
        about = RunInfo("name", "project", None, str(self.path.parent), {})
        state = self.path.parent / "tracking" / "memory.json"
        follower = Follower(self.tracker, about, self.path, state, self.warnings.append)
        follower.start()
        follower.stop()
        assert follower.join(10)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "events.jsonl")


def test_every_step_once_though_steps_are_repeated_after_a_kill(log: Log) -> None:
    log.train(0, 1, 10, "a")
    log.follow()
    log.add("resumed", stage=0, step=12, steps=100, losses=[float(n) for n in range(3, 13)])
    log.train(0, 13, 20)
    log.add("resumed", stage=0, step=15, steps=100, losses=[])
    log.train(0, 16, 30)
    log.add("checkpoint", stage=0, step=30, seconds=0.1)
    log.follow()
    log.follow()
    assert log.tracker.steps("run-1", 0) == list(range(1, 31))
    assert [p.value for p in log.tracker.runs["run-1"] if p.name == "loss"] == [float(n) for n in range(1, 31)]
    assert log.tracker.steps("run-1", 0, "gradient_norm") == [10, 20, 30]
    assert log.tracker.steps("run-1", 0, "checkpoint/seconds") == [30]


def test_a_sitting_that_finds_nothing_new_says_how_the_run_ended(log: Log) -> None:
    log.add("start", run="r")
    log.train(0, 1, 3, "a")
    log.add("done", seconds=1.0)
    log.follow()  # of a killed run, behind the one that went on from it
    log.follow()
    assert log.tracker.closed == ["done", "done"]


def test_skipped_steps_have_no_loss_and_steps_after_a_rollback_are_sent_anew(log: Log) -> None:
    log.add("training", stage=0, recipe="a", steps=100)
    log.add(
        "step", stage=0, step=3, steps=100, losses=[1.0, None, 3.0], loss=2.0, learning_rate=0.1, gradient_norm=None
    )
    log.add("diverged", stage=0, step=2, why="NaN", action="skip")
    log.add("held_out", stage=0, step=3, nats=1.5)
    log.train(0, 4, 12)
    log.add("diverged", stage=0, step=12, to=10, why="NaN", action="rollback")
    log.train(0, 11, 12)
    log.add("diverged", stage=0, step=12, to=10, why="NaN", action="rollback")
    log.train(0, 11, 14)
    log.follow()
    rest = [4, 5, 6, 7, 8, 9, 10, 11, 12, 11, 12, 11, 12, 13, 14]
    assert log.tracker.steps("run-1", 0) == [1, 3, *rest]
    assert log.tracker.steps("run-1", 0, "held_out/nats") == [3]
    # Killed, and resumed below the rollbacks, which repeat: nothing is sent twice.
    log.add("resumed", stage=0, step=9, steps=100, losses=[])
    log.train(0, 10, 12)
    for _ in range(2):
        log.add("diverged", stage=0, step=12, to=10, why="NaN", action="rollback")
        log.train(0, 11, 15)
    log.follow()
    assert log.tracker.steps("run-1", 0) == [1, 3, *rest, 15]
    assert not log.warnings


def test_a_changed_stage_is_another_tracker_run_that_has_the_stages_below(log: Log) -> None:
    log.train(0, 1, 5, "a")
    log.train(1, 1, 5, "b")
    log.add("done")
    log.follow()
    log.add("start")
    log.add("reused", stage=0, recipe="a")
    log.train(1, 1, 7, "c")
    log.train(2, 1, 3, "d")
    log.follow()
    assert list(log.tracker.runs) == ["run-1", "run-2"]
    assert log.tracker.steps("run-1", 1) == [1, 2, 3, 4, 5]
    assert [log.tracker.steps("run-2", stage) for stage in range(3)] == [
        [1, 2, 3, 4, 5],
        [1, 2, 3, 4, 5, 6, 7],
        [1, 2, 3],
    ]
    assert log.tracker.closed == ["done", "done", "interrupted"]


def test_a_tracker_that_fails_warns_once_and_misses_nothing(log: Log) -> None:
    log.train(0, 1, 5, "a")
    log.tracker.broken = True
    log.follow()
    assert len(log.warnings) == 1
    assert "memory takes no figures (ConnectionError: no route); training goes on" in log.warnings[0]
    log.tracker.broken = False
    log.train(0, 6, 9)
    log.follow()
    assert log.tracker.steps("run-1", 0) == list(range(1, 10))


def test_a_tracker_that_begins_and_then_fails_begins_no_second_run(log: Log) -> None:
    log.train(0, 1, 5, "a")
    log.train(1, 1, 5, "b")
    log.tracker.mute = True
    log.follow()
    log.follow()
    log.tracker.mute = False
    log.follow()
    log.train(1, 1, 5, "c")
    log.tracker.mute = True
    log.follow()
    log.tracker.mute = False
    log.follow()
    assert log.tracker.begun == 2
    assert [log.tracker.steps(key, stage) for key in ("run-1", "run-2") for stage in (0, 1)] == [[1, 2, 3, 4, 5]] * 4


def test_half_a_line_and_a_log_that_was_cut(log: Log) -> None:
    log.train(0, 1, 5, "a")
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b'{"event": "st')
    log.follow()
    log.path.write_bytes(whole[: whole.index(b"\n") + 1])
    log.train(0, 4, 8)
    log.follow()
    assert log.tracker.steps("run-1", 0) == list(range(1, 9))


def test_a_tracker_switched_on_late_gets_what_counts(log: Log) -> None:
    log.train(0, 1, 5, "a")
    log.train(0, 1, 6, "b")
    log.add("evaluation", result={"bits_per_byte": 2.0, "loss": {"0.5": 1.0}, "accuracy": {}})
    log.follow()
    assert log.tracker.steps("run-1", 0) == [1, 2, 3, 4, 5, 6]
    assert {p.name for p in log.tracker.runs["run-1"] if p.stage is None} == {
        "held_out/bits_per_byte",
        "held_out/loss_at_0.5",
    }


def test_a_stage_of_several_windows_is_one_series_whose_steps_go_on(log: Log) -> None:
    def plan() -> None:
        steps = [(0, 0, 10), (1, 0, 12), (0, 1, 11), (1, 1, 9)]
        keys = ("stage", "depth", "window", "steps")
        log.add("plan", stages=[dict(zip(keys, (n, *each), strict=True)) for n, each in enumerate(steps)])

    plan()
    log.train(0, 1, 10, "a")
    log.train(1, 1, 12, "b")
    log.train(2, 1, 4, "c")
    log.follow()
    log.train(2, 5, 7)
    log.follow()  # a start later, before the next plan
    # As an earlier version kept it: which window a place is the log says, and nothing is sent again.
    file = log.path.parent / "tracking" / "memory.json"
    kept = json.loads(file.read_text())
    kept["told"] = kept.pop("sent")
    file.write_text(json.dumps(kept))
    log.train(2, 8, 9)
    log.follow()
    plan()
    log.add("resumed", stage=2, step=8, steps=100, losses=[float(n) for n in range(1, 9)])
    log.train(2, 9, 11)
    log.add("held_out", stage=2, step=11, nats=1.5)
    log.train(3, 1, 9, "d")
    log.add("written", stage=3, bytes=5, seconds=0.1)
    log.follow()
    assert [log.tracker.steps("run-1", stage) for stage in range(4)] == [[*range(1, 22)], [*range(1, 22)], [], []]
    assert log.tracker.steps("run-1", 0, "held_out/nats") == [21]
    assert log.tracker.steps("run-1", 1, "boundary_bytes") == [21]
    # Another stage in a later window: the next tracker run has the same series up to there.
    log.train(2, 1, 3, "changed")
    log.follow()
    assert [log.tracker.steps("run-2", stage) for stage in range(3)] == [[*range(1, 14)], [*range(1, 13)], []]
    assert not log.warnings


def test_windows_on_tensorboard(micro: Micro, tmp_path: Path) -> None:
    run(micro(training__windows=2, evaluation__samples=4), tmp_path / "run")
    found = trackers_files.tensorboard(tmp_path / "run")
    assert {name.partition("/")[0] for name in found} == {"stage-000", "stage-001", "depth"}
    for stage in ("stage-000", "stage-001"):
        assert [step for step, _ in found[f"{stage}/loss"]] == list(range(1, 21))


def test_event_files_hold_any_number(tmp_path: Path) -> None:
    (tmp_path / "tensorboard" / "stage-000").mkdir(parents=True)
    file = EventFile(tmp_path / "tensorboard" / "stage-000", ".1")
    for step, value in enumerate((1.5, -2.5, 0.0, 1e39, -math.inf)):
        file.scalar("loss", value, step * 10**6, 1.8e9)
    file.close()
    (found,) = trackers_files.tensorboard(tmp_path).items()
    assert found == (
        "stage-000/loss",
        [(0, 1.5), (10**6, -2.5), (2 * 10**6, 0.0), (3 * 10**6, math.inf), (4 * 10**6, -math.inf)],
    )


def test_tensorboard_by_default_and_not_where_it_is_off(micro: Micro, tmp_path: Path) -> None:
    run(micro(), tmp_path / "run")
    found = trackers_files.tensorboard(tmp_path / "run")
    for stage in ("stage-000", "stage-001"):
        assert [step for step, _ in found[f"{stage}/loss"]] == list(range(1, 21))
        for name in ("learning_rate", "tokens_per_second", "wait_fraction", "memory"):
            assert found[f"{stage}/{name}"][-1][0] == 20
    assert found["stage-000/boundary_bytes"][0][1] > 0
    assert [step for step, _ in found["depth/held_out/bits_per_byte"]] == [0, 1]
    # What is tracked shapes no result.
    before = list((tmp_path / "run" / "tensorboard").rglob("events*"))
    assert not named(run(micro(tracking__tensorboard=False), tmp_path / "run"), "training")
    assert list((tmp_path / "run" / "tensorboard").rglob("events*")) == before


@pytest.mark.stress  # ClearML takes up to half a minute to write a session
def test_a_session_of_clearml_offline_has_every_figure(micro: Micro, tmp_path: Path) -> None:
    config = micro(training__steps=4, tracking__trackers=[{"kind": "clearml"}, {"kind": "tensorboard"}])
    seen = run(config, tmp_path / "run")
    assert not named(seen, "warning")
    (session,) = (tmp_path / "run" / "clearml" / "offline").glob("offline-*.zip")
    with zipfile.ZipFile(session) as files:
        points = [point for line in files.read("metrics.jsonl").splitlines() for point in json.loads(line)]
        task = json.loads(files.read("task.json"))
    board = trackers_files.tensorboard(tmp_path / "run")
    for depth in (0, 1):
        of_stage = [one for one in points if (one["metric"], one["variant"]) == (f"stage_{depth:03d}", "loss")]
        shown = sorted((one["iter"], one["value"]) for one in of_stage)
        assert [step for step, _ in shown] == [1, 2, 3, 4]
        losses = [value for _, value in board[f"stage-{depth:03d}/loss"]]
        assert [value for _, value in shown] == pytest.approx(losses, rel=1e-6)
    assert "training.learning_rate" in json.dumps(task)
    with pytest.raises(UsageError, match="Neptune's service ended in March 2026"):
        micro(tracking__trackers=[{"kind": "neptune"}])


def test_all_three_after_a_kill_have_every_point_once(micro: Micro, tmp_path: Path) -> None:
    uri = str(tmp_path / "mlruns")
    on = {"tracking.wandb": "offline", "tracking.mlflow": uri, "tracking.group": "a group"}
    config: StackWiseConfig = micro(training__steps=150, training__checkpoint_steps=10, **on)
    (tmp_path / "stackwise.yaml").write_text(dump(config))
    first = Command(tmp_path / "stackwise.yaml", tmp_path / "run")
    first.until("step", 1, 30)
    first.process.send_signal(signal.SIGKILL)
    first.end()
    again = Command(tmp_path / "stackwise.yaml", tmp_path / "run")
    code, err = again.end()
    assert (code, err) == (0, "")
    assert not [e for e in again.seen if e["event"] == "warning"]
    steps = list(range(1, 151))
    board = trackers_files.tensorboard(tmp_path / "run")
    ids, told, rows = trackers_files.wandb(tmp_path / "run")
    state = json.loads((tmp_path / "run" / "tracking" / "mlflow.json").read_text())
    found, metrics = trackers_files.mlflow(uri, state["id"])
    for depth in (0, 1):
        losses = board[f"stage-{depth:03d}/loss"]
        assert [step for step, _ in losses] == steps
        for other in (rows, metrics):
            shown = sorted(other[f"stage_{depth:03d}/loss"])
            assert [step for step, _ in shown] == steps
            assert [value for _, value in shown] == pytest.approx([value for _, value in losses], rel=1e-6)
    assert len(ids) == 1, "the same run of W&B before and after"
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2
    assert told["training"]["learning_rate"] == pytest.approx(3e-3)
    assert found.info.status == "FINISHED"
    assert found.data.params["training.learning_rate"] == "0.003"
    assert found.data.tags["group"] == "a group"
    assert len(metrics["held_out_by_depth/held_out/bits_per_byte"]) == 2


def test_a_server_that_is_gone_does_not_stop_training(micro: Micro, tmp_path: Path) -> None:
    with socket.socket() as port:  # bound and not listening: a connection is refused
        port.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{port.getsockname()[1]}"
        begun = time.monotonic()
        events = run(micro(tracking__mlflow=uri), tmp_path / "run")
    assert named(events, "done")
    (warning,) = named(events, "warning")
    assert warning["text"].startswith("mlflow takes no figures")
    assert time.monotonic() - begun < 60
    # What it missed goes to one that answers, later.
    run(micro(tracking__mlflow=str(tmp_path / "mlruns")), tmp_path / "run")
    state = json.loads((tmp_path / "run" / "tracking" / "mlflow.json").read_text())
    metrics = trackers_files.mlflow(str(tmp_path / "mlruns"), state["id"])[1]
    assert [step for step, _ in metrics["stage_000/loss"]] == list(range(1, 21))


def test_a_missing_package_is_said_before_anything_starts(
    micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    for kind, value, wanted in (
        ("wandb", "offline", r"stackwise\[wandb\]"),
        ("mlflow", "http://localhost:1", r"stackwise\[mlflow\]"),
    ):
        with pytest.raises(UsageError, match=wanted):
            run(micro(**{f"tracking.{kind}": value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_without_a_use_are_noted_and_paths_made_absolute(micro: Micro) -> None:
    assert "tracking.group, project: unused" in unused_settings(micro(tracking__project="p", tracking__group="g"))[0]
    assert not unused_settings(micro(tracking__project="p", tracking__wandb="offline"))
    for given, expected in (
        ("mlruns", str(Path("mlruns").absolute())),
        ("sqlite:///runs.db", f"sqlite:///{Path('runs.db').absolute()}"),
        ("sqlite:////tmp/runs.db", "sqlite:////tmp/runs.db"),
        ("http://localhost:5000", "http://localhost:5000"),
    ):
        assert with_absolute_paths(micro(tracking__mlflow=given)).tracking.trackers[-1].plain() == {
            "kind": "mlflow",
            "uri": expected,
        }


def test_damaged_marks_and_lines_of_the_log_stop_no_tracker(log: Log) -> None:
    log.train(0, 1, 5, "a")
    log.follow()
    state = log.path.parent / "tracking" / "memory.json"
    for mark in ("[]", "{", '{"number": "x"}', '{"told": {"a": {}}}'):
        state.write_text(mark)
        log.follow()
    for line in ('{"event": "step"}', '{"event": "plan", "stages": 3}', '{"event": "training", "stage": "x"}', "[]"):
        with log.path.open("a") as file:
            file.write(line + "\n")
    log.train(0, 6, 7)
    log.follow()
    assert log.tracker.steps("run-1", 0)[-2:] == [6, 7]
    assert not log.warnings


@pytest.mark.stress
def test_a_server_of_mlflow_over_sqlite(micro: Micro, tmp_path: Path) -> None:
    """MLflow's own server on loopback, killed in the middle and started again: nothing is missing in the end."""
    import subprocess
    import sys
    import urllib.request

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = (
        "from mlflow.server import app; from werkzeug.serving import run_simple;"
        f"run_simple('127.0.0.1', {port}, app, threaded=True)"
    )
    store = f"sqlite:///{tmp_path / 'runs.db'}"
    env = os.environ | {"_MLFLOW_SERVER_FILE_STORE": store, "_MLFLOW_SERVER_ARTIFACT_ROOT": str(tmp_path / "files")}

    def serve() -> subprocess.Popen[bytes]:
        with (tmp_path / "server.log").open("ab") as out:
            server = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=out, stderr=out)
        for _ in range(600):
            try:  # the first question makes the tables, which takes a while
                ask = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
                urllib.request.urlopen(ask, timeout=120).close()
                return server
            except OSError:
                time.sleep(0.2)
        raise AssertionError((tmp_path / "server.log").read_text())

    server = serve()
    config: StackWiseConfig = micro(training__steps=400, tracking__mlflow=f"http://127.0.0.1:{port}")
    (tmp_path / "stackwise.yaml").write_text(dump(config))
    try:
        command = Command(tmp_path / "stackwise.yaml", tmp_path / "run")
        command.until("committed", 0)
        server.kill()
        server.wait()
        code_, err = command.end()
        assert (code_, err) == (0, "")
        server = serve()
        for _ in range(5):  # on a slow machine one sitting may not be enough: the next one sends the rest
            assert Command(tmp_path / "stackwise.yaml", tmp_path / "run").end() == (0, "")
            state = json.loads((tmp_path / "run" / "tracking" / "mlflow.json").read_text())
            if state["offset"] == (tmp_path / "run" / "events.jsonl").stat().st_size:
                break
        _, metrics = trackers_files.mlflow(f"http://127.0.0.1:{port}", state["id"])
    finally:
        server.kill()
        server.wait()
    for depth in (0, 1):
        assert sorted(step for step, _ in metrics[f"stage_{depth:03d}/loss"]) == list(range(1, 401))
