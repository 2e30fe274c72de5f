"""The kinds of objective: their settings and facts. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stackwise.config.fields import Size
from stackwise.config.kinds import Fault, Objective

Share = Annotated[float, Field(ge=0.0, le=1.0)]


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
        """See `Objective.unadaptable`."""
        return None if self.block is None else "in blocks the rack generates with a cache as it is"

    def specification(self, seed: int) -> dict[str, Any]:
        """See `Objective.specification`."""
        return {} if self.block is None else {"block": self.block}

    def faults(self, seq_len: int) -> Iterator[Fault]:
        """See `Objective.faults`."""
        if self.block is not None and seq_len % self.block:
            yield "block", f"{self.block} does not divide training.seq_len {seq_len}: take a divisor of it"

    def build(self, mask_token: int, vocab_size: int, seed: int) -> Any:
        """See `Objective.build`."""
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
        """See `Objective.specification`."""
        return {"mask_share": self.mask_share, "random_share": self.random_share, "seed": seed}

    def faults(self, seq_len: int) -> Iterator[Fault]:
        """See `Objective.faults`."""
        if self.mask_share + self.random_share > 1:
            total = self.mask_share + self.random_share
            yield "random_share", f"with mask_share it makes {total:g}, more than 1"

    def build(self, mask_token: int, vocab_size: int, seed: int) -> Any:
        """See `Objective.build`."""
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
        """See `Objective.causal`."""
        return True

    def specification(self, seed: int) -> dict[str, Any]:
        """It shows the tokens themselves."""
        return {}

    def scoring(self) -> dict[str, Any]:
        """See `Objective.scoring`."""
        return self.model_dump(exclude_defaults=True) | {"name": self.name}

    def unadaptable(self) -> str | None:
        """See `Objective.unadaptable`."""
        return "with training.objective clm the rack is causal from the start"

    def build(self, mask_token: int, vocab_size: int, seed: int) -> Any:
        """See `Objective.build`."""
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
        """See `Objective.causal`."""
        return self.attention == "causal"

    def specification(self, seed: int) -> dict[str, Any]:
        """It shows the tokens as they are."""
        return {}

    def scoring(self) -> dict[str, Any]:
        """See `Objective.scoring`; where positions see is in the specification."""
        return {"name": self.name}

    def unadaptable(self) -> str | None:
        """See `Objective.unadaptable`."""
        return "a rack of custom targets does not say tokens; use mask_diffusion or mlm"

    def build(self, mask_token: int, vocab_size: int, seed: int) -> Any:
        """See `Objective.build`."""
        from stackwise.objectives.objectives import CustomObjective

        return CustomObjective(causal=self.causal)
