"""How trackers follow a run's log of events: which figures it holds, and which of them a tracker has already.

A tracker follows the log, as a reader that may fall behind. What it has taken is kept beside the log, so a run that
was killed goes on in the same tracker run without a figure twice, a server that was gone gets what it missed, and a
tracker that is switched on late gets the whole history.
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

from stackwise.config import StackWiseConfig
from stackwise.config.kinds import Tracker
from stackwise.durable import FileLock, write_json
from stackwise.errors import BusyError
from stackwise.files import make_directory, open_regular, read_json
from stackwise.identity import content_id
from stackwise.pipeline.device import python_command
from stackwise.pipeline.events import EVENTS, Event
from stackwise.pipeline.events import event as event_of
from stackwise.pipeline.run import SCORES, RunDirectory
from stackwise.pipeline.tracking.trackers import about, wanted
from stackwise.shapes import array, array_of, count, integer, mapping, number, optional, record, text
from stackwise.text import printable

SECONDS = 1.0
"""Between two looks at the log."""
RETRY_SECONDS = 20.0
"""After a failure, before the next attempt."""
BATCH_BYTES = 1 << 22
"""Of the log, taken at once."""


@dataclass(frozen=True, slots=True)
class Point:
    """One figure.

    Args:
        stage: The stage's depth; None: a figure of the run by depth.
        step: The stage's optimizer step, counted through all its windows; of a figure of the run, the depth.
        value: Losses in nats, sizes in bytes, times in seconds, rates as they are.
    """

    stage: int | None
    name: str
    step: int
    value: float
    time: float


@dataclass(frozen=True)
class About:
    """What a tracker is told of the run."""

    name: str
    project: str
    group: str | None
    directory: str
    parameters: dict[str, Any]


class TrackerClient(Protocol):
    """What takes figures, as built by a kind of tracker. Any call may fail; what was not taken comes again."""

    name: str

    def open(self, about: About, number: int, known: str | None) -> str:
        """Begin a tracker run, or go on with the one `known`; returns its id.

        Args:
            number: 1, and one more each time that a changed configuration trains other stages in the same directory.
        """

    def log(self, points: list[Point]) -> None:
        """Take figures; they are safe when this returns."""

    def close(self, state: str) -> None:
        """The run ended: done, failed or interrupted."""


_ROLLBACKS = array_of(array(count, count))


def _known(value: Any) -> str | None:
    return None if isinstance(value, str | bool) else integer(value) and _ROLLBACKS(value)


_KEPT = {
    "number": count,
    "id": optional(text),
    "offset": count,
    "recipes": mapping(text),
    "places": mapping(array(count, count)),
    "told": mapping(_known),
    "whole": lambda value: None if isinstance(value, bool) else "is neither true nor false",
}
"""What is kept of `Taken`."""
_AT = {"time": number, "stage": optional(count), "step": count}
_STEPS = record({"stage": count, "step": count}, {"time": number, "losses": array_of(optional(number))})
_OF_STAGE = record({"stage": count, "recipe": text})
_LINES = {
    "plan": record({"stages": array_of(record({"stage": count}, {"depth": count, "steps": optional(count)}))}),
    "training": _OF_STAGE,
    "reused": _OF_STAGE,
    "step": _STEPS,
    "resumed": _STEPS,
    "diverged": record({"stage": count, "step": count}, {**_AT, "to": count}),
    "evaluation": record({}, {"time": number, "result": optional(SCORES)}),
}
"""Lines of the log that figures follow from; one that is not like this is passed over."""


@dataclass
class Taken:
    """What a tracker run has.

    Args:
        offset: Bytes of the log that were read.
        recipes: The recipe of each stage (by its place in the schedule, as text) whose figures it holds.
        places: Of each place in the schedule its stage's depth, and that stage's steps in the windows before.
        told: The last step of each series by recipe and kind, as the log counts it, from the start of its window; for
            figures of the run, what they were.
        whole: Whether it has what the log held when it began.
    """

    number: int = 1
    id: str | None = None
    offset: int = 0
    recipes: dict[str, str] = field(default_factory=dict)
    places: dict[str, list[int]] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    whole: bool = False

    def copied(self) -> Taken:
        """A copy to take further figures with."""
        return replace(self, recipes=dict(self.recipes), told=dict(self.told))

    def changed_by(self, event: Event) -> bool:
        """Whether a stage now has another recipe: its figures belong to another tracker run."""
        if event["event"] not in ("training", "reused"):
            return False
        before = self.recipes.get(str(event["stage"]))
        return before is not None and before != event["recipe"]

    def renewed(self, event: Event) -> Taken:
        """The next tracker run: the stages below the changed one are the same."""
        place = event["stage"]
        kept = {key: recipe for key, recipe in self.recipes.items() if int(key) < place}
        return Taken(self.number + 1, None, self.offset, kept | {str(place): event["recipe"]}, dict(self.places))

    def planned(self, event: Event) -> None:
        """Take up a plan: which stage and window each place of the schedule is."""
        self.places, steps = {}, dict[int, int]()
        for stage in event["stages"]:
            depth = stage.get("depth", stage["stage"])
            self.places[str(stage["stage"])] = [depth, steps.get(depth, 0)]
            steps[depth] = steps.get(depth, 0) + (stage.get("steps") or 0)

    def take(self, event: Event) -> list[Point]:
        """The event's figures that are new here; they count as taken.

        A stage of several windows is one series, whose steps go on from window to window as its schedules do.
        """
        place = event.get("stage")
        at: list[Any] = self.places.get(str(place), [place, 0])
        depth, before = at
        return [
            figure if figure.stage is None else replace(figure, stage=depth, step=before + figure.step)
            for figure in self._new(event)
        ]

    def _new(self, event: Event) -> list[Point]:
        """The figures that are new, by the stage's place and its step in the window."""
        kind, stage, at = event["event"], event.get("stage"), float(event.get("time", 0.0))
        if kind == "plan":
            self.planned(event)
        if kind == "evaluation":
            return self._evaluation(event, at)
        if not isinstance(stage, int):
            return []
        if kind in ("training", "reused"):
            self.recipes[str(stage)] = event["recipe"]
            return []
        recipe = self.recipes.get(str(stage), "")
        if kind in ("step", "resumed"):
            return self._steps(event, recipe, stage, at)
        if kind == "diverged" and isinstance(event.get("to"), int):
            self._go_back(event, recipe)
        if kind == "written":
            step, prefix = int(self.told.get(recipe, 0)), "boundary_"
            figures = _figures(event)
        elif isinstance(event.get("step"), int):  # a checkpoint's time, a held-out loss, …
            step, prefix, figures = event["step"], f"{kind}/", _figures(event)
        else:
            return []
        key = f"{recipe}:{kind}"
        if step <= self.told.get(key, -1):
            return []
        self.told[key] = step
        return [Point(stage, prefix + name, step, value, at) for name, value in figures.items()]

    def _go_back(self, event: Event, recipe: str) -> None:
        """The stage went back to an earlier step: the steps from there have other figures, which are new.

        A stage that was resumed below a rollback comes to it again, with the figures that are known.
        """
        known, rollback = self.told.get(f"{recipe}:rollbacks", []), [event["step"], event["to"]]
        if rollback in known and self.told.get(f"{recipe}:resumed"):
            return
        self.told |= {f"{recipe}:rollbacks": [*known, rollback], f"{recipe}:resumed": False}
        for key in (recipe, *(f"{recipe}:{kind}" for kind in ("held_out", "checkpoint", "best"))):
            if key in self.told:
                self.told[key] = min(self.told[key], event["to"])

    def _steps(self, event: Event, recipe: str, stage: int, at: float) -> list[Point]:
        last, losses, told = event["step"], event.get("losses", []), int(self.told.get(recipe, 0))
        first = last - len(losses) + 1
        new = [
            Point(stage, "loss", first + at_step, float(loss), at)
            for at_step, loss in enumerate(losses)
            if first + at_step > told and loss is not None
        ]
        if event["event"] == "step" and last > told:
            new += [Point(stage, name, last, value, at) for name, value in _figures(event).items()]
        if new:
            self.told[recipe] = max(told, last)
        if event["event"] == "resumed":
            self.told[f"{recipe}:resumed"] = True
        return new

    def _evaluation(self, event: Event, at: float) -> list[Point]:
        result = event.get("result") or {}
        digest = content_id("evaluation", json.dumps(result, sort_keys=True))
        if event.get("reused") or not result or self.told.get("evaluation") == digest:
            return []
        self.told["evaluation"] = digest
        found = []
        for depth, figures in enumerate(result.get("stages") or [result]):
            shown = {"bits_per_byte": figures.get("bits_per_byte")}
            for name in ("loss", "accuracy"):
                values = figures.get(name) or {}
                shown |= {f"{name}_at_{printable(share)}": value for share, value in values.items()}
            found += [
                Point(None, f"held_out/{name}", depth, float(value), at)
                for name, value in shown.items()
                if value is not None
            ]
        return found


