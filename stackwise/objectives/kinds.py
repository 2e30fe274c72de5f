"""The kinds of objective and of score: their settings and facts. No torch here.

Objectives over masked or next tokens, over conversations and pairs of answers, and over the rack's own answers; and
what such an answer is worth: functions that can be checked, and a reward model that a run has trained. A score of your
own is one class in a file that `STACKWISE_PLUGINS` names:

    @SCORES.register("polite")
    class Polite(Score):
        def scores(self, prompts, answers):
            return [float("please" in answer) for answer in answers]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator

from stackwise.config.fields import Positive, Section, Share, Size, Text
from stackwise.config.kinds import Fault, Objective, Score, choice
from stackwise.errors import UsageError


class Masking(Objective):
    """What the objectives that mask positions have in common."""

    weight: Literal["none", "inverse_time"] = Field(
        "none", description="none: each scored position counts the same; inverse_time: each sample does (1/t)"
    )


class MaskDiffusion(Masking):
    """Masked positions are predicted, at shares that vary from row to row (MDLM, arXiv 2406.07524)."""

    block: Size | None = Field(
        None,
        description="diffusion in blocks of so many tokens, each given the clean ones before it; generation then keeps "
        "a cache. Rows are twice as long. null: attention over the whole sample",
    )

    def positions(self, seq_len: int) -> int:
        """In blocks a row is a noised and a clean copy of the sample."""
        return seq_len if self.block is None else 2 * seq_len

    def unadaptable(self) -> str | None:
        return None if self.block is None else "in blocks the rack generates with a cache as it is"

    def specification(self, seed: int) -> dict[str, Any]:
        return {} if self.block is None else {"block": self.block}

    def faults(self, seq_len: int) -> Iterator[Fault]:
        if self.block is not None and seq_len % self.block:
            yield "block", f"{self.block} does not divide training.seq_len {seq_len}: take a divisor of it"

    def build(self, mask_token: int, vocab_size: int, seed: int) -> Any:
        from stackwise.objectives.objectives import BlockDiffusionObjective, MaskDiffusionObjective

        weighted = self.weight == "inverse_time"
        if self.block is not None:
            return BlockDiffusionObjective(mask_token, self.block, weighted)
        return MaskDiffusionObjective(mask_token, weighted)


class MLM(Masking):
    """Selected positions are predicted, of which some show a random token or their own (BERT, arXiv 1810.04805)."""

    scores_alone: ClassVar[bool] = True

    mask_share: Share = Field(0.8, description="share of selected positions that show the mask token")
    random_share: Share = Field(0.1, description="share of them that show a random token; the rest shows itself")

    def specification(self, seed: int) -> dict[str, Any]:
        return {"mask_share": self.mask_share, "random_share": self.random_share, "seed": seed}

    def faults(self, seq_len: int) -> Iterator[Fault]:
        if self.mask_share + self.random_share > 1:
            total = self.mask_share + self.random_share
            yield "random_share", f"with mask_share it makes {total:g}, more than 1"

    def build(self, mask_token: int, vocab_size: int, seed: int) -> Any:
        from stackwise.objectives.objectives import MLMObjective

        weighted = self.weight == "inverse_time"
        return MLMObjective(mask_token, vocab_size, self.mask_share, self.random_share, seed, weighted)


class CLM(Objective):
    """Each position predicts the next one."""

    masks: ClassVar[bool] = False
    shows_mask: ClassVar[bool] = False

    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="share of a target that training spreads evenly over all ids (arXiv 1512.00567); 0: none"
    )

    @property
    def causal(self) -> bool:
        return True

    def specification(self, seed: int) -> dict[str, Any]:
        """It shows the tokens themselves."""
        return {}

    def scoring(self) -> dict[str, Any]:
        return self.model_dump(exclude_defaults=True) | {"name": self.name}

    def unadaptable(self) -> str | None:
        return "with training.objective clm the rack is causal from the start"

    def build(self, mask_token: int, vocab_size: int, seed: int) -> Any:
        from stackwise.objectives.objectives import CLMObjective

        return CLMObjective(self.label_smoothing)


class Custom(Objective):
    """Each masked position predicts a target that the data brings."""

    shows_mask: ClassVar[bool] = False
    inputs: ClassVar[tuple[str, ...]] = ("targets",)

    attention: Literal["both", "causal"] = Field(
        "both", description="where positions see: both ways, or (causal) themselves and those before"
    )

    @property
    def causal(self) -> bool:
        return self.attention == "causal"

    def specification(self, seed: int) -> dict[str, Any]:
        """It shows the tokens as they are."""
        return {}

    def scoring(self) -> dict[str, Any]:
        """See `Objective.scoring`; where positions see is in the specification."""
        return {"name": self.name}

    def unadaptable(self) -> str | None:
        return "a rack of custom targets does not say tokens; use mask_diffusion or mlm"

    def build(self, mask_token: int, vocab_size: int, seed: int) -> Any:
        from stackwise.objectives.objectives import CustomObjective

        return CustomObjective(causal=self.causal)


class Causal(Objective):
    """What these objectives have in common: each position says the next token, and nothing is masked."""

    masks: ClassVar[bool] = False
    shows_mask: ClassVar[bool] = False
    continued_as: ClassVar[str | None] = "clm"

    @property
    def causal(self) -> bool:
        return True

    def specification(self, seed: int) -> dict[str, Any]:
        """See `Objective.specification`: tokens are shown as they are, sequence by sequence."""
        return {} if self.sequences == 1 else {"sequences": self.sequences}

    def unadaptable(self) -> str | None:
        return f"with training.objective {self.name} the rack is causal from the start"


class SFT(Causal):
    """Supervised fine-tuning: the answers of conversations are learnt, what they answer is only read."""

    inputs: ClassVar[tuple[str, ...]] = ("completion_mask",)
    packs: ClassVar[bool] = True

    def build(self, mask_token: int, vocab_size: int, seed: int) -> Any:
        from stackwise.objectives.preferences import SFTObjective

        return SFTObjective()


class _Pairs(Causal):
    """Pairs: two answers to one prompt, of which one was preferred."""

    inputs: ClassVar[tuple[str, ...]] = ("pair_mask", "margin")
    sequences: ClassVar[int] = 2
    watched: ClassVar[Mapping[str, tuple[str, ...]]] = {"preference": ("accuracy", "margin", "chosen", "rejected")}

    def faults(self, seq_len: int) -> Iterator[Fault]:
        if seq_len % 2:
            yield "name", f"{self.name}: each side of a pair has half of training.seq_len, and {seq_len} is odd"


class DPO(_Pairs):
    """Direct preference optimisation (arXiv 2305.18290): likelier answers than a reference finds them, by pairs."""

    beta: Positive = Field(0.1, description="how dear it is to leave the reference; of ipo tau")
    loss: Literal["sigmoid", "robust", "ipo"] = Field(
        "sigmoid",
        description="sigmoid: of the margin (DPO); robust: unbiased by labels that are smoothed away; ipo: the squared "
        "distance of the margin, a token, from 1/(2 beta)",
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        0.0, description="share of pairs that are taken to be labelled the wrong way round; of no effect with ipo"
    )
    reference_model: Text | None = Field(
        None,
        description="the reference: a Hugging Face directory or an export; null: what the run begins from "
        "(init.weights)",
    )

    @property
    def reference(self) -> str | None:
        return self.reference_model or ""

    def placed(self, absolute: Callable[[str], str]) -> Self:
        if self.reference_model is None:
            return self
        return self.model_copy(update={"reference_model": absolute(self.reference_model)})

    def scoring(self) -> dict[str, Any]:
        """See `Objective.scoring`: which reference it is, is among the inputs, by content."""
        smoothing = {"label_smoothing": self.label_smoothing} if self.loss != "ipo" else {}
        return {"name": self.name, "beta": self.beta, "loss": self.loss} | smoothing

    def build(self, mask_token: int, vocab_size: int, seed: int) -> Any:
        from stackwise.objectives.preferences import DPOObjective

        return DPOObjective(self.beta, self.label_smoothing, self.loss)


class Reward(_Pairs):
    """A reward model (Bradley-Terry): a score at an answer's end, higher for the preferred one."""

    score_width: ClassVar[int | None] = 1
    evaluated: ClassVar[Literal["text", "pairs", "answers"]] = "pairs"

    margin: bool = Field(True, description="the chosen score is to be ahead by the row's margin (arXiv 2307.09288)")
    centered: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="weight of the squared sum of both scores, which draws scores to a mean of 0"
    )

    def build(self, mask_token: int, vocab_size: int, seed: int) -> Any:
        from stackwise.objectives.preferences import RewardObjective

        return RewardObjective(margin=self.margin, centered=self.centered)


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
        return self.model_copy(update={"score": self.score.placed(absolute)})

    def window_rows(self, rows: int) -> int:
        return max(1, rows // self.passes)

    def rollout(self) -> dict[str, Any]:
        """What of it shapes the answers that are drawn, for identities."""
        return {"new_tokens": self.new_tokens, "temperature": self.temperature}

    def scoring(self) -> dict[str, Any]:
        kl = self.kl.model_dump()
        if self.kl.target is None:
            del kl["horizon"]
        values = {name: getattr(self, name) for name in type(self).model_fields if name not in ("kl", "score")}
        return {"name": self.name, "kl": kl, "score": self.score.plain() | self.score.code} | values

    def faults(self, seq_len: int) -> Iterator[Fault]:
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
        from stackwise.objectives.ppo import PPOObjective

        return PPOObjective(self.clip, self.clip_value, self.value_weight, self.temperature)


class Length(Score):
    """Answers of a given length: the distance from it, as a share of it, with a minus sign."""

    target: Size = Field(64, description="characters that an answer is to have")

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
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
        return self.path

    def placed(self, absolute: Callable[[str], str]) -> Self:
        return self.model_copy(update={"path": absolute(self.path)})

    def plain(self) -> dict[str, Any]:
        """Its name alone: which weights they are is among the inputs of a stage, by content."""
        return {self.tag: self.name}

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
        raise UsageError(f"score {self.name}: tokens are scored by the run's weights, not text")
