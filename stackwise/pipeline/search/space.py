"""What a search may try: keys of the configuration with their ranges, and where each is searched at all.

And what each key changes: the lowest stage, and so the share of a run that a new value of it costs. A stage whose
recipe a key leaves alone is trained once for all its values. So a search over keys of upper stages is cheap, and it is
those that are searched first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackwise import words
from stackwise.config import StackWiseConfig
from stackwise.config.loading import parse_overrides
from stackwise.config.tune import Choices, Interval, Range, SearchedKey, is_interval, parse_range
from stackwise.errors import UsageError
from stackwise.pipeline.batch.grid import Combination, parse_axes, shown
from stackwise.pipeline.batch.sweep import Member, Sweep
from stackwise.pipeline.decisions import Decision, forward_flops

EXAMPLE = "for example -s training.learning_rate=1e-4..1e-2:log -s stages.2.training.weight_decay=0,0.1"
ELSEWHERE = ("tune", "tracking", "slurm", "name")  # sections that shape no trial
MOST = 100_000  # trials of a grid: beyond that it is a slip

Settings = dict[str, Any]  # values by dotted key


@dataclass(frozen=True)
class Searched:
    """A key, what is tried for it, and where.

    Args:
        when: Other keys of the search, and the values of theirs that this one is searched with; empty: with all.
    """

    key: str
    range: Range
    when: Mapping[str, tuple[Any, ...]]

    def active(self, settings: Settings) -> bool:
        """Whether it is searched beside these values of the keys before it."""
        return all(key in settings and settings[key] in Choices(values) for key, values in self.when.items())


@dataclass(frozen=True)
class Space:
    """The keys of a search; a key stands behind those that say whether it is searched."""

    keys: tuple[Searched, ...]

    @property
    def plain(self) -> dict[str, Any]:
        """As JSON-ready data, by which two spaces are compared."""
        return {
            searched.key: {
                "range": _plain(searched.range),
                "when": {key: list(values) for key, values in searched.when.items()},
            }
            for searched in self.keys
        }

    def first(self) -> Settings:
        """One point of it: the lowest value of each key that is searched there."""
        settings: Settings = {}
        for searched in self.keys:
            if searched.active(settings):
                settings[searched.key] = searched.range.ends[0]
        return settings

    def with_value(self, key: str, value: Any) -> Settings:
        """The point nearest to the first one where a key has some value."""
        chosen = {key: value}
        by_key = {searched.key: searched for searched in self.keys}
        for name in reversed([searched.key for searched in self.keys]):  # what decides stands before what it decides on
            if name in chosen:
                chosen |= {other: values[0] for other, values in by_key[name].when.items() if other not in chosen}
        settings: Settings = {}
        for searched in self.keys:
            if searched.active(settings):
                settings[searched.key] = chosen.get(searched.key, searched.range.ends[0])
        return settings

    def grid(self) -> list[Settings]:
        """Every point, where the keys have lists or whole numbers.

        Raises:
            UsageError: A range has no finite number of values, or there are far too many points.
        """
        if wide := [
            searched.key
            for searched in self.keys
            if isinstance(searched.range, Interval) and not searched.range.integer
        ]:
            raise UsageError(
                f"a grid has values to list: {wide[0]} is a range of fractions",
                hint=f"give a list, as -s {wide[0]}=1e-3,3e-3, or another --sampler",
            )
        several = math.prod(len(_values(searched.range)) for searched in self.keys)
        if several > MOST:
            raise UsageError(f"the grid has {several:,} points, more than {MOST:,}", hint="narrow it, or --sampler tpe")
        return list(_points(self.keys, {}))


def _values(values: Range) -> Sequence[Any]:
    if isinstance(values, Choices):
        return values.values
    return range(int(values.low), int(values.high) + 1)


def _points(keys: Sequence[Searched], settings: Settings) -> Iterator[Settings]:
    if not keys:
        yield dict(settings)
        return
    first, *rest = keys
    for value in _values(first.range) if first.active(settings) else [None]:
        yield from _points(rest, settings | ({first.key: value} if first.active(settings) else {}))


def _plain(values: Range) -> Any:
    if isinstance(values, Choices):
        return list(values.values)
    return {"low": values.low, "high": values.high, "log": values.log}


def merged(items: Sequence[str], section: Mapping[str, SearchedKey]) -> dict[str, SearchedKey]:
    """The section `tune.space` with what the command line adds to it or narrows.

    Args:
        items: `KEY=RANGE` strings.
        section: As the configuration has it.

    Raises:
        UsageError: An item has no range, or an impossible one.
    """
    typed: dict[str, SearchedKey] = {}
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not key or not text.strip():
            raise UsageError(f"-s {item}: needs KEY=RANGE", hint=EXAMPLE)
        parse_overrides([f"{key}=0"])  # refuses what is no key
        if key in typed:
            raise UsageError(f"-s {item}: {key} is searched twice", hint="give all its values in one -s")
        values = text.strip() if is_interval(text) else parse_axes([item], "-s")[key]
        try:
            parse_range(values)
        except ValueError as error:
            raise UsageError(f"-s {item}: {error}") from None
        typed[key] = SearchedKey(range=values, when=section[key].when if key in section else {})
    return {**section, **typed}


def space_of(section: Mapping[str, SearchedKey]) -> Space:
    """The space of a search.

    Raises:
        UsageError: Nothing is searched, or a condition is never met.
    """
    if not section:
        raise UsageError("nothing is searched: no key has a range", hint=f"{EXAMPLE}; or tune.space in CONFIG")
    for key in section:
        if key.split(".")[0] in ELSEWHERE or key == "store.path":
            raise UsageError(f"{key} cannot be searched: it says where or how trials run, not what they train")
        if inner := [other for other in section if other.startswith(f"{key}.")]:
            raise UsageError(f"{key} and {inner[0]} cannot both be searched: one is a part of the other")
    by_key = {
        key: Searched(
            key, parse_range(entry.range), {k: tuple(v) if isinstance(v, list) else (v,) for k, v in entry.when.items()}
        )
        for key, entry in section.items()
    }
    return Space(tuple(_ordered(by_key)))


def _ordered(by_key: Mapping[str, Searched]) -> Iterator[Searched]:
    """Each behind those that decide on it."""
    left, done = dict(by_key), set[str]()
    for searched in by_key.values():
        for key, values in searched.when.items():
            if key not in by_key or key == searched.key:
                raise UsageError(f"tune.space: {searched.key} depends on {key}, which is not searched beside it")
            if never := [value for value in values if value not in by_key[key].range]:
                raise UsageError(f"tune.space: {searched.key} is searched where {key} is {never[0]}, which it never is")
    while left:
        free = [searched for searched in left.values() if done.issuperset(searched.when)]
        if not free:
            raise UsageError(
                f"tune.space: {' and '.join(left)} depend on each other", hint="let one be searched always"
            )
        yield free[0]
        done.add(free[0].key)
        del left[free[0].key]


Make = Callable[[Settings], StackWiseConfig]
Progress = Callable[[str, int, int | None], None]
FEW = 3  # values of a key that are planned to see what it changes


@dataclass(frozen=True)
class Effect:
    """A key, the lowest stage that it changes (None: none), and the share of a run's training from there on."""

    key: str
    stage: int | None
    share: float