def _figures(event: Event) -> dict[str, float]:
    """The numbers of an event that are figures."""
    values = {name: event.get(name) for name in EVENTS[event["event"]].figures}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def _is_event(value: Any) -> bool:
    """Whether a line of the log is an event that figures can be taken from."""
    if not isinstance(value, dict) or not isinstance(value.get("event"), str) or value["event"] not in EVENTS:
        return False
    return _LINES.get(value["event"], record({}, _AT))(value) is None


class Follower:
    """Brings one tracker level with a run's log, again and again."""

    def __init__(self, tracker: TrackerClient, run: About, log: Path, state: Path, warn: Callable[[str], None]) -> None:
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
                line = (str(error).strip().splitlines() or [""])[0][:200]
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
        more = True
        while more:
            taken, points = taken.copied(), []
            events, more = self._read(taken.offset)
            for event, offset in events:
                if taken.changed_by(event):
                    self._send(taken, points)
                    self._tracker.close("done")
                    taken = taken.renewed(event)
                    taken.id = self._tracker.open(self._run, taken.number, None)
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
            found = self._tracker.open(self._run, known.number, known.id)
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
            known.id = self._tracker.open(self._run, known.number, None)
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
        make_directory(self._file.parent)
        write_json(self._file, asdict(taken))

    def _known(self) -> Taken | None:
        with contextlib.suppress(OSError, ValueError):
            value = read_json(self._file)
            if record({}, _KEPT)(value) is not None:
                return None  # it begins anew
            taken = Taken(**{key: value[key] for key in _KEPT if key in value})
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
            with os.fdopen(open_regular(self._log), "rb") as file:
                file.seek(offset)
                size = BATCH_BYTES if end is None else min(BATCH_BYTES, end - offset)
                block = file.read(size)
                whole = len(block) == BATCH_BYTES
                if not block.endswith(b"\n"):
                    block += file.readline()
        except FileNotFoundError:
            return [], False
        events = []
        for line in block.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            offset += len(line)
            event: Any = None
            with contextlib.suppress(ValueError):
                event = json.loads(line)
            if _is_event(event):
                events.append((event, offset))
        return events, whole


