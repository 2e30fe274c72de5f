"""How trackers follow a run's log of events: which figures it holds, and which of them a tracker has already.

A tracker reads the log and may fall behind. What it has is kept beside the log: so a run that was killed goes on in the
same tracker run without a figure twice, a server that was gone gets what it missed, and a tracker that is switched on
late gets the whole history.

Trackers that are quick work in a thread, the others in a process of their own (`python -m` this module). That gets its
task as one line of JSON, prints each warning as a line, and ends when its standard input closes, once it is level with
the log. So nothing that the packages of W&B and MLflow or their servers do can hold up training; and a runner that is
killed leaves a process that finishes what the log holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from stackwise.config import StackWiseConfig
from stackwise.config.kinds import Tracker
from stackwise.durable import FileLock, write_json
from stackwise.errors import BusyError, line_of
from stackwise.files import make_directory, read_json
from stackwise.pipeline.device import python_command
from stackwise.pipeline.events import Event, read_log
from stackwise.pipeline.events import event as event_of
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.tracking.figures import SHAPE, Taken, is_event
from stackwise.pipeline.tracking.trackers import Point, RunInfo, TrackerClient, run_info
from stackwise.shapes import record
from stackwise.text import printable

SECONDS = 1.0  # between two looks at the log
RETRY_SECONDS = 20.0  # after a failure, before the next attempt
BATCH_POINTS = 10_000  # figures after which what a tracker has taken is noted
CLOSE_SECONDS = 20.0  # how long the end of a run waits for trackers; what they lack then is sent at the next start
STANDS = ("plan", "training", "reused")  # events that say what the stages are now
OUTCOMES = ("start", "done", "failed", "interrupted")  # events that say how the run ended, or that it goes on


class Follower:
    """Brings one tracker level with a run's log, again and again; `warn` is called once, where the tracker fails."""

    def __init__(
        self, tracker: TrackerClient, run: RunInfo, log: Path, state: Path, warn: Callable[[str], None]
    ) -> None:
        self._tracker, self._run, self._log, self._file, self._warn = tracker, run, log, state, warn
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
                line = line_of(error, "")[:200]
                self._warn(
                    f"{self.name} takes no figures ({type(error).__name__}: {printable(line)}); training goes on, "
                    "and what is missing is sent when the tracker answers again, or at the run's next start"
                )
            return False
        return True

    def _catch_up(self) -> None:
        taken = self._taken if self._taken is not None else self._begin()
        if not taken.whole:
            taken, points = self._with_history(taken)
            self._send(taken, points)
        begun, taken, points = taken.offset, taken.copied(), list[Point]()
        for event, offset in self._events(taken.offset):
            before = taken.recipes.get(str(event.get("stage"))) if event["event"] in ("training", "reused") else None
            if before is not None and before != event["recipe"]:  # its figures belong to another tracker run
                self._send(taken, points)
                self._tracker.close("done")
                # The stages below the changed one are the same, so the new run holds them too.
                kept = {place: recipe for place, recipe in taken.recipes.items() if int(place) < event["stage"]}
                kept[str(event["stage"])] = event["recipe"]
                taken = Taken(taken.number + 1, None, taken.offset, kept)
                taken.id = self._tracker.open(self._run, taken.number, None)
                self._keep(taken)
                taken, points = self._with_history(taken)
            points += taken.take(event)
            taken.offset = offset
            self._note(event)
            if len(points) >= BATCH_POINTS:
                self._send(taken, points)
                begun, taken, points = taken.offset, taken.copied(), []
        if taken.offset != begun:
            self._send(taken, points)

    def _begin(self) -> Taken:
        """Go on with the tracker run that is on record; else begin one with what the log holds by now."""
        taken = self._recorded() or Taken()
        recorded = taken.id
        taken.id = self._tracker.open(self._run, taken.number, recorded)
        size = self._log.stat().st_size if self._log.exists() else 0
        if recorded is None or taken.id != recorded:
            taken = Taken(taken.number, taken.id, size)
        for event, _ in self._events(0, taken.offset, (*STANDS, *OUTCOMES)):
            if event["event"] in OUTCOMES:
                # the process of a run that was killed may have taken all that the next run logged, its end too
                self._note(event)
            elif event["event"] == "plan":
                taken.plan(event)
            elif taken.id != recorded:
                taken.recipes[str(event["stage"])] = event["recipe"]
        self._keep(taken)
        return taken

    def _with_history(self, taken: Taken) -> tuple[Taken, list[Point]]:
        """A tracker run with what it lacks of the log before its beginning, of the stages as they are now."""
        taken = taken.copied()
        current: dict[str, str] = {}
        points: list[Point] = []
        for event, _ in self._events(0, taken.offset):
            self._note(event)
            stage = str(event.get("stage"))
            if event["event"] in ("training", "reused"):
                current[stage] = event["recipe"]
            elif event["event"] == "evaluation":
                points += taken.take(event) if current == taken.recipes else []
            elif event["event"] == "plan" or current.get(stage) == taken.recipes.get(stage):
                points += taken.take(event)
        taken.whole = True
        return taken, points

    def _note(self, event: Event) -> None:
        """Keep in mind how the run ended."""
        if event["event"] in OUTCOMES:
            self._outcome = "interrupted" if event["event"] == "start" else event["event"]

    def _send(self, taken: Taken, points: list[Point]) -> None:
        if points:
            self._tracker.log(points)
        self._keep(taken)

    def _keep(self, taken: Taken) -> None:
        self._taken = taken
        make_directory(self._file.parent)
        write_json(self._file, {key: getattr(taken, key) for key in SHAPE})

    def _recorded(self) -> Taken | None:
        """What the tracker has taken, by its file; None: there is none, or it is damaged."""
        with contextlib.suppress(OSError, ValueError):
            value = read_json(self._file)
            if isinstance(value, dict) and "told" in value:  # as it was called before
                value["sent"] = value.pop("told")
            if record({}, SHAPE)(value) is None:
                taken = Taken(**{key: value[key] for key in SHAPE if key in value})
                size = self._log.stat().st_size if self._log.exists() else 0
                taken.offset = taken.offset if taken.offset <= size else 0  # a log that was cut is read again
                return taken
        return None

    def _events(self, offset: int, end: int | None = None, kinds: tuple[str, ...] = ()) -> Iterator[tuple[Event, int]]:
        """Events of the log that figures can be taken from (see `read_log`)."""
        return (found for found in read_log(self._log, offset, end, kinds) if is_event(found[0]))


