"""A sweep: every combination of some settings' values, a run each, over one store, so that nothing is trained twice.

DIR/store/            the store of all of them, unless `store.path` says otherwise
DIR/COMBINATION/      a run's directory each, named by what is its own

In windows, a run removes a stage's weights once those of a later window have taken their place. A run of the same sweep
that has this stage in common, and another one above it, still needs them. So the sweep refers to them in its own name
until the last such run has taken them, and what it refers to is not pruned.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.yaml_files import dump
from stackwise.data import PreparedData, prepare
from stackwise.errors import BusyError, DamageError, InterruptedRun, NoSpaceError, StackWiseError, UsageError
from stackwise.identity import content_id
from stackwise.pipeline.batch.grid import Combination
from stackwise.pipeline.costs import boundaries_bytes, settle_windows
from stackwise.pipeline.decisions import Decision, preview
from stackwise.pipeline.estimate import RECORD_BYTES
from stackwise.pipeline.events import Event, Observer
from stackwise.pipeline.initial import initial_sources, settle_mask, tokenizer_limit
from stackwise.pipeline.job import start
from stackwise.pipeline.plan import Plan
from stackwise.pipeline.run import RunDirectory, status, with_absolute_paths
from stackwise.pipeline.runner.auto import may_compile
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.runner.workers import Worker
from stackwise.pipeline.schedule import Stage
from stackwise.pipeline.stopping import stop_signals
from stackwise.pipeline.tracking.trackers import check_installed
from stackwise.store import ActivationStore
from stackwise.words import size as in_bytes

Watch = Callable[["Combination"], contextlib.AbstractContextManager[Observer]]


@dataclass
class Member:
    """The status of a combination."""

    combination: Combination
    decisions: list[Decision] = field(default_factory=list)
    failure: str | None = None
    boundaries: int = 0  # bytes that its boundaries take at most, where it trains in windows

    @property
    def keys(self) -> list[str]:
        """Its stages' ids."""
        return [decision.id for decision in self.decisions]


STORE = "store"
TRAIN = "train"
AGAIN = "again"


def sources(members: Sequence[Member], *, kept: bool = True) -> dict[str, list[str]]:
    """Where each stage of each run comes from, by the run's name: `store`, `train`, or the run that trains it.

    `again`: weights of it that the run needs are gone, for a later window's took their place: it is trained once more.
    """
    names: dict[str, str] = {}

    def source(name: str, stage: Decision) -> str:
        if stage.committed is not None and not stage.again:
            return STORE
        first = names.setdefault(stage.id, name) == name
        if first or (stage.again and not kept):
            return AGAIN if stage.again else TRAIN
        return names[stage.id]

    return {m.combination.name: [source(m.combination.name, stage) for stage in m.decisions] for m in members}


def shared(members: Sequence[Member]) -> dict[str, Decision]:
    """The stages with a window to come that several runs have in common, by key."""
    seen: set[str] = set()
    common: dict[str, Decision] = {}
    for member in members:
        for decision in member.decisions:
            if decision.stage.states_out and decision.id in seen:
                common[decision.id] = decision
            seen.add(decision.id)
    return common


def no_room(members: Sequence[Member]) -> str | None:
    """Why `store.max_bytes` does not let the runs keep weights for each other; None where it does.

    It counts, at most: the last window's stages of every run, each once; one more in training; what is kept; and the
    boundaries of a window.
    """
    kept = shared(members)
    limits = [m.combination.config.store.max_bytes for m in members if m.combination.config.windows > 1]
    limit = min((most for most in limits if most is not None), default=None)
    if not kept or limit is None:
        return None
    stages = {decision.id: decision for member in members for decision in member.decisions}
    takes = sum(d.bytes for d in stages.values() if not d.stage.states_out or d.id in kept)
    takes += max(d.bytes for d in stages.values())
    takes += RECORD_BYTES * len(stages) + max(member.boundaries for member in members)
    if takes <= limit:
        return None
    return (
        f"store.max_bytes {in_bytes(limit)} has no room for weights that a later window's replace and other runs of "
        f"the sweep need (with them, up to {in_bytes(takes)}): such stages are trained again"
    )


