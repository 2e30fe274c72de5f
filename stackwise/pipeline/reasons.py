"""Why a stage trains, in the words of the configuration: which key decided, from what to what.

A recipe names its settings by the keys of the configuration, so what differs between two of them is a key. Where an
entry follows from several settings (the rows, the blocks that a stage holds), each changed one is tried alone: it is a
cause where it alone changes the entry. So no list says which setting shapes what.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise.config import StackWiseConfig
from stackwise.config.fields import Section
from stackwise.config.kinds import Kind
from stackwise.errors import DamageError, StackWiseError
from stackwise.pipeline.recipe import Recipe, recipe_id, stage_settings
from stackwise.pipeline.rows import row_settings
from stackwise.pipeline.schedule import Stage, schedule

if TYPE_CHECKING:
    from stackwise.pipeline.plan import Plan

NEW, BEGUN = "not trained yet", "not finished yet"
FIRST = (NEW, BEGUN)  # reasons of stages that this run had never committed
SHOWN = 3  # changes named in a reason; of more, how many more there are
OTHER = {"forward.numerics": "the version of the arithmetic", "held_out": "the held-out rows"}
"""Entries of a recipe that no setting stands for, in words."""

UNFIT = (StackWiseError, ValueError, ArithmeticError, LookupError, TypeError, StopIteration)
"""What settings raise of which one alone was changed, so that they need not go together."""

Look = Callable[[StackWiseConfig, Stage], Any]


@dataclass(frozen=True)
class Change:
    """A setting, or something in words, that is another than before."""

    key: str
    before: Any = field(default=None, compare=False)
    now: Any = field(default=None, compare=False)
    path: tuple[str, ...] = ()


class History:
    """What a run's directory says of its stages from before.

    Args:
        config: The configuration that they were trained by; None: it is not known.
        store: Where the store was; None: it is not known. Whether it still is there is looked at once, now: the run
            may make a new one in its place.
    """

    def __init__(
        self, stages: Sequence[Mapping[str, Any]] = (), config: StackWiseConfig | None = None, store: str | None = None
    ) -> None:
        self.config, self.store = config, store
        self._store_there = store is None or (Path(store) / "format.json").exists()
        self._alone: dict[Change, tuple[StackWiseConfig, list[Stage]]] = {}
        self._stages = {(stage["depth"], stage["window"]): stage for stage in stages}
        self.damaged: set[str] = set()  # recipes that were dropped, for their files were damaged

    def last_recipe(self, stage: Stage) -> str | None:
        """The recipe that a stage was last trained by."""
        before = self._stages.get((stage.depth, stage.window), {})
        return before.get("recipe") or before.get("last")

    def was_committed(self, stage: Stage) -> bool:
        """Whether the run had committed a stage."""
        return self._stages.get((stage.depth, stage.window), {}).get("state") == "done"

    def reason_above(self, plan: Plan, stage: Stage, below: int) -> str:
        """Why a stage trains whose trunk will be another: `below` is the lowest stage that is trained."""
        if self.last_recipe(stage) is None:
            return NEW
        staged = [c for c in changed_settings(self.config, plan.config, stage.depth) if c.key.startswith("stages.")]
        return f"stage {below} below it is trained" + (f"; {words(staged)}" if staged else "")

    def reason(self, plan: Plan, stage: Stage, recipe: Recipe) -> str:
        """Why a stage trains: what changed since it was last trained here, or that it never was."""
        last, key = self.last_recipe(stage), recipe_id(recipe)
        if last is None:
            return NEW
        before = self._stages[stage.depth, stage.window]
        if key in self.damaged:
            return "its committed files were damaged"
        if last == key:
            if not self.was_committed(stage):
                return BEGUN if before.get("step") else NEW
            return self.moved(plan.store.path) or "it was committed, and its files are gone from the store"
        old = None
        with contextlib.suppress(DamageError):
            old = plan.store.stage(last, check=False)
        if old is None or not isinstance(old.record.get("recipe"), dict):
            causes = self._causes(plan.config, stage, _shape)
            return f"changed: {words(causes)}" if causes else "the configuration changed since it began"
        decided = self._changes(old.record["recipe"], recipe, plan, stage)
        return f"changed: {words(decided)}"

    def _changes(self, old: Recipe, new: Recipe, plan: Plan, stage: Stage) -> list[Change]:
        """What decided that a recipe is another than before: keys of the configuration where one is the cause."""
        if old.get("version") != new["version"]:
            return [Change("the form of recipes (by an earlier version of StackWise)")]
        config = plan.config
        decided, followed = list[Change](), list[Change]()  # what follows is named where nothing else changed
        for path, before, now in _differences(old, new):
            top, _, rest = path.partition(".")
            if top in ("forward", "settings") and _is_setting(config, rest, stage):
                decided.append(Change(_own_key(rest, config, self.config, stage), before, now))
            elif rest == "training.steps":  # by tokens, epochs, or a part of another stage's
                causes = self._causes(config, stage, lambda c, s: [_budget(c, s), row_settings(c, s.rowset)])
                decided += causes or [Change("its steps", before, now)]
            elif top == "stage":
                decided += self._causes(config, stage, lambda c, s: s) or [Change(f"its {rest}", before, now)]
            elif top == "rowset":
                causes = self._causes(config, stage, lambda c, s: [row_settings(c, s.rowset), _data(c)])
                decided += causes
                followed += [] if causes else [Change("the text or its masks are others")]
            elif top in ("reads", "initial"):
                followed.append(self._below(plan, stage, path, before, now))
            elif top in ("order", "span", "window"):
                followed.append(Change("its rows are others"))
            else:
                name = f"the {path.removeprefix('forward.')}".replace(".", " of ")
                decided.append(Change(OTHER.get(path, name), before, now))
        return list(dict.fromkeys(decided or followed or [Change("the recipe")]))

    def _below(self, plan: Plan, stage: Stage, path: str, before: Any, now: Any) -> Change:
        part = path.partition(".")[2]
        if part in plan.sources and path.startswith("initial") and plan.sources[part].digest == now:
            return Change(f"the weights that {part} starts from", before, now)
        if not stage.depth:
            return Change("what it starts from is another")
        return Change(f"stage {stage.depth - 1} below it is another")

    def _causes(self, config: StackWiseConfig, stage: Stage, look: Look) -> list[Change]:
        """The changed settings each of which alone changes what `look` sees of a stage."""
        if self.config is None:
            return []
        before = _looked(look, self.config, _schedule(self.config), stage)
        causes = []
        for change in changed_settings(self.config, config, stage.depth):
            if change not in self._alone:
                value = config.stages if change.path == ("stages",) else change.now
                alone = _with(self.config, change.path, value)
                self._alone[change] = alone, _schedule(alone)
            if _looked(look, *self._alone[change], stage) != before:
                causes.append(change)
        return causes

    def moved(self, store: Path) -> str | None:
        """That the store which stages were committed to is not the one in use; None: it is."""
        if self.store is None:
            return None
        if not self._store_there:
            return f"store.path: the store {self.store} is not where it was"
        if Path(self.store).resolve() != store.resolve():
            return f"store.path: it was committed to another store, {self.store}"
        return None


def changed_settings(earlier: StackWiseConfig | None, config: StackWiseConfig, depth: int) -> list[Change]:
    """The settings that differ between two configurations, of single stages those of stage `depth` alone."""
    if earlier is None:
        return []
    changes = _section_changes(earlier, config, ())
    for name in sorted(_own_settings(earlier, depth) | _own_settings(config, depth)):
        before, now = (getattr(c.stage_training(depth), name) for c in (earlier, config))
        if before != now:
            changes.append(Change(f"stages.{depth}.training.{name}", before, now, ("stages",)))
    if (before := _own_precision(earlier, depth)) != (now := _own_precision(config, depth)):
        changes.append(Change(f"stages.{depth}.precision", before, now, ("stages",)))
    return changes


def words(changed: Sequence[Change]) -> str:
    """Changes in a line: `key: old → new`, those beyond a few counted."""
    lines = [
        change.key
        if change.before is None and change.now is None
        else f"{change.key}: {_short(change.before)} → {_short(change.now)}"
        for change in changed
    ]
    more = [f"{len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "; ".join([*lines[:SHOWN], *more])


def _section_changes(old: Section, new: Section, path: tuple[str, ...]) -> list[Change]:
    changes: list[Change] = []
    for name in type(new).model_fields:
        if not path and name in ("stages", "name"):
            continue
        before, now, here = getattr(old, name), getattr(new, name), (*path, name)
        if isinstance(before, Section) and type(before) is type(now):
            changes += _section_changes(before, now, here)
        elif before != now:
            changes.append(Change(".".join(here), before, now, here))
    return changes


def _own_settings(config: StackWiseConfig, depth: int) -> set[str]:
    """The settings of training that a stage has of its own."""
    return set(config.stages[depth].training.model_fields_set) if depth in config.stages else set()


def _own_precision(config: StackWiseConfig, depth: int) -> Any:
    return config.stages[depth].precision if depth in config.stages else None


def _with(config: Section, path: tuple[str, ...], value: Any) -> Any:
    """A copy with one setting another, unchecked."""
    name, *rest = path
    inner = _with(getattr(config, name), tuple(rest), value) if rest else value
    return config.model_copy(update={name: inner})


def _schedule(config: StackWiseConfig) -> list[Stage]:
    """The stages; none where the settings do not go together."""
    try:
        return schedule(config)
    except UNFIT:
        return []


def _looked(look: Look, config: StackWiseConfig, stages: Sequence[Stage], stage: Stage) -> Any:
    """What `look` sees of a stage of a configuration; None where there is none, or settings do not fit together."""
    same = next((s for s in stages if (s.depth, s.window) == (stage.depth, stage.window)), None)
    try:
        return None if same is None else look(config, same)
    except UNFIT:
        return None


def _shape(config: StackWiseConfig, stage: Stage) -> Any:
    """All that settings say of a stage's result."""
    forward = [config.model.specification(), config.precision, config.objective.plain(), config.data.within_documents]
    rows = [row_settings(config, stage.rowset), _data(config), _budget(config, stage)]
    return [stage, stage_settings(config, stage), forward, rows, config.store.codec, config.model.init_std]


