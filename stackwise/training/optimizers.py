"""The kinds of optimizer: their settings and facts. No torch here."""

from __future__ import annotations

from pydantic import Field

from stackwise.config.fields import Positive, Probability
from stackwise.config.kinds import Optimizer


class AdamW(Optimizer):
    """AdamW (arXiv 1711.05101)."""

    beta1: Probability = Field(0.9, description="decay rate of the mean of gradients")
    beta2: Probability = Field(0.95, description="decay rate of the mean of their squares")
    eps: Positive = Field(1e-8, description="added to the root of the second mean")

    def state_bytes(self, blocks: int, rest: int) -> int:
        """Two moments in fp32."""
        return 8 * (blocks + rest)


class AdamW8bit(AdamW):
    """AdamW with its moments in 8 bits (arXiv 2110.02861)."""

    def state_bytes(self, blocks: int, rest: int) -> int:
        """Two moments in a byte each."""
        return 2 * (blocks + rest)


class Muon(AdamW):
    """Muon for the blocks' matrices, AdamW for all else (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

    momentum: Probability = Field(0.95, description="decay rate of the mean of the matrices' gradients")

    def state_bytes(self, blocks: int, rest: int) -> int:
        """One moment of the blocks, two of the rest."""
        return 4 * blocks + 8 * rest