CLOSE_SECONDS = 20.0
"""How long the end of a run waits for trackers; what they lack then is sent at the next start."""


class Trackers:
    """Keeps the trackers of a run at work.

    Args:
        emit: Takes an event for each warning, in the thread that passes events to this one.
    """

    def __init__(self, run: RunDirectory, config: StackWiseConfig, emit: Callable[[Event], None]) -> None:
        self._run, self._emit = run, emit
        self._about, self._wanted = about(config, run.path.absolute()), wanted(config)
        self._warnings: list[str] = []
        self._followers: list[Follower] = []
        self._process: subprocess.Popen[str] | None = None
        self._listener: threading.Thread | None = None

    def __call__(self, event: Event) -> None:
        """Take the occasion to pass on warnings."""
        while self._warnings:
            self._emit(event_of("warning", text=self._warnings.pop(0)))

    def __enter__(self) -> Self:
        inside = {kind: value for kind, value in self._wanted.items() if Tracker.registry[kind].inside}
        self._followers = followers(inside, self._about, self._warnings.append)
        outside = {kind: value for kind, value in self._wanted.items() if not Tracker.registry[kind].inside}
        if outside:
            self._start(outside)
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

    def _start(self, trackers: dict[str, Any]) -> None:
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
            self._process.stdin.write(json.dumps({"trackers": trackers, "about": asdict(self._about)}) + "\n")
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
            behind = [kind for kind in self._wanted if not Tracker.registry[kind].inside]
        listener.join(1.0)  # a grandchild may hold the pipe open
        if not listener.is_alive():
            process.stdout.close()
        return behind


def followers(trackers: dict[str, Any], known: About, warn: Callable[[str], None]) -> list[Follower]:
    """A started follower for each tracker."""
    run = RunDirectory(Path(known.directory))
    made = [
        Follower(Tracker.of(value).build(), known, run.events_file, run.tracking / f"{kind}.json", warn)
        for kind, value in trackers.items()
    ]
    for follower in made:
        follower.start()
    return made


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

    known = About(**request["about"])
    run = RunDirectory(Path(known.directory))
    make_directory(run.tracking)
    with contextlib.ExitStack() as stack:
        lock = FileLock(run.tracking / "lock", "the trackers of the run")
        while True:  # a runner that was killed leaves a process that finishes first
            try:
                stack.enter_context(lock)
                break
            except BusyError:
                time.sleep(0.1)
        started = followers(request["trackers"], known, warn)
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