class Trackers:
    """Keeps the trackers of a run at work.

    Args:
        emit: Takes an event for each warning, in the thread that passes events to this one.
    """

    def __init__(self, run: RunDirectory, config: StackWiseConfig, emit: Callable[[Event], None]) -> None:
        self._run, self._emit = run, emit
        self._info = run_info(config, run.path.absolute())
        self._inside: dict[str, Any] = {}  # trackers by name, with their settings
        self._outside: dict[str, Any] = {}
        for tracker in config.tracking.trackers:
            (self._inside if tracker.inside else self._outside)[tracker.name] = tracker.plain()
        self._warnings: list[str] = []
        self._followers: list[Follower] = []
        self._process: subprocess.Popen[str] | None = None
        self._listener: threading.Thread | None = None

    def __call__(self, event: Event) -> None:
        """Take the occasion to pass on warnings."""
        while self._warnings:
            self._emit(event_of("warning", text=self._warnings.pop(0)))

    def __enter__(self) -> Self:
        self._followers = followers(self._inside, self._info, self._warnings.append)
        if self._outside:
            self._start()
        return self

    def __exit__(self, *exception: object) -> None:
        deadline = time.monotonic() + CLOSE_SECONDS
        for follower in self._followers:
            follower.stop()
        behind = self._end_process(deadline)
        behind += [f.name for f in self._followers if not f.join(max(0.0, deadline - time.monotonic()))]
        if behind:
            self._warnings.append(f"{', '.join(behind)}: not level with the run yet; its next start sends the rest")
        self({})

    def _start(self) -> None:
        with self._run.open_log("trackers.log") as errors:
            self._process = subprocess.Popen(
                python_command("stackwise.pipeline.tracking.following"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"trackers": self._outside, "run": asdict(self._info)}) + "\n")
            self._process.stdin.flush()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for line in self._process.stdout:
                self._warnings.append(line.rstrip("\n"))

    def _end_process(self, deadline: float) -> list[str]:
        process, listener = self._process, self._listener
        if process is None or listener is None:
            return []
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        behind: list[str] = []
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
            if code != 0:
                self._warnings.append(f"the trackers' process ended with code {code}: {self._run.logs}/trackers.log")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            behind = [*self._outside]
        listener.join(1.0)  # a grandchild may hold the pipe open
        if not listener.is_alive():
            process.stdout.close()
        return behind


def followers(trackers: dict[str, Any], info: RunInfo, warn: Callable[[str], None]) -> list[Follower]:
    """A started follower for each tracker."""
    run = RunDirectory(Path(info.directory))
    started = [
        Follower(Tracker.of(value).build(), info, run.events_file, run.tracking / f"{kind}.json", warn)
        for kind, value in trackers.items()
    ]
    for follower in started:
        follower.start()
    return started


def main() -> int:
    """Serve until standard input closes."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a package prints goes to the log
    request = json.loads(sys.stdin.readline() or "null")
    if request is None:
        return 0

    def warn(text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            out.write(text + "\n")
            out.flush()

    info = RunInfo(**request["run"])
    run = RunDirectory(Path(info.directory))
    make_directory(run.tracking)
    with contextlib.ExitStack() as stack:
        lock = FileLock(run.tracking / "lock", "the trackers of the run")
        while True:  # a runner that was killed leaves a process that finishes first
            try:
                stack.enter_context(lock)
                break
            except BusyError:
                time.sleep(0.1)
        started = followers(request["trackers"], info, warn)
        sys.stdin.read()
        for follower in started:
            follower.stop()
        for follower in started:
            follower.join()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Packages that are still at their exit's work would only hold up the end.
    os._exit(code)
