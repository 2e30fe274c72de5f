"""Keys as they were written before, and where they stand now: the seeds' documents, flat keys, configurations of
earlier runs, overrides on the command line. Nothing else knows the old keys.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from stackwise.config.fields import Section
from stackwise.config.kinds import Kind
from stackwise.config.model import ModelConfig
from stackwise.config.training import StageTraining

Tree = dict[str, Any]


@dataclass(frozen=True)
class Moved:
    """A key that stands elsewhere now.

    Args:
        old: The dotted key, as it was written.
        new: The dotted key now; None: nothing uses it.
        default: The value that says nothing: what it had where it was left out.
        why: Why nothing uses it.
    """

    old: str
    new: str | None
    default: Any = None
    why: str = ""


TABLE = (
    Moved("model.n_kv_heads", "model.attention.kv_heads"),
    Moved("model.kv_rank", "model.attention.kv_rank"),
    Moved("model.q_rank", "model.attention.q_rank"),
    Moved("model.rope_head_dim", "model.attention.rope_head_dim"),
    Moved("model.feature_map", "model.attention.feature_map", "elu"),
    Moved("model.random_features", "model.attention.random_features"),
    Moved("training.block_size", "training.mode.block_size", 4),
    Moved("training.n_stages", "training.mode.n_stages"),
    Moved("training.block_sizes", "training.mode.block_sizes"),
    Moved("training.trial_steps", "training.mode.trial_steps", 100),
    Moved("training.fusion_mode", "training.mode.fusion_mode", "frozen"),
    Moved("training.beta1", "training.optimizer.beta1", 0.9),
    Moved("training.beta2", "training.optimizer.beta2", 0.95),
    Moved("training.adam_eps", "training.optimizer.eps", 1e-8),
    Moved("training.muon_momentum", "training.optimizer.momentum", 0.95),
    Moved("training.loss_weight", "training.objective.weight", "none"),
    Moved("training.diffusion_block", "training.objective.block"),
    Moved("training.mlm_mask", "training.objective.mask_share", 0.8),
    Moved("training.mlm_random", "training.objective.random_share", 0.1),
    Moved("training.on_divergence", "training.divergence.policy", "stop"),
    Moved("training.divergence_factor", "training.divergence.factor", 3.0),
    Moved("training.divergence_limit", "training.divergence.limit", 5),
    Moved("training.rollback_factor", "training.divergence.rate_factor", 0.5),
    Moved("training.lookahead_blocks", "training.lookahead.blocks", 1),
    Moved("training.adaptation_steps", "training.adaptation.steps"),
    *(Moved(f"training.adaptation{sign}anneal", None, 0, "a rack is made causal at once") for sign in "_."),
    # Earlier runs wrote these out whatever the strategy.
    Moved("training.fusion.steps", "training.fusion.steps"),
    Moved("training.fusion.rounds", "training.fusion.rounds", 1),
    Moved("training.fusion.probe_steps", "training.fusion.probe_steps"),
    Moved("model.time_embedding_dim", "model.time_embedding.width", 256),
    Moved("training.progressive.time_encoding_type", "model.time_embedding.kind", "sinusoidal"),
    Moved("training.progressive.time_embedding_dim", "model.time_embedding.width", 512),
    Moved("training.progressive.time_per_stack", None, 100, "a stack sees masked shares, and no count of time steps"),
    Moved("training.cache_dir", "store.path"),
    Moved("training.cache_mode", None, None, "the mode decides what is stored"),
    Moved("training.fusion_evaluation", None, False, "every run evaluates the fused rack"),
)
"""Every old key. Those of `training` are read in `stages.K.training` too, where the new one is a stage's."""


_OF_A_STAGE = frozenset(StageTraining.model_fields) | {
    row.old.split(".")[1]
    for row in TABLE
    if row.new is not None and row.new.startswith("training.") and row.new.split(".")[1] in StageTraining.model_fields
}
"""Keys of `training` that `stages.K.training` has too."""


_OBJECTIVE, _TIME, _MAPPING = (
    f"training.progressive.{name}" for name in ("training_objective", "time_interpretation", "stack_time_mapping")
)
_PROGRESSIVE = frozenset((_OBJECTIVE, _TIME, _MAPPING))
"""Keys of progressive training that decided what `training` and `model` say now."""


