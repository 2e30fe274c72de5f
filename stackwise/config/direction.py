"""In which direction attention looks: what the configuration, objectives and blocks all speak of. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockCausal:
    """Attention within blocks of positions, and causal between them (BD3-LM, arXiv 2503.09573, section 3).

    Attributes:
        size: Positions in a block.
        paired: A row is a noised copy of the sample followed by the clean one. A noised position sees its own noised
            block and the clean blocks before it; a clean position sees the clean blocks up to its own.
    """

    size: int
    paired: bool = False


Direction = bool | BlockCausal
"""False: every position sees all others. True: none sees those that follow."""
