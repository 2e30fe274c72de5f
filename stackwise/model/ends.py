"""The two ends of a rack: the front makes vectors of tokens, the head logits of vectors.

Shapes in names: B batch, S sequence, D d_model, V vocabulary, T width of the time features; `…` any leading dimensions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config.model import TIME_KNOTS, ModelConfig
from stackwise.errors import UsageError
from stackwise.model.layers import make_norm, too_long


class TimeEmbedding(nn.Module):
    """The masked share of a row as a vector: features of it, then two layers with SiLU between (arXiv 2006.11239).

    `sinusoidal`: sines and cosines at wavelengths from 1/1000 of the range to ten times it. `learned`: a table of
    vectors at even shares, linear in between.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width = config.time_embedding_dim
        self.table = nn.Embedding(TIME_KNOTS, self.width) if config.time_embedding == "learned" else None
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
    """Token embedding, plus a learned table of positions, plus an embedding of time, where the configuration asks so.

    Args:
        config: The rack's configuration.
        vocab_size: Token ids it knows.
        seq_len: Longest sample, where `config.max_seq_len` is None.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seq_len: int) -> None:
        super().__init__()
        self.max_seq_len = config.max_seq_len or seq_len
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.positions = nn.Embedding(self.max_seq_len, config.d_model) if config.positions == "learned" else None
        self.time = TimeEmbedding(config) if config.time_embedding != "none" else None

    def forward(self, ids_BS: Tensor, time: Tensor | None = None, *, start: int = 0, paired: bool = False) -> Tensor:
        """Token ids (any integer dtype) [B, S] to [B, S, D] in the embedding's dtype.

        Args:
            ids_BS: Token ids.
            time: The masked share of each row [B], or what holds at each position [B, S]; unused where the front has
                no embedding of it.
            start: The first position.
            paired: The halves of a row are two copies of a sample, each from position `start` on.

        Raises:
            UsageError: A sample longer than the model takes; no time where one is needed.
        """
        length = ids_BS.shape[-1] // 2 if paired else ids_BS.shape[-1]
        if start + length > self.max_seq_len:
            raise too_long(start + length, self.max_seq_len)
        x_BSD: Tensor = self.embedding(ids_BS if ids_BS.dtype in (torch.int32, torch.int64) else ids_BS.long())
        if self.positions is not None:
            places_SD = self.positions.weight[start : start + length]
            x_BSD = x_BSD + (places_SD.repeat(2, 1) if paired else places_SD)
        if self.time is not None:
            if time is None:
                raise UsageError("this front takes the masked share of each row as input", hint="pass time, [B]")
            embedded = self.time(time)
            x_BSD = x_BSD + (embedded[:, None] if time.ndim == 1 else embedded)
        return x_BSD


class Head(nn.Module):
    """Final norm and output projection.

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
    fixed: Tensor | None

    def __init__(self, config: ModelConfig, vocab_size: int, embedding: Tensor | None = None) -> None:
        super().__init__()
        shape = (vocab_size, config.d_model)
        if embedding is not None and tuple(embedding.shape) != shape:
            raise UsageError(f"an embedding of shape {tuple(embedding.shape)} cannot be a head of shape {shape}")
        self.norm = make_norm(config)
        own = nn.Parameter(nn.init.normal_(torch.empty(shape), std=config.init_std)) if embedding is None else None
        self.register_parameter("projection", own)
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
        return F.linear(h.to(weight_VD.dtype), weight_VD)
