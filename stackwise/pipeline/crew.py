"""The workers of a runner: the one at work, the next one getting ready, and how both are told to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from stackwise.durable import is_locked
from stackwise.errors import InterruptedRun, StackWiseError
from stackwise.pipeline.events import Event, Observer
from stackwise.pipeline.job import FinishJob, StageJob
from stackwise.pipeline.process import Worker

LOCK_PATIENCE = 20.0
"""Seconds to wait for the worker of a runner that was killed: it saves and leaves by itself."""


class Crew:
    """Gives jobs to workers, each a process of its own, and passes on what they tell.

    Args:
        observe: Told every event.
        resume_command: What an interruption tells the user to type.
    """

    def __init__(self, observe: Observer, resume_command: str) -> None:
        self._observe, self._resume_command = observe, resume_command
        self._device, self._log = "auto", Path()
        self._busy: Worker | None = None
        self._spare: Worker | None = None
        self._stopping = False

    def start(self, device: str, log: Path) -> Event:
        """Start the first worker; says the device, its name, memory and default precision.

        Args:
            device: As in the configuration; workers resolve it.
            log: Where workers' standard error goes.

        Raises:
            StackWiseError: A worker cannot start here.
        """
        self._device, self._log = device, log
        self._spare = Worker(device, log)
        return self._spare.ready()

    def work(self, job: StageJob | FinishJob) -> list[Event]:
        """Have a job done; returns its events, progress aside.

        Raises:
            InterruptedRun: It was stopped after saving.
            StackWiseError: It failed.
        """
        if isinstance(job, StageJob):
            self._wait_for_orphan(Path(job.store) / "locks" / f"work-{job.recipe_id}.lock")
        if self._stopping:
            raise self._interrupted("stopped before the next step began")
        worker = self._spare or Worker(self._device, self._log)
        self._busy, self._spare = worker, None
        events = []
        try:
            for event in worker.run(job.plain()):
                if event["event"] in ("step", "boundary", "resumed"):
                    self._start_spare()
                self._observe(event)
                if event["event"] not in ("step", "boundary"):
                    events.append(event)
        except InterruptedRun as error:
            raise self._interrupted(error.message) from None
        except StackWiseError as error:
            depth = job.stage.depth if isinstance(job, StageJob) else None
            self._observe({"event": "failed", "stage": depth, "text": error.message})
            raise
        finally:
            worker.close()
            self._busy = None
        return events

    def close(self) -> None:
        """Let go of every worker; one that is at work saves first."""
        for worker in (self._busy, self._spare):
            if worker is not None:
                worker.close()
        self._busy = self._spare = None

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM: the worker saves and ends. A second one stops at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self._stopping:
                for worker in (self._busy, self._spare):
                    if worker is not None:
                        worker.kill()
                raise InterruptedRun("stopped at once", hint=f"go on with: {self._resume_command}")
            self._stopping = True
            if self._busy is None:
                raise InterruptedRun("stopped", hint=f"go on with: {self._resume_command}")
            text = "finishing the step in hand and saving (again to stop at once)"
            self._observe({"event": "stopping", "text": text})
            self._busy.stop()

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _start_spare(self) -> None:
        """Start the next worker, whose imports are done while this one works."""
        if self._spare is None and not self._stopping:
            self._spare = Worker(self._device, self._log)

    def _wait_for_orphan(self, lock: Path) -> None:
        """A runner that was killed leaves a worker that saves and ends; give it the time."""
        deadline = time.monotonic() + LOCK_PATIENCE
        while is_locked(lock) and time.monotonic() < deadline and not self._stopping:
            time.sleep(0.05)

    def _interrupted(self, message: str) -> InterruptedRun:
        self._observe({"event": "interrupted", "text": message})
        return InterruptedRun(message, hint=f"go on with: {self._resume_command}")
