"""The workers of a run: processes, each with one job; how they are started early, listened to, and told to stop."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stackwise.config import StackWiseConfig
from stackwise.durable import is_locked
from stackwise.errors import InterruptedRun, NoSpaceError, StackWiseError
from stackwise.files import open_regular, user_cache
from stackwise.host import killed_for_memory
from stackwise.pipeline.costs import oom_advice
from stackwise.pipeline.device import describe, python_command
from stackwise.pipeline.estimate import Estimate, kind_of
from stackwise.pipeline.events import Event, Observer
from stackwise.pipeline.job import FinishJob, StageJob
from stackwise.pipeline.stopping import STOPPING, stop_signals
from stackwise.pipeline.worker import forking

if TYPE_CHECKING:
    from stackwise.pipeline.runner.group import Group
    from stackwise.pipeline.runner.hosts import Host, Hosts, RemoteWorker
    from stackwise.pipeline.trial import TrialJob

ENVIRONMENT = {"GOMP_SPINCOUNT": "1000", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""What a worker's environment says where the user's does not. Threads wait for each other by a short spin, then asleep:
with the long spin of libgomp itself one keeps the core that another needs as soon as anything else runs on the machine
(docs/log.md). A GPU's memory comes in segments that grow, so that stages of odd sizes leave no holes in it."""
CLOSE_SECONDS = 120.0  # how long a worker that was told to stop may take for the step in hand and its checkpoint
LOCK_PATIENCE = 20.0  # seconds to wait for the worker of a runner that was killed: it saves and leaves by itself
PROGRESS = ("step", "passes", "boundary", "evaluating")  # events that only say how far a job is


class WorkerFailed(StackWiseError):
    """A worker ended without finishing its job."""


class OutOfMemory(WorkerFailed):
    """A worker ran out of memory, or was killed as the system kills for want of it.

    Attributes:
        measured: `limit`, `base`, `peak` in bytes and `what` they are of, as the worker saw them; None: it was killed.
    """

    measured: dict[str, Any] | None = None


_ERRORS = {kind.exit_code: kind for kind in (InterruptedRun, NoSpaceError)}


class Mailbox(Protocol):
    """Where a worker's events go; the last is None."""

    def put(self, event: Event | None) -> None:
        """Called by the worker's listener, and by signal handlers."""

    def get(self) -> Event | None:
        """The next one; waits for it."""


