"""Attention: which position sees which, what is kept of earlier positions, multi-head and multi-head latent.

Shapes in names: B batch, S positions that ask, T positions that are asked (those kept in a cache, then the S),
D d_model, H heads, K key/value heads, E width of a head; of latent attention: C the latent, Q the queries' latent,
R the rotary part of a head; `…` any leading dimensions.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config import kinds
from stackwise.config.model import BlockCausal, Direction, ModelConfig
from stackwise.errors import UsageError
from stackwise.model.kinds import Latent, Projected, Windowed
from stackwise.model.layers import RMSNorm, Rotary
from stackwise.model.projections import weight_of


def sees(
    direction: Direction, q: Tensor, k: Tensor, length: int, window: int | None = None, both: bool = False
) -> Tensor:
    """Whether position q sees position k, bool in the shape that the two broadcast to.

    A window limits how far back a causal position sees. Of one that looks back alone, what is seen in both directions
    has none: a block of block-causal attention as a whole. So attention whose blocks grow to the row ends where
    bidirectional attention is. A window to both sides limits everything that is seen.

    Args:
        direction: The rule.
        q: int64 positions that ask.
        k: int64 positions that are asked.
        length: Positions of the row; of a paired row, both copies together.
        window: Positions that one sees back, itself among them; None: all.
        both: The window limits what is ahead as well.
    """
    if both and window is not None:
        half = length // 2 if is_paired(direction) else length
        return sees(direction, q, k, length) & ((q % half - k % half).abs() < window)
    if isinstance(direction, BlockCausal):
        half = length // 2 if direction.paired else length
        asks, key_block = q % half // direction.size, k % half // direction.size
        before = key_block < asks
        if window is not None:
            before = before & (q % half - k % half < window)
        if not direction.paired:
            return (asks == key_block) | before
        # Clean positions (the second half) are seen by blocks above, and by their own block's clean copy.
        same_half = (asks == key_block) & ((q >= half) == (k >= half))
        return same_half | ((k >= half) & before)
    if direction is False:
        return torch.ones_like(q == k)
    return k <= q if window is None else (k <= q) & (q - k < window)


@dataclass(frozen=True)
class AttentionPattern:
    """What the S newest of T positions see.

    Attributes:
        direction: The rule between positions.
        segments_BS: Integers; a position sees only those with its own value. None: no such limit.
        start: Positions in front of the S that ask, whose keys are kept.
        window: How far back a position sees (see `sees`); None: all the way.
        both: The window limits what is ahead as well.
    """

    direction: Direction
    segments_BS: Tensor | None = None
    start: int = 0
    window: int | None = None
    both: bool = False

    @property
    def plain(self) -> bool:
        """Whether a fused kernel needs no mask: all, or causal from the first position on."""
        if self.segments_BS is not None or self.direction is False:
            return self.segments_BS is None and not self._local
        return self.direction is True and self.start == 0 and self.window is None

    @property
    def _local(self) -> bool:
        """Whether a window limits what is seen in both directions."""
        return self.both and self.window is not None

    def mask(self, length: int, device: torch.device) -> Tensor | None:
        """Bool [B or 1, 1, S, T]; None where every position sees all T.

        Args:
            length: S.
            device: Where the mask is made.
        """
        mask_BSS = None
        if self.segments_BS is not None:
            mask_BSS = self.segments_BS[:, :, None] == self.segments_BS[:, None, :]
        looks_back = self.direction is True and self.window is None
        if looks_back and self.start == 0:
            if mask_BSS is None:
                mask_BSS = torch.ones((1, length, length), dtype=torch.bool, device=device)
            return mask_BSS.tril()[:, None]
        if (self.direction is not False or self._local) and not (looks_back and length == 1):
            places = torch.arange(self.start + length, device=device)
            asks, keys = places[self.start :, None], places[None]
            rule = sees(self.direction, asks, keys, len(places), self.window, self.both)[None]
            mask_BSS = rule if mask_BSS is None else mask_BSS & rule
        return None if mask_BSS is None else mask_BSS[:, None]


def attention_mask(segments_BS: Tensor, causal: Direction) -> Tensor:
    """Which position sees which, bool [B, 1, S, S]: those of its own segment, as far as the direction lets it."""
    mask_B1SS = AttentionPattern(causal, segments_BS).mask(segments_BS.shape[1], segments_BS.device)
    assert mask_B1SS is not None
    return mask_B1SS


class Cache:
    """The memory of one block: keys and values, or a latent (`join`), or a state of fixed size (`replace`).

    For generation alone: nothing in it has a gradient.

    Attributes:
        length: Positions kept.
        frozen: Read without keeping what is new: for the passes over a block that is still being written.
    """

    def __init__(self) -> None:
        self.length = 0
        self.frozen = False
        self.kept: tuple[Tensor, ...] = ()

    def join(self, *new: Tensor) -> tuple[Tensor, ...]:
        """What is kept, followed by what is new: […, length + S, width] each, from […, S, width]."""
        count = new[0].shape[-2]
        end = self.length + count
        if not self.kept or self.kept[0].shape[-2] < end:
            # Room doubles, so that a token costs its own copy and not one of all that came before it.
            room = max(64, 1 << (end - 1).bit_length())
            grown = tuple(t.new_empty((*t.shape[:-2], room, t.shape[-1])) for t in new)
            for old, wide in zip(self.kept, grown, strict=False):
                wide[..., : self.length, :] = old[..., : self.length, :]
            self.kept = grown
        for wide, tensor in zip(self.kept, new, strict=True):
            wide[..., self.length : end, :] = tensor
        if not self.frozen:
            self.length = end
        return tuple(wide[..., :end, :] for wide in self.kept)

    def replace(self, count: int, *state: Tensor) -> None:
        """A new state, after `count` more positions."""
        if not self.frozen:
            self.kept, self.length = state, self.length + count


class Caches:
    """The caches of a rack's blocks, lowest first; one is made when its block is first met."""

    def __init__(self) -> None:
        self._each: list[Cache] = []
        self.frozen = False

    @property
    def length(self) -> int:
        """Positions kept."""
        return self._each[0].length if self._each else 0

    def of(self, first: int, count: int) -> list[Cache]:
        """Those of `count` blocks from block `first` on."""
        while len(self._each) < first + count:
            self._each.append(Cache())
        some = self._each[first : first + count]
        for cache in some:
            cache.frozen = self.frozen
        return some


