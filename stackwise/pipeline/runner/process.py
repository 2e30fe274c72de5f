"""A worker seen from the runner: started early, given one job, listened to, told to stop."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stackwise.errors import InterruptedRun, NoSpaceError, StackWiseError
from stackwise.pipeline.memory import killed_for_memory
from stackwise.pipeline.runner.launch import WorkerProcess

Event = dict[str, Any]

CLOSE_SECONDS = 120
"""How long a worker that was told to stop may take for the step in hand and its checkpoint."""

_ERRORS = {kind.exit_code: kind for kind in (InterruptedRun, NoSpaceError)}


class WorkerFailed(StackWiseError):
    """A worker ended without finishing its job."""


class OutOfMemory(WorkerFailed):
    """A worker ran out of memory, or was killed as the system kills for want of it.

    Attributes:
        measured: `limit`, `base`, `peak` in bytes and `what` they are of, as the worker saw them; None: it was killed.
    """

    measured: dict[str, Any] | None = None


class Worker:
    """One worker process.

    Args:
        device: As in the configuration; the worker resolves it.
        log: Where its standard error goes.
    """

    def __init__(self, device: str, log: Path) -> None:
        self.log = log
        self._process = WorkerProcess(device, log)
        # Its `put` may be called by a signal handler that interrupts its `get`.
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, name="worker-events", daemon=True)
        self._listener.start()
        self._ready: Event | None = None
        self._given = self._stopped = False
        self._killed_before = killed_for_memory()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ready(self) -> Event:
        """Wait until its imports are done; says the device, its name, memory and default precision.

        Raises:
            StackWiseError: It could not start, or the device is not there.
        """
        if self._ready is None:
            event = self._events.get()
            if event is None or event["event"] != "ready":
                raise self._failure(event)
            self._ready = event
        return self._ready

    def run(self, job: dict[str, Any]) -> Iterator[Event]:
        """Give it its job and yield its events until it ends.

        Raises:
            InterruptedRun: It was told to stop, and saved its state.
            StackWiseError: It failed; says how, with the last lines of its log.
        """
        self.ready()
        self._given = True
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        while (event := self._events.get()) is not None:
            if event["event"] in ("error", "interrupted"):
                self._process.wait()
                raise self._failure(event)
            if event["event"] != "ready":  # said again, where a template said it for a worker that it cannot fork
                yield event
        if self._process.wait() != 0:
            raise self._failure(None)

    def stop(self, told: Event) -> None:
        """Ask it to save and end; one without a job has nothing to save. May be called by a signal handler.

        Args:
            told: An event that says so; it appears among the worker's own.
        """
        self._stopped = True
        self._events.put(told)
        self._process.send_signal(signal.SIGTERM if self._given else signal.SIGKILL)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def close(self) -> None:
        """Let go of it: one without a job ends at once; one with a job saves first."""
        if not self._given:
            self.kill()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=CLOSE_SECONDS)
        except TimeoutError:
            self.kill()
            self._process.wait()
        if self._process.begun:
            self._listener.join()
        self._process.close()

    def _listen(self) -> None:
        with contextlib.suppress(ValueError, OSError), self._process.stdout:
            for line in self._process.stdout:
                with contextlib.suppress(json.JSONDecodeError):
                    self._events.put(json.loads(line))
        self._events.put(None)

    def _failure(self, event: Event | None) -> StackWiseError:
        if event is not None and event["event"] in ("error", "interrupted"):
            code = int(event.get("exit_code", 1))
            if (measured := event.get("memory")) is not None:
                short = OutOfMemory(str(event["message"]), hint=f"its log: {self.log}")
                short.measured = measured
                return short
            hint = event.get("hint") or (f"its log: {self.log}" if event.get("unexpected") else None)
            tail = self._tail() if event.get("unexpected") else ""
            error: StackWiseError = _ERRORS.get(code, WorkerFailed)(f"{event['message']}{tail}", hint=hint)
            error.exit_code = code
            return error
        if not self._given:
            self.kill()
        code = self._process.wait()
        if self._stopped and code in (0, -signal.SIGTERM, -signal.SIGKILL):
            return InterruptedRun("stopped before there was anything to save")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        kind: type[WorkerFailed] = WorkerFailed
        if code == -signal.SIGKILL:
            kind = OutOfMemory
            sure = killed_for_memory() > self._killed_before
            how += ": out of memory" if sure else " (often the system's way of saying: out of memory)"
        return kind(f"worker {self.pid} {how}{self._tail()}", hint=f"its log: {self.log}")

    def _tail(self) -> str:
        return "".join(f"\n    {line}" for line in self._last_lines(5))

    def _last_lines(self, count: int) -> list[str]:
        try:
            return self.log.read_text(errors="replace").splitlines()[-count:]
        except OSError:
            return []
