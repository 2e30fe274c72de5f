"""The workers of a runner: the one at work, the next one getting ready, and how both are told to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from stackwise.durable import is_locked
from stackwise.errors import InterruptedRun, NoSpaceError, StackWiseError
from stackwise.pipeline.job import FinishJob, StageJob
from stackwise.pipeline.runner.events import Event, Observer
from stackwise.pipeline.runner.process import OutOfMemory, Worker
from stackwise.pipeline.runner.time_limit import TimeLimit
from stackwise.pipeline.trial import TrialJob

LOCK_PATIENCE = 20.0
"""Seconds to wait for the worker of a runner that was killed: it saves and leaves by itself."""

PROGRESS = ("step", "boundary", "evaluating")
"""Events that only say how far a job is."""


class Crew:
    """Gives jobs to workers, each a process of its own, and passes on what they tell.

    Args:
        observe: Told every event.
        resume_command: What an interruption tells the user to type.
        limit: When the run has to be over.
    """

    def __init__(self, observe: Observer, resume_command: str, limit: TimeLimit | None = None) -> None:
        self._observe, self._resume_command, self._limit = observe, resume_command, limit
        self._device, self._log = "auto", Path()
        self._busy: Worker | None = None
        self._spare: Worker | None = None
        self._stopping = False
        self._signals = 0

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

    def work(
        self,
        job: StageJob | FinishJob | TrialJob,
        *,
        saves: int = 0,
        remedy: Callable[[dict[str, Any] | None], str] | None = None,
    ) -> list[Event]:
        """Have a job done; returns its events, progress aside.

        Args:
            job: The job.
            saves: Bytes of one of its checkpoints.
            remedy: What to do where memory runs out, from what was measured.

        Raises:
            InterruptedRun: It was stopped after saving.
            StackWiseError: It failed.
        """
        if isinstance(job, StageJob):
            self._wait_for_orphan(Path(job.store) / "locks" / f"work-{job.recipe_id}.lock")
        self.check()
        worker = self._busy = self._spare or Worker(self._device, self._log)
        self._spare = None
        if self._limit is not None:
            self._limit.begin(saves)
        events = []
        try:
            for event in worker.run(job.plain()):
                if event["event"] in ("step", "boundary", "resumed"):
                    self._start_spare()
                if self._limit is not None:
                    self._limit.observe(event)
                self._observe(event)
                if event["event"] not in PROGRESS:
                    events.append(event)
        except InterruptedRun as error:
            raise self._interrupted(error.message) from None
        except StackWiseError as error:
            place = job.stage.place if isinstance(job, StageJob) else None
            with contextlib.suppress(NoSpaceError):  # of the log: what ended the job is what is to be said
                self._observe({"event": "failed", "stage": place, "text": error.message})
            if isinstance(error, OutOfMemory) and remedy is not None:
                error.hint = f"{remedy(error.measured)}\n  {error.hint}"
            error.hint = f"{error.hint}; go on with: {self._resume_command}" if error.hint else self.go_on
            raise
        finally:
            worker.close()
            self._busy = None
        return events

    @property
    def go_on(self) -> str:
        """What to do after the end of a run that is not finished."""
        return f"go on with: {self._resume_command}"

    def check(self) -> None:
        """Whatever takes long outside of workers asks this as it goes.

        Raises:
            InterruptedRun: The run was told to stop.
        """
        if self._stopping:
            raise self._interrupted("stopped before the next step began")

    def close(self) -> None:
        """Let go of every worker; one that is at work saves first."""
        for worker in (self._busy, self._spare):
            if worker is not None:
                worker.close()
        self._busy = self._spare = None

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and the end of the time: the worker saves and ends. A second signal stops at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            self._signals += 1
            if self._signals > 1:
                for worker in (self._busy, self._spare):
                    if worker is not None:
                        worker.kill()
                raise InterruptedRun("stopped at once, at the last checkpoint", hint=self.go_on)
            if not self._stop("finishing the step in hand and saving (again to stop at once)"):
                raise InterruptedRun("stopped", hint=self.go_on)

        over = threading.Event()
        watcher = threading.Thread(target=self._watch_the_time, args=(over,), name="time-limit", daemon=True)
        watcher.start()
        mine = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if mine else ()
        previous = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for before, handler in previous.items():
                signal.signal(before, handler)
            over.set()
            watcher.join()

    def _watch_the_time(self, over: threading.Event) -> None:
        limit = self._limit
        while limit is not None and not over.wait(min(1.0, max(0.02, limit.left))):
            if limit.left <= 0 and not self._stopping:
                self._stop(f"the time limit is near: {limit.reserved}")

    def _stop(self, text: str) -> bool:
        """Have the worker save and end; returns whether there is one. Called by signals and from another thread."""
        self._stopping, busy = True, self._busy
        if busy is not None:
            busy.stop({"event": "stopping", "text": text})
        return busy is not None

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
        return InterruptedRun(message, hint=self.go_on)