class SelfAttention(nn.Module, abc.ABC):
    """What attentions share: how they are called, which position sees which, where rotary tables come from.

    Args:
        config: The rack's configuration, as this block has it (`ModelConfig.at`).
        kind: The attention's settings.

    Raises:
        UsageError: Heads that do not divide the width, or key/value heads that do not divide the heads; a rotary part
            of odd width.
    """

    o: nn.Linear

    def __init__(self, config: ModelConfig, kind: kinds.Attention) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.n_heads, kind.key_heads(config), config.head_dim
        if config.head_size is None and config.d_model % self.heads:
            raise UsageError(f"model.n_heads {self.heads} does not divide model.d_model {config.d_model}")
        if self.heads % self.kv_heads:
            raise UsageError(f"model.attention.kv_heads {self.kv_heads} does not divide model.n_heads {self.heads}")
        self.window = kind.window if isinstance(kind, Windowed) else None
        self.both_sides = isinstance(kind, Windowed) and kind.window_sides == "both"
        turned = kind.rotary_width(config)
        scaling = config.rope_scaling
        self.rotary = Rotary(turned, kind.rope_theta(config), config.max_seq_len, scaling) if turned else None

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
        S, start = x_BSD.shape[1], 0 if cache is None else cache.length
        # A window as wide as the row is none, and leaves the kernel without a mask.
        window = None if self.window is None or self.window >= start + S else self.window
        pattern = AttentionPattern(causal, segments_BS, start, window, self.both_sides)
        tables = None if self.rotary is None else self.rotary.copies(S, start, is_paired(causal))
        y_BHSE = self.heads_of(x_BSD, tables, pattern, cache)
        y_BSD: Tensor = self.o(y_BHSE.transpose(1, 2).flatten(2))
        return y_BSD

    @abc.abstractmethod
    def heads_of(
        self, x_BSD: Tensor, tables: tuple[Tensor, Tensor] | None, pattern: AttentionPattern, cache: Cache | None
    ) -> Tensor:
        """What each head brings together, [B, H, S, E].

        Args:
            x_BSD: Normed input.
            tables: Rotary tables of its positions; None: they are learned.
            pattern: Which position sees which.
            cache: The positions in front, which these join.
        """