@dataclass(frozen=True)
class Outlook:
    """What a search will be like.

    Args:
        depths: Of the stages of a trial, at the space's first point, in the order of its schedule.
        steps: Optimizer steps of each of them.
    """

    effects: list[Effect]
    depths: list[int]
    steps: list[int]

    @property
    def shared(self) -> int:
        """The lowest stage that is not the same in all trials."""
        return min((effect.stage for effect in self.effects if effect.stage is not None), default=max(self.depths) + 1)

    @property
    def common(self) -> int:
        """How many stages all trials have in common, each window's counted."""
        return sum(depth < self.shared for depth in self.depths)

    @property
    def order(self) -> str | None:
        """Which keys to search first, in a line; None where all cost the same."""
        ranked = sorted(
            (effect for effect in self.effects if effect.stage is not None), key=lambda effect: effect.share
        )
        if not ranked or ranked[0].share == ranked[-1].share:
            return None
        costs = [f"{effect.key} costs {words.percent(effect.share)} of a run's training" for effect in ranked]
        return f"search {ranked[0].key} first, with the others fixed: a new value of {', of '.join(costs)}"


def outlook(space: Space, make: Make, directory: Path, progress: Progress | None = None) -> Outlook:
    """Check every value of a space's lists and the ends of its ranges, and see what each key changes.

    Nothing is trained, and nothing written but prepared data in the cache.

    Raises:
        UsageError: With some value there is no valid configuration, or it does not fit the data.
    """
    base = space.first()
    points: dict[str, list[Settings]] = {}
    for searched in space.keys:
        points[searched.key] = [space.with_value(searched.key, value) for value in searched.range.ends]
        for settings in points[searched.key]:
            _made(make, settings, searched.key)
    planned = [base, *(point for some in points.values() for point in some[:FEW])]
    named = [Combination(str(number), point, _made(make, point, None)) for number, point in enumerate(planned)]
    members = Sweep(named, directory, "stackwise tune").preview(progress)
    by_name = {member.combination.name: member for member in members}
    for number, point in enumerate(planned):
        if (why := by_name[str(number)].failure) is not None:
            text = ", ".join(f"{key}={shown(value)}" for key, value in point.items())
            raise UsageError(f"with {text}: {why}", hint="narrow the range, or change what it does not fit")
    effects, at = [], 1
    for key, some in points.items():
        mine = [by_name[str(number)] for number in range(at, at + len(some[:FEW]))]
        at += len(mine)
        effects.append(_effect(key, mine))
    first = by_name["0"].decisions
    return Outlook(effects, [decision.stage.depth for decision in first], [decision.steps for decision in first])


def _made(make: Make, settings: Settings, key: str | None) -> StackWiseConfig:
    try:
        return make(settings)
    except UsageError as error:
        if key is not None:
            error.message = error.message.replace("-o ", "-s ", 1)
        raise


def _effect(key: str, members: Sequence[Member]) -> Effect:
    first, *others = members
    places = [place for other in others if (place := _differ(first.keys, other.keys)) is not None]
    if not places:
        return Effect(key, None, 0.0)
    config, decisions = first.combination.config, first.decisions
    # Of a rack that only becomes larger, every stage is the same; the last one is not the last any more.
    lowest = decisions[min(*places, len(decisions) - 1)].stage.depth
    costs = [(decision.stage.depth, _flops(config, decision)) for decision in decisions]
    above = sum(cost for depth, cost in costs if depth >= lowest)
    return Effect(key, lowest, above / (sum(cost for _, cost in costs) or 1.0))


def _differ(one: Sequence[str], other: Sequence[str]) -> int | None:
    pairs: Any = enumerate(zip(one, other, strict=False))
    depth = next((depth for depth, (mine, theirs) in pairs if mine != theirs), None)
    return min(len(one), len(other)) if depth is None and len(one) != len(other) else depth


def _flops(config: StackWiseConfig, decision: Decision) -> float:
    """FLOPs of a stage's training in its blocks: a forward pass, and a backward pass of twice as many."""
    settings = config.stage_training(decision.stage.depth)
    rows = decision.steps * max(1, settings.batch_size) * settings.accumulation
    return 3.0 * rows * forward_flops(config, decision.stage)
