"""A sweep: every combination of some settings' values, a run each, over one store, so that nothing is trained twice.

DIR/store/            the store of all of them, unless `store.path` says otherwise
DIR/COMBINATION/      a run's directory each, named by what is its own
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.loading import dump
from stackwise.data import PreparedData, prepare
from stackwise.errors import BusyError, InterruptedRun, NoSpaceError, StackWiseError, UsageError
from stackwise.identity import content_id
from stackwise.pipeline.batch.forecast import Outlook, forecast, planned, resolved
from stackwise.pipeline.batch.grid import Combination
from stackwise.pipeline.batch.keeping import Keeping, no_room, sources
from stackwise.pipeline.planning.windows import boundaries_bytes
from stackwise.pipeline.run import RunDirectory, status, with_absolute_paths
from stackwise.pipeline.runner.events import Event, Observer
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.tracking.trackers import check_installed

Watch = Callable[["Combination"], contextlib.AbstractContextManager[Observer]]


@dataclass
class Member:
    """How a combination stands.

    Args:
        combination: Which it is.
        outlook: Its stages, as foreseen before anything was trained.
        failure: Why it cannot run, or what ended it.
        boundaries: Bytes that its boundaries take at most, where it trains in windows.
    """

    combination: Combination
    outlook: list[Outlook] = field(default_factory=list)
    failure: str | None = None
    boundaries: int = 0

    @property
    def keys(self) -> list[str]:
        """Its stages' ids."""
        return [stage.key for stage in self.outlook]


