"""What every objective is: the ids that are shown, the positions that are scored, their targets, the loss.

All objectives share this interface and hold no state: what they give is a function of their arguments alone.
Shapes in names: B rows, S positions, D d_model, n scored positions.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stackwise.config.direction import Direction
from stackwise.objectives.cross_entropy import SLICE_BYTES, head_cross_entropy

HeadFunction = Callable[[Tensor], Tensor]
SampleIds = NDArray[np.uint8]


class Objective(abc.ABC):
    """The interface.

    Masks may lie on the CPU beside tokens on a GPU: which positions are scored is then known without waiting for
    the GPU.
    """

    name: str
    """As the configuration calls it."""
    causal: Direction = False
    """The direction of attention."""

    def at(self, step: int | None) -> Objective:
        """The objective of an optimizer step, counted from 0: the same at all of them, but for one that changes.

        Args:
            step: The step; None: what holds when training is done.
        """
        return self

    @abc.abstractmethod
    def inputs(self, tokens_BS: Tensor, masks_BS: Tensor, sample_ids: SampleIds | None = None) -> Tensor:
        """The ids shown to the front.

        Args:
            tokens_BS: The sample's tokens.
            masks_BS: Its mask, bool.
            sample_ids: uint8 [B, 16], for what is random; None: made of the tokens.

        Returns:
            int64 [B, S] on the tokens' device.
        """

    def times(self, masks_BS: Tensor) -> Tensor:
        """The share of positions masked, float32 on the masks' device: of each row [B], or for each position shown."""
        return masks_BS.float().mean(1)

    @abc.abstractmethod
    def positions(self, masks_BS: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        """Which positions are scored, bool [B, S] on the masks' device."""

    def targets(self, tokens_BS: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        """What each position is to say, [B, S]; of no meaning where it is not scored.

        Raises:
            UsageError: Targets are needed and not given.
        """
        return tokens_BS

    def select(self, tokens_BS: Tensor, masks_BS: Tensor, targets_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The scored positions and their targets.

        Args:
            tokens_BS: The sample's tokens.
            masks_BS: Its mask, bool.
            targets_BS: Custom targets.

        Returns:
            bool [B, S] on the masks' device, and int64 [n] on the tokens', in the order of positions.
        """
        positions_BS = self.positions(masks_BS, targets_BS)
        index_n = flat_index(positions_BS, tokens_BS.device)
        return positions_BS, self.targets(tokens_BS, targets_BS).flatten().index_select(0, index_n).long()

    def loss(
        self,
        x_BSD: Tensor,
        head: HeadFunction,
        tokens_BS: Tensor,
        masks_BS: Tensor,
        targets_BS: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Sum of the float32 cross entropies at the scored positions, in nats, and what it is divided by for a mean.

        The head sees only those positions, a slice of them at a time (`head_cross_entropy`).

        Args:
            x_BSD: The vectors that leave the stage.
            head: From […, D] to logits […, V].
            tokens_BS: The sample's tokens.
            masks_BS: Its mask, bool.
            targets_BS: Custom targets.
        """
        index_n = flat_index(self.positions(masks_BS, targets_BS), x_BSD.device)
        targets_n = self.targets(tokens_BS, targets_BS).to(x_BSD.device).flatten().index_select(0, index_n).long()
        x_nD = x_BSD.flatten(0, 1).index_select(0, index_n)
        factors_BS = self.factors(masks_BS)
        if factors_BS is None:
            return head_cross_entropy(head, x_nD, targets_n), len(index_n)
        factors_n = factors_BS.to(x_BSD.device).flatten().index_select(0, index_n)
        return head_cross_entropy(head, x_nD, targets_n, factors_n), masks_BS.numel()

    def factors(self, masks_BS: Tensor) -> Tensor | None:
        """What each position's cross entropy is multiplied by, float32 [B, S], its mean then over all positions.

        None: by 1, its mean over the scored ones.
        """
        return None

    def specification(self) -> dict[str, Any]:
        """Everything that determines its result, as plain data."""
        return {"objective": self.name, "causal": self.causal, "slice_bytes": SLICE_BYTES}


def flat_index(positions_BS: Tensor, device: torch.device) -> Tensor:
    """Indices into the flattened positions that are True, int64 [n]."""
    index_n = positions_BS.flatten().nonzero().squeeze(1)
    return index_n.to(device, non_blocking=True)