class SoftmaxAttention(SelfAttention):
    """Multi-head attention (arXiv 1706.03762), grouped-query (arXiv 2305.13245) where there are fewer key/value heads.

    Raises:
        UsageError: As `SelfAttention`.
    """

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear

    def __init__(self, config: ModelConfig, kind: Projected) -> None:
        super().__init__(config, kind)
        for name, matrix in kind.matrices(config).items():  # q, k, v, o
            setattr(self, name, nn.Linear(matrix.inputs, matrix.outputs, bias=matrix.bias))
        self.q_norm = RMSNorm(self.width, eps=config.norm_eps) if kind.qk_norm else None
        self.k_norm = RMSNorm(self.width, eps=config.norm_eps) if kind.qk_norm else None

    def heads_of(
        self, x_BSD: Tensor, tables: tuple[Tensor, Tensor] | None, pattern: AttentionPattern, cache: Cache | None
    ) -> Tensor:
        B, S, _ = x_BSD.shape
        q_BSHE = self.q(x_BSD).view(B, S, -1, self.width)  # of the heads that this rank has
        k_BSKE = self.k(x_BSD).view(B, S, -1, self.width)
        v_BSKE = self.v(x_BSD).view(B, S, -1, self.width)
        if self.q_norm is not None and self.k_norm is not None:
            # Under autocast the norms are float32 and the matrices are not: fused attention wants one dtype.
            q_BSHE, k_BSKE = self.q_norm(q_BSHE).to(v_BSKE.dtype), self.k_norm(k_BSKE).to(v_BSKE.dtype)
        if self.rotary is not None and tables is not None:
            q_BSHE, k_BSKE = self.rotary.rotate(q_BSHE, tables), self.rotary.rotate(k_BSKE, tables)
        return self.mix(q_BSHE.transpose(1, 2), k_BSKE.transpose(1, 2), v_BSKE.transpose(1, 2), pattern, cache)

    def mix(
        self, q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, pattern: AttentionPattern, cache: Cache | None
    ) -> Tensor:
        """What each head brings together, [B, H, S, E]."""
        if cache is not None:
            k_BKSE, v_BKSE = cache.join(k_BKSE, v_BKSE)
        return attend(q_BHSE, k_BKSE, v_BKSE, pattern)


def is_paired(direction: Direction) -> bool:
    """Whether a row is two copies of a sample."""
    return isinstance(direction, BlockCausal) and direction.paired


def attend(
    q_BHSE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, pattern: AttentionPattern, scale: float | None = None
) -> Tensor:
    """Softmax attention of queries over keys and values, [B, H, S, E].

    Args:
        q_BHSE: Queries.
        k_BKTE: Keys; K divides H.
        v_BKTE: Values.
        pattern: Which position sees which.
        scale: On the scores; None: 1/sqrt(E).
    """
    if pattern.start and pattern.direction is True and pattern.window is not None:
        # Of what is kept no position sees more than a window in front of the first that asks.
        start = min(pattern.start, pattern.window - 1)
        first = pattern.start - start
        k_BKTE, v_BKTE = k_BKTE[:, :, first:], v_BKTE[:, :, first:]
        window = None if q_BHSE.shape[2] == 1 else pattern.window
        pattern = replace(pattern, start=start, window=window)
    grouped = q_BHSE.shape[1] != k_BKTE.shape[1]
    if pattern.plain:
        return F.scaled_dot_product_attention(
            q_BHSE, k_BKTE, v_BKTE, is_causal=bool(pattern.direction), scale=scale, enable_gqa=grouped
        )
    if q_BHSE.is_cuda and torch.compiler.is_compiling() and pattern.start == 0 and q_BHSE.shape[-1] >= 16:
        return flex(q_BHSE, k_BKTE, v_BKTE, pattern, scale)
    mask = pattern.mask(q_BHSE.shape[2], q_BHSE.device)
    if grouped and mask is not None and q_BHSE.is_cuda:
        # CUDA's kernels that take a mask know no groups: without this the whole score matrix would be made.
        repeats = q_BHSE.shape[1] // k_BKTE.shape[1]
        k_BKTE, v_BKTE = k_BKTE.repeat_interleave(repeats, 1), v_BKTE.repeat_interleave(repeats, 1)
        grouped = False
    return F.scaled_dot_product_attention(q_BHSE, k_BKTE, v_BKTE, attn_mask=mask, scale=scale, enable_gqa=grouped)


