"""What each key of a search changes: the lowest stage, and so the share of a run that a new value of it costs.

A stage whose recipe a key leaves alone is trained once for all its values. So a search over keys of upper stages is
cheap, and it is those that are searched first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackwise import words
from stackwise.config import StackWiseConfig
from stackwise.errors import UsageError
from stackwise.pipeline.batch.grid import Combination, shown
from stackwise.pipeline.batch.sweep import Member, Sweep
from stackwise.pipeline.decisions import Decision, forward_flops
from stackwise.pipeline.search.space import Settings, Space

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
