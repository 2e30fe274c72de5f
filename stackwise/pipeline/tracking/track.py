"""The trackers of a run: those that are quick in a thread, the others in a process of their own.

`python -m stackwise.pipeline.tracking.track` is that process. It is told everything in one line of JSON, says what goes
wrong a line each, and ends when its standard input closes, once it is level with the log. So the packages of W&B and
MLflow, their servers and their exits are nothing that training could wait for; and a runner that is killed leaves a
process that finishes what the log holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from stackwise.config import StackWiseConfig
from stackwise.config.kinds import Tracker
from stackwise.durable import FileLock
from stackwise.errors import BusyError
from stackwise.files import make_directory
from stackwise.pipeline.device import python_command
from stackwise.pipeline.events import Event
from stackwise.pipeline.events import event as event_of
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.tracking.following import About, Follower
from stackwise.pipeline.tracking.trackers import about, wanted

CLOSE_SECONDS = 20.0
"""How long the end of a run waits for trackers; what they lack then is sent at the next start."""


class Trackers:
    """Keeps the trackers of a run at work.

    Args:
        run: The run's directory.
        config: Its configuration.
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
                python_command("stackwise.pipeline.tracking.track"),
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
