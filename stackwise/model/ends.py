"""The two ends of a rack: the front makes vectors of tokens, the head logits of vectors.

Shapes in names: B batch, S sequence, D d_model, V vocabulary; `…` any leading dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config.schema import ModelConfig
from stackwise.errors import UsageError
from stackwise.model.layers import make_norm, too_long


class Front(nn.Module):
    """Token embedding, plus a learned table of positions where the configuration asks for one.

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

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Token ids (any integer dtype) [B, S] to [B, S, D] in the embedding's dtype.

        Raises:
            UsageError: A sample longer than the model takes.
        """
        length = ids_BS.shape[-1]
        if length > self.max_seq_len:
            raise too_long(length, self.max_seq_len)
        x_BSD: Tensor = self.embedding(ids_BS if ids_BS.dtype in (torch.int32, torch.int64) else ids_BS.long())
        return x_BSD if self.positions is None else x_BSD + self.positions.weight[:length]


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
