"""The whole model: the front makes vectors of tokens, stacks of blocks work on them, the head makes logits.

Shapes in names: B batch, S sequence, D d_model, V vocabulary, T width of the time features; `…` any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config.model import TIME_KNOTS, Direction, LearnedTime, ModelConfig, Sinusoidal
from stackwise.errors import UsageError
from stackwise.model import kinds
from stackwise.model.attention import Cache, is_paired
from stackwise.model.block import Block, Stack
from stackwise.model.layers import ACTIVATIONS, make_norm, too_long


class TimeEmbedding(nn.Module):
    """The masked share of a row as a vector: features of it, then two layers with SiLU between (arXiv 2006.11239).

    `sinusoidal`: sines and cosines at wavelengths from 1/1000 of the range to ten times it. `learned`: a table of
    vectors at even shares, linear in between.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kind = config.time_embedding
        assert isinstance(kind, Sinusoidal)
        self.width = kind.width
        self.table = nn.Embedding(TIME_KNOTS, self.width) if isinstance(kind, LearnedTime) else None
        self.up = nn.Linear(self.width, config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def features(self, time: Tensor) -> Tensor:
        """Shares in [0, 1], […], to […, T]."""
        if self.table is not None:
            place = time.clamp(0.0, 1.0) * (TIME_KNOTS - 1)
            low = place.floor().clamp(max=TIME_KNOTS - 2)
            within = (place - low)[..., None]
            index = low.long()
            features: Tensor = torch.lerp(self.table(index), self.table(index + 1), within.to(self.table.weight.dtype))
            return features
        half = -(-self.width // 2)
        steps = torch.arange(half, dtype=torch.float32, device=time.device) / max(1, half - 1)
        angle = 2000.0 * math.pi * time.float()[..., None] * torch.exp(-math.log(10_000.0) * steps)
        return torch.cat((angle.sin(), angle.cos()), -1)[..., : self.width]

    def forward(self, time: Tensor) -> Tensor:
        """Shares in [0, 1], […], to […, D]."""
        y: Tensor = self.out(F.silu(self.up(self.features(time).to(self.up.weight.dtype))))
        return y


class Front(nn.Module):
    """Token embedding, plus what the configuration asks for: learned positions, the first token type, a norm, time.

    Args:
        config: The rack's configuration.
        vocab_size: Token ids it knows.
        seq_len: Longest sample, where `config.max_seq_len` is None.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seq_len: int) -> None:
        super().__init__()
        self.max_seq_len = config.max_seq_len or seq_len
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.offset = config.position_offset
        rows = self.offset + self.max_seq_len
        self.positions = nn.Embedding(rows, config.d_model) if config.positions == "learned" else None
        self.types = nn.Embedding(config.token_types, config.d_model) if config.token_types else None
        self.norm = make_norm(config) if config.embedding_norm else None
        self.time = TimeEmbedding(config) if isinstance(config.time_embedding, Sinusoidal) else None

    def forward(
        self,
        ids_BS: Tensor,
        time: Tensor | None = None,
        *,
        start: int = 0,
        paired: bool = False,
        tasks: Tensor | None = None,
    ) -> Tensor:
        """Token ids (any integer dtype) [B, S] to [B, S, D] in the embedding's dtype.

        Args:
            ids_BS: Token ids.
            time: The masked share of each row [B], or what holds at each position [B, S]; unused where the front has
                no embedding of it.
            start: The first position.
            paired: The halves of a row are two copies of a sample, each from position `start` on.
            tasks: The task of each row [B], from 0; unused where tasks have no columns of their own.

        Raises:
            UsageError: A sample longer than the model takes; no time where one is needed.
        """
        length = ids_BS.shape[-1] // 2 if paired else ids_BS.shape[-1]
        if start + length > self.max_seq_len:
            raise too_long(start + length, self.max_seq_len)
        x_BSD: Tensor = self.embedding(ids_BS if ids_BS.dtype in (torch.int32, torch.int64) else ids_BS.long())
        if self.types is not None:
            x_BSD = x_BSD + self.types.weight[0]
        if self.positions is not None:
            places_SD = self.positions.weight[self.offset + start : self.offset + start + length]
            x_BSD = x_BSD + (places_SD.repeat(2, 1) if paired else places_SD)
        if self.norm is not None:
            x_BSD = self.norm(x_BSD)
        if self.time is not None:
            if time is None:
                raise UsageError("this front takes the masked share of each row as input", hint="pass time, [B]")
            embedded = self.time(time)
            x_BSD = x_BSD + (embedded[:, None] if time.ndim == 1 else embedded)
        return x_BSD


class Head(nn.Module):
    """Final norm, where the configuration has one, and output projection.

    A tied projection is the front's parameter and stays the front's: it is no parameter of the head, nor in its
    state dict, so no optimizer sees it twice and no file holds it twice. Its gradient arrives all the same. A plain
    tensor as `embedding` is used and moved along, but not trained.

    Args:
        config: The rack's configuration.
        vocab_size: Width of the logits.
        embedding: The projection [V, D] to share; None: a projection of its own.

    Raises:
        UsageError: An embedding of another shape.
    """

    projection: nn.Parameter | None
    bias: nn.Parameter | None
    """Added to the logits, [V]; None: nothing is."""
    fixed: Tensor | None

    def __init__(self, config: ModelConfig, vocab_size: int, embedding: Tensor | None = None) -> None:
        super().__init__()
        shape = (vocab_size, config.d_model)
        if embedding is not None and tuple(embedding.shape) != shape:
            raise UsageError(f"an embedding of shape {tuple(embedding.shape)} cannot be a head of shape {shape}")
        plain = not isinstance(config.head, kinds.LinearHead) or config.head.norm
        self.norm = make_norm(config) if plain else nn.Identity()
        projection = (
            nn.Parameter(nn.init.normal_(torch.empty(shape), std=config.init_std)) if embedding is None else None
        )
        self.register_parameter("projection", projection)
        self.register_parameter("bias", None)
        self.match: nn.Linear | None = None
        """From d_model to a teacher's width, where a stage is drawn to hidden states of another width."""
        is_parameter = isinstance(embedding, nn.Parameter)
        self.register_buffer("fixed", None if is_parameter else embedding, persistent=False)
        # In a tuple, where nn.Module does not look for parameters.
        self._shared: tuple[nn.Parameter, ...] = (embedding,) if isinstance(embedding, nn.Parameter) else ()

    @property
    def tied(self) -> bool:
        """Whether the projection belongs to another part."""
        return self.projection is None

    @property
    def weight(self) -> Tensor:
        """The projection [V, D], own or shared."""
        if self.projection is not None:
            return self.projection
        if self._shared:
            return self._shared[0]
        assert self.fixed is not None
        return self.fixed

    def share(self, embedding: nn.Parameter) -> None:
        """Project with another part's parameter [V, D]."""
        self.projection, self.fixed, self._shared = None, None, (embedding,)

    def untie(self) -> None:
        """Give a tied head a trainable projection of its own, starting as a copy."""
        if self.tied:
            self.projection = nn.Parameter(self.weight.detach().clone())
            self._shared, self.fixed = (), None

    def features(self, x: Tensor) -> Tensor:
        """What the projection is applied to: the normed input, […, D] to […, D]."""
        normed: Tensor = self.norm(x)
        return normed

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] to logits […, V]."""
        h, weight_VD = self.features(x), self.weight
        return F.linear(h.to(weight_VD.dtype), weight_VD, self.bias)


class TransformHead(Head):
    """BERT's masked-LM head: a layer, an activation, a norm, and the projection with a bias; perhaps a norm before all.

    Args:
        config: The rack's configuration.
        kind: The head's settings.
        vocab_size: Width of the logits.
        embedding: The projection [V, D] to share; None: a projection of its own.
    """

    def __init__(
        self, config: ModelConfig, kind: kinds.TransformHead, vocab_size: int, embedding: Tensor | None
    ) -> None:
        super().__init__(config, vocab_size, embedding)
        self.input_norm = make_norm(config) if kind.input_norm else nn.Identity()
        self.dense = nn.Linear(config.d_model, config.d_model, bias=kind.layer_bias)
        self.activation = kind.activation
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if kind.bias else None

    def features(self, x: Tensor) -> Tensor:
        inner: Tensor = self.input_norm(x).to(self.dense.weight.dtype)
        normed: Tensor = self.norm(ACTIVATIONS[self.activation](self.dense(inner)))
        return normed


class Rack(nn.Module):
    """The whole model.

    Args:
        front: Tokens to vectors.
        stacks: Lowest first.
        head: Vectors to logits.
    """

    def __init__(self, front: Front, stacks: Iterable[Stack], head: Head) -> None:
        super().__init__()
        self.front = front
        self.stacks: Iterable[Stack] = nn.ModuleList(stacks)  # type: ignore[assignment]
        self.head = head

    @property
    def blocks(self) -> list[nn.Module]:
        """Every block, lowest first, whatever stack it is in."""
        return [block for stack in self.stacks for block in stack.blocks]

    def hidden(
        self, ids_BS: Tensor, causal: Direction = False, segments_BS: Tensor | None = None, time: Tensor | None = None
    ) -> Tensor:
        """The vectors that enter the head, [B, S, D]; the arguments are those of `forward`."""
        x_BSD = enter(self.front, ids_BS, time, causal=causal)
        for stack in self.stacks:
            x_BSD = stack(x_BSD, causal=causal, segments_BS=segments_BS)
        return x_BSD

    def forward(
        self, ids_BS: Tensor, causal: Direction = False, segments_BS: Tensor | None = None, time: Tensor | None = None
    ) -> Tensor:
        """Token ids [B, S] to logits [B, S, V].

        Args:
            ids_BS: Token ids.
            causal: False: attention is bidirectional; True: no position sees those after it; or another direction.
            segments_BS: Integers; a position sees only those with its own value. None: it sees all.
            time: The masked share of each row, [B], where the front takes it.

        Raises:
            UsageError: A sample longer than the model takes; no time where one is needed.
        """
        logits_BSV: Tensor = self.head(self.hidden(ids_BS, causal, segments_BS, time))
        return logits_BSV


def enter(
    front: nn.Module,
    ids_BS: Tensor,
    time: Tensor | None = None,
    *,
    causal: Direction = False,
    start: int = 0,
    tasks: Tensor | None = None,
) -> Tensor:
    """Token ids through a front, [B, S, D]; another module than StackWise's own is given the ids alone.

    Args:
        front: Tokens to vectors.
        ids_BS: Token ids.
        time: The masked share of each row [B], or at each position [B, S].
        causal: The direction of attention, which says whether rows are pairs of copies.
        start: The first position.
        tasks: The task of each row [B], from 0.
    """
    if not isinstance(front, Front):
        x_BSD: Tensor = front(ids_BS)
        return x_BSD
    time = None if time is None else time.to(ids_BS.device)
    return front(ids_BS, time, start=start, paired=is_paired(causal), tasks=tasks)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class StageModules:
    """What evaluation and inference need of one stage, loaded. Drop it, and its memory is free."""

    depth: int
    """Its place in the schedule."""
    blocks: Sequence[nn.Module] = field(repr=False)
    """The blocks it holds, lowest first; only StackWise's own are given the direction and the documents."""
    head: Head | None = field(repr=False)
    """The head it trained with; None: rows only go through it."""
    causal: Direction = False
    """The direction of attention that it was trained with."""
    front: Front | None = field(default=None, repr=False)
    """Where the stage does not go on from the one before it: the front that it starts from."""
    beyond: Sequence[nn.Module] = field(default=(), repr=False)
    """Blocks between its own and its head, which nothing above it goes through."""

    def forward(
        self,
        x_BSD: Tensor,
        segments_BS: Tensor | None = None,
        *,
        direction: Direction | None = None,
        caches: Sequence[Cache] | None = None,
    ) -> Tensor:
        """The vectors that leave the stage, [B, S, D] to [B, S, D].

        Args:
            x_BSD: Those that enter it.
            segments_BS: Attention stays within equal values.
            direction: Another than it was trained with: without the pairs of training, say.
            caches: One for each block, of the positions in front.

        Raises:
            UsageError: Caches, and blocks that are not StackWise's own.
        """
        return self._run_blocks(self.blocks, x_BSD, segments_BS, direction, caches)

    def features(
        self, x_BSD: Tensor, segments_BS: Tensor | None = None, *, direction: Direction | None = None
    ) -> Tensor:
        """The vectors that enter its head, of those that leave it."""
        return self._run_blocks(self.beyond, x_BSD, segments_BS, direction, None)

    def _run_blocks(
        self,
        blocks: Sequence[nn.Module],
        x_BSD: Tensor,
        segments_BS: Tensor | None,
        direction: Direction | None,
        caches: Sequence[Cache] | None,
    ) -> Tensor:
        causal = self.causal if direction is None else direction
        if caches is not None:
            for block, cache in zip(blocks, caches, strict=True):
                if not isinstance(block, Block):
                    raise UsageError("a cache needs StackWise's own blocks", hint="pass cache=False")
                x_BSD = block(x_BSD, causal=causal, segments_BS=segments_BS, cache=cache)
            return x_BSD
        for block in blocks:
            if isinstance(block, Block | Stack):
                x_BSD = block(x_BSD, causal=causal, segments_BS=segments_BS)
            else:
                x_BSD = block(x_BSD)
        return x_BSD


def stages_of(rack: Rack, causal: Direction = False) -> list[StageModules]:
    """A whole rack as a single stage, for what takes stages."""
    return [StageModules(0, rack.blocks, rack.head, causal)]
