"""Continuing a prompt with a rack that was trained causally.

Shapes in names: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from stackwise.errors import UsageError
from stackwise.inference.forward import Stages, choose, forbid, logits_at
from stackwise.model.cache import Caches
from stackwise.model.ends import Front


def sample_causal(
    front: nn.Module,
    stages: Stages,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    forbidden: Collection[int] = (),
    stop_token_id: int | None = None,
    autocast: torch.dtype | None = None,
    callback: Callable[[Tensor], object] | None = None,
    cache: bool = True,
) -> Tensor:
    """Continue a prompt token by token, going over the new token alone.

    Beyond the model's length the latest tokens are the context, which moves on with each token: nothing can be kept
    then, and every token goes over all of it.

    Args:
        front: Tokens to vectors.
        stages: The rack, its stages, or a function that loads them one by one for each token.
        prompt: [S] or [B, S], at least one token.
        max_new_tokens: Most tokens to add.
        temperature: 0 takes the likeliest token, 1 draws from the model.
        top_k: Draw among so many of the likeliest; None: all.
        seed: Of what is drawn.
        forbidden: Ids never produced: the mask token, say.
        stop_token_id: Ends a row, and stays; the row repeats it until all rows have ended.
        autocast: Narrow dtype to compute in, the residual stream too, as in training; None: none.
        callback: Called with the ids after each token.
        cache: Keep what attention needs of the tokens behind; False goes over all of them for each token.

    Returns:
        int64 [S + new] or [B, S + new], the prompt included.

    Raises:
        UsageError: An empty prompt, stages that were not trained causally, numbers out of range.
    """
    if prompt.ndim not in (1, 2) or not prompt.numel():
        raise UsageError("a prompt needs at least one token")
    if max_new_tokens < 0 or (top_k is not None and top_k < 1):
        raise UsageError(f"max_new_tokens {max_new_tokens}, top_k {top_k}: out of range")
    ids_BS = prompt.long().reshape(-1, prompt.shape[-1])
    limit = getattr(front, "max_seq_len", None)
    caches = Caches() if cache and isinstance(front, Front) else None
    ended_B = torch.zeros(len(ids_BS), dtype=torch.bool, device=ids_BS.device)
    for step in range(max_new_tokens):
        if caches is not None and limit is not None and ids_BS.shape[1] > limit:
            caches = None
        context_BS = ids_BS if limit is None else ids_BS[:, -limit:]
        if caches is not None:
            context_BS = context_BS[:, caches.length :]
        last_B = torch.arange(1, len(ids_BS) + 1, device=ids_BS.device) * context_BS.shape[1] - 1
        none_B = torch.zeros(len(ids_BS), device=ids_BS.device)  # nothing is masked
        logits_BV = logits_at(
            front, stages, context_BS, last_B, causal=True, autocast=autocast, time=none_B, caches=caches
        )
        logits_BV = forbid(logits_BV, forbidden)
        if top_k is not None and top_k < logits_BV.shape[1]:
            least_B1 = logits_BV.topk(top_k).values[:, -1:]
            logits_BV.masked_fill_(logits_BV < least_B1, -torch.inf)
        next_B = choose(logits_BV, temperature, seed, "causal", step)
        if stop_token_id is not None:
            next_B = next_B.masked_fill(ended_B, stop_token_id)
            ended_B |= next_B == stop_token_id
        ids_BS = torch.cat((ids_BS, next_B[:, None]), 1)
        if callback is not None:
            callback(ids_BS.view(-1) if prompt.ndim == 1 else ids_BS)
        if ended_B.all():
            break
    return ids_BS.view(-1) if prompt.ndim == 1 else ids_BS
