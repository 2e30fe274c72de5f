"""What an answer is worth: functions that can be checked, and a reward model that a run has trained. No torch here.

A score of your own is one class in a file that `STACKWISE_PLUGINS` names:

    @SCORES.register("polite")
    class Polite(Score):
        def scores(self, prompts, answers):
            return [float("please" in answer) for answer in answers]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Self

from pydantic import Field, field_validator

from stackwise.config.fields import Size, Text
from stackwise.config.kinds import Score
from stackwise.errors import UsageError


class Length(Score):
    """Answers of a given length: the distance from it, as a share of it, with a minus sign."""

    target: Size = Field(64, description="characters that an answer is to have")

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
        """See `Score.scores`."""
        return [-abs(len(answer) - self.target) / self.target for answer in answers]


class Pattern(Score):
    """Answers of a given style: the share of an answer's characters that a regular expression matches."""

    regex: Text = Field("[a-z]+", description="a regular expression of Python, searched for from left to right")

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is no regular expression ({error})") from None
        return value

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
        """See `Score.scores`; an empty answer is worth nothing."""
        pattern = re.compile(self.regex)
        return [
            sum(len(match.group()) for match in pattern.finditer(answer)) / max(1, len(answer)) for answer in answers
        ]


class RewardModel(Score):
    """The score of a reward model: a finished run with `training.objective: reward`, of the same tokenizer."""

    path: Text = Field(description="the directory of the run")

    @property
    def run(self) -> str | None:
        """See `Score.run`."""
        return self.path

    def placed(self, absolute: Callable[[str], str]) -> Self:
        """See `Kind.placed`."""
        return self.model_copy(update={"path": absolute(self.path)})

    def plain(self) -> dict[str, Any]:
        """Its name alone: which weights they are is among the inputs of a stage, by content."""
        return {self.tag: self.name}

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
        """See `Score.scores`."""
        raise UsageError(f"score {self.name}: tokens are scored by the run's weights, not text")
