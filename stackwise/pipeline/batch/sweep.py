"""A sweep: every combination of some settings' values, a run each, over one store, so that nothing is trained twice.

DIR/store/            the store of all of them, unless `store.path` says otherwise
DIR/COMBINATION/      a run's directory each, named by what is its own
"""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.loading import dump, parse_yaml
from stackwise.data import PreparedData, prepare
from stackwise.errors import BusyError, ConfigError, InterruptedRun, NoSpaceError, StackWiseError, UsageError
from stackwise.identity import content_id
from stackwise.pipeline.batch.forecast import Outlook, forecast, planned, resolved
from stackwise.pipeline.run import RunDirectory, status, with_absolute_paths
from stackwise.pipeline.runner.events import Event, Observer
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.tracking.trackers import check_installed

NAME_LENGTH = 100
"""Longest name of a combination's directory."""
EXAMPLE = "for example -o training.learning_rate=1e-3,3e-3"
Watch = Callable[["Combination"], contextlib.AbstractContextManager[Observer]]


@dataclass(frozen=True)
class Combination:
    """One run of a sweep.

    Args:
        name: Its directory's name.
        values: What is its own, by dotted key.
        config: The whole configuration.
    """

    name: str
    values: dict[str, Any]
    config: StackWiseConfig


@dataclass
class Member:
    """How a combination stands.

    Args:
        combination: Which it is.
        outlook: Its stages, as foreseen before anything was trained.
        failure: Why it cannot run, or what ended it.
    """

    combination: Combination
    outlook: list[Outlook] = field(default_factory=list)
    failure: str | None = None

    @property
    def keys(self) -> list[str]:
        """Its stages' ids."""
        return [stage.key for stage in self.outlook]


def parse_axes(items: Sequence[str]) -> dict[str, list[Any]]:
    """`KEY=V1,V2,…` strings as dotted keys with the values to try; a list as one value stands in brackets.

    Raises:
        UsageError: An item has no `=`, or its values are not YAML.
    """
    axes: dict[str, list[Any]] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"-o {item}: needs KEY=VALUE,VALUE,…", hint=EXAMPLE)
        try:
            values = parse_yaml(f"[{text}]", f"-o {item}")
        except ConfigError:  # text that is no list inside brackets may be a value on its own
            values = [parse_yaml(text, f"-o {item}")]
        axes[key.strip()] = values or [parse_yaml(text, f"-o {item}")]
    return axes


def combinations(axes: dict[str, list[Any]], make: Callable[[dict[str, Any]], StackWiseConfig]) -> list[Combination]:
    """The product of the axes, in their order, each once.

    Args:
        axes: Values by dotted key; a key with one value is the same for all.
        make: A configuration from overrides.

    Raises:
        UsageError: No key has several values.
        ConfigError: A combination is no valid configuration; every fault of the first such is named.
    """
    varied = [key for key, values in axes.items() if len(values) > 1]
    if not varied:
        raise UsageError("a sweep needs a key with several values", hint=EXAMPLE)
    found: dict[str, Combination] = {}
    for values in itertools.product(*axes.values()):
        overrides = dict(zip(axes, values, strict=True))
        own = {key: overrides[key] for key in varied}
        name = _name(own)
        if name not in found:
            found[name] = Combination(name, own, make(overrides))
    return list(found.values())


def label(key: str) -> str:
    """A key, short: `learning_rate`, `stage3.weight_decay`, `model.d_model`."""
    if staged := re.fullmatch(r"stages\.(\d+)\.training\.(.+)", key):
        return f"stage{staged.group(1)}.{staged.group(2)}"
    return key.removeprefix("training.")


def shown(value: Any) -> str:
    """A value, short."""
    if isinstance(value, float):
        return f"{value:g}"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if _plain(value) else str(value)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _name(values: dict[str, Any]) -> str:
    text = "_".join(f"{label(key)}-{shown(value)}" for key, value in values.items())
    clean = re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-")
    if clean != text or len(clean) > NAME_LENGTH:
        clean = f"{clean[: NAME_LENGTH - 9]}-{content_id('combination', text)[:8]}"
    return clean


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
                store = self.run_directory(member).store_path(config)
                with planned(config, prepared[key], store) as plan:
                    member.outlook = forecast(plan)
            except UsageError as error:
                member.failure, first = error.message, first or error
        if first is not None and all(member.failure is not None for member in self.members):
            raise first
        return self._ordered()

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
        with self._signals():
            for number, member in enumerate(order, 1):
                name = member.combination.name
                reused = member.failure is None and self._finished(member)
                tell(_event("combination", name=name, number=number, of=len(order), reused=reused))
                if member.failure is None and not reused:
                    left = None if max_time is None else max(0.0, max_time - (time.monotonic() - begun))
                    self._run_one(member, watch, left)
                tell(_event("combination_ended", name=name, failure=member.failure))
        return self.members

    def _run_one(self, member: Member, watch: Watch, left: float | None) -> None:
        run, config = self.run_directory(member), member.combination.config
        with watch(member.combination) as observe:
            try:
                Runner(config, run, observe, resume_command=self._resume_command, max_time=left).run()
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


def sources(members: Sequence[Member]) -> dict[str, list[str]]:
    """Where each stage of each run comes from, by the run's name: `store`, `train`, or the run that trains it.

    Args:
        members: In the order of running.
    """
    made: dict[str, str] = {}
    found = {}
    for member in members:
        name = member.combination.name
        found[name] = [
            "store" if stage.committed else "train" if made.setdefault(stage.key, name) == name else made[stage.key]
            for stage in member.outlook
        ]
    return found


def _event(kind: str, **values: Any) -> Event:
    return {"event": kind, **values}
