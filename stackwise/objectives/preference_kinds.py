"""The kinds of objective over conversations and pairs of answers: their settings and facts. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from stackwise.config.fields import Positive, Text
from stackwise.config.kinds import Fault, Objective


class Causal(Objective):
    """What these objectives have in common: each position says the next token, and nothing is masked."""

    masks: ClassVar[bool] = False
    shows_mask: ClassVar[bool] = False
    continued_as: ClassVar[str | None] = "clm"

    @property
    def causal(self) -> bool:
        """See `Objective.causal`."""
        return True

    def specification(self, seed: int) -> dict[str, Any]:
        """See `Objective.specification`: tokens are shown as they are, sequence by sequence."""
        return {} if self.sequences == 1 else {"sequences": self.sequences}

    def unadaptable(self) -> str | None:
        """See `Objective.unadaptable`."""
        return f"with training.objective {self.name} the rack is causal from the start"


class SFT(Causal):
    """Supervised fine-tuning: the answers of conversations are learnt, what they answer is only read."""

    inputs: ClassVar[tuple[str, ...]] = ("completion_mask",)
    packs: ClassVar[bool] = True

    def build(self, mask_token: int, vocab_size: int, seed: int) -> Any:
        """See `Objective.build`."""
        from stackwise.objectives.preferences import SFTObjective

        return SFTObjective()


class _Pairs(Causal):
    """Pairs: two answers to one prompt, of which one was preferred."""

    inputs: ClassVar[tuple[str, ...]] = ("pair_mask", "margin")
    sequences: ClassVar[int] = 2
    watched: ClassVar[Mapping[str, tuple[str, ...]]] = {"preference": ("accuracy", "margin", "chosen", "rejected")}

    def faults(self, seq_len: int) -> Iterator[Fault]:
        """See `Objective.faults`."""
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
        """See `Objective.reference`."""
        return self.reference_model or ""

    def placed(self, absolute: Callable[[str], str]) -> Self:
        """See `Kind.placed`."""
        if self.reference_model is None:
            return self
        return self.model_copy(update={"reference_model": absolute(self.reference_model)})

    def scoring(self) -> dict[str, Any]:
        """See `Objective.scoring`: which reference it is, is among the inputs, by content."""
        smoothing = {"label_smoothing": self.label_smoothing} if self.loss != "ipo" else {}
        return {"name": self.name, "beta": self.beta, "loss": self.loss} | smoothing

    def build(self, mask_token: int, vocab_size: int, seed: int) -> Any:
        """See `Objective.build`."""
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
        """See `Objective.build`."""
        from stackwise.objectives.preferences import RewardObjective

        return RewardObjective(margin=self.margin, centered=self.centered)