class Worker:
    """One worker process: started early, given one job.

    Args:
        device: As in the configuration.
        log: Where its standard error goes.
        host: The process of the launcher that starts it; None: this one.
    """

    def __init__(self, device: str, log: Path, host: Host | None = None) -> None:
        self.log, self._device, self._host = log, device, host
        # Its `put` may be called by a signal handler that interrupts its `get`.
        self._events: Mailbox = queue.SimpleQueue()
        self._ready: Event | None = None
        self._job: dict[str, Any] | None = None
        self._stopped = False
        self._killed_before = killed_for_memory()
        self._start(fork=True)

    def _start(self, *, fork: bool) -> None:
        self._process: forking.ForkedWorker | RemoteWorker | subprocess.Popen[str]
        if self._host is not None:
            self._process = self._host.start(self._device, self.log)
        else:
            self._process = self._started_here(fork=fork)
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        self._listener = threading.Thread(target=self._listen, name="worker-events", daemon=True)
        self._listener.start()

    def _started_here(self, *, fork: bool) -> forking.ForkedWorker | subprocess.Popen[str]:
        errors = open_regular(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        # What a worker compiles is found by those after it, of other runs too: the compiler writes beside and renames.
        environment = {**ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": str(user_cache() / "inductor"), **os.environ}
        if "PYTORCH_CUDA_ALLOC_CONF" in os.environ and "PYTORCH_ALLOC_CONF" not in os.environ:
            del environment["PYTORCH_ALLOC_CONF"]  # its older name: what the user says there counts
        try:
            forked = forking.fork(self._device, environment, errors) if fork else None
            return forked or subprocess.Popen(
                python_command("stackwise.pipeline.worker", self._device),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env=environment,
                start_new_session=True,  # a terminal's Ctrl-C is for the runner to pass on
            )
        finally:
            os.close(errors)

    @property
    def pid(self) -> int:
        """Its process id; 0: it has not begun yet."""
        self._process.poll()
        return self._process.pid

    def ready(self, *, itself: bool = False) -> Event:
        """The device, its name, memory and default precision; waits where only the worker can tell.

        Args:
            itself: Wait for what it says itself, which also has `numerics`: what shapes its numbers.

        Raises:
            StackWiseError: It could not start, or the device is not there.
        """
        if self._ready is None and isinstance(self._process, forking.ForkedWorker) and not itself:
            self._ready = describe(None)  # it is forked where there is the CPU alone
        if self._ready is None or (itself and "numerics" not in self._ready):
            event = next(self.events(), None)
            if event is None or event["event"] != "ready":
                raise self.failure(event)
            self._ready = event
        return self._ready

    @property
    def has_job(self) -> bool:
        """Whether it was given one."""
        return self._job is not None

    def report_to(self, mailbox: Mailbox) -> None:
        """Let its events go elsewhere from now on; called when it is ready and has no job yet."""
        before, self._events = self._events, mailbox
        if not self._listener.is_alive():
            mailbox.put(before.get())  # it ended meanwhile

    def run(self, job: dict[str, Any]) -> Iterator[Event]:
        """Give it its job and yield its events until it ends.

        Raises:
            InterruptedRun: It was told to stop, and saved its state.
        """
        self.ready()
        self.give(job)
        for event in self.events():
            if event["event"] in ("error", "interrupted"):
                self._process.wait()
                raise self.failure(event)
            if event["event"] != "ready":
                yield event
        if self.exit_code() != 0:
            raise self.failure(None)

    def events(self) -> Iterator[Event]:
        """What it says, until it ends."""
        while True:
            event = self._events.get()
            if event is not None:
                yield event
            elif not self.start_again():
                return

    def start_again(self) -> bool:
        """Where there never was a process, as a template did not serve: start one by itself, with the same job."""
        if not (isinstance(self._process, forking.ForkedWorker) and self._process.refused):
            return False
        self._let_go()
        self._start(fork=False)
        if self._job is not None:
            self.give(self._job)
        return True

    def exit_code(self) -> int:
        """Of its process, once it has ended; waits for that."""
        return self._process.wait()

    def give(self, job: dict[str, Any]) -> None:
        """Give it its job."""
        self._job = job
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(json.dumps(job) + "\n")
            self._stdin.flush()

    def stop(self, event: Event | None) -> None:
        """Ask it to save and end; one without a job has nothing to save. May be called by a signal handler.

        Args:
            event: Says so among its events; None: something else does.
        """
        self._stopped = True
        if event is not None:
            self._events.put(event)
        self.end()

    def kill(self) -> None:
        """End it at once."""
        self._process.send_signal(signal.SIGKILL)

    def end(self) -> None:
        """Let it end: at once without a job; one with a job saves first."""
        self._process.send_signal(signal.SIGTERM if self.has_job else signal.SIGKILL)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Let go of it, once it has ended; it may take so many seconds."""
        self.end()
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        self._let_go()

    def _let_go(self) -> None:
        with contextlib.suppress(OSError):
            self._stdin.close()
        if isinstance(self._process, forking.ForkedWorker):
            self._process.close()
            if not self._process.pid:
                return  # a template that is about to fork it holds its output open: nobody waits for that
        self._listener.join()

    def _listen(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        with contextlib.suppress(ValueError, OSError), stdout:
            for line in stdout:
                with contextlib.suppress(json.JSONDecodeError):
                    self._events.put(json.loads(line))
        self._events.put(None)

    def failure(self, event: Event | None) -> StackWiseError:
        """What went wrong, by what it said last; None: it said nothing."""
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
        if not self.has_job:
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
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "".join(f"\n    {line}" for line in lines[-5:])


class TimeLimit:
    """The end of a run's time, and how much of it the way to a saved state takes, as measured.

    That is the longest wait between two events of the worker at work (a step, a chunk, a batch; what it is at now
    takes at least as long again as it has taken), and a save: the slowest rate in bytes a second so far, applied to
    the state of the stage at work.
    """

    MARGIN = 2.0  # seconds for what comes after the save: the worker's end, the manifest, the report
    SAVE_RATE = 200e6  # bytes a second that a checkpoint is thought to be written at, until one is measured
    HEADROOM = 1.5  # how much longer a save may take than the slowest before it

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._rate: float | None = None
        self._bytes, self._unit = 0, 0.0
        self._heard, self._measures = time.monotonic(), False

    def begin(self, saves: int) -> None:
        """A job begins, whose checkpoints have so many bytes; 0: it saves as it goes."""
        self._bytes, self._unit = saves, 0.0
        self._heard, self._measures = time.monotonic(), False

    def observe(self, event: Event) -> None:
        """Learn from an event of the worker how long a step and a save take."""
        now = time.monotonic()
        match event["event"]:
            case "step" | "boundary" | "evaluating":
                if self._measures:
                    self._unit = max(self._unit, now - self._heard)
                self._heard, self._measures = now, True
                return
            case "checkpoint" if self._bytes:
                seconds = max(value for key, value in event.items() if key.endswith("seconds"))
                rate = self._bytes / max(seconds, 1e-3)
                self._rate = rate if self._rate is None else min(rate, self._rate)
            case "passes":
                return  # of a step that has not ended
            case "committed":
                self._bytes = 0  # what follows is the boundary, chunk by chunk
        self._heard, self._measures = now, False  # what lies between was no step

    @property
    def save_seconds(self) -> float:
        """How long a save may take."""
        return self.HEADROOM * self._bytes / (self._rate or self.SAVE_RATE)

    @property
    def seconds(self) -> float:
        """Seconds until the run has to be over."""
        return max(0.0, self._end - time.monotonic())

    @property
    def left(self) -> float:
        """Seconds until it is time to stop."""
        now = time.monotonic()
        return self._end - now - self.MARGIN - max(self._unit, now - self._heard) - self.save_seconds


class WorkerPool:
    """Gives jobs to workers, one after the other, and passes on their events."""

    def __init__(
        self,
        config: StackWiseConfig,
        observe: Observer,
        resume_command: str,
        limit: TimeLimit | None = None,
        hosts: Hosts | None = None,
    ) -> None:
        self._hosts = hosts
        self._config, self._observe, self._resume_command, self.limit = config, observe, resume_command, limit
        self._log = Path()
        self._busy: Worker | Group | None = None
        self._spare: Worker | Group | None = None
        self._stopping = False

    def start(self, log: Path) -> Event:
        """Start the first worker, its standard error to `log`; returns what `Worker.ready` does.

        Raises:
            StackWiseError: A worker cannot start here.
        """
        self._log = log
        self._spare = self._hired()
        return self._spare.ready()

    def _hired(self) -> Worker | Group:
        """A worker; of several ranks as many."""
        from stackwise.pipeline.runner.group import Group

        parallel, device = self._config.parallel, self._config.device
        return Worker(device, self._log) if parallel.ranks == 1 else Group(device, self._log, parallel, self._hosts)

    def work(self, job: StageJob | FinishJob | TrialJob) -> list[Event]:
        """Have a job done; returns its events, progress aside. Raises InterruptedRun: it was stopped after saving."""
        stage = job if isinstance(job, StageJob) else None
        if stage is not None:
            self._wait_for_orphan(Path(stage.store) / "locks" / f"work-{stage.recipe_id}.lock")
        self.check()
        worker = self._busy = self._spare or self._hired()
        self._spare = None
        if self.limit is not None:
            estimate = Estimate(self._config, stage.vocab_size, stage.stage) if stage and stage.train else None
            self.limit.begin(estimate.state_bytes(gradients=False) if estimate else 0)
        events = []
        try:
            for event in worker.run(asdict(job)):
                if event["event"] in ("step", "boundary", "resumed") and self._spare is None and not self._stopping:
                    self._spare = self._hired()  # its imports are done while this one works
                if self.limit is not None:
                    self.limit.observe(event)
                self._observe(event)
                if event["event"] not in PROGRESS:
                    events.append(event)
        except InterruptedRun as error:
            raise self._interrupted(error.message) from None
        except StackWiseError as error:
            place = stage.stage.place if stage is not None else None
            with contextlib.suppress(OSError):  # the log cannot be written: what ended the job is what is to be said
                self._observe({"event": "failed", "stage": place, "text": error.message})
            if isinstance(error, OutOfMemory) and stage is not None:
                advice = oom_advice(
                    Estimate(self._config, stage.vocab_size, stage.stage, kind_of(stage.device)), error.measured
                )
                error.hint = f"{advice}\n  {error.hint}"
            error.hint = f"{error.hint}; {self._go_on}" if error.hint else self._go_on
            raise
        finally:
            worker.close()
            self._busy = None
        return events

    def check(self) -> None:
        """Whatever takes long outside of workers asks this as it goes.

        Raises:
            InterruptedRun: The run was told to stop.
        """
        if self._stopping:
            raise self._interrupted("stopped before the next step began")

    def kill(self) -> None:
        """End every worker at once; what was saved stays."""
        for worker in (self._busy, self._spare):
            if worker is not None:
                worker.kill()

    def close(self) -> None:
        """Let go of every worker; one that is at work saves first."""
        for worker in (self._busy, self._spare):
            if worker is not None:
                worker.close()
        self._busy = self._spare = None

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and the end of the time: the worker saves and ends. A second signal stops at once."""

        def stop(came: int) -> None:
            if came > 1:
                self.kill()
                raise InterruptedRun("stopped at once, at the last checkpoint", hint=self._go_on)
            if not self.stop(STOPPING):
                raise InterruptedRun("stopped", hint=self._go_on)

        over = threading.Event()
        watcher = threading.Thread(target=self._watch_the_time, args=(over,), name="time-limit", daemon=True)
        watcher.start()
        try:
            with stop_signals(stop):
                yield
        finally:
            over.set()
            watcher.join()

    @property
    def _go_on(self) -> str:
        return f"go on with: {self._resume_command}"

    def _watch_the_time(self, over: threading.Event) -> None:
        limit = self.limit
        while limit is not None and not over.wait(min(1.0, max(0.02, limit.left))):
            if limit.left <= 0 and not self._stopping:
                left = f"{limit.seconds:.0f} s before it"
                self.stop(f"the time limit is near: finishing the step in hand and saving, {left}")

    def stop(self, text: str) -> bool:
        """Have the worker save and end; returns whether there is one. Called by signals and from another thread."""
        self._stopping, busy = True, self._busy
        if busy is not None:
            busy.stop({"event": "stopping", "text": text})
        return busy is not None

    def _wait_for_orphan(self, lock: Path) -> None:
        """A runner that was killed leaves a worker that saves and ends; give it the time."""
        deadline = time.monotonic() + LOCK_PATIENCE
        while is_locked(lock) and time.monotonic() < deadline and not self._stopping:
            time.sleep(0.05)

    def _interrupted(self, message: str) -> InterruptedRun:
        self._observe({"event": "interrupted", "text": message})
        return InterruptedRun(message, hint=self._go_on)
