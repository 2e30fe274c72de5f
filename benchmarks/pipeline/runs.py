"""Real runs of the command, listened to: their events with the time of each, and how they are ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import refuse

Event = dict[str, Any]


@dataclass
class Run:
    """A `stackwise run`, and what it has told so far.

    Args:
        directory: The run directory.
        preset: What is run.
        settings: `KEY=VALUE` strings.
    """

    directory: Path
    preset: str
    settings: Sequence[str]
    seen: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        command = [sys.executable, "-m", "stackwise", "run", "--preset", self.preset, "--run", str(self.directory)]
        for setting in self.settings:
            command += ["-o", setting]
        self._errors = (self.directory.parent / f"{self.directory.name}.errors").open("a+")
        self.begun = time.time()
        self._process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=self._errors, text=True)

    def events(self) -> Iterator[Event]:
        """Its events as they come."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.seen.append(json.loads(line))
            yield self.seen[-1]

    def finish(self) -> list[Event]:
        """Let it come to its end; its events.

        Raises:
            UsageError: It failed.
        """
        for _ in self.events():
            pass
        code = self._ended()
        if code != 0:
            raise refuse(f"the run ended with code {code}", self._last_words())
        return self.seen

    def kill_worker(self, pid: int) -> None:
        """End a worker as a lack of memory would; the run says so and ends."""
        os.kill(pid, signal.SIGKILL)
        for _ in self.events():
            pass
        self._ended()

    def _ended(self) -> int:
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()
        return self._process.wait()

    def _last_words(self) -> str:
        said = Path(self._errors.name).read_text().strip().splitlines()
        return said[-1] if said else "it said nothing"


def named(events: Sequence[Event], name: str, stage: int | None = None) -> list[Event]:
    """The events of a name, of one stage or of all."""
    return [event for event in events if event["event"] == name and (stage is None or event.get("stage") == stage)]


def first_batch_at(events: Sequence[Event], stage: int, tokens: int) -> float:
    """When a stage's trainer asked for its first batch: the first report says how long its steps took.

    Args:
        events: A run's.
        stage: The stage.
        tokens: Tokens in one of its steps.
    """
    first = named(events, "step", stage)[0]
    return float(first["time"]) - len(first["losses"]) * tokens / float(first["tokens_per_second"])


def first_step_at(events: Sequence[Event], stage: int, tokens: int) -> float:
    """When a stage had taken its first step, at the pace of its first report."""
    first = named(events, "step", stage)[0]
    return first_batch_at(events, stage, tokens) + tokens / float(first["tokens_per_second"])


def handoffs(events: Sequence[Event], stages: int, tokens: int) -> list[float]:
    """Seconds from the boundary below being complete to the first batch asked for, for each stage above the first."""
    found = []
    for stage in range(1, stages):
        ready = named(events, "written", stage - 1) or named(events, "committed", stage - 1)
        found.append(first_batch_at(events, stage, tokens) - float(ready[-1]["time"]))
    return found