class Sweep:
    """The runs of a sweep in one directory.

    Args:
        combinations: What to run.
        directory: Where.
        resume_command: What an interruption tells the user to type.
    """

    def __init__(self, combinations: Sequence[Combination], directory: Path, resume_command: str) -> None:
        self.directory, self._resume_command = directory, resume_command
        self.members = [Member(self._placed(combination)) for combination in combinations]
        self.no_room: str | None = None
        """Why runs in windows cannot keep weights for each other, where they cannot: known once foreseen."""

    def run_directory(self, member: Member) -> RunDirectory:
        """Where a combination's run is."""
        return RunDirectory(self.directory / member.combination.name)

    def foresee(self, progress: Callable[[str, int, int | None], None] | None = None) -> list[Member]:
        """What each run reuses and trains, in the order of running: runs with the same stages beside each other.

        Nothing is trained, and nothing is written but prepared data in the cache.

        Raises:
            UsageError: No combination can run; what the first one lacks.
        """
        for member in self.members:
            check_installed(member.combination.config)
        settled: dict[str, StackWiseConfig] = {}
        prepared: dict[str, PreparedData] = {}
        data: dict[str, PreparedData] = {}  # by the run's name
        first: UsageError | None = None
        for member in self.members:
            config = member.combination.config
            try:
                if config.precision == "auto":
                    if config.device not in settled:
                        settled[config.device] = resolved(config)
                    config.precision = settled[config.device].precision
                key = content_id("data", [config.data.model_dump(), config.model.vocab_size])
                if key not in prepared:
                    told = progress or (lambda phase, done, total: None)
                    prepared[key], _ = prepare(config.data, model_vocab=config.model.vocab_size, progress=told)
                data[member.combination.name] = prepared[key]
                with planned(config, prepared[key], self.run_directory(member).store_path(config)) as plan:
                    member.outlook = forecast(plan)
                    member.boundaries = boundaries_bytes(plan) if config.windows > 1 else 0
            except UsageError as error:
                member.failure, first = error.message, first or error
        if first is not None and all(member.failure is not None for member in self.members):
            raise first
        order = self._ordered()
        self.no_room = no_room(order)
        earlier: set[str] = set()
        for member in order if self.no_room else ():
            config, name = member.combination.config, member.combination.name
            if member.outlook:
                with planned(config, data[name], self.run_directory(member).store_path(config)) as plan:
                    member.outlook = forecast(plan, earlier)
                earlier |= {*member.keys}
        return order

    def sources(self, order: Sequence[Member]) -> dict[str, list[str]]:
        """Where each stage of each run comes from; see `keeping.sources`."""
        return sources(order, kept=self.no_room is None)

    def run(self, watch: Watch, tell: Callable[[Event], None], max_time: float | None = None) -> list[Member]:
        """Every combination, one after another; one that fails leaves the others to go on.

        Args:
            watch: Gives the observer of a combination's events.
            tell: Told when a combination begins and ends.
            max_time: Seconds after which the sweep has to be over; None: no limit.

        Returns:
            The members, each with its failure where it has one.

        Raises:
            InterruptedRun: Told to stop; what was done is saved.
            NoSpaceError: The disk is full.
            BusyError: Another process works on one of the runs.
        """
        begun = time.monotonic()
        order = self.foresee(lambda phase, done, total: tell(_event("preparing", phase=phase, done=done, total=total)))
        if self.no_room:
            tell(_event("note", text=self.no_room))
        with self._signals():
            finished = {member.combination.name: self._finished(member) for member in order if member.failure is None}
            todo = [member for member in order if not finished.get(member.combination.name, True)]
            key = str(self.directory.resolve())
            keeping = Keeping(key, todo, self.sources(order), self.no_room is None)
            stores = [self.run_directory(member).store_path(member.combination.config) for member in order]
            for number, member in enumerate(order, 1):
                name = member.combination.name
                reused = finished.get(name, False)
                tell(_event("combination", name=name, number=number, of=len(order), reused=reused))
                if member.failure is None and not reused:
                    left = None if max_time is None else max(0.0, max_time - (time.monotonic() - begun))
                    keeping.begin(member, stores)
                    self._run_one(member, keeping, watch, left)
                tell(_event("combination_ended", name=name, failure=member.failure))
            keeping.begin(None, stores)
        return self.members

    def _run_one(self, member: Member, keeping: Keeping, watch: Watch, left: float | None) -> None:
        run, config = self.run_directory(member), member.combination.config
        with watch(member.combination) as observe:

            def both(event: Event) -> None:
                keeping.observe(event, member, run.store_path(config))
                observe(event)

            try:
                Runner(config, run, both, resume_command=self._resume_command, max_time=left).run()
            except (InterruptedRun, NoSpaceError, BusyError):
                raise
            except StackWiseError as error:
                member.failure = error.message

    def _finished(self, member: Member) -> bool:
        """Whether the run stands complete in the store as it would be made."""
        run, config = self.run_directory(member), member.combination.config
        try:
            same = run.config_file.read_text(encoding="utf-8") == dump(config)
            manifest = run.manifest()
        except (OSError, UsageError):
            return False
        recipes = [stage.get("recipe") for stage in manifest["stages"]]
        return (
            same
            and status(run)["state"] == "done"
            and recipes == member.keys
            and all(stage.committed for stage in member.outlook)
            and manifest.get("evaluation") is not None
        )

    def _ordered(self) -> list[Member]:
        """Depth first: the runs that share the most stages follow each other, so that what one leaves is at hand."""
        ranks: dict[tuple[str, ...], int] = {}

        def rank(member: Member) -> list[int]:
            prefixes = [tuple(member.keys[: depth + 1]) for depth in range(len(member.keys))]
            return [ranks.setdefault(prefix, len(ranks)) for prefix in prefixes]

        ranked = [(rank(member), member) for member in self.members]
        return [member for _, member in sorted(ranked, key=lambda pair: pair[0])]

    def _placed(self, combination: Combination) -> Combination:
        config = with_absolute_paths(combination.config)
        if config.store.path is None:
            config.store.path = str((self.directory / "store").absolute())
        if config.tracking.group is None and (config.tracking.wandb or config.tracking.mlflow):
            config.tracking.group = self.directory.name
        return Combination(combination.name, combination.values, config)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Between two runs, Ctrl-C and SIGTERM end the sweep as they end a run."""

        def handle(number: int, frame: object) -> None:
            raise InterruptedRun("stopped between two runs", hint=f"go on with: {self._resume_command}")

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _event(kind: str, **values: Any) -> Event:
    return {"event": kind, **values}
