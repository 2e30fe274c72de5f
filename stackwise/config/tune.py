"""The section `tune`: what `stackwise tune` searches, and by what it judges."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from stackwise.config.fields import Count, PositiveInt, Section, Size, Text

Sampler = Literal["grid", "random", "tpe", "gp", "gp-ucb", "hyperband", "pbt"]
Measure = Literal["bits_per_byte", "loss", "memory", "seconds"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)


def _checked(value: Any) -> Any:
    try:
        parse_range(value)
    except ValueError as error:
        raise PydanticCustomError("range", "{why}", {"why": str(error)}) from None
    return value


class SearchedKey(Section):
    """A key that is searched only where others have certain values."""

    range: Annotated[Text | list[Any], AfterValidator(_checked)] = Field(description="a range or a list of values")
    when: dict[Text, Any] = Field(
        default_factory=dict,
        description="searched only where these other keys of the search have this value, or one of these in a list",
    )


def _whole(value: Any) -> Any:
    """A range alone is that of a key that is always searched."""
    return {"range": value} if isinstance(value, str | list) else value


class TuneConfig(Section):
    """A search (`stackwise tune`); a run without one uses none of it."""

    space: dict[Text, Annotated[SearchedKey, BeforeValidator(_whole)]] = Field(
        default_factory=dict,
        description="keys and what to try for them, as {training.learning_rate: 1e-4..1e-2:log}: a range, a list, or "
        "{range: …, when: {KEY: VALUE}}",
    )
    sampler: Sampler = Field(
        "tpe",
        description="grid, random, tpe, gp (a Gaussian process, expected improvement), gp-ucb (of it the upper "
        "confidence bound), hyperband (tpe with pruning), "
        "pbt (trials are one population, which exchanges stages)",
    )
    trials: PositiveInt | None = Field(None, description="runs in all; null: --trials says it, of a grid all of it")
    objectives: Annotated[list[Measure], Field(min_length=1, max_length=4)] = Field(
        default=["bits_per_byte"],
        description="what is made small, the first decides which trial is best: bits_per_byte, loss, memory, seconds",
    )
    pruner: Literal["none", "median", "hyperband"] = Field(
        "none", description="end a trial early where its held-out loss within a stage is behind (training.eval_every)"
    )
    warmup_steps: Count = Field(
        0, description="pruner median: optimizer steps of a trial, in all its stages, before it may be ended early"
    )
    jobs: Size = Field(1, description="trials at the same time")
    seed: Count | None = Field(None, description="of the sampler; null: the run's seed")


NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
INTERVAL = re.compile(rf"\s*({NUMBER})\s*\.\.\s*({NUMBER})\s*(?::\s*(\w+)\s*)?")
WHOLE = re.compile(r"[+-]?\d+")
EXAMPLE = "as 1e-4..1e-2:log, 1..8, or a list 0,0.1"


@dataclass(frozen=True)
class Choices:
    """A list of values, of any type that YAML has."""

    values: tuple[Any, ...]

    def __contains__(self, value: Any) -> bool:
        return any(same(value, choice) for choice in self.values)

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values to try a setting at: all of them."""
        return self.values


@dataclass(frozen=True)
class Interval:
    """Numbers from `low` to `high`, both among them; with `log`, evenly spread by their order of magnitude."""

    low: float
    high: float
    log: bool = False

    @property
    def integer(self) -> bool:
        """Whether whole numbers alone are meant."""
        return isinstance(self.low, int)

    def __contains__(self, value: Any) -> bool:
        number = isinstance(value, int) and not isinstance(value, bool)
        return (number or (isinstance(value, float) and not self.integer)) and self.low <= value <= self.high

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values to try a setting at: the lowest and the highest."""
        return self.low, self.high


Range = Choices | Interval


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same setting: `true` is no 1."""
    return type(one) is type(other) and one == other


def is_interval(text: str) -> bool:
    """Whether text is meant as a range of numbers, which it may still be no good one of."""
    return re.fullmatch(r"[^,\[\]'\"/]*[^,\[\]'\"/.]\.\.[^,\[\]'\"/.][^,\[\]'\"/]*", text.strip()) is not None


def parse_range(value: str | Sequence[Any]) -> Range:
    """A range as text, or a list of values.

    Raises:
        ValueError: There is nothing to choose from, or no such range; one line says why.
    """
    if isinstance(value, str):
        interval = INTERVAL.fullmatch(value)
        if interval is None:
            raise ValueError(f"{value!r} is no range of numbers; {EXAMPLE}")
        return _interval(*interval.groups())
    different: list[Any] = []
    for choice in value:
        if isinstance(choice, float) and not math.isfinite(choice):
            raise ValueError(f"{choice} is no finite number")
        if not any(same(choice, other) for other in different):
            different.append(choice)
    if len(different) < 2:
        raise ValueError(f"nothing to choose from: {len(different) or 'no'} value; {EXAMPLE}")
    return Choices(tuple(different))


def _interval(low: str, high: str, scale: str | None) -> Interval:
    if scale not in (None, "log", "linear"):
        raise ValueError(f"{scale!r} is no scale of a range: log, or none")
    whole = WHOLE.fullmatch(low) and WHOLE.fullmatch(high)
    first, last = (int(low), int(high)) if whole else (float(low), float(high))
    if not (math.isfinite(first) and math.isfinite(last)):
        raise ValueError(f"{low}..{high}: its ends must be finite numbers")
    if first >= last:
        raise ValueError(f"the range {low}..{high} is empty: it must go from a lower to a higher number")
    if scale == "log" and first <= 0:
        raise ValueError(f"{low}..{high}:log has no logarithm at {low}: begin above 0")
    return Interval(first, last, scale == "log")
