"""The kinds of optimizer: their settings and facts. No torch here."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from stackwise.config.fields import Positive, Probability
from stackwise.config.kinds import Optimizer


class AdamW(Optimizer):
    """AdamW (arXiv 1711.05101)."""

    divides: ClassVar[bool] = True

    beta1: Probability = Field(0.9, description="decay rate of the mean of gradients")
    beta2: Probability = Field(0.95, description="decay rate of the mean of their squares")
    eps: Positive = Field(1e-8, description="added to the root of the second mean")

    def state_bytes(self, blocks: int, rest: int) -> int:
        """Two moments in fp32."""
        return 8 * (blocks + rest)

    def build(self, groups: list[dict[str, Any]]) -> Any:
        """See `Optimizer.build`: fused where the device has it."""
        import torch

        from stackwise.training.optim import eager

        fused = all(p.device.type in ("cuda", "cpu") for group in groups for p in group["params"])
        return eager(torch.optim.AdamW)(groups, betas=(self.beta1, self.beta2), eps=self.eps, fused=fused)


class AdamW8bit(AdamW):
    """AdamW with its moments in 8 bits (arXiv 2110.02861)."""

    divides: ClassVar[bool] = False

    def state_bytes(self, blocks: int, rest: int) -> int:
        """Two moments in a byte each."""
        return 2 * (blocks + rest)

    def build(self, groups: list[dict[str, Any]]) -> Any:
        from stackwise.training.optim import QuantizedAdamW, eager

        return eager(QuantizedAdamW)(groups, betas=(self.beta1, self.beta2), eps=self.eps)


class Muon(AdamW):
    """Muon for the blocks' matrices, AdamW for all else (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Its updates are scaled to the size of AdamW's, so that learning rate and decay mean the same (arXiv 2502.16982,
    section 2.2).
    """

    divides: ClassVar[bool] = False

    momentum: Probability = Field(0.95, description="decay rate of the mean of the matrices' gradients")

    def state_bytes(self, blocks: int, rest: int) -> int:
        """One moment of the blocks, two of the rest."""
        return 4 * blocks + 8 * rest

    def family(self, part: str, dimensions: int) -> str:
        return "matrices" if dimensions == 2 and part not in ("front", "head") else ""

    def build(self, groups: list[dict[str, Any]]) -> Any:
        import torch

        from stackwise.training.optim import Both, eager

        matrices = [group for group in groups if group["family"]]
        rest = [group for group in groups if not group["family"]]
        if not matrices:
            return super().build(rest)
        muon = eager(torch.optim.Muon)(matrices, momentum=self.momentum, adjust_lr_fn="match_rms_adamw")
        return Both(muon, super().build(rest)) if rest else muon
