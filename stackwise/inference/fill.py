"""Filling holes by iterative unmasking, most confident first.

Sources: MaskGIT (arXiv 2202.04200), LLaDA with low-confidence remasking (arXiv 2502.09992).
Shapes in names: B rows, S positions, n holes that are still open, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stackwise.errors import UsageError
from stackwise.inference.forward import Stages, choose, forbid, logits_at


@dataclass(frozen=True)
class FillStep:
    """What a step has done, for showing progress."""

    step: int
    """1 … steps."""
    steps: int
    ids: Tensor
    """The ids so far, in the shape that was given; open holes show the mask token."""
    open: Tensor
    """Which are still open, bool."""


def fill(
    front: nn.Module,
    stages: Stages,
    ids: Tensor,
    holes: Tensor,
    *,
    mask_token_id: int,
    steps: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    forbidden: Collection[int] = (),
    segments: Tensor | None = None,
    autocast: torch.dtype | None = None,
    callback: Callable[[FillStep], object] | None = None,
) -> Tensor:
    """Fill holes: each step predicts all that are open, keeps the most confident, and masks the others again.

    An even share of each row's holes is kept a step; confidence is the probability (at temperature 1, after what is
    forbidden) of the token chosen. The mask token is never produced.

    Args:
        front: Tokens to vectors.
        stages: The rack, its stages, or a function that loads them one by one for each step.
        ids: [S] or [B, S]; what stands at the holes plays no part.
        holes: bool, the same shape.
        mask_token_id: Shown where a hole is open.
        steps: Forward passes; at most one for each hole.
        temperature: 0 takes the likeliest token, 1 draws from the model.
        seed: Of what is drawn.
        forbidden: Other ids never produced: the separator, say.
        segments: Attention stays within equal values.
        autocast: Narrow dtype to compute in, the residual stream too, as in training; None: none.
        callback: Called after each step.

    Returns:
        int64 in the shape of `ids`; outside the holes it is `ids`.

    Raises:
        UsageError: Shapes that differ, no steps, a negative temperature, every id forbidden, a sample too long, stages
            that were trained causally.
    """
    if ids.shape != holes.shape or ids.ndim not in (1, 2):
        raise UsageError(f"ids {list(ids.shape)} and holes {list(holes.shape)} need the same shape, [S] or [B, S]")
    if steps < 1:
        raise UsageError(f"{steps} steps: filling takes at least one")
    shape, device = ids.shape, ids.device
    open_BS = holes.to(device, torch.bool).reshape(-1, shape[-1]).clone()
    ids_BS = ids.long().reshape(open_BS.shape).masked_fill(open_BS, mask_token_id)
    segments_BS = None if segments is None else segments.to(device).reshape(open_BS.shape)
    steps = min(steps, int(open_BS.sum(1).max())) if open_BS.any() else 0
    for step in range(1, steps + 1):
        index_n = open_BS.flatten().nonzero().squeeze(1)
        logits_nV = logits_at(front, stages, ids_BS, index_n, causal=False, segments_BS=segments_BS, autocast=autocast)
        logits_nV = forbid(logits_nV, {mask_token_id, *forbidden})
        chosen_n = choose(logits_nV, temperature, seed, "fill", step)
        sure_n = logits_nV.gather(1, chosen_n[:, None]).squeeze(1) - logits_nV.logsumexp(-1)
        sure_BS = torch.full(open_BS.shape, -torch.inf, device=device).flatten().scatter(0, index_n, sure_n)
        guess_BS = ids_BS.flatten().scatter(0, index_n, chosen_n).view_as(ids_BS)
        # The k surest of each row; rows end together, whatever the number of their holes.
        remaining_B, left = open_BS.sum(1), steps - step + 1
        keep_B = -(-remaining_B // left)
        order_BS = sure_BS.view_as(ids_BS).argsort(dim=1, descending=True, stable=True)
        rank_BS = order_BS.argsort(1)
        closing_BS = open_BS & (rank_BS < keep_B[:, None])
        ids_BS = torch.where(closing_BS, guess_BS, ids_BS)
        open_BS = open_BS & ~closing_BS
        if callback is not None:
            callback(FillStep(step, steps, ids_BS.view(shape).clone(), open_BS.view(shape).clone()))
    return ids_BS.view(shape)
