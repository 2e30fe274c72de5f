"""What stands in a run's way: another run, a full disk, a directory that cannot be used, a clock set back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.config import StackWiseConfig
from stackwise.config.yaml_files import dump
from stackwise.durable import FileLock, is_locked, write_durably
from stackwise.errors import BusyError, NoSpaceError, StackWiseError, UsageError
from stackwise.pipeline.parts import save_part
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.runner.manifest import EventLog
from stackwise.pipeline.runner.runner import Runner
from tests.conftest import Micro, mounted, raises_naming, run
from tests.pipeline.storm import Command, retrained
from tests.pipeline.test_run import weights


def written(config: StackWiseConfig, path: Path) -> Path:
    path.write_text(dump(config))
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of a few megabytes."""
    path = tmp_path / "disk"
    path.mkdir()
    with mounted(path, 24):
        yield path


def test_of_two_runs_at_once_one_works(micro: Micro, tmp_path: Path) -> None:
    """On one run directory; and on one store with the same stage to train: the other ends at once, and says who."""
    slow = micro(training__steps=100_000, training__rows=500, store__path=str(tmp_path / "store"))
    file = written(slow, tmp_path / "slow.yaml")
    first = Command(file, tmp_path / "run")
    pid = first.until("step", 0)["pid"]
    begun = time.monotonic()
    others = [Command(file, tmp_path / "run"), Command(file, tmp_path / "another")]
    ended = [other.end() for other in others]
    assert time.monotonic() - begun < 60
    for (code, said), holder in zip(ended, (first.process.pid, pid), strict=True):
        assert code == 4, said
        assert f"held by pid {holder} on {os.uname().nodename}" in said
        assert "Traceback" not in said
    lock = tmp_path / "store" / "locks" / f"work-{status(RunDirectory(tmp_path / 'run'))['stages'][0]['recipe']}.lock"
    assert is_locked(lock)
    os.kill(pid, signal.SIGKILL)
    assert first.end()[0] == 1
    assert not is_locked(lock), "a dead worker's lock is free at once"


@pytest.mark.parametrize("place", ["run", "store"])
def test_a_disk_that_can_only_be_read(micro: Micro, disk: Path, tmp_path: Path, place: str) -> None:
    config = micro(data__cache_dir=str(tmp_path / "cache"))
    if place == "store":
        config.store.path = str(disk / "store")
    directory = disk / "run" if place == "run" else tmp_path / "run"
    before = sorted(os.listdir(tmp_path))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with raises_naming(UsageError, disk) as refused:
        Runner(config, RunDirectory(directory), lambda event: None).run()
    assert "\n" not in refused.value.message
    assert sorted(os.listdir(tmp_path)) == before, "nothing was prepared, nothing was made"


@pytest.mark.stress
def test_a_clock_that_was_set_back_does_not_matter(micro: Micro, tmp_path: Path) -> None:
    config = micro(training__steps=40)
    run(config, tmp_path / "reference")
    file = written(config, tmp_path / "config.yaml")
    first = Command(file, tmp_path / "run")
    first.until("checkpoint", 1)
    first.process.kill()
    first.end()
    # Everything that the first run left is now of a time to come.
    ahead = time.time() + 10 * 86400
    for path in (tmp_path / "run").rglob("*"):
        os.utime(path, (ahead, ahead), follow_symlinks=False)
    manifest = tmp_path / "run" / "run.json"
    events = tmp_path / "run" / "events.jsonl"
    moved = [json.loads(line) for line in events.read_text().splitlines()]
    events.write_text("".join(json.dumps(e | {"time": e["time"] + 10 * 86400}) + "\n" for e in moved))
    assert manifest.exists()
    again = Command(file, tmp_path / "run")
    code, said = again.end()
    assert code == 0, said
    assert weights(tmp_path / "run") == weights(tmp_path / "reference")
    gc = [sys.executable, "-m", "stackwise", "cache", "gc", "--run", str(tmp_path / "run"), "--json"]
    assert subprocess.run(gc, capture_output=True, check=False).returncode == 0
    assert retrained(tmp_path / "run") == []


