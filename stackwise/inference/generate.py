"""Generation: filling holes by iterative unmasking (masked diffusion), and continuing a prompt token by token.

Sources: MaskGIT (arXiv 2202.04200), MDLM (arXiv 2406.07524), LLaDA with low-confidence remasking and
semi-autoregressive blocks (arXiv 2502.09992, section 2.4), BD3-LM (arXiv 2503.09573, section 3.2).
Shapes in names: B rows, S positions, n holes that are being worked on, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from stackwise.config.model import BlockCausal
from stackwise.errors import UsageError
from stackwise.identity import derive_seed
from stackwise.inference.forward import LoadedModel, choose, forbid
from stackwise.model.attention import Caches
from stackwise.model.rack import Front

Order = Literal["confidence", "random"]


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


@dataclass(frozen=True)
class Filling:
    """How holes are filled.

    Args:
        mask_token_id: Shown where a hole is open.
        steps: Forward passes in all; at most one for each hole, at least one for each block.
        order: Which predictions are kept: the most confident, or random ones.
        block: Finish so many holes before the next ones are begun, from the left (semi-autoregressive); None: all at
            once. A rack trained in blocks has its own.
        temperature: 0 takes the likeliest token, 1 draws from the model.
        seed: Of what is drawn.
        forbidden: Ids never produced beside the mask token: the separator, say.
        exit_at: From the share of positions that are open to the depth of the stage that answers; None: the last.
    """

    mask_token_id: int
    steps: int = 16
    order: Order = "confidence"
    block: int | None = None
    temperature: float = 0.0
    seed: int = 0
    forbidden: Collection[int] = ()
    exit_at: Callable[[float], int] | None = None


def fill(
    model: LoadedModel,
    ids: Tensor,
    holes: Tensor,
    how: Filling,
    *,
    segments: Tensor | None = None,
    callback: Callable[[FillStep], object] | None = None,
) -> Tensor:
    """Fill holes: each step predicts all that are open, keeps some, and masks the others again.

    An even share of each row's holes is kept a step: the most confident (the probability, at temperature 1 and after
    what is forbidden, of the token chosen), or random ones. The mask token is never produced.

    A rack trained in blocks is filled block by block from the left, each given the finished ones through a cache;
    positions behind a block play no part in it, and a last block that is cut short is worked on whole.

    Args:
        model: What predicts; its direction is bidirectional, or in blocks.
        ids: [S] or [B, S]; what stands at the holes plays no part.
        holes: bool, the same shape.
        how: How they are filled.
        segments: Attention stays within equal values.
        callback: Called after each step.

    Returns:
        int64 in the shape of `ids`; outside the holes it is `ids`.

    Raises:
        UsageError: Shapes that differ, no steps, a negative temperature, every id forbidden, a sample too long, stages
            that were trained another way, segments with a rack trained in blocks.
    """
    if ids.shape != holes.shape or ids.ndim not in (1, 2):
        raise UsageError(f"ids {list(ids.shape)} and holes {list(holes.shape)} need the same shape, [S] or [B, S]")
    if how.steps < 1:
        raise UsageError(f"{how.steps} steps: filling takes at least one")
    if how.block is not None and how.block < 1:
        raise UsageError(f"a block of {how.block} holes: it takes at least one")
    shape, length = ids.shape, ids.shape[-1]
    open_BS = holes.to(ids.device, torch.bool).reshape(-1, length).clone()
    ids_BS = ids.long().reshape(open_BS.shape).masked_fill(open_BS, how.mask_token_id)
    if not open_BS.any():
        return ids_BS.view(shape)
    canvas: _WholeCanvas
    if isinstance(model.direction, BlockCausal):
        if segments is not None:
            raise UsageError("a rack trained in blocks fills one document at a time")
        block = model.direction.size
        pad = -length % block
        open_BS = torch.nn.functional.pad(open_BS, (0, pad), value=True)
        ids_BS = torch.nn.functional.pad(ids_BS, (0, pad), value=how.mask_token_id)
        groups_BS = (torch.arange(length + pad, device=ids.device) // block).expand_as(ids_BS)
        canvas = _BlockCanvas(replace(model, direction=BlockCausal(block)), how.exit_at)
    else:
        groups_BS = (open_BS.cumsum(1) - 1) // (how.block or length)
        segments_BS = None if segments is None else segments.to(ids.device).reshape(open_BS.shape)
        canvas = _WholeCanvas(model, how.exit_at, segments_BS)
    noise_BS = _random(open_BS, how.seed) if how.order == "random" else None
    plan = list(_plan(open_BS, groups_BS, min(how.steps, int(open_BS.sum(1).max()))))
    for step, (group, left) in enumerate(plan, 1):
        ours_BS = open_BS & (groups_BS == group)
        index_n = ours_BS.flatten().nonzero().squeeze(1)
        logits_nV = forbid(canvas.logits(ids_BS, open_BS, index_n, group), {how.mask_token_id, *how.forbidden})
        chosen_n = choose(logits_nV, how.temperature, how.seed, "fill", step)
        if noise_BS is None:
            sure_n = logits_nV.gather(1, chosen_n[:, None]).squeeze(1) - logits_nV.logsumexp(-1)
        else:
            sure_n = noise_BS.flatten()[index_n]
        sure_BS = torch.full(open_BS.shape, -torch.inf, device=ids.device).flatten().scatter(0, index_n, sure_n)
        guess_BS = ids_BS.flatten().scatter(0, index_n, chosen_n).view_as(ids_BS)
        # The k surest of each row; rows end together, whatever the number of their holes.
        keep_B = -(-ours_BS.sum(1) // left)
        order_BS = sure_BS.view_as(ids_BS).argsort(dim=1, descending=True, stable=True)
        rank_BS = order_BS.argsort(1)
        closing_BS = ours_BS & (rank_BS < keep_B[:, None])
        ids_BS = torch.where(closing_BS, guess_BS, ids_BS)
        open_BS = open_BS & ~closing_BS
        if callback is not None:
            now, still = ids_BS[:, :length], open_BS[:, :length]
            callback(FillStep(step, len(plan), now.reshape(shape).clone(), still.reshape(shape).clone()))
    return ids_BS[:, :length].reshape(shape)


def _random(open_BS: Tensor, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(derive_seed(seed, "fill order"))
    return torch.rand(open_BS.shape, generator=generator, device="cpu").to(open_BS.device)


def _plan(open_BS: Tensor, groups_BS: Tensor, steps: int) -> Iterator[tuple[int, int]]:
    """The steps as (group of holes, steps left for it): shared out by the groups' sizes, at least one for each."""
    numbers = torch.unique(groups_BS[open_BS]).tolist()
    sizes = [int((open_BS & (groups_BS == number)).sum(1).max()) for number in numbers]
    done = upto = 0
    for number, size in zip(numbers, sizes, strict=True):
        upto += size
        steps_here = max(1, min(size, -(-steps * upto // sum(sizes)) - done))
        done += steps_here
        for left in range(steps_here, 0, -1):
            yield number, left


class _WholeCanvas:
    """A canvas that every step goes over whole."""

    def __init__(
        self, model: LoadedModel, exit_at: Callable[[float], int] | None, segments_BS: Tensor | None = None
    ) -> None:
        self.model, self.exit_at, self.segments_BS = model, exit_at, segments_BS

    def logits(self, ids_BS: Tensor, open_BS: Tensor, index_n: Tensor, group: int) -> Tensor:
        """Logits at some positions, float32 [n, V].

        Args:
            ids_BS: The canvas.
            open_BS: What is masked on it.
            index_n: Indices into its flattened positions.
            group: Number of the group of holes that they are of.
        """
        return self._run(ids_BS, index_n, open_BS.float().mean(1), float(open_BS.float().mean()), None)

    def _run(self, ids_BS: Tensor, index_n: Tensor, time: Tensor, share: float, caches: Caches | None) -> Tensor:
        depth = None if self.exit_at is None or not len(index_n) else self.exit_at(share)
        return self.model.logits_at(
            ids_BS, index_n, segments_BS=self.segments_BS, time=time, caches=caches, exit_depth=depth
        )


class _BlockCanvas(_WholeCanvas):
    """A canvas of blocks: a step goes over one of them; what is finished goes into the caches, once."""

    caches: Caches | None = None

    def logits(self, ids_BS: Tensor, open_BS: Tensor, index_n: Tensor, group: int) -> Tensor:
        """Logits at some positions of block `group`."""
        direction = self.model.direction
        assert isinstance(direction, BlockCausal)
        size, length = direction.size, ids_BS.shape[1]
        if not self.model.keeps_cache:  # the same by going over everything up to the end of the block
            end = (group + 1) * size
            share_BS = open_BS[:, :end].float().view(len(ids_BS), -1, size).mean(2).repeat_interleave(size, 1)
            share = float(share_BS[:, -size:].mean())
            return self._run(ids_BS[:, :end], index_n // length * end + index_n % length, share_BS, share, None)
        if self.caches is None:
            self.caches = Caches()
        caches, start = self.caches, group * size
        if caches.length < start:
            caches.frozen = False
            finished_BS = ids_BS[:, caches.length : start]
            none_n = index_n[:0]
            self._run(finished_BS, none_n, torch.zeros(finished_BS.shape, device=ids_BS.device), 0.0, caches)
        caches.frozen = True
        part = slice(start, start + size)
        share_BS = open_BS[:, part].float().mean(1, keepdim=True).expand(-1, size)
        rows_n, places_n = index_n // length, index_n % length
        own_n = rows_n * size + places_n - start
        return self._run(ids_BS[:, part], own_n, share_BS, float(share_BS.mean()), caches)


@dataclass(frozen=True)
class Continuing:
    """How a prompt is continued.

    Args:
        temperature: 0 takes the likeliest token, 1 draws from the model.
        top_k: Draw among so many of the likeliest; None: all.
        seed: Of what is drawn.
        forbidden: Ids never produced: the mask token, say.
        stop_token_id: Ends a row, and stays; the row repeats it until all rows have ended.
        cache: Keep what attention needs of the tokens behind; False goes over all of them for each token.
    """

    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0
    forbidden: Collection[int] = ()
    stop_token_id: int | None = None
    cache: bool = True


def sample_causal(
    model: LoadedModel,
    prompt: Tensor,
    max_new_tokens: int,
    how: Continuing | None = None,
    *,
    lengths_B: Tensor | None = None,
    callback: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Continue a prompt token by token, going over the new token alone.

    Prompts of several lengths go together without padding: the shortest ends first, and what follows of the others is
    theirs and not drawn.

    Beyond the model's length the latest tokens are the context, which moves on with each token: nothing can be kept
    then, and every token goes over all of it.

    Args:
        model: What predicts; its direction is causal.
        prompt: [S] or [B, S], at least one token.
        max_new_tokens: Most tokens to add.
        how: How they are chosen; None: the likeliest.
        lengths_B: Tokens of each row's prompt, where they differ; what stands behind them plays no part. Each row gets
            `max_new_tokens`; behind them it repeats `stop_token_id`.
        callback: Called with the ids after each token.

    Returns:
        int64 [S + new] or [B, S + new], the prompt included.

    Raises:
        UsageError: An empty prompt, stages that were not trained causally, numbers out of range.
    """
    how = how or Continuing()
    if prompt.ndim not in (1, 2) or not prompt.numel():
        raise UsageError("a prompt needs at least one token")
    if max_new_tokens < 0 or (how.top_k is not None and how.top_k < 1):
        raise UsageError(f"max_new_tokens {max_new_tokens}, top_k {how.top_k}: out of range")
    given_BS = ids_BS = prompt.long().reshape(-1, prompt.shape[-1])
    shortest = longest = ids_BS.shape[1]
    if lengths_B is not None:
        shortest, longest = int(lengths_B.min()), int(lengths_B.max())
        if how.stop_token_id is None or not 1 <= shortest <= longest <= ids_BS.shape[1]:
            raise UsageError("prompts of several lengths need a stop_token_id, and each at least one of their tokens")
        ids_BS = ids_BS[:, :shortest]
    limit = model.max_seq_len
    caches = Caches() if how.cache and model.keeps_cache and isinstance(model.front, Front) else None
    ended_B = torch.zeros(len(ids_BS), dtype=torch.bool, device=ids_BS.device)
    for step in range(longest - shortest + max_new_tokens):
        if caches is not None and limit is not None and ids_BS.shape[1] > limit:
            caches = None
        context_BS = ids_BS if limit is None else ids_BS[:, -limit:]
        if caches is not None:
            context_BS = context_BS[:, caches.length :]
        last_B = torch.arange(1, len(ids_BS) + 1, device=ids_BS.device) * context_BS.shape[1] - 1
        none_B = torch.zeros(len(ids_BS), device=ids_BS.device)  # nothing is masked
        logits_BV = model.logits_at(context_BS, last_B, time=none_B, caches=caches)
        logits_BV = forbid(logits_BV, how.forbidden)
        if how.top_k is not None and how.top_k < logits_BV.shape[1]:
            least_B1 = logits_BV.topk(how.top_k).values[:, -1:]
            logits_BV.masked_fill_(logits_BV < least_B1, -torch.inf)
        next_B = choose(logits_BV, how.temperature, how.seed, "causal", step)
        at = ids_BS.shape[1]
        if how.stop_token_id is not None:
            if lengths_B is not None:
                ended_B |= at >= lengths_B + max_new_tokens
            next_B = next_B.masked_fill(ended_B, how.stop_token_id)
            stops_B = next_B == how.stop_token_id
            if lengths_B is not None and at < longest:
                next_B = torch.where(at < lengths_B, given_BS[:, at], next_B)
                stops_B &= at >= lengths_B
            ended_B |= stops_B
        ids_BS = torch.cat((ids_BS, next_B[:, None]), 1)
        if callback is not None:
            callback(ids_BS.view(-1) if prompt.ndim == 1 else ids_BS)
        if ended_B.all():
            break
    return ids_BS.view(-1) if prompt.ndim == 1 else ids_BS
