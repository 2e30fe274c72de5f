"""Kills at random moments of a run, of whoever is there: the runner, its workers, a `cache gc` beside them.

Each round is a run from nothing in a directory and a data cache of its own, killed again and again until it once
comes through; then its weights, its store and its log are looked at.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from stackwise.config import StackWiseConfig
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.runner.workers import WorkerFailed
from stackwise.pipeline.worker.forking import SHARED
from stackwise.store import ActivationStore
from tests.conftest import run

MOMENTS = ("start", "preparing", "device", "training", "step", "checkpoint", "committed", "writing", "boundary")
MOMENTS += ("written", "evaluating", "evaluation", "done")
"""Events that a kill follows."""
VICTIMS = ("runner", "worker", "both", "gc")
EXPECTED = (0, 1, 75, -signal.SIGKILL, -signal.SIGTERM)
"""How a run may end that is killed, or whose worker is."""


class Command:
    """A real `stackwise run`, listened to.

    Args:
        alone: Its workers are forked from a process of its own, as a user's are, not from the one that tests share.
    """

    def __init__(self, config: Path, directory: Path, *more: str, alone: bool = False) -> None:
        args = [sys.executable, "-W", "error", "-m", "stackwise", "run", str(config), "--run", str(directory), "--json"]
        environment = {name: value for name, value in os.environ.items() if not (alone and name == SHARED)}
        self.process = subprocess.Popen(
            [*args, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.seen: list[dict[str, Any]] = []

    def events(self) -> Iterator[dict[str, Any]]:
        """What it tells, as it comes."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # a kill may cut the last line
                self.seen.append(json.loads(line))
                yield self.seen[-1]

    def until(self, event: str, stage: int, at: int = 0) -> dict[str, Any]:
        """Wait for an event of a stage."""
        for seen in self.events():
            if seen["event"] == event and seen.get("stage") == stage and seen.get("step", 0) >= at:
                return seen
        raise AssertionError(f"no {event} of stage {stage}: {self.process.communicate()[1]}")

    def end(self) -> tuple[int, str]:
        """Its exit code, and what it said on standard error."""
        out, err = self.process.communicate(timeout=300)
        for line in out.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                self.seen.append(json.loads(line))
        return self.process.returncode, err

    def children(self) -> list[int]:
        """Ids of its workers, and of the process that they are forked from, where it runs `alone`."""
        try:
            return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def killed(config: StackWiseConfig, directory: Path, *stages: int) -> None:
    """A run whose worker is killed after the first checkpoint of each of these stages, and comes through in the end.

    Kills of the runner itself, and of both, are in `test_kill`.
    """
    for stage in stages:
        kill_worker(config, directory, stage)
    events = run(config, directory)
    assert [event["stage"] for event in events if event["event"] == "resumed"] == [stages[-1]]


def kill_worker(config: StackWiseConfig, directory: Path, stage: int, step: int | None = None) -> None:
    """Run a configuration until a worker emits that step, or a first checkpoint, of a stage; kill it then."""
    workers: list[int] = []

    def observe(event: dict[str, Any]) -> None:
        if event.get("stage") != stage:
            return
        if event["event"] == "step":
            workers.append(event["pid"])
        if event["event"] == "checkpoint" if step is None else event["event"] == "step" and event["step"] >= step:
            with contextlib.suppress(ProcessLookupError):  # killed at the step before
                os.kill(workers[-1], signal.SIGKILL)

    with pytest.raises(WorkerFailed, match="SIGKILL"):
        Runner(config, RunDirectory(directory), observe).run()


class Storm:
    """Kills runs of a configuration until so many were killed.

    Args:
        config: The configuration file.
        expected: The weights of a run that nothing disturbed.
        home: Where the rounds' directories go.
        seed: Of the moments, victims and signals.
    """

    def __init__(self, config: Path, expected: list[str], home: Path, seed: int) -> None:
        self._config, self._expected, self._home = config, expected, home
        self._draw = random.Random(seed)
        self.kills: Counter[tuple[str, str, str]] = Counter()
        """By moment, victim and signal."""
        self.rounds = 0

    def rage(self, kills: int) -> None:
        """Round after round until so many kills were made."""
        while self.kills.total() < kills:
            directory = self._home / f"round-{self.rounds}"
            directory.mkdir()
            cache = ["-o", f"data.cache_dir={directory / 'cache'}"]
            while not self._struck(Command(self._config, directory / "run", *cache, alone=True), directory / "run"):
                pass
            self._check(directory / "run")
            self.rounds += 1

    def _struck(self, command: Command, run: Path) -> bool:
        """Let a run go on until a random moment of it, and kill; returns whether it came through before."""
        moment, victim = self._draw.choice(MOMENTS), self._draw.choice(VICTIMS)
        number = self._draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        nth, after = self._draw.randint(1, 8), self._draw.choice((0.0, 0.01, 0.1, 0.4))
        patience, begun = self._draw.uniform(0.5, 4.0), 0.0
        for event in command.events():
            begun = begun or (time.monotonic() if event["event"] == "training" else 0.0)
            nth -= event["event"] == moment
            late = begun and time.monotonic() - begun > patience  # the moment is past, or far away
            if nth == 0 or late or (event["event"] == moment and moment not in ("step", "checkpoint", "boundary")):
                moment = event["event"]
                time.sleep(self._draw.uniform(0, after))
                self._kill(command, run, moment, victim, number)
                break
        code, err = command.end()
        assert code in EXPECTED, f"{moment}, {victim}, {number.name}: {code}: {err}"
        assert "Traceback" not in err, err
        return code == 0

    def _kill(self, command: Command, run: Path, moment: str, victim: str, number: signal.Signals) -> None:
        if victim == "gc" and (run / "store" / "format.json").exists():
            arguments = [sys.executable, "-m", "stackwise", "cache", "gc", "--run", str(run), "--json"]
            gc = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(self._draw.uniform(0.2, 2.0))
            if gc.poll() is None:
                gc.send_signal(number)
                self.kills[moment, victim, number.name] += 1
            assert gc.wait(timeout=60) in (0, 4, 130, -signal.SIGKILL, -signal.SIGTERM)
            return
        workers = command.children()
        victims = [command.process.pid] if victim in ("runner", "both", "gc") or not workers else []
        victims += {"worker": [self._draw.choice(workers)] if workers else [], "both": workers}.get(victim, [])
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                name = "runner" if pid == command.process.pid else "worker"
                self.kills[moment, name, number.name] += 1

    def _check(self, run: Path) -> None:
        """The end is that of a run never killed, the store is whole, and nothing was trained after its commit."""
        assert [stage["weights"] for stage in status(RunDirectory(run))["stages"]] == self._expected
        with ActivationStore(run / "store", create=False) as store:
            assert store.verify()["damaged"] == []
        assert not list((run / "checkpoints").glob("*/*")), "a committed stage's checkpoints are removed"
        assert retrained(run) == []


def retrained(run: Path) -> list[str]:
    """Recipes that were trained after they had been committed, from the run's log of events."""
    committed, again = set(), []
    for line in (run / "events.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # cut by a kill
            event = json.loads(line)
            if event["event"] in ("committed", "reused"):
                committed.add(event["recipe"])
            elif event["event"] == "training" and event["recipe"] in committed:
                again.append(event["recipe"])
    return again
