"""A trial as a job of a batch system: submitted, followed by what its run logs, ended where the search says so.

Its job trains the whole trial, and waits for stages that other trials are training. The search only looks at the run's
files, so it may be killed meanwhile: the job goes on, and the search that comes after follows it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from stackwise.config import StackWiseConfig
from stackwise.errors import BusyError, InterruptedRun, StackWiseError
from stackwise.pipeline.batch.cluster import Job, active_jobs, end_job, submit_alone
from stackwise.pipeline.batch.resources import BatchSystem
from stackwise.pipeline.device import python_command
from stackwise.pipeline.events import Event, Observer, read_log
from stackwise.pipeline.run import RunDirectory, job_file, job_state
from stackwise.pipeline.runner.runner import Runner
from stackwise.text import printable

Engine = Literal["here", "slurm", "ray", "local"]
BUSY_SECONDS = 0.5  # before a trial tries again what another one holds
LOOK_SECONDS = 0.2  # between two looks at a job's files
QUEUE_SECONDS = 10.0  # between two questions to the batch system, whether a silent job is still there
NAME = "stackwise: "  # begins the line in a job's log that says why it failed


class JobRunner:
    """Carries a trial out as a job; what `Runner` is to a trial that trains in a worker here.

    Args:
        observe: Gets the events that the job's run logs.
        resume_command: What is typed to go on with the search.
    """

    def __init__(
        self,
        config: StackWiseConfig,
        run: RunDirectory,
        observe: Observer,
        engine: BatchSystem,
        resume_command: str,
    ) -> None:
        self._config, self._run, self._observe = config, RunDirectory(run.path.absolute()), observe
        self._engine, self._resume_command = engine, resume_command
        self._stopped = threading.Event()
        self._failure: str | None = None
        self._read = 0  # bytes of the log

    def run(self, only: int | None = None) -> None:
        """Submit the trial, or follow its job where one is there, until it ends.

        Args:
            only: One stage alone.

        Raises:
            InterruptedRun: It was ended, and saved.
            StackWiseError: It failed, or the batch system lost it.
        """
        job = next(iter(active_jobs(self._run)), None) or self._finished(only)
        if job is None:
            with contextlib.suppress(FileNotFoundError):
                self._read = self._run.events_file.stat().st_size
            command = [str(self._run.path), *([] if only is None else [str(only)])]
            entry = {"stage": only, "window": None}
            argv = python_command("stackwise.pipeline.search.jobs", *command)
            job = submit_alone(self._config, self._run, self._engine, entry, argv)
        state = self._follow(job)
        if state == "done":
            return
        if self._stopped.is_set() or state == "interrupted":
            raise InterruptedRun(
                f"{self._engine} job {job['job']} was ended", hint=f"go on with: {self._resume_command}"
            )
        why = self._failure or _said(job) or ("it is gone" if state == "gone" else f"it is {state}")
        raise StackWiseError(f"{self._engine} job {job['job']}: {why}", hint=f"its log: {job['log']}")

    def stop(self, text: str, *, at_once: bool = False) -> None:
        """From another thread: have the job save and end; a job alone decides how long that takes."""
        self._stopped.set()

    def _finished(self, only: int | None) -> Job | None:
        """The job of this very trial that ended well when no search followed it, if there is one."""
        for job in self._run.jobs():
            if job["stage"] == only and job_state(job_file(self._run, job)) == "done":
                return job  # its figures are in the run's log: queued again, it would wait to find nothing to do
        return None

    def _follow(self, job: Job) -> str:
        """Pass on what the run logs until the job ends; returns its state, `gone` where the batch system lost it."""
        ending, asked_at = False, time.monotonic()
        while True:
            state = job_state(job_file(self._run, job))
            for event in self._news():
                if event["event"] == "failed":
                    self._failure = str(event.get("text"))
                self._observe(event)
            if state not in ("submitted", "running"):
                return state
            if self._stopped.is_set() and not ending:
                ending, asked_at = True, 0.0
                end_job(job)
            if time.monotonic() - asked_at >= (1.0 if ending else QUEUE_SECONDS):
                asked_at = time.monotonic()
                if job not in active_jobs(self._run) and job_state(job_file(self._run, job)) == state:
                    return "gone"
            time.sleep(LOOK_SECONDS)

    def _news(self) -> Iterator[Event]:
        """Events that the log has since the last look."""
        for event, self._read in read_log(self._run.events_file, self._read):  # noqa: B020
            yield event


def _said(job: Job) -> str | None:
    """Why a job failed, by its log."""
    with contextlib.suppress(OSError):
        lines = Path(job["log"]).with_suffix(".err").read_text(errors="replace").splitlines()
        return next((line.removeprefix(NAME) for line in reversed(lines) if line.startswith(NAME)), None)
    return None


def _train(directory: str, *depth: str) -> None:
    """A job's part: train the trial in a directory, or a stage of it; what another trial holds is waited for."""
    run = RunDirectory(Path(directory))
    while True:
        try:
            Runner(run.config(), run, lambda event: None, waits=True).run(*map(int, depth))
            return
        except BusyError:
            time.sleep(BUSY_SECONDS)


if __name__ == "__main__":
    try:
        _train(*sys.argv[1:])
    except StackWiseError as error:
        print(f"{NAME}{printable(error.message)}", file=sys.stderr)
        sys.exit(error.exit_code)
