"""The rack's settings, and the sizes that follow from them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from stackwise.config.fields import Positive, Probability, Section, Size, Small
from stackwise.config.kinds import TIME_EMBEDDINGS, Attention, FeedForward, Kind
from stackwise.registry import Registry

TIME_KNOTS = 65
"""Shares of masked positions that a learned time embedding has a vector for, evenly from 0 to 1."""


class TimeEmbedding(Kind):
    """How the masked share of a row is an input."""

    registry: ClassVar[Registry[Any]] = TIME_EMBEDDINGS
    tag: ClassVar[str] = "kind"
    default: ClassVar[str] = "none"

    def parameters(self, d_model: int) -> int:
        """Parameters of it in the front."""
        return 0


class NoTime(TimeEmbedding):
    """The share is no input."""


class Sinusoidal(TimeEmbedding):
    """Sines and cosines of the share, and two layers."""

    width: Size = Field(256, description="width of the features, which two layers take to d_model")

    def parameters(self, d_model: int) -> int:
        """See `TimeEmbedding.parameters`."""
        return self.width * d_model + d_model + d_model * d_model + d_model


class LearnedTime(Sinusoidal):
    """A table of vectors at even shares, linear in between, and two layers."""

    def parameters(self, d_model: int) -> int:
        """See `TimeEmbedding.parameters`."""
        return super().parameters(d_model) + TIME_KNOTS * self.width


class ArchitectureConfig(Section):
    """How blocks make stacks, and stacks the rack."""

    n_stacks: Small | None = Field(None, description="stacks in the rack; null: training.progressive.max_stacks")
    blocks_per_stack: Small = Field(1, description="blocks (transformer layers) in a stack")


class ModelConfig(Section):
    """The rack: front, blocks, head."""

    vocab_size: Size | None = Field(None, description="token ids that the model knows; null: the tokenizer's")
    d_model: Size = Field(256, description="width of the residual stream")
    n_heads: Size = Field(4, description="attention heads; they divide d_model")
    d_ff: Size | None = Field(
        None, description="width inside the feed-forward; null: 4 d_model (gelu), 8/3 d_model rounded up to 32 (swiglu)"
    )
    architecture: ArchitectureConfig = Field(default_factory=lambda: ArchitectureConfig())
    attention: Attention = Field(
        default_factory=lambda: Attention.of(Attention.default),
        description="mha (multi-head), {kind: gqa, kv_heads: N} (grouped-query), {kind: mla} (multi-head latent), "
        "{kind: linear} (a feature map for the softmax)",
    )
    time_embedding: TimeEmbedding = Field(
        default_factory=lambda: TimeEmbedding.of(TimeEmbedding.default),
        description="the masked share of a row as an input, embedded and added by the front: none, sinusoidal, or "
        "learned; {kind: sinusoidal, width: 512}",
    )
    norm: Literal["rmsnorm", "layernorm"] = Field(
        "rmsnorm", description="the norms of blocks and head: rmsnorm, or layernorm"
    )
    norm_eps: Positive = Field(1e-5, description="added to the variance inside a norm")
    positions: Literal["rope", "learned"] = Field("rope", description="rotary, or a learned table added by the front")
    rope_theta: Positive = Field(10_000.0, description="base of the rotary wavelengths")
    ffn: FeedForward = Field(
        default_factory=lambda: FeedForward.of(FeedForward.default),
        description="the feed-forward of a block: swiglu (gated), or gelu",
    )
    bias: bool = Field(False, description="biases in linear layers")
    dropout: Probability = Field(0.0, description="dropout after attention and feed-forward, in training")
    tie_embeddings: bool = Field(
        True, description="the head projects with the token embedding; false: each stage has a projection of its own"
    )
    max_seq_len: Size | None = Field(None, description="longest sample the model takes; null: training.seq_len")
    init_std: Positive = Field(0.02, description="standard deviation of fresh weights")

    @property
    def n_blocks(self) -> int:
        """Blocks in the whole rack."""
        return (self.architecture.n_stacks or 1) * self.architecture.blocks_per_stack

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.attention.key_heads(self)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def ffn_width(self) -> int:
        """Width inside the feed-forward, resolved."""
        return self.d_ff or self.ffn.width(self.d_model)

    @property
    def block_parameters(self) -> int:
        """Parameters in one block."""
        norms = 2 * self.d_model * (2 if self.norm == "layernorm" else 1)
        return self.attention.parameters(self) + self.ffn.parameters(self) + norms

    @property
    def time_parameters(self) -> int:
        """Parameters of the front's time embedding."""
        return self.time_embedding.parameters(self.d_model)

    def specification(self) -> dict[str, Any]:
        """What of it shapes a forward pass beside the weights; settings without effect are left out."""
        own = self.model_dump(
            include={"d_model", "n_heads", "norm", "norm_eps", "positions", "bias"}
            | ({"max_seq_len"} if self.positions == "learned" else {"rope_theta"})
        )
        own |= {"d_ff": self.ffn_width}
        own |= {
            "attention": self.attention.specification(self) | self.attention.code,
            "ffn": self.ffn.specification(self) | self.ffn.code,
        }
        return own | {"time_embedding": self.time_embedding.plain()}
