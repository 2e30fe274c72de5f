"""The section `tune`: what `stackwise tune` searches, and by what it judges."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from stackwise.config.fields import Count, PositiveInt, Section, Size, Text
from stackwise.config.ranges import parse_range

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
    """A search (`stackwise tune`); a run without one heeds none of it."""

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
