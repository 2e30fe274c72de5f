"""A search's record, `DIR/study.json`: what it searches, and every trial with its settings and what came of it.

It is written whenever a trial begins or ends. The trials' directories follow from their numbers, so no path is read
from it. And what a search makes small: figures of a finished run, or a function of one's own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from stackwise import durable
from stackwise.config.tune import Measure
from stackwise.errors import StackWiseError, UsageError, line_of
from stackwise.files import read_json
from stackwise.pipeline.events import Event
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.search.space import Settings
from stackwise.shapes import (
    anything,
    array,
    array_of,
    check_shape,
    count,
    finite,
    mapping,
    number,
    one_of,
    optional,
    record,
    text,
)
from stackwise.store import ActivationStore
from stackwise.text import printable

FORMAT = 1
BROKEN = "remove it: the search begins anew, and finds every stage in the store"
STATES = ("running", "done", "pruned", "failed")


@dataclass
class Trial:
    """A trial as the record has it.

    Args:
        state: `running` from its beginning to its end, also where the search was interrupted meanwhile.
        trained, reused: Its stages that it trained itself, and those that it found in the store.
        failure: Why it failed.
        steps: Held-out losses within its stages, in nats, each with the steps taken by then in all of them.
        scores: In population-based training: held-out loss at the end of each stage; None: it failed.
        origins: And the trial whose stages it went on from, after each.
    """

    number: int
    settings: Settings
    state: str = "running"
    values: list[float] | None = None
    trained: int = 0
    reused: int = 0
    failure: str | None = None
    steps: list[tuple[int, float]] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its directory's name."""
        return f"{self.number:04d}"


_TRIAL = record(
    {"number": count, "settings": mapping(anything), "state": one_of(*STATES), "values": optional(array_of(number))},
    {"trained": count, "reused": count, "failure": optional(text)}
    | {"steps": array_of(array(count, number))}
    | {"scores": array_of(optional(number)), "origins": array_of(count)},
)
_RECORD = record({"format": count, "search": mapping(anything), "trials": array_of(_TRIAL)})


class StudyRecord:
    """The record of the search in a directory.

    Args:
        search: What is searched and how: with another of these it is another search.
    """

    def __init__(self, directory: Path, search: dict[str, Any]) -> None:
        self.path, self.search = directory / "study.json", json.loads(json.dumps(search))
        self.trials: list[Trial] = []
        known = read_record(directory)
        if known is None:
            return
        compared = [key for key in self.search if key != "library"]  # a newer one goes on with the search
        if different := [key for key in compared if known["search"].get(key) != self.search[key]]:
            raise UsageError(
                f"{directory} holds another search, of another {' and '.join(different)}",
                hint="name another directory with --run, or give what it was begun with",
            )
        self.trials = [Trial(**entry) for entry in known["trials"]]

    def save(self) -> None:
        """Publish it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        trials = [finite(asdict(trial)) for trial in self.trials]
        durable.write_json(self.path, {"format": FORMAT, "search": self.search, "trials": trials})


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of a directory; None: there is none.

    Raises:
        UsageError: It is broken, or of a newer format.
    """
    path, hint = directory / "study.json", BROKEN
    try:
        value = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UsageError(f"{path} is broken: {error}", hint=hint) from None
    check_shape(value, _RECORD, path, hint)
    if value["format"] > FORMAT:
        raise UsageError(f"{path} is of a newer format ({value['format']})")
    if [entry["number"] for entry in value["trials"]] != list(range(len(value["trials"]))):
        raise UsageError(f"{path} is broken: its trials are not numbered from 0", hint=hint)
    record: dict[str, Any] = value
    return record


