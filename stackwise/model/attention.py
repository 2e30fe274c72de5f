"""Softmax attention, multi-head or grouped-query.

Shapes in names: B batch, S positions that ask, T positions that are asked, D d_model, H heads, K key/value heads,
E width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config.direction import BlockCausal, Direction
from stackwise.config.model import ModelConfig
from stackwise.errors import UsageError
from stackwise.model.cache import Cache
from stackwise.model.layers import Rotary
from stackwise.model.sight import Sight, sees


class Attention(nn.Module):
    """Multi-head attention (arXiv 1706.03762), grouped-query (arXiv 2305.13245) where there are fewer key/value heads.

    Raises:
        UsageError: Heads that do not divide the width, or key/value heads that do not divide the heads.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, self.heads, self.kv_heads = config.d_model, config.n_heads, config.kv_heads
        if d % self.heads:
            raise UsageError(f"model.n_heads {self.heads} does not divide model.d_model {d}")
        if self.heads % self.kv_heads:
            raise UsageError(f"model.n_kv_heads {self.kv_heads} does not divide model.n_heads {self.heads}")
        self.width = d // self.heads
        self.q = nn.Linear(d, d, bias=config.bias)
        self.k = nn.Linear(d, self.kv_heads * self.width, bias=config.bias)
        self.v = nn.Linear(d, self.kv_heads * self.width, bias=config.bias)
        self.o = nn.Linear(d, d, bias=config.bias)
        self.rotary = Rotary(self.width, config.rope_theta, config.max_seq_len) if config.positions == "rope" else None

    def forward(
        self,
        x_BSD: Tensor,
        *,
        causal: Direction = False,
        segments_BS: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend. [B, S, D] to [B, S, D].

        Args:
            x_BSD: Normed input.
            causal: The direction.
            segments_BS: A position sees only those with its own value; None: no such limit.
            cache: The positions in front of these, which these join; None: there are none.
        """
        B, S, D = x_BSD.shape
        start = 0 if cache is None else cache.length
        q_BSHE = self.q(x_BSD).view(B, S, self.heads, self.width)
        k_BSKE = self.k(x_BSD).view(B, S, self.kv_heads, self.width)
        v_BSKE = self.v(x_BSD).view(B, S, self.kv_heads, self.width)
        if self.rotary is not None:
            tables = self.rotary.copies(S, start, is_paired(causal))
            q_BSHE, k_BSKE = self.rotary.rotate(q_BSHE, tables), self.rotary.rotate(k_BSKE, tables)
        q_BHSE, k_BKSE, v_BKSE = q_BSHE.transpose(1, 2), k_BSKE.transpose(1, 2), v_BSKE.transpose(1, 2)
        y_BHSE = self.mix(q_BHSE, k_BKSE, v_BKSE, Sight(causal, segments_BS, start), cache)
        y_BSD: Tensor = self.o(y_BHSE.transpose(1, 2).reshape(B, S, D))
        return y_BSD

    def mix(self, q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, sight: Sight, cache: Cache | None) -> Tensor:
        """What each head brings together, [B, H, S, E]."""
        if cache is not None:
            k_BKSE, v_BKSE = cache.join(k_BKSE, v_BKSE)
        return attend(q_BHSE, k_BKSE, v_BKSE, sight)


def is_paired(direction: Direction) -> bool:
    """Whether a row is two copies of a sample."""
    return isinstance(direction, BlockCausal) and direction.paired


def attend(q_BHSE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, sight: Sight, scale: float | None = None) -> Tensor:
    """Softmax attention of queries over keys and values, [B, H, S, E].

    Args:
        q_BHSE: Queries.
        k_BKTE: Keys; K divides H.
        v_BKTE: Values.
        sight: Which position sees which.
        scale: On the scores; None: 1/sqrt(E).
    """
    grouped = q_BHSE.shape[1] != k_BKTE.shape[1]
    if sight.plain:
        return F.scaled_dot_product_attention(
            q_BHSE, k_BKTE, v_BKTE, is_causal=bool(sight.direction), scale=scale, enable_gqa=grouped
        )
    if q_BHSE.is_cuda and torch.compiler.is_compiling() and sight.start == 0 and q_BHSE.shape[-1] >= 16:
        return flex(q_BHSE, k_BKTE, v_BKTE, sight, scale)
    mask = sight.mask(q_BHSE.shape[2], q_BHSE.device)
    if grouped and mask is not None and q_BHSE.is_cuda:
        # CUDA's kernels that take a mask know no groups: without this the whole score matrix would be made.
        repeats = q_BHSE.shape[1] // k_BKTE.shape[1]
        k_BKTE, v_BKTE = k_BKTE.repeat_interleave(repeats, 1), v_BKTE.repeat_interleave(repeats, 1)
        grouped = False
    return F.scaled_dot_product_attention(q_BHSE, k_BKTE, v_BKTE, attn_mask=mask, scale=scale, enable_gqa=grouped)


def flex(q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, sight: Sight, scale: float | None = None) -> Tensor:
    """The same by FlexAttention (arXiv 2412.05496), which skips the tiles in which nothing is seen.

    It pays inside a compiled block on a GPU, where it becomes one kernel; by itself it makes the whole score matrix.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    segments_BS, length = sight.segments_BS, q_BHSE.shape[2]

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = sees(sight.direction, q, k, length)
        return seen if segments_BS is None else seen & (segments_BS[b, q] == segments_BS[b, k])

    batch = None if segments_BS is None else len(q_BHSE)
    blocks = create_block_mask(rule, batch, None, length, length, device=str(q_BHSE.device))
    grouped = q_BHSE.shape[1] != k_BKSE.shape[1]
    return flex_attention(q_BHSE, k_BKSE, v_BKSE, block_mask=blocks, scale=scale, enable_gqa=grouped)
