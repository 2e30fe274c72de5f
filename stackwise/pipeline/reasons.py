"""Why a stage trains, in the words of the configuration: which key decided, from what to what."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise.config import StackWiseConfig
from stackwise.errors import DamageError
from stackwise.pipeline.recipe import Recipe, recipe_id
from stackwise.pipeline.schedule import Stage

if TYPE_CHECKING:
    from stackwise.pipeline.plan import Plan

Change = tuple[str, Any, Any]
"""A dotted key, its value before, its value now; None where there was or is none."""

NEW = "not trained yet"

SHOWN = 3
"""Changes named in a reason; of more, how many more there are."""

KEYS = {
    "forward.vocab_size": "model.vocab_size",
    "forward.mask_token": "training.mask_token_id",
    "forward.precision": "precision",
    "forward.within_documents": "data.within_documents",
    "objective.name": "training.objective",
    "training.dropout": "model.dropout",
    "head.tied": "model.tie_embeddings",
    "head.above": "training.tied_head",
    "fresh.init_std": "model.init_std",
    "reads.codec": "store.codec",
}
"""Where an entry of a recipe stands in the configuration, beside those that are called alike in both."""

FOLLOWS = ("initial", "reads.trunk", "order", "fresh.seed", "forward.causal", "reads", "span", "window")
"""Entries that follow from others, or from the stages below: named where nothing else changed."""

SHAPELESS = (
    *("name", "device", "tracking", "evaluation", "store", "data.cache_dir", "training.cache_dir"),
    *("training.checkpoint", "training.log_every", "training.cache_mode", "training.fusion_evaluation"),
    *("training.save_fused_checkpoints", "training.compile", "training.trial_steps"),
)
"""Settings that shape no result."""

ROWS = (
    *("data.", "seed", "training.seq_len", "training.rows", "training.steps", "training.tokens", "training.mask"),
    *("training.min_mask", "training.max_mask", "training.batch_size", "training.accumulation"),
    *("training.objective", "training.progressive.", "training.epochs", "training.fresh_masks", "training.windows"),
)
"""Settings that a rowset follows from."""

PARTS = (
    *("training.mode", "training.block_size", "training.n_stages", "training.fusion_mode"),
    *("training.lookahead", "training.fusion.", "training.adaptation", "training.progressive.", "model.architecture."),
)
"""Settings that say which blocks a stage holds, and what of it trains."""


class History:
    """What a run's directory says of its stages from before.

    Args:
        stages: As the manifest has them.
        config: The configuration that they were trained by; None: it is not known.
        store: Where the store was; None: it is not known. Whether it still is there is looked at once, now: the run
            may make a new one in its place.
    """

    def __init__(
        self,
        stages: Sequence[Mapping[str, Any]] = (),
        config: StackWiseConfig | None = None,
        store: str | None = None,
    ) -> None:
        self.config, self.store = config, store
        self._store_there = store is None or (Path(store) / "format.json").exists()
        self._stages = {(stage["depth"], stage["window"]): stage for stage in stages}
        self.damaged: set[str] = set()
        """Recipes that were dropped, for their files were damaged."""

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
        own = words(own_changes(self.config, plan.config, stage.depth))
        return f"stage {below} below it is trained" + (f"; {own}" if own else "")

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
                return "not finished yet" if before.get("step") else NEW
            return self.moved(plan.store.path) or "it was committed, and its files are gone from the store"
        old = None
        with contextlib.suppress(DamageError):
            old = plan.store.stage(last, check=False)
        if old is None:
            text = words(changed_settings(self.config, plan.config, stage.depth))
            return f"changed: {text}" if text else "the configuration changed since it began"
        decided = changes(old.record["recipe"], recipe, depth=stage.depth, config=plan.config, earlier=self.config)
        return f"changed: {words(decided)}"

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
    """The settings that differ between two configurations and can shape a stage's result, by their own keys.

    Args:
        earlier: The configuration before; None where it is not known.
        config: The configuration now.
        depth: The stage.
    """
    if earlier is None:
        return []
    old, new = _flat(earlier, depth), _flat(config, depth)
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    return [(key, old.get(key), new.get(key)) for key in keys if not key.startswith(SHAPELESS)]


def own_changes(earlier: StackWiseConfig | None, config: StackWiseConfig, depth: int) -> list[Change]:
    """Those among `changed_settings` that are of this stage alone."""
    return [change for change in changed_settings(earlier, config, depth) if change[0].startswith("stages.")]


def changes(
    old: Recipe, new: Recipe, *, depth: int, config: StackWiseConfig, earlier: StackWiseConfig | None
) -> list[Change]:
    """What decided that a recipe is another than the one before, as keys of the configuration where one is the cause.

    Args:
        old: The recipe that the stage had.
        new: The one that it has now.
        depth: The stage.
        config: The configuration now.
        earlier: The one before, where it is known: it alone tells what changed a stage's rows or its blocks.
    """
    settings = changed_settings(earlier, config, depth)
    decided: dict[str, Change] = {}
    followed: dict[str, Change] = {}
    for path, before, now in _differences(old, new):
        if path.startswith(FOLLOWS):
            if path == "reads" or path.startswith(("initial", "reads.trunk")):
                followed["below"] = (f"stage {depth - 1} below it is another", None, None)
        elif path == "rowset":
            named = [change for change in settings if change[0].startswith(ROWS)]
            for change in named or [("the text or its masks are others", None, None)]:
                (decided if named else followed)[change[0]] = change
        elif path.startswith("stage."):
            named = [change for change in settings if change[0].startswith(PARTS)]
            for change in named or [(f"the stage's {path.removeprefix('stage.')}", before, now)]:
                decided[change[0]] = change
        else:
            key, before, now = _key(path, before, now, depth, config, earlier)
            decided[key] = (key, before, now)
    return list((decided or followed).values())


def words(changed: list[Change]) -> str:
    """Changes in a line: `key: old → new`, those beyond a few counted."""
    said = [
        key if old is None and new is None else f"{key}: {_short(old)} → {_short(new)}" for key, old, new in changed
    ]
    more = [f"{len(said) - SHOWN} more"] if len(said) > SHOWN else []
    return "; ".join([*said[:SHOWN], *more])


def _key(
    path: str, before: Any, now: Any, depth: int, config: StackWiseConfig, earlier: StackWiseConfig | None
) -> Change:
    if path in KEYS:
        key = KEYS[path]
    elif path.startswith("forward.model."):
        key = path.removeprefix("forward.")
    elif path.startswith("forward.corruption"):
        key = "training.mlm_mask, mlm_random"
    elif path == "forward.numerics":
        key = "the version of the arithmetic"
    elif path == "rows":
        key = "training.mask_schedule_over"
        before, now = "depth" if before else "time", "depth" if now else "time"
    elif path == "seed":
        key, before, now = "seed", _first(before), _first(now)
    else:
        key = path
    name = key.removeprefix("training.")
    if key.startswith("training.") and any(
        each is not None and depth in each.stages and name in each.stages[depth].training.model_fields_set
        for each in (config, earlier)
    ):
        key = f"stages.{depth}.{key}"
    return key, before, now


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _differences(old: Any, new: Any, prefix: str = "") -> list[Change]:
    """What differs between two trees of plain data, leaf by leaf."""
    found: list[Change] = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found


def _flat(config: StackWiseConfig, depth: int) -> dict[str, Any]:
    """Every setting by its dotted key; of single stages those of this one."""
    plain = config.model_dump(exclude={"stages"})
    found = _leaves(plain)
    own = config.stages.get(depth)
    for name, value in (own.training.model_dump(exclude_unset=True) if own is not None else {}).items():
        found[f"stages.{depth}.training.{name}"] = value
    return found


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= _leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return f"{text[:21]}…" if len(text) > 24 else text