@dataclass
class Keeping:
    """Refers, in a sweep's name, to what its later runs still need."""

    name: str
    members: list[Member]
    origins: dict[str, list[str]]
    kept: bool
    _recipes: dict[str, str] = field(init=False, default_factory=dict)
    _registered: dict[Path, tuple[list[str], dict[str, list[str]]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for member in self.members:
            self._recipes |= {d.id: d.id for d in member.decisions if d.committed is not None}

    def begin(self, member: Member | None, stores: Sequence[Path]) -> None:
        """A run begins (None: none does any more): what only it and those before it needed is let go of."""
        at = len(self.members) if member is None else self.members.index(member) + 1
        for store in dict.fromkeys(stores):
            self._register(store, self.members[at:])

    def observe(self, event: Event, member: Member, store: Path) -> None:
        """A stage of the run has a recipe now: where a later run needs what it comes to, that is kept."""
        if event["event"] not in ("training", "reused") or event["stage"] >= len(member.decisions):
            return
        self._recipes[member.decisions[event["stage"]].id] = event["recipe"]
        self._register(store, self.members[self.members.index(member) + 1 :])

    def _register(self, store: Path, later: Sequence[Member]) -> None:
        """Let a store know, where it is anything new."""
        needed = self._needed(later) if self.kept else {}
        idle = {recipe: list(stage.states_out) for recipe, (stage, takes_up) in needed.items() if not takes_up}
        refers = (sorted(needed), idle)
        if self._registered.get(store) == refers or not (store / "format.json").exists():
            return
        with ActivationStore(store, create=False) as opened:
            if needed:
                opened.register_run(self.name, recipes=refers[0], boundaries=[], idle=idle)
            else:
                opened.forget_run(self.name)
        self._registered[store] = refers

    def _needed(self, later: Sequence[Member]) -> dict[str, tuple[Stage, bool]]:
        """By recipe the stages whose weights later runs need, and whether one of them takes up its states too."""
        needed: dict[str, tuple[Stage, bool]] = {}
        for member in later:
            origins = self.origins[member.combination.name]
            for decision, origin in zip(member.decisions, origins, strict=True):
                stage, recipe = decision.stage, self._recipes.get(decision.id)
                if not stage.states_out or recipe is None or origin in (TRAIN, AGAIN):
                    continue
                following = _takes_up(stage, member.decisions)  # its next window, or what a rack grows into
                takes_up = origins[following.place] in (TRAIN, AGAIN) or needed.get(recipe, (stage, False))[1]
                needed[recipe] = (stage, takes_up)
        return needed


def _takes_up(stage: Stage, decisions: Sequence[Decision]) -> Stage:
    """The stage that goes on with the optimizer states that this one commits."""
    after = (decision.stage for decision in decisions[stage.place + 1 :])
    return next(later for later in after if {start(later, name) for name in later.states_in} & {*stage.states_out})


class Sweep:
    """The runs of a sweep in one directory."""

    def __init__(self, combinations: Sequence[Combination], directory: Path, resume_command: str) -> None:
        self.directory, self._resume_command = directory, resume_command
        self.members = [
            Member(replace(combination, config=placed(combination.config, directory))) for combination in combinations
        ]
        self.no_room: str | None = None
        """Why runs in windows cannot keep weights for each other, where they cannot; known after `preview`."""

    def run_directory(self, member: Member) -> RunDirectory:
        """Where a combination's run is."""
        return RunDirectory(self.directory / member.combination.name)

    def preview(self, progress: Callable[[str, int, int | None], None] | None = None) -> list[Member]:
        """What each run reuses and trains, in the order of running: runs with the same stages beside each other.

        Nothing is trained, and nothing is written but prepared data in the cache.

        Raises:
            UsageError: No combination can run; what the first one lacks.
        """
        for member in self.members:
            check_installed(member.combination.config)
        machines: dict[str, Event] = {}  # by the device
        prepared: dict[str, PreparedData] = {}
        data: dict[str, PreparedData] = {}  # by the run's name
        first: UsageError | DamageError | None = None
        for member in self.members:
            config = member.combination.config
            try:
                if config.device not in machines and (config.precision == "auto" or config.training.compile is None):
                    machines[config.device] = machine_of(config.device)
                if config.precision == "auto":
                    config.precision = machines[config.device]["precision"]
                if config.training.compile is None:
                    config.training.compile = may_compile(config, machines[config.device])
                columns, vocabulary = config.objective.inputs, config.model.vocab_size
                key = content_id("data", [config.data.model_dump(), vocabulary, list(columns)])
                if key not in prepared:
                    report = progress or (lambda phase, done, total: None)
                    prepared[key], _ = prepare(
                        config.data, model_vocab=tokenizer_limit(config), progress=report, columns=columns
                    )
                settle_mask(config, prepared[key].tokenizer)
                data[member.combination.name] = prepared[key]
                with planned(config, prepared[key], self.run_directory(member).store_path(config)) as plan:
                    member.decisions = preview(plan).decisions
                    member.boundaries = boundaries_bytes(plan) if config.windows > 1 else 0
            except (UsageError, DamageError) as error:
                member.failure, first = error.message, first or error
        if first is not None and all(member.failure is not None for member in self.members):
            raise first
        order = self._ordered()
        self.no_room = no_room(order)
        earlier: set[str] = set()
        for member in order if self.no_room else ():
            config, name = member.combination.config, member.combination.name
            if member.decisions:
                with planned(config, data[name], self.run_directory(member).store_path(config)) as plan:
                    member.decisions = preview(plan, replaced=earlier).decisions
                earlier |= {*member.keys}
        return order

    def sources(self, order: Sequence[Member]) -> dict[str, list[str]]:
        """Where each stage of each run comes from; see `sources`."""
        return sources(order, kept=self.no_room is None)

    def run(self, watch: Watch, emit: Callable[[Event], None], max_time: float | None = None) -> list[Member]:
        """Every combination, one after another; one that fails leaves the others to go on.

        Args:
            max_time: Seconds after which the sweep has to be over; None: no limit.

        Returns:
            The members, each with its failure where it has one.

        Raises:
            InterruptedRun: Told to stop; what was done is saved.
            NoSpaceError: The disk is full.
            BusyError: Another process works on one of the runs.
        """
        begun = time.monotonic()
        order = self.preview(lambda phase, done, total: emit(_event("preparing", phase=phase, done=done, total=total)))
        if self.no_room:
            emit(_event("note", text=self.no_room))
        with stop_signals(self._stop):
            finished = {member.combination.name: self._finished(member) for member in order if member.failure is None}
            todo = [member for member in order if not finished.get(member.combination.name, True)]
            key = str(self.directory.resolve())
            keeping = Keeping(key, todo, self.sources(order), self.no_room is None)
            stores = [self.run_directory(member).store_path(member.combination.config) for member in order]
            for number, member in enumerate(order, 1):
                name = member.combination.name
                reused = finished.get(name, False)
                emit(_event("combination", name=name, number=number, of=len(order), reused=reused))
                if member.failure is None and not reused:
                    left = None if max_time is None else max(0.0, max_time - (time.monotonic() - begun))
                    keeping.begin(member, stores)
                    self._run_one(member, keeping, watch, left)
                emit(_event("combination_ended", name=name, failure=member.failure))
            keeping.begin(None, stores)
        return self.members

    def _stop(self, came: int) -> None:
        """Between two runs, Ctrl-C and SIGTERM end the sweep as they end a run."""
        raise InterruptedRun("stopped between two runs", hint=f"go on with: {self._resume_command}")

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
            and all(decision.committed is not None for decision in member.decisions)
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


def placed(config: StackWiseConfig, directory: Path) -> StackWiseConfig:
    """A copy for one of several runs of a directory: over the directory's store, unless `store.path` names another."""
    config = with_absolute_paths(config)
    if config.store.path is None:
        config.store.path = str((directory / "store").absolute())
    if config.tracking.group is None and any(tracker.named for tracker in config.tracking.trackers):
        config.tracking.group = directory.name
    return config


def _event(kind: str, **values: Any) -> Event:
    return {"event": kind, **values}


def machine_of(device: str) -> Event:
    """What a worker says of a device: the precision that `auto` means on it, whether blocks compile there.

    Raises:
        StackWiseError: The device is not there.
    """
    with tempfile.NamedTemporaryFile(prefix="stackwise-", suffix=".log") as log:
        worker = Worker(device, Path(log.name))
        try:
            return worker.ready()
        finally:
            worker.close()


@contextlib.contextmanager
def planned(config: StackWiseConfig, data: PreparedData, store: Path) -> Iterator[Plan]:
    """A plan over a store, or over an empty one where there is none yet.

    Args:
        config: With `precision` and batches settled; windows are settled in it.

    Raises:
        UsageError: The configuration does not fit the data.
    """
    with contextlib.ExitStack() as stack:
        if (store / "format.json").exists():
            opened = stack.enter_context(ActivationStore(store, create=False))
        else:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="stackwise-plan-"))
            opened = stack.enter_context(ActivationStore(Path(directory) / "store"))
        settle_windows(config, data, {})
        yield Plan(config, data, opened, device="cpu", sources=initial_sources(config))
