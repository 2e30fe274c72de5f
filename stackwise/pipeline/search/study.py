"""A search: trials over one store, each an ordinary run with settings of its own, one after another or several at once.

DIR/study.json     the record: every trial, its settings and what came of it
DIR/trials/0007/   a run's directory each
DIR/store/         the store of all of them, unless `store.path` says otherwise

The record alone says what is tried next, so a search that was killed goes on with the same trials. Trial n is chosen
by the results of those up to n - jobs, whatever came in since, so that several at once are the same trials each time.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.tune import TuneConfig
from stackwise.durable import FileLock
from stackwise.errors import BusyError, ConfigError, InterruptedRun, NoSpaceError, StackWiseError
from stackwise.pipeline.batch.sweep import placed
from stackwise.pipeline.events import Event, Observer, read_log
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.search.jobs import BUSY_SECONDS, Engine, JobRunner
from stackwise.pipeline.search.record import Measured, StudyRecord, Trial, Watched, measure
from stackwise.pipeline.search.samplers import Past, Sampling
from stackwise.pipeline.search.space import Make, Settings
from stackwise.pipeline.stopping import STOPPING, stop_signals
from stackwise.store import ActivationStore

TrialObserver = Callable[[Trial, Event], None]
Work = tuple[Trial, Callable[[], None]]


@dataclass(frozen=True)
class Search:
    """What is searched, and how.

    Args:
        make: The configuration that some settings come to.
        plan: The settings of every trial, where they are known beforehand; else `sampling` chooses them.
        objectives: By name, what is made small.
        trials: How many.
        jobs: How many at once.
        shared: The lowest stage that is not the same in all trials.
        engine: Where trials train: here, or as jobs of a batch system.
        evolve: What is done with the trials before each is carried out whole; None: nothing.
    """

    make: Make
    sampling: Sampling
    objectives: Mapping[str, Measured]
    trials: int
    jobs: int = 1
    plan: Sequence[Settings] | None = None
    description: Mapping[str, Any] = field(default_factory=dict)
    shared: int = 0
    engine: Engine = "here"
    evolve: Callable[[Study, TrialObserver], None] | None = None


class Pruned(Exception):
    """A trial is behind."""


class Common:
    """Refers, in the search's own name, to what its trials have in common, as they make it.

    A run drops the boundaries that `store.keep` does not keep, and the weights of windows that are over, once nothing
    of its own needs them. The stages below the lowest one that is searched, and the boundary that enters that one, are
    those of every trial to come.

    Args:
        name: The search, as the store knows it.
        shared: The lowest stage that is not the same in all trials.
    """

    def __init__(self, name: str, shared: int) -> None:
        self._name, self._shared = name, shared
        self._recipes: set[str] = set()
        self._boundaries: set[str] = set()
        self._depths: list[int] = []  # of the stages, by their places in the schedule

    def observe(self, event: Event, store: Path) -> None:
        """A stage is committed, or a boundary written: where it is common it is kept."""
        kind, place, before = event["event"], event.get("stage"), (len(self._recipes), len(self._boundaries))
        if kind == "plan":
            self._depths = [stage["depth"] for stage in event["stages"]]
        elif kind in ("committed", "reused") and isinstance(place, int) and place < len(self._depths):
            if self._depths[place] < self._shared:
                self._recipes.add(event["recipe"])
        elif kind == "written" and event["depth"] == self._shared:
            self._boundaries.add(event["boundary"])
        if before == (len(self._recipes), len(self._boundaries)) or not (store / "format.json").exists():
            return
        with ActivationStore(store, create=False) as opened:
            known = opened.runs().get(self._name, {"recipes": [], "boundaries": []})  # of sittings before
            self._recipes |= set(known["recipes"])
            self._boundaries |= set(known["boundaries"])
            opened.register_run(self._name, recipes=sorted(self._recipes), boundaries=sorted(self._boundaries))


class Study:
    """The search in a directory.

    Args:
        resume_command: What is typed to go on.
    """

    def __init__(self, search: Search, directory: Path, resume_command: str) -> None:
        self.search, self.directory, self._resume_command = search, directory, resume_command
        self.record = StudyRecord(directory, dict(search.description))
        self._lock = threading.RLock()  # of the record, and of what is observed
        self._runners: dict[int, Runner | JobRunner] = {}
        self._common = Common(str(directory.resolve()), search.shared)
        self._stopping = 0
        self._ends: float | None = None

    @property
    def trials(self) -> list[Trial]:
        """Every trial so far, by number."""
        return self.record.trials

    def run_directory(self, trial: Trial) -> RunDirectory:
        """Where a trial's run is."""
        return RunDirectory(self.directory / "trials" / trial.name)

    def config(self, trial: Trial) -> StackWiseConfig:
        """The configuration of a trial, over the search's store."""
        config = placed(self.search.make(trial.settings), self.directory)
        config.tune = TuneConfig()  # a trial is a run like any other
        return config

    @property
    def best(self) -> Trial | None:
        """The trial whose first objective is lowest; of equal ones the first."""
        done = [trial for trial in self.trials if trial.values is not None]
        return min(done, key=lambda trial: trial.values or [], default=None)

    @property
    def front(self) -> list[Trial]:
        """Trials that no other is better than in one objective, and as good in all: the Pareto front."""
        done = [(trial, trial.values) for trial in self.trials if trial.values is not None]

        def beaten(mine: Sequence[float]) -> bool:
            return any(theirs != mine and all(a <= b for a, b in zip(theirs, mine, strict=True)) for _, theirs in done)

        return [trial for trial, values in done if not beaten(values)]

    def importance(self) -> dict[str, float]:
        """See `Sampling.importance`."""
        past = [Past(trial.settings, trial.state, trial.values) for trial in self.trials]
        return self.search.sampling.importance(past)

    def run(self, observe: TrialObserver, max_time: float | None = None) -> None:
        """Carry the search out, from where it stands.

        Args:
            observe: Gets the events of all trials, one at a time, and `trial_begun` and `trial_ended` of each.
            max_time: Seconds after which it has to be over; None: no limit.

        Raises:
            InterruptedRun: Told to stop; what was done is saved.
            BusyError: Another process works on this search.
            NoSpaceError: The disk is full.
        """
        self._ends = None if max_time is None else time.monotonic() + max_time
        (self.directory / "trials").mkdir(parents=True, exist_ok=True)
        with FileLock(self.directory / "study.lock", f"the search in {self.directory}"), stop_signals(self._signalled):
            self.record.save()
            if self.search.evolve is not None:
                self.search.evolve(self, observe)
            todo = [trial for trial in self.trials if trial.state == "running"]

            def following(working: Collection[int]) -> Work | None:
                trial = todo.pop(0) if todo else self._next(working)
                return None if trial is None else (trial, partial(self._carry_out, trial, observe))

            self.together(following)

    def together(self, following: Callable[[Collection[int]], Work | None]) -> None:
        """Work on trials, as many at once as the search has jobs.

        Args:
            following: The next trial and its work, beside the trials of these numbers; None: none now.

        Raises:
            InterruptedRun: Told to stop; what was done is saved.
        """
        ended: queue.SimpleQueue[tuple[Trial, BaseException | None]] = queue.SimpleQueue()
        working: dict[int, threading.Thread] = {}
        failure: BaseException | None = None
        while True:
            while failure is None and not self._stopping and len(working) < self.search.jobs:
                work = following(working)
                if work is None:
                    break
                trial = work[0]
                working[trial.number] = threading.Thread(target=_apart, args=(*work, ended), name=trial.name)
                working[trial.number].start()
            if not working:
                break
            trial, error = _take(ended)
            working.pop(trial.number).join()
            if error is not None and failure is None:
                failure = error
                self._stop("another trial was stopped")
        if failure is not None:
            raise failure
        if self._stopping:
            raise InterruptedRun("stopped between two trials", hint=f"go on with: {self._resume_command}")

    def note(self, trial: Trial, **values: Any) -> None:
        """Change what the record has of a trial, and publish it; a trial that is new to it is added."""
        with self._lock:
            for name, value in values.items():
                setattr(trial, name, value)
            if trial.number == len(self.trials):
                self.trials.append(trial)
            self.record.save()

    def _next(self, working: Collection[int]) -> Trial | None:
        """The next trial, noted in the record; None: there is none, or it needs the result of one that goes on."""
        number = len(self.trials)
        if number >= self.search.trials:
            return None
        if self.search.plan is not None:
            settings = self.search.plan[number]
        elif any(other <= number - self.search.jobs for other in working):
            return None
        else:
            settings = self.search.sampling.suggest(self._past(number))
        trial = Trial(number, settings)
        self.note(trial)
        return trial

    def _past(self, number: int) -> list[Past]:
        """The trials before one as it knows them: the last ones, which may go on beside it, without results."""
        known = number - self.search.jobs
        return [
            Past(trial.settings, trial.state, trial.values, dict(trial.steps))
            if trial.number <= known
            else Past(trial.settings, "running")
            for trial in self.trials[:number]
        ]

    def _carry_out(self, trial: Trial, observe: TrialObserver) -> None:
        run = self.run_directory(trial)

        emit = self.emitting(trial, observe)
        emit({"event": "trial_begun"})
        state, failure, values, watched = "done", None, None, Watched(self.directory / "store")
        try:
            watched = Watched(run.store_path(self.config(trial)))
            self._resume(trial, run, watched)
            self.train(trial, run, self._watching(trial, watched, emit))
            values = [measure(name, of, run) for name, of in self.search.objectives.items()]
        except Pruned:
            state = "pruned"
        except (InterruptedRun, NoSpaceError, BusyError):
            raise
        except StackWiseError as error:
            state, failure = "failed", error.faults[0] if isinstance(error, ConfigError) else error.message
        stages = status(run)["stages"] if run.manifest_file.exists() else []
        done = [stage["recipe"] for stage in stages if stage["state"] == "done"]
        trained = sum(recipe in watched.trained for recipe in done)
        came = {"state": state, "failure": failure, "values": values, "steps": sorted(watched.steps.items())}
        self.note(trial, **came, trained=trained, reused=len(done) - trained)
        emit({"event": "trial_ended"})

    def emitting(self, trial: Trial, observe: TrialObserver) -> Observer:
        """What passes a trial's events on, one at a time."""

        def emit(event: Event) -> None:
            with self._lock:
                observe(trial, event)

        return emit

    def train(self, trial: Trial, run: RunDirectory, observe: Observer, only: int | None = None) -> None:
        """Run a trial, all of it or one stage; what another one holds is waited for.

        Raises:
            Pruned: It was ended early.
            InterruptedRun: The search was told to stop.
        """
        pruned, store = threading.Event(), run.store_path(self.config(trial))

        def seen(event: Event) -> None:
            with self._lock:
                self._common.observe(event, store)
            try:
                observe(event)
            except Pruned:
                pruned.set()
                runner.stop("behind the other trials: saving and ending")

        while True:
            left = None if self._ends is None else max(0.0, self._ends - time.monotonic())
            runner = self._runner(trial, run, seen, left)
            with self._lock:
                self._runners[trial.number] = runner
                if self._stopping:
                    raise InterruptedRun("stopped before the trial began", hint=f"go on with: {self._resume_command}")
            try:
                runner.run(only)
            except InterruptedRun:
                if pruned.is_set() and not self._stopping:
                    raise Pruned from None
                raise
            except BusyError:  # a boundary, say, that another trial writes
                if len(self._runners) == 1:
                    raise
                time.sleep(BUSY_SECONDS)
                continue
            finally:
                with self._lock:
                    self._runners.pop(trial.number, None)
            if pruned.is_set():  # it was about to end by itself
                raise Pruned
            return

    def _runner(self, trial: Trial, run: RunDirectory, observe: Observer, left: float | None) -> Runner | JobRunner:
        config, again = self.config(trial), self._resume_command
        if self.search.engine == "here":
            return Runner(config, run, observe, resume_command=again, max_time=left, waits=True)
        return JobRunner(config, run, observe, self.search.engine, again)

    def _resume(self, trial: Trial, run: RunDirectory, watched: Watched) -> None:
        """Take up what a trial's log has of sittings before; what was decided in them is decided again."""
        for event, _ in read_log(run.events_file):
            if watched.observe(event):
                self._judge(trial, watched)

    def _watching(self, trial: Trial, watched: Watched, emit: Observer) -> Observer:
        def observe(event: Event) -> None:
            emit(event)
            if watched.observe(event):
                self._judge(trial, watched)

        return observe

    def _judge(self, trial: Trial, watched: Watched) -> None:
        with self._lock:
            past = self._past(trial.number)
            if self.search.sampling.prunes(past, Past(trial.settings, "running", None, dict(watched.steps))):
                raise Pruned

    def _signalled(self, came: int) -> None:
        """Ctrl-C and SIGTERM end the trials as they end a run: each saves. A second signal stops at once."""
        self._stopping = came
        self._stop(STOPPING, at_once=came > 1)

    def _stop(self, text: str, *, at_once: bool = False) -> None:
        for runner in list(self._runners.values()):
            runner.stop(text, at_once=at_once)


def _apart(trial: Trial, work: Callable[[], None], ended: queue.SimpleQueue[Any]) -> None:
    """Work, in a thread of its own."""
    error: BaseException | None = None
    try:
        work()
    except BaseException as raised:
        error = raised
    ended.put((trial, error))


def _take(ended: queue.SimpleQueue[Any]) -> Any:
    """What comes next; a wait without an end would keep signals from being heard."""
    while True:
        with contextlib.suppress(queue.Empty):
            return ended.get(timeout=0.2)