def fill(disk: Path) -> Path:
    """Fill a disk to its last byte."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return ballast


def logged(path: Path, *events: dict[str, Any], error: Exception | None = None) -> None:
    with EventLog(RunDirectory(path.parent)) as log:
        for event in events:
            log({"time": 1.0, **event})
        if error is not None:
            raise error


def test_the_log_of_events_on_a_full_disk(disk: Path) -> None:
    """What ended the run is what is raised; a line that was cut off does not take the next one with it."""
    path = disk / "events.jsonl"
    logged(path, {"event": "start"})
    ballast = fill(disk)
    with pytest.raises(NoSpaceError):
        logged(path, {"event": "note", "text": "x" * 8192})
    step = {"event": "step", "losses": [1.0] * 4096}
    with pytest.raises(UsageError):  # the step is held back until the end
        logged(path, step, error=UsageError("what ended the run"))
    ballast.unlink()
    logged(path, {"event": "done"})
    lines = path.read_text().splitlines()
    assert json.loads(lines[0])["event"] == "start"
    assert json.loads(lines[-1])["event"] == "done"


@pytest.fixture(scope="module")
def undisturbed(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The weights of a run that nothing stood in the way of."""
    path = tmp_path_factory.mktemp("undisturbed")
    run(micro(training__steps=60), path)
    return weights(path)


MOMENTS: dict[str, list[tuple[str, int]]] = {"run": [("step", 0)], "store": [("writing", 0), ("training", 1)]}
"""After which event of which stage the disk is filled, by what lies on it: a checkpoint, a boundary, a stage fails."""


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=pytest.mark.stress if place == "run" else ()) for place in MOMENTS]
)
def test_a_disk_that_fills_up_in_the_middle(
    micro: Micro, disk: Path, tmp_path: Path, undisturbed: list[str], place: str
) -> None:
    """It ends with one line and 5, whatever was being written; with room again the same command goes on."""
    directory = disk / "run" if place == "run" else tmp_path / "run"
    every, store = (5, None) if place == "run" else (50, str(disk / "store"))
    config = micro(training__steps=60, training__checkpoint_steps=every, store__path=store)
    file = written(config, tmp_path / "config.yaml")
    for moment, stage in MOMENTS[place]:
        command = Command(file, directory)
        command.until(moment, stage)
        ballast = fill(disk)
        code, said = command.end()
        assert code == 5, (moment, said)
        message, hint = said.splitlines()
        assert message.startswith("stackwise: no space left "), said
        assert "free" in hint, said
        assert "then run the same command again" in hint, said
        ballast.unlink()
    code, said = Command(file, directory).end()
    assert code == 0, said
    assert weights(directory) == undisturbed
    assert retrained(directory) == []
    assert "Traceback" not in (directory / "logs" / "workers.log").read_text()
    verify = [sys.executable, "-m", "stackwise", "cache", "verify", "--run", str(directory), "--json"]
    done = subprocess.run(verify, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["damaged"] == []


@pytest.mark.parametrize("place", ["checkpoints", "store/stages", "store/boundaries"])
def test_a_disk_that_turns_read_only_is_a_line(micro: Micro, tmp_path: Path, place: str) -> None:
    """As one does that fails. What a worker meets is told without a traceback, and the run goes on from there."""
    config = micro(training__checkpoint_steps=5)
    (part := tmp_path / "run" / place).mkdir(parents=True)
    if subprocess.run(["mount", "--bind", str(part), str(part)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(part)], check=True)
        with raises_naming(StackWiseError, part) as failed:
            run(config, tmp_path / "run")
    finally:
        subprocess.run(["umount", "-l", str(part)], check=True)
    assert failed.value.exit_code == 1
    assert ".tmp-" not in str(failed.value), "a name that a user does not know"
    assert "Error" not in failed.value.message
    assert "\n" not in failed.value.message
    run(config, tmp_path / "run")
    assert {stage["state"] for stage in status(RunDirectory(tmp_path / "run"))["stages"]} == {"done"}


def test_weights_on_a_full_disk(disk: Path) -> None:
    """What the library of safetensors says of it is understood, and nothing is left behind."""
    ballast = fill(disk)
    with raises_naming(NoSpaceError, disk / "part"):
        write_durably(disk / "part", partial(save_part, {"weight": torch.zeros(4096)}))
    assert list(disk.iterdir()) == [ballast]


def test_a_lock_on_a_full_disk(disk: Path) -> None:
    """It holds all the same, though its holder's name cannot be written: what frees space takes it, too."""
    fill(disk)
    path = disk / "lock"
    with FileLock(path, "it"):
        assert is_locked(path)
        with raises_naming(BusyError, path):
            FileLock(path, "it").acquire()
    assert not is_locked(path)