class Watched:
    """What a trial's events come to, taken from its log or as they are emitted: the same either way.

    Attributes:
        steps: Held-out losses within its stages in nats, by the steps that the trial had taken in all of them; of
            stages that it found in the store as well.
        trained: Recipes of the stages that it trained itself.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self._before: list[int] = []
        self._at: dict[Any, str] = {}
        self.steps: dict[int, float] = {}
        self.trained: set[str] = set()

    def observe(self, event: Event) -> bool:
        """Take up an event; returns whether it is a new held-out loss of a stage in training."""
        kind, place = event["event"], event.get("stage")
        if kind == "plan":
            steps = [int(stage["steps"]) for stage in event["stages"]]
            self._before = [sum(steps[:number]) for number in range(len(steps))]
        elif kind in ("training", "committed"):
            self._at[place] = event["recipe"]
        elif kind == "reused":
            self._reused(place, event["recipe"])
        if kind in ("step", "committed") and place in self._at:
            self.trained.add(self._at[place])
        if kind != "held_out" or not isinstance(place, int) or place >= len(self._before):
            return False
        self.steps[self._before[place] + event["step"]] = event["nats"]
        return True

    def _reused(self, place: Any, recipe: str) -> None:
        if not isinstance(place, int) or place >= len(self._before) or not (self._store / "format.json").exists():
            return
        with ActivationStore(self._store, create=False) as store, contextlib.suppress(StackWiseError):
            stage = store.stage(recipe, check=False)
            for step, nats in (stage.record.get("held_out") or []) if stage is not None else []:
                self.steps[self._before[place] + step] = nats


Measured = Callable[[RunDirectory], float]

MEASURES: tuple[Measure, ...] = get_args(Measure)
QUALITY = ("bits_per_byte", "loss")
"""Figures that follow from what the stages commit alone."""


def objective(name: str) -> Measured:
    """The figure of a name; `module:function` is called with the run's directory as a path.

    Raises:
        UsageError: There is no such figure, module or function.
    """
    if name in MEASURES:
        return lambda run: _figure(name, run)
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise UsageError(
            f"--objective {name}: there is no such figure", hint=f"{', '.join(MEASURES)}, or module:function"
        )
    sys.path.insert(0, str(Path.cwd()))  # the user's own file lies where they are
    try:
        call: Any = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        line = line_of(error, "")
        raise UsageError(f"--objective {name} cannot be imported: {type(error).__name__}: {line}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(call):
        raise UsageError(f"--objective {name} is no function")

    def measured(run: RunDirectory) -> float:
        try:
            value = call(run.path)
        except Exception as error:
            line = line_of(error, "")
            raise StackWiseError(f"objective {name}: {type(error).__name__}: {line}") from error
        try:
            number = float(value)
        except Exception:
            number = math.nan
        if not math.isfinite(number):
            shown = printable(f"{value!r:.60}") if isinstance(value, str | int | float | None) else ""
            raise StackWiseError(
                f"objective {name} returned {f'{type(value).__name__} {shown}'.strip()}, which is no finite number",
                hint="let it return a number: the lower, the better",
            )
        return number

    return measured


def measure(name: str, of: Measured, run: RunDirectory) -> float:
    """An objective's value of a finished run.

    Raises:
        StackWiseError: It has none, or it is no finite number.
    """
    value = of(run)
    if not math.isfinite(value):
        raise StackWiseError(f"objective {name} is {value}, no finite number")
    return value


def _figure(name: str, run: RunDirectory) -> float:
    manifest = run.manifest()
    if name == "memory":
        return float(max(stage["peak_memory_bytes"] or 0 for stage in manifest["stages"]))
    if name == "seconds":  # as committed: what another trial trained took as long for this one
        with ActivationStore(run.store_path(run.config()), create=False) as store:
            known = [store.stage(stage["recipe"], check=False) for stage in manifest["stages"]]
        return float(sum(stage.record.get("seconds", 0.0) for stage in known if stage is not None))
    result = (manifest.get("evaluation") or {}).get("result") or {}
    losses = [loss for loss in (result.get("loss") or {}).values() if loss is not None]
    value = result.get("bits_per_byte") if name == "bits_per_byte" else statistics.fmean(losses) if losses else None
    if value is None:
        raise StackWiseError(f"the run has no held-out {name}", hint="judge by another figure with --objective")
    return float(value)
