"""Which position sees which, as one rule: dense masks, FlexAttention's masks and tests all follow from it.

Shapes in names: B batch, S positions that ask, T positions that are asked (those kept in a cache, then the S).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stackwise.config.direction import Annealed, BlockCausal, Direction

_LOW = 0xFFFFFFFF


def sees(direction: Direction, q: Tensor, k: Tensor, length: int) -> Tensor:
    """Whether position q sees position k, bool in the shape that the two broadcast to.

    Args:
        direction: The rule.
        q: int64 positions that ask.
        k: int64 positions that are asked.
        length: Positions of the row; of a paired row, both copies together.
    """
    if isinstance(direction, BlockCausal):
        if not direction.paired:
            return k // direction.size <= q // direction.size
        half = length // 2
        asks, asked = q % half // direction.size, k % half // direction.size
        # Clean positions (the second half) are seen by blocks above, and by their own block's clean copy.
        own = (asks == asked) & ((q >= half) == (k >= half))
        return own | ((k >= half) & (asked < asks))
    if isinstance(direction, Annealed):
        return (k <= q) | (_hash(q, k, direction.key) < int(direction.visible * (_LOW + 1)))
    return k <= q if direction else torch.ones_like(q == k)


def _hash(q: Tensor, k: Tensor, key: int) -> Tensor:
    """32 bits of each pair of positions: Wellons' lowbias32, in int64 whose low half wraps as it must."""
    x = (q * 0x9E3779B1 + k * 0x85EBCA77 + (key & _LOW)) & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)


@dataclass(frozen=True)
class Sight:
    """What the S newest of T positions see.

    Attributes:
        direction: The rule between positions.
        segments_BS: Integers; a position sees only those with its own value. None: no such limit.
        start: Positions in front of the S that ask, whose keys are kept.
    """

    direction: Direction
    segments_BS: Tensor | None = None
    start: int = 0

    @property
    def plain(self) -> bool:
        """Whether a fused kernel needs no mask: all, or causal from the first position on."""
        return self.segments_BS is None and isinstance(self.direction, bool) and (self.start == 0 or not self.direction)

    def mask(self, length: int, device: torch.device) -> Tensor | None:
        """Bool [B or 1, 1, S, T]; None where every position sees all T.

        Args:
            length: S.
            device: Where the mask is made.
        """
        mask_BSS = None
        if self.segments_BS is not None:
            mask_BSS = self.segments_BS[:, :, None] == self.segments_BS[:, None, :]
        if self.direction is True and self.start == 0:
            if mask_BSS is None:
                mask_BSS = torch.ones((1, length, length), dtype=torch.bool, device=device)
            return mask_BSS.tril()[:, None]
        if self.direction is not False and not (self.direction is True and length == 1):
            places = torch.arange(self.start + length, device=device)
            rule = sees(self.direction, places[self.start :, None], places[None], self.start + length)[None]
            mask_BSS = rule if mask_BSS is None else mask_BSS & rule
        return None if mask_BSS is None else mask_BSS[:, None]


def attention_mask(segments_BS: Tensor, causal: Direction) -> Tensor:
    """Which position sees which, bool [B, 1, S, S]: those of its own segment, as far as the direction lets it."""
    mask_B1SS = Sight(causal, segments_BS).mask(segments_BS.shape[1], segments_BS.device)
    assert mask_B1SS is not None
    return mask_B1SS