@dataclass
class Reading:
    """A tree of settings in today's form, and what is to be said of the one it was made from.

    Args:
        tree: Nested mappings.
        unused: One line for each setting that nothing uses.
        faults: Keys and what is wrong with them: a setting given in an old and a new form that differ.
    """

    tree: Tree
    unused: list[str]
    faults: list[tuple[str, str]]


def translate(root: type[Section], tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> Reading:
    """Settings in today's form, overrides applied.

    Args:
        root: The class of the whole configuration.
        tree: As YAML gives it; not changed.
        overrides: Dotted keys and values.
    """
    reading = Reading({}, [], [])
    work, copied = _Translation(root, reading), _copied(tree)
    # A file may give settings of several modes flat: the one that is taken in the end says which of them are used.
    if isinstance(overrides.get("training.mode"), str) and not isinstance(_get(tree, "training.mode"), Mapping):
        _set(copied, "training.mode", overrides["training.mode"])
    reading.tree = work.translated(copied, {})
    # Those that choose a kind come first: which settings there are depends on it.
    for written in sorted(overrides, key=work.place):
        work.override(written, overrides[written])
    work.complete()
    return reading


def read_model(tree: Mapping[str, Any]) -> ModelConfig:
    """The model that an export or another saved file describes.

    Raises:
        ValidationError: It describes none.
    """
    reading = translate(_Model, {"model": tree}, {})
    return ModelConfig.model_validate(reading.tree["model"])


class _Model(Section):
    model: ModelConfig


class _Translation:
    """One reading of a tree and its overrides."""

    def __init__(self, root: type[Section], reading: Reading) -> None:
        self.choices = dict(_choices(root, ""))
        self.lists = set(_lists(root, ""))
        self.reading = reading
        self.written: dict[str, tuple[str, Any]] = {}

    def place(self, key: str) -> int:
        """When an override is applied: those that others depend on come first."""
        if key in ("training", "model", "training.progressive", "training.progressive.enabled"):
            return 0
        path = _base(key)
        chosen = [row.new for row in TABLE if row.old == path]
        tags = {f"{choice}.{sort.tag}" for choice, sort in self.choices.items()}
        chooses = path in self.choices or path in tags or any(new in tags for new in chosen)
        return 1 if chooses else 2 if path in _PROGRESSIVE else 3

    def translated(self, tree: Tree, base: Tree) -> Tree:
        """A tree in today's form; `base`: what it will be put upon, which says the kinds that it leaves open."""
        for path in self.choices:
            for key in _spread(path, tree):
                value = _get(tree, key)
                if isinstance(value, str):
                    _set(tree, key, {self.choices[path].tag: value})
                elif value is None and _has(tree, key):
                    _drop(tree, key)
        self._progressive(tree, base)
        self._key_heads(tree, base)
        self._trackers(tree, base)
        for row in TABLE:
            for key in _spread(row.old, tree):
                if _has(tree, key):
                    self._move(tree, base, row, key)
        return tree

    def _move(self, tree: Tree, base: Tree, row: Moved, key: str) -> None:
        value = _drop(tree, key)
        new = None if row.new is None else key.removesuffix(row.old) + row.new
        if new is None:  # nothing reads it any more
            if value != row.default:
                self.reading.unused.append(f"{key} is unused: {row.why}")
            return
        path = row.new.rpartition(".")[0] if row.new else ""
        if (sort := self.choices.get(path)) is not None:
            name = self._kind(sort, new.rpartition(".")[0], tree, base)
            kind = _class(sort, name)
            if kind is None or new.rpartition(".")[2] not in (sort.tag, *kind.model_fields):
                if value != row.default and kind is not None:
                    self.reading.unused.append(f"{key} is unused: {new.rpartition('.')[0]} is {name}")
                return
            if value == row.default and key == row.old and not base and not _has(tree, new):
                return  # an earlier run wrote out what it left at its default
        if _has(tree, new) and _get(tree, new) != value:
            text = f"{value!r}, but {new} says {_get(tree, new)!r}, and both are one setting: leave one of them out"
            self.reading.faults.append((key, text))
            return
        _set(tree, new, value)

    def _kind(self, sort: type[Kind], key: str, tree: Tree, base: Tree) -> str:
        """The name of the kind that a choice has: its own, that of what it will be put upon, the run's, the default."""
        for place in (key, _base(key)):
            for source in (tree, base):
                value = _get(source, place)
                name = value.get(sort.tag) if isinstance(value, dict) else value
                if isinstance(name, str):
                    return name
        return sort.default

    def _progressive(self, tree: Tree, base: Tree) -> None:
        """What progressive training said in words of its own, and what came before what `training` and `model` say."""
        removed = {key: _drop(tree, key) for key in (_OBJECTIVE, _TIME, _MAPPING) if _has(tree, key)}
        enabled = _get(tree, "training.progressive.enabled")
        enabled = _get(base, "training.progressive.enabled") if enabled is None else enabled
        for key in removed.copy():
            if (removed[key] is None or not enabled) and removed.pop(key) is not None:
                self.reading.unused.append(f"{key} is unused: training.progressive.enabled is false")
        objective, interpretation, mapping = (removed.get(key) for key in (_OBJECTIVE, _TIME, _MAPPING))
        if objective is not None:
            name = _tag(_get(tree, "training.objective"), "name")
            if name not in (None, objective):  # of another objective: its settings have no place
                _drop(tree, "training.objective")
            self._wins(tree, "training.objective", objective, None if name == "mask_diffusion" else name, _OBJECTIVE)
        if interpretation == "input":
            embedding = _tag(_get(tree, "model.time_embedding"), "kind") or _tag(
                _get(base, "model.time_embedding"), "kind"
            )
            if embedding in (None, "none"):
                kind = _get(tree, "training.progressive.time_encoding_type") or "sinusoidal"
                width = _get(tree, "training.progressive.time_embedding_dim") or 512
                _set(tree, "model.time_embedding", {"kind": kind, "width": width})
                for name in ("time_encoding_type", "time_embedding_dim"):
                    if _has(tree, f"training.progressive.{name}"):
                        _drop(tree, f"training.progressive.{name}")
        elif interpretation == "depth":
            over = _get(tree, "training.mask_schedule_over")
            self._wins(tree, "training.mask_schedule_over", "depth", over, _TIME)
        elif interpretation is not None:
            self.reading.faults.append((_TIME, f"must be one of input, depth, not {interpretation!r}"))
        if mapping in ("linear", "exponential"):
            shape = _get(tree, "training.mask_schedule_type")
            self._wins(tree, "training.mask_schedule_type", mapping, None if shape == "linear" else shape, _MAPPING)
        elif mapping == "custom":
            windows = _get(tree, "training.mask_windows") or _get(base, "training.mask_windows")
            over = _get(tree, "training.mask_schedule_over") or _get(base, "training.mask_schedule_over")
            if over != "depth":
                text = "custom is for fractions that go over depth (training.mask_schedule_over)"
                self.reading.unused.append(f"{_MAPPING} is unused: {text}")
            elif windows is None:
                text = "custom needs training.mask_windows: a [from, to] for each stage"
                self.reading.faults.append((_MAPPING, text))
        elif mapping is not None:
            text = f"must be one of linear, exponential, custom, not {mapping!r}"
            self.reading.faults.append((_MAPPING, text))
        if not enabled or interpretation != "input":
            why = "time is not an input" if enabled else "training.progressive.enabled is false"
            for name, default in (("time_encoding_type", "sinusoidal"), ("time_embedding_dim", 512)):
                key = f"training.progressive.{name}"
                chosen = enabled and _tag(_get(base, "model.time_embedding"), "kind")
                if _has(tree, key) and not chosen and _drop(tree, key) != default:
                    self.reading.unused.append(f"{key} is unused: {why}")

    def _wins(self, tree: Tree, key: str, value: Any, other: Any, winner: str) -> None:
        """Set a key that progressive training decides; say so where something else was given."""
        if other not in (None, value):
            self.reading.unused.append(f"{key} is unused: {winner} is {value}")
        if isinstance(self.choices.get(key), type):
            before = _get(tree, key)
            value = (before if isinstance(before, dict) else {}) | {self.choices[key].tag: value}
        _set(tree, key, value)

    def _key_heads(self, tree: Tree, base: Tree) -> None:
        """`n_kv_heads` alone meant grouped-query attention."""
        heads = _get(tree, "model.n_kv_heads")
        if not _has(tree, "model.n_kv_heads"):
            return
        attention, before = _get(tree, "model.attention"), _get(base, "model.attention")
        name = _tag(attention or before, "kind")
        if heads is None and name == "gqa" and not attention:
            _set(tree, "model.attention", {"kind": "mha"})
        # it says what is so anyway
        if heads is None or (name == "mha" and heads == (_get(tree, "model.n_heads") or 4)):
            _drop(tree, "model.n_kv_heads")
        elif name is None or (name == "mha" and not attention):
            _set(tree, "model.attention", {"kind": "gqa"})
        elif name == "mha":
            text = f"mha has as many key and value heads as heads; n_kv_heads {heads} means gqa"
            self.reading.faults.append(("model.attention", text))

    def _trackers(self, tree: Tree, base: Tree) -> None:
        """Each tracker had a key of its own: true, false, or the one setting that it has."""
        for name, setting in (("tensorboard", None), ("wandb", "mode"), ("mlflow", "uri")):
            if not _has(tree, f"tracking.{name}"):
                continue
            value = _drop(tree, f"tracking.{name}")
            trackers = _get(tree, "tracking.trackers")
            trackers = _get(base, "tracking.trackers") if trackers is None else trackers
            trackers = ["tensorboard"] if trackers is None else trackers
            # a tracker is in the list once
            others = (
                [tracker for tracker in trackers if _tag(tracker, "kind") != name] if isinstance(trackers, list) else []
            )
            options = {} if setting is None or value is True else {setting: value}
            _set(tree, "tracking.trackers", others if value in (False, None) else [*others, {"kind": name} | options])

    def override(self, written: str, value: Any) -> None:
        """Apply one override."""
        key = ".".join(written.split("."))
        if value is None and _base(key) in self.choices:  # back to its default
            if _has(self.reading.tree, key):
                _drop(self.reading.tree, key)
            return
        tree = self.translated(_nested(key, _copied(value)), self.reading.tree)
        plain = tree == _nested(key, value)
        if plain and _base(key) in self.choices and isinstance(value, dict):
            self.written |= {f"{key}.{name}": (written, setting) for name, setting in value.items()}
        for path, leaf in [(key, value)] if plain else _leaves(tree, self.choices):
            other, earlier = self.written.get(path, (written, leaf))
            # two names of one setting on one command line
            differs = earlier is not leaf and earlier != leaf and path != "tracking.trackers"  # each adds to the list
            if differs and _PROGRESSIVE.isdisjoint((key, other)):
                text = f"{value!r}, but {other} says {earlier!r}, and both are one setting: leave one of them out"
                self.reading.faults.append((key, text))
            elif differs:  # what progressive training says comes first
                loser, winner, chosen = (key, other, earlier) if other in _PROGRESSIVE else (other, key, leaf)
                chosen = chosen.get("name") if isinstance(chosen, dict) else chosen
                self.reading.unused.append(f"{loser} is unused: {winner} is {chosen}")
                if winner == key:
                    self._assign(path, leaf, keeps=True)
            else:
                self.written[path] = (written, leaf)
                self._assign(path, leaf, keeps=not plain and isinstance(value, str))

    def _assign(self, key: str, value: Any, *, keeps: bool = False) -> None:
        """Set one key; a kind given by its name alone keeps the settings that both kinds have."""
        section: Any = self.reading.tree
        names = key.split(".")
        for depth, (name, following) in enumerate(pairwise(names), 1):
            place, above = _at(section, name), ".".join(names[:depth])
            absent = isinstance(section, dict) and section.get(place) is None
            if absent and following.isdecimal() and _base(above) in self.lists:
                self.reading.faults.append((key, f"{above} has no list to change item {following} of: give the list"))
                return
            if absent:
                section[place] = {}
            section = section[place]
            if isinstance(section, list) and not (following.isdecimal() and int(following) < len(section)):
                text = f"{above} is a list of {len(section)}: {following} is no item of it, counted from 0"
                self.reading.faults.append((key, text))
                return
            if not isinstance(section, dict | list):
                self.reading.faults.append((key, f"{above} is a value, not a section"))
                return
        sort = self.choices.get(_base(key))
        if sort is not None and isinstance(value, dict) and (keeps or sort.tag not in value):
            place = _at(section, key.rpartition(".")[2])
            value = _onto(sort, section.get(place), value)
        section[_at(section, key.rpartition(".")[2])] = _copied(value)  # later overrides may change items of it

    def complete(self) -> None:
        """Choices that a stage gives in part, or by name alone, have the rest from the run's own."""
        tree = self.reading.tree
        for path, sort in self.choices.items():
            for key in _spread(path, tree):
                value, run = _get(tree, key), _get(tree, path)
                if key != path and isinstance(value, dict) and (sort.tag not in value or set(value) == {sort.tag}):
                    _set(tree, key, _onto(sort, run if isinstance(run, dict) else None, value))
                elif key == path and isinstance(value, dict) and sort.tag not in value:
                    _set(tree, key, {sort.tag: self._kind(sort, key, tree, {})} | value)


def _onto(sort: type[Kind], before: Any, value: Tree) -> Tree:
    """Settings of a choice upon those it had, of which the ones that the kind lacks are left out."""
    before = before if isinstance(before, dict) else {}
    name = value.get(sort.tag, before.get(sort.tag, sort.default))
    kind = _class(sort, name)
    fields = kind.model_fields if kind is not None else {}
    return {sort.tag: name} | {key: setting for key, setting in before.items() if key in fields} | value


def _tag(value: Any, tag: str) -> Any:
    return value.get(tag) if isinstance(value, dict) else value


def _class(sort: type[Kind], name: Any) -> type[Kind] | None:
    """The kind of this name; None where there is none, which is said when the tree is read."""
    return sort.registry[name] if isinstance(name, str) and name in sort.registry else None


def _choices(section: type[Section], prefix: str) -> Iterator[tuple[str, type[Kind]]]:
    """Each choice by its dotted key."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Kind):
            yield f"{prefix}{name}", kind
        elif isinstance(kind, type) and issubclass(kind, Section):
            yield from _choices(kind, f"{prefix}{name}.")


def _lists(section: type[Section], prefix: str) -> Iterator[str]:
    """Each setting that is a list, by its dotted key; other settings with numbered items are mappings."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if list in (typing.get_origin(arm) for arm in (kind, *typing.get_args(kind))):
            yield f"{prefix}{name}"
        elif isinstance(kind, type) and issubclass(kind, Kind):
            for chosen in kind.registry.names():
                yield from _lists(kind.registry[chosen], f"{prefix}{name}.")
        elif isinstance(kind, type) and issubclass(kind, Section):
            yield from _lists(kind, f"{prefix}{name}.")


def _base(key: str) -> str:
    """The run's key that a stage's own stands for."""
    parts = key.split(".")
    return ".".join(parts[2:]) if parts[0] == "stages" and len(parts) > 2 else key


def _spread(key: str, tree: Tree) -> Iterator[str]:
    """A key, and the same one of each stage that has settings of its own."""
    yield key
    stages = tree.get("stages")
    if isinstance(stages, dict) and key.startswith("training.") and key.split(".")[1] in _OF_A_STAGE:
        yield from (f"stages.{stage}.{key}" for stage in stages)


def _at(section: Any, name: str) -> Any:
    """A name as the mapping or list has it: numbers of stages, and of a list's items, are whole numbers."""
    return int(name) if name.removeprefix("-").isdecimal() and name not in section else name


def _get(tree: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(tree, dict):
            return None
        tree = tree.get(_at(tree, name))
    return tree


def _has(tree: Tree, key: str) -> bool:
    above, _, name = key.rpartition(".")
    section = _get(tree, above)
    return isinstance(section, dict) and _at(section, name) in section


def _set(tree: Tree, key: str, value: Any) -> None:
    *above, last = key.split(".")
    for name in above:
        place = _at(tree, name)
        if not isinstance(tree.get(place), dict):
            tree[place] = {}
        tree = tree[place]
    tree[_at(tree, last)] = value


def _drop(tree: Tree, key: str) -> Any:
    above, _, name = key.rpartition(".")
    section = _get(tree, above)
    return section.pop(_at(section, name))


def _nested(key: str, value: Any) -> Tree:
    tree: Tree = {}
    _set(tree, key, value)
    return tree


def _leaves(tree: Tree, choices: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        sort = choices.get(_base(key))
        if isinstance(value, dict) and not (sort is not None and sort.tag in value):
            yield from _leaves(value, choices, f"{key}.")
        else:
            yield key, value


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, Mapping) else value