def flex(
    q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, pattern: AttentionPattern, scale: float | None = None
) -> Tensor:
    """The same by FlexAttention (arXiv 2412.05496), which skips the tiles in which nothing is seen.

    It pays inside a compiled block on a GPU, where it becomes one kernel; outside one it makes the whole score matrix.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    segments_BS, length = pattern.segments_BS, q_BHSE.shape[2]

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = sees(pattern.direction, q, k, length, pattern.window, pattern.both)
        return seen if segments_BS is None else seen & (segments_BS[b, q] == segments_BS[b, k])

    batch = None if segments_BS is None else len(q_BHSE)
    blocks = create_block_mask(rule, batch, None, length, length, device=str(q_BHSE.device))
    grouped = q_BHSE.shape[1] != k_BKSE.shape[1]
    return flex_attention(q_BHSE, k_BKSE, v_BKSE, block_mask=blocks, scale=scale, enable_gqa=grouped)


class LatentAttention(SelfAttention):
    """Low-rank joint compression of keys and values, with the rotary positions in dimensions of their own.

    The layers are the paper's matrices (equations 9 to 19): `kv_down` W^DKV, `k_up` W^UK, `v_up` W^UV, `k_rotary`
    W^KR, `q_down` W^DQ, `q_up` W^UQ, `q_rotary` W^QR, `o` W^O, with its norms behind the compressions (section 3.1.2).
    Only `o` has a bias where the configuration asks for biases. A cache holds the latent and the one rotary key.

    Raises:
        UsageError: As `SelfAttention`.
    """

    def __init__(self, config: ModelConfig, kind: Latent) -> None:
        super().__init__(config, kind)
        d, inner = config.d_model, kind.q_rank or config.d_model
        self.rank, self.turned = kind.latent_rank(config), kind.rotary_width(config)
        self.q_down = nn.Linear(d, inner, bias=False) if kind.q_rank else None
        self.q_norm = RMSNorm(inner, eps=config.norm_eps) if kind.q_rank else None
        self.q_up = nn.Linear(inner, self.heads * self.width, bias=False)
        self.kv_down = nn.Linear(d, self.rank, bias=False)
        self.kv_norm = RMSNorm(self.rank, eps=config.norm_eps)
        self.k_up = nn.Linear(self.rank, self.heads * self.width, bias=False)
        self.v_up = nn.Linear(self.rank, self.heads * self.width, bias=False)
        self.o = nn.Linear(self.heads * self.width, d, bias=config.bias)
        self.q_rotary = nn.Linear(inner, self.heads * self.turned, bias=False) if self.turned else None
        self.k_rotary = nn.Linear(d, self.turned, bias=False) if self.turned else None
        self.scale = (self.width + self.turned) ** -0.5

    def heads_of(
        self, x_BSD: Tensor, tables: tuple[Tensor, Tensor] | None, pattern: AttentionPattern, cache: Cache | None
    ) -> Tensor:
        B, S, _ = x_BSD.shape
        c_BSQ = x_BSD
        if self.q_down is not None and self.q_norm is not None:
            c_BSQ = self.q_norm(self.q_down(x_BSD))
        q_BHSE = self._heads(self.q_up(c_BSQ))
        c_B1SC = self.kv_norm(self.kv_down(x_BSD))[:, None]
        if tables is not None and self.rotary is not None and self.q_rotary is not None and self.k_rotary is not None:
            q_BSHR = self.q_rotary(c_BSQ).view(B, S, self.heads, self.turned)
            q_BHSR = self.rotary.rotate(q_BSHR, tables).transpose(1, 2)
            k_B1SR = self.rotary.rotate(self.k_rotary(x_BSD).view(B, S, 1, self.turned), tables).transpose(1, 2)
        else:
            q_BHSR, k_B1SR = q_BHSE[..., :0], c_B1SC[..., :0]
        if cache is not None:
            # Under autocast the norm is float32 and the matrices are not: what is kept is what they would be given.
            dtype = q_BHSE.dtype
            c_B1SC, k_B1SR = cache.join(c_B1SC.to(dtype), k_B1SR.to(dtype))
        if pattern.start and type(self.k_up) is type(self.v_up) is nn.Linear:
            return self._absorbed(q_BHSE, q_BHSR, c_B1SC, k_B1SR, pattern)
        k_BHTE, v_BHTE = self._heads(self.k_up(c_B1SC[:, 0])), self._heads(self.v_up(c_B1SC[:, 0]))
        k_BHTR = k_B1SR.expand(-1, self.heads, -1, -1)
        q, k = torch.cat((q_BHSE, q_BHSR), -1), torch.cat((k_BHTE, k_BHTR.to(k_BHTE.dtype)), -1)
        # Fused kernels want values as wide as keys.
        return attend(q, k, F.pad(v_BHTE, (0, self.turned)), pattern, self.scale)[..., : self.width]

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, self.width).transpose(1, 2)

    def _absorbed(
        self, q_BHSE: Tensor, q_BHSR: Tensor, c_B1TC: Tensor, k_B1TR: Tensor, pattern: AttentionPattern
    ) -> Tensor:
        """The same without making keys and values: `k_up` goes into the queries, `v_up` behind the sum."""
        up_HEC = weight_of(self.k_up, q_BHSE.dtype).view(self.heads, self.width, self.rank)
        down_HEC = weight_of(self.v_up, q_BHSE.dtype).view(self.heads, self.width, self.rank)
        q = torch.cat((torch.einsum("bhse,hec->bhsc", q_BHSE, up_HEC), q_BHSR), -1)
        kept = torch.cat((c_B1TC, k_B1TR), -1)
        y_BHSC = attend(q, kept, kept, pattern, self.scale)[..., : self.rank]
        return torch.einsum("bhsc,hec->bhse", y_BHSC, down_HEC)