def _data(config: StackWiseConfig) -> Any:
    return config.data.model_dump(exclude={"cache_dir", "within_documents"})


def _budget(config: StackWiseConfig, stage: Stage) -> Any:
    return config.stage_training(stage.depth).model_dump(include={"steps", "tokens", "epochs_per_layer"})


def _is_setting(config: StackWiseConfig, path: str, stage: Stage) -> bool:
    """Whether a path is that of a setting which says the entry itself."""
    if path == "training.steps":
        return config.stage_training(stage.depth).steps is not None and config.training.steps is not None
    at: Any = config
    for name in path.split("."):
        if isinstance(at, Kind) and name == at.tag:
            return True
        if not isinstance(at, Section) or name not in type(at).model_fields:
            return isinstance(at, (dict, Kind))
        at = getattr(at, name)
    return True


def _own_key(path: str, config: StackWiseConfig, earlier: StackWiseConfig | None, stage: Stage) -> str:
    """The key of a setting: that of the single stage where this is where it was set."""
    top, _, rest = path.partition(".")
    keys = _own_settings(config, stage.depth) | (_own_settings(earlier, stage.depth) if earlier is not None else set())
    return f"stages.{stage.depth}.{path}" if top == "training" and rest.partition(".")[0] in keys else path


def _differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """What differs between two trees of plain data, leaf by leaf."""
    different: list[tuple[str, Any, Any]] = []
    for key in dict.fromkeys([*old, *new]):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            different += _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            different.append((f"{prefix}{key}", before, now))
    return different


def _short(value: Any) -> str:
    text = "unset" if value is None else value.name if isinstance(value, Kind) else str(value)
    return f"{text[:21]}…" if len(text) > 24 else text
