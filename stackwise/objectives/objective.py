"""What every objective is: the ids that are shown, the positions that are scored, their targets, the loss.

All objectives share this interface and hold no state: what they give is a function of their arguments alone.
Shapes in names: B rows, S positions, D d_model, n scored positions.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stackwise.batch import Batch, Term, sent
from stackwise.config.model import Direction
from stackwise.objectives.cross_entropy import head_cross_entropy

HeadFunction = Callable[[Tensor], Tensor]

CROSS_ENTROPY = "cross_entropy"
"""The name of the term that most objectives have."""


@dataclass(frozen=True)
class Outputs:
    """What a stage gives its objective.

    Args:
        x_BSD: The vectors that leave the stage.
        head: From […, D] to logits […, V].
    """

    x_BSD: Tensor
    head: HeadFunction


class RuntimeObjective(abc.ABC):
    """The interface. Masks may lie on the CPU beside tokens on a GPU."""

    name: str
    """As the configuration calls it."""
    causal: Direction = False
    """The direction of attention."""
    likelihood: Literal["bound", "exact"] | None = None
    """What its loss is of the text's likelihood, as bits per byte have it; None: it is none."""
    sequences: int = 1
    """Sequences in a row, of one length, which see nothing of each other and have positions of their own."""
    label_smoothing: float = 0.0
    """Share of a target that is spread evenly over all ids, in training alone: what is held out is scored plainly."""
    inputs: tuple[str, ...] = ()
    """The named columns that it needs of each batch, beside tokens and masks."""

    @abc.abstractmethod
    def shown(self, batch: Batch) -> Tensor:
        """The ids shown to the front, int64 [B, S] on the tokens' device."""

    def times(self, batch: Batch) -> Tensor:
        """The share of positions masked, float32 on the masks' device: of each row [B], or for each position shown."""
        return batch.masks_BS.float().mean(1)

    def positions(self, batch: Batch) -> Tensor:
        """Which positions are scored, bool [B, S] on the masks' device."""
        return batch.masks_BS

    def targets(self, batch: Batch) -> Tensor:
        """What each position is to say, [B, S]; of no meaning where it is not scored.

        Raises:
            UsageError: Targets are needed and not given.
        """
        return batch.tokens_BS

    def select(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The scored positions and their targets.

        Returns:
            bool [B, S] on the masks' device, and int64 [n] on the tokens', in the order of positions.
        """
        positions_BS = self.positions(batch)
        index_n = flat_index(positions_BS, batch.tokens_BS.device)
        return positions_BS, self.targets(batch).flatten().index_select(0, index_n).long()

    def counts(self, batch: Batch) -> dict[str, int]:
        """The count of each term of `loss`, before anything is computed."""
        weighted = self.factors(batch) is not None
        return {CROSS_ENTROPY: batch.masks_BS.numel() if weighted else int(self.positions(batch).sum())}

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Term]:
        """The terms of the loss, by name."""
        return {CROSS_ENTROPY: self.cross_entropy(outputs, batch)}

    def cross_entropy(self, outputs: Outputs, batch: Batch) -> Term:
        """The float32 cross entropies at the scored positions, in nats.

        The head sees only those positions, a slice of them at a time (`head_cross_entropy`).
        """
        x_BSD = outputs.x_BSD
        index_n = flat_index(self.positions(batch), x_BSD.device)
        targets_n = self.targets(batch).to(x_BSD.device).flatten().index_select(0, index_n).long()
        x_nD = x_BSD.flatten(0, 1).index_select(0, index_n)
        factors_BS = self.factors(batch)
        if factors_BS is None:
            smoothing = self.label_smoothing if torch.is_grad_enabled() else 0.0
            return Term(head_cross_entropy(outputs.head, x_nD, targets_n, None, smoothing), len(index_n))
        factors_n = factors_BS.to(x_BSD.device).flatten().index_select(0, index_n)
        return Term(head_cross_entropy(outputs.head, x_nD, targets_n, factors_n), batch.masks_BS.numel())

    def factors(self, batch: Batch) -> Tensor | None:
        """What each position's cross entropy is multiplied by, float32 [B, S], its mean then over all positions.

        None: by 1, its mean over the scored ones.
        """
        return None


def flat_index(positions_BS: Tensor, device: torch.device) -> Tensor:
    """Indices into the flattened positions that are True, int64 [n]."""
    return sent(positions_BS.flatten().nonzero().squeeze(1), device)
