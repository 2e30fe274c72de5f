"""The kind of objective that trains on the rack's own answers: its settings and facts. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from stackwise.config.fields import Positive, Section, Size
from stackwise.config.kinds import Fault, Score, choice
from stackwise.errors import UsageError
from stackwise.objectives.preference_kinds import Causal

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class KL(Section):
    """How dear it is to leave the reference, in score a nat; and how that follows the divergence that is measured."""

    coefficient: Annotated[float, Field(ge=0.0)] = Field(
        0.1, description="what a nat of divergence from the reference costs, in the first window"
    )
    target: Positive | None = Field(
        None,
        description="nats an answer that the divergence is drawn to: the coefficient rises above it and falls below "
        "(arXiv 1909.08593, section 2.2); null: the coefficient is fixed",
    )
    horizon: Size = Field(1000, description="answers over which the coefficient follows; fewer: faster")

    def following(self, coefficient: float, measured: float, answers: int) -> float:
        """The coefficient of the next window (arXiv 1909.08593, equation after 2).

        Args:
            coefficient: That of this window.
            measured: The mean divergence of this window's answers, in nats an answer.
            answers: How many they are.
        """
        if self.target is None:
            return coefficient
        error = min(max(measured / self.target - 1.0, -0.2), 0.2)
        return coefficient * (1.0 + error * answers / self.horizon)


class PPO(Causal):
    """Proximal policy optimisation (arXiv 1707.06347) on scored answers, near a reference (arXiv 1909.08593).

    Each window of the schedule (`training.windows`) is a phase: the rack answers prompts, the answers are scored and
    kept in the store, and the stage trains on them for some passes.
    """

    inputs: ClassVar[tuple[str, ...]] = ("prompt_mask",)
    score_width: ClassVar[int | None] = 1
    rolls_out: ClassVar[bool] = True
    evaluated: ClassVar[Literal["text", "pairs", "answers"]] = "answers"
    watched: ClassVar[Mapping[str, tuple[str, ...]]] = {"ppo": ("clipped", "moved")}

    score: Score = choice(Score, "what an answer is worth")
    new_tokens: Size = Field(32, description="tokens of an answer, at most; its prompt has what is left of seq_len")
    temperature: Positive = Field(1.0, description="of the distribution that answers are drawn from, and trained")
    passes: Size = Field(4, description="passes over a window's answers")
    kl: KL = Field(default_factory=KL, description="the penalty on divergence from the reference")
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.2, description="how far a token's probability may move, as a share, before it counts no more"
    )
    clip_value: Positive = Field(0.2, description="how far a value may move from that of the rollout")
    value_weight: Annotated[float, Field(ge=0.0)] = Field(0.1, description="weight of the loss of the values")
    discount: Share = Field(1.0, description="gamma: what a token later counts")
    gae: Share = Field(0.95, description="lambda of generalised advantage estimation (arXiv 1506.02438)")
    whiten_scores: bool = Field(False, description="bring a window's rewards to a variance of 1, their mean kept")
    unended: float | None = Field(
        None, allow_inf_nan=False, description="the score of an answer that does not end by itself; null: as any other"
    )

    def placed(self, absolute: Callable[[str], str]) -> Self:
        """See `Kind.placed`."""
        return self.model_copy(update={"score": self.score.placed(absolute)})

    def window_rows(self, rows: int) -> int:
        """See `Objective.window_rows`."""
        return max(1, rows // self.passes)

    def rollout(self) -> dict[str, Any]:
        """What of it shapes the answers that are drawn, for identities."""
        return {"new_tokens": self.new_tokens, "temperature": self.temperature}

    def scoring(self) -> dict[str, Any]:
        """See `Objective.scoring`."""
        kl = self.kl.model_dump()
        if self.kl.target is None:
            del kl["horizon"]
        values = {name: getattr(self, name) for name in type(self).model_fields if name not in ("kl", "score")}
        return {"name": self.name, "kl": kl, "score": self.score.plain() | self.score.code} | values

    def faults(self, seq_len: int) -> Iterator[Fault]:
        """See `Objective.faults`."""
        if self.new_tokens >= seq_len:
            text = f"{self.new_tokens} leave no token of training.seq_len {seq_len} to a prompt"
            yield "new_tokens", f"{text}: give at most {seq_len - 1}"

    def check_samples(self, split: Any, seq_len: int) -> None:
        """See `Objective.check_samples`: prompts must leave room for an answer."""
        longest = split.longest_prompt
        if longest + self.new_tokens > seq_len:
            raise UsageError(
                f"the longest prompt has {longest} tokens, and with {self.new_tokens} of an answer (training.objective."
                f"new_tokens) it does not fit into training.seq_len {seq_len}",
                hint=f"set training.seq_len to {longest + self.new_tokens} or more, or shorten the prompts",
            )

    def build(self, mask_token: int, vocab_size: int, seed: int) -> Any:
        """See `Objective.build`."""
        from stackwise.objectives.ppo import PPOObjective

        return PPOObjective(self.clip, self.clip_value, self.value_weight, self.temperature)
