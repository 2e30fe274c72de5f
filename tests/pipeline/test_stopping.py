"""Runs that are told to stop: by the clock, by one Ctrl-C or by two, by SIGTERM; on a real terminal."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stackwise.errors import InterruptedRun
from stackwise.pipeline.run import RunDirectory, held_by_live_process, status
from stackwise.pipeline.runner import workers
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.runner.workers import TimeLimit
from tests.conftest import Micro, raises_naming


def test_what_is_reserved_follows_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    margin, headroom, save_rate = TimeLimit.MARGIN, TimeLimit.HEADROOM, TimeLimit.SAVE_RATE
    monkeypatch.setattr("time.monotonic", lambda: now)
    limit = TimeLimit(1000.0)
    limit.begin(saves=int(10 * save_rate))
    assert limit.left == pytest.approx(1000 - margin - 10 * headroom)
    now = 40.0
    assert limit.left == pytest.approx(1000 - 40 - margin - 40 - 10 * headroom), "the first step has taken 40 s so far"
    limit.observe({"event": "resumed"})
    for at in (50.0, 53.0, 54.0):  # the first step follows what is no step
        now = at
        limit.observe({"event": "step"})
    limit.observe({"event": "checkpoint", "seconds": 20.0})
    assert limit.left == pytest.approx(1000 - 54 - margin - 3 - 20 * headroom)
    limit.observe({"event": "committed"})
    assert limit.left == pytest.approx(1000 - 54 - margin - 3), "the boundary above is written chunk by chunk"
    limit.begin(saves=int(save_rate))
    assert limit.left == pytest.approx(1000 - 54 - margin - 2 * headroom)


def test_a_run_saves_before_its_time_is_over(micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three hours, of which all but a few seconds are gone at the first step: the busiest machine gets there."""
    config = micro(training__steps=1_000_000, training__rows=500, training__checkpoint_steps=None)
    events: list[dict[str, Any]] = []
    gone = 0.0

    def observe(event: dict[str, Any]) -> None:
        nonlocal gone
        events.append(event)
        gone = gone or (3 * 3600 - 60.0 if event["event"] == "step" else 0.0)

    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + gone))
    with raises_naming(InterruptedRun, "stage 0", 1000000) as stopped:
        Runner(config, RunDirectory(tmp_path / "run"), observe, resume_command="again", max_time=3 * 3600).run()
    assert stopped.value.hint == "go on with: again"
    kinds = [event["event"] for event in events]
    assert kinds.index("stopping") < kinds.index("checkpoint") < kinds.index("interrupted")
    assert "the time limit is near" in events[kinds.index("stopping")]["text"]
    assert list((tmp_path / "run" / "checkpoints").glob("*/step-*"))


def test_no_time_at_all_trains_nothing(micro: Micro, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        Runner(micro(), RunDirectory(tmp_path / "run"), lambda event: None, max_time=0.1).run()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


class Terminal:
    """`stackwise run` in a session of its own on a terminal, where Ctrl-C reaches the whole process group."""

    def __init__(self, *args: str) -> None:
        self.leader, follower = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stackwise", "run", *args],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env={**os.environ, "TERM": "dumb"},
            preexec_fn=lambda: os.login_tty(follower),
        )
        os.close(follower)
        self.drawn = ""

    def until(self, found: Callable[[str], bool]) -> None:
        while not found(self.drawn):
            try:
                data = os.read(self.leader, 65536)
            except OSError:  # the other end is closed
                data = b""
            if not data:
                assert found(self.drawn), self.drawn
                return
            self.drawn += data.decode()

    def ctrl_c(self) -> None:
        os.write(self.leader, b"\x03")

    def end(self) -> int:
        code = self.process.wait(timeout=60)
        os.close(self.leader)
        return code


def slow(text: Path, run: Path) -> list[str]:
    """Steps that take long enough for a second Ctrl-C to come before the save."""
    settings = {"data.paths": f"[{text}]", "training.steps": "400", "training.rows": "2000"}
    settings |= {"training.accumulation": "25", "training.batch_size": "64", "training.checkpoint_steps": "1"}
    return ["--preset", "micro", "--run", str(run), *(x for k, v in settings.items() for x in ("-o", f"{k}={v}"))]


def watch(*command: str | Path) -> subprocess.Popen[str]:
    *names, run = map(str, command)
    args = [sys.executable, "-m", "stackwise", *names, "--run", run, "--watch", "--json"]
    return subprocess.Popen(args, stdout=subprocess.PIPE, text=True)


def saved_step(run: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("*/step-*"))


def test_ctrl_c_twice_on_a_terminal_stops_at_once(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    terminal = Terminal(*slow(text, run))
    terminal.until(lambda drawn: "stage 0: step " in drawn)
    watchers = [watch("status", run), watch("stage", "list", run)]
    begun_with = [watcher.stdout.readline() for watcher in watchers if watcher.stdout is not None]
    terminal.ctrl_c()
    terminal.until(lambda drawn: "again to stop at once" in drawn)
    begun = time.monotonic()
    terminal.ctrl_c()
    terminal.until(lambda drawn: "go on with: stackwise run" in drawn)
    assert terminal.end() == 75
    assert time.monotonic() - begun < 5.0
    assert "Traceback" not in terminal.drawn
    assert not held_by_live_process(RunDirectory(run))
    shown = status(RunDirectory(run))
    assert shown["state"] == "interrupted"
    assert shown["stages"][0]["step"] - saved_step(run) <= 1, "nothing but the steps since the last checkpoint is lost"
    for watcher, line in zip(watchers, begun_with, strict=True):  # from other terminals; they end with the run
        lines = [json.loads(each) for each in (line + watcher.communicate(timeout=30)[0]).splitlines()]
        assert watcher.returncode == 0
        assert len(lines) > 1
        assert lines[-1]["stages"][0]["state"] == "interrupted"
        assert lines[0]["stages"][0]["state"] == "running"
    # Cut off as it was, it goes on from there.
    again = subprocess.Popen(
        [sys.executable, "-m", "stackwise", "run", "--run", str(run), "--json"], stdout=subprocess.PIPE, text=True
    )
    assert again.stdout is not None
    saved = saved_step(run)
    for line in again.stdout:
        if (event := json.loads(line))["event"] == "resumed":
            assert event["step"] == saved
            break
    again.send_signal(signal.SIGTERM)
    again.stdout.read()
    again.stdout.close()
    assert again.wait(timeout=60) == 75
