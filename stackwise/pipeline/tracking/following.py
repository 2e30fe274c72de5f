"""What a tracker is, and how it follows a run's log of events.

A tracker follows the log, as a reader that may fall behind. What it has taken is kept beside the log, so a run that
was killed goes on in the same tracker run without a point twice, a server that was gone gets what it missed, and a
tracker that is switched on late gets the whole history.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from stackwise.durable import read_json, write_json
from stackwise.pipeline.tracking.figures import Event, Point, Taken

SECONDS = 1.0
"""Between two looks at the log."""
RETRY_SECONDS = 20.0
"""After a failure, before the next attempt."""
BATCH_BYTES = 1 << 22
"""Of the log, taken at once."""


@dataclass(frozen=True)
class About:
    """What a tracker is told of the run.

    Args:
        name: The run's name.
        project: The project, or experiment, it belongs to.
        group: The group, such as a sweep.
        directory: The run's directory.
        parameters: The configuration by dotted key.
    """

    name: str
    project: str
    group: str | None
    directory: str
    parameters: dict[str, Any]


class Tracker(Protocol):
    """Where figures go: TensorBoard, Weights & Biases, MLflow. Any call may fail; what was not taken comes again."""

    name: str

    def open(self, about: About, number: int, known: str | None) -> str:
        """Begin a tracker run, or go on with the one `known`; returns its id.

        Args:
            about: The run.
            number: 1, and one more each time that a changed configuration trains other stages in the same directory.
            known: The id that an earlier `open` gave.
        """

    def log(self, points: list[Point]) -> None:
        """Take figures; they are safe when this returns."""

    def close(self, state: str) -> None:
        """The run ended: done, failed or interrupted."""


class Follower:
    """Brings one tracker level with a run's log, again and again.

    Args:
        tracker: Where the figures go.
        about: The run.
        log: The run's log of events.
        state: Where to keep what the tracker has.
        warn: Told, once, that the tracker fails.
    """

    def __init__(self, tracker: Tracker, about: About, log: Path, state: Path, warn: Callable[[str], None]) -> None:
        self._tracker, self._about, self._log, self._file, self._warn = tracker, about, log, state, warn
        self.name = tracker.name
        self._taken: Taken | None = None
        self._end = threading.Event()
        self._outcome = "interrupted"
        self._warned = False
        self._thread = threading.Thread(target=self._follow, name=f"tracker-{tracker.name}", daemon=True)

    def start(self) -> None:
        """Begin, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """What the log holds by now is still taken."""
        self._end.set()

    def join(self, seconds: float | None = None) -> bool:
        """Wait for the end; whether it has come."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _follow(self) -> None:
        again = 0.0
        while True:
            last = self._end.wait(SECONDS)
            if last or time.monotonic() >= again:
                again = 0.0 if self._attempt(self._catch_up) else time.monotonic() + RETRY_SECONDS
            if last:
                break
        if self._taken is not None:
            self._attempt(lambda: self._tracker.close(self._outcome))

    def _attempt(self, act: Callable[[], None]) -> bool:
        try:
            act()
        except Exception as error:  # whatever a tracker's package or its server comes up with
            if not self._warned:
                self._warned = True
                line = (str(error).strip().splitlines() or [""])[0][:200]
                self._warn(
                    f"{self._tracker.name} takes no figures ({type(error).__name__}: {line}); training goes on, "
                    "and what is missing is sent when the tracker answers again, or at the run's next start"
                )
            return False
        return True

    def _catch_up(self) -> None:
        taken = self._taken if self._taken is not None else self._begin()
        if not taken.whole:
            taken, points = self._with_history(taken)
            self._send(taken, points)
        more = True
        while more:
            taken, points = taken.copied(), []
            events, more = self._read(taken.offset)
            for event, offset in events:
                if taken.changed_by(event):
                    self._send(taken, points)
                    self._tracker.close("done")
                    taken = taken.renewed(event)
                    taken.id = self._tracker.open(self._about, taken.number, None)
                    self._keep(taken)
                    taken, points = self._with_history(taken)
                points += taken.take(event)
                taken.offset = offset
                self._note(event)
            if events:
                self._send(taken, points)

    def _begin(self) -> Taken:
        """Go on with the tracker run that is known; else begin one with what the log holds by now."""
        known = self._known()
        if known is not None and known.id is not None:
            found = self._tracker.open(self._about, known.number, known.id)
            if found == known.id:
                if not known.places:  # kept before there was such a thing
                    for event in self._before(known.offset):
                        if event["event"] == "plan":
                            known.planned(event)
                self._taken = known
                return known
            known = Taken(known.number, found)
        else:
            known = Taken()
            known.id = self._tracker.open(self._about, known.number, None)
        known.offset = self._log.stat().st_size if self._log.exists() else 0
        for event in self._before(known.offset):
            if event["event"] in ("training", "reused"):
                known.recipes[str(event["stage"])] = event["recipe"]
        self._keep(known)
        return known

    def _with_history(self, taken: Taken) -> tuple[Taken, list[Point]]:
        """A tracker run with what it lacks of the log before its beginning."""
        taken = taken.copied()
        points = self._history(taken)
        taken.whole = True
        return taken, points

    def _history(self, taken: Taken) -> list[Point]:
        """What the log says so far of the stages as they are now."""
        current: dict[str, str] = {}
        points: list[Point] = []
        for event in self._before(taken.offset):
            self._note(event)
            if event["event"] in ("training", "reused"):
                current[str(event["stage"])] = event["recipe"]
            elif event["event"] == "plan":
                taken.planned(event)
            elif event["event"] == "evaluation":
                points += taken.take(event) if current == taken.recipes else []
            elif current.get(key := str(event.get("stage"))) == taken.recipes.get(key):
                points += taken.take(event)
        return points

    def _note(self, event: Event) -> None:
        """Keep in mind how the run ended."""
        if event["event"] in ("done", "failed", "interrupted", "start"):
            self._outcome = "interrupted" if event["event"] == "start" else event["event"]

    def _send(self, taken: Taken, points: list[Point]) -> None:
        if points:
            self._tracker.log(points)
        self._keep(taken)

    def _keep(self, taken: Taken) -> None:
        self._taken = taken
        self._file.parent.mkdir(exist_ok=True)
        write_json(self._file, asdict(taken))

    def _known(self) -> Taken | None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            taken = Taken(**read_json(self._file))
            size = self._log.stat().st_size if self._log.exists() else 0
            taken.offset = taken.offset if taken.offset <= size else 0  # a log that was cut is read again
            return taken
        return None

    def _before(self, offset: int) -> Iterator[Event]:
        at, more = 0, True
        while more and at < offset:
            events, more = self._read(at, offset)
            for event, at in events:  # noqa: B007 (the place goes on with the last event)
                yield event
            if not events:
                return

    def _read(self, offset: int, end: int | None = None) -> tuple[list[tuple[Event, int]], bool]:
        """Whole lines from an offset on, each with the offset after it; whether there are more."""
        try:
            with self._log.open("rb") as file:
                file.seek(offset)
                size = BATCH_BYTES if end is None else min(BATCH_BYTES, end - offset)
                block = file.read(size)
                whole = len(block) == BATCH_BYTES
                if not block.endswith(b"\n"):
                    block += file.readline()
        except FileNotFoundError:
            return [], False
        found = []
        for line in block.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            offset += len(line)
            event: Any = None
            with contextlib.suppress(ValueError):
                event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                found.append((event, offset))
        return found, whole
