"""The rack's settings, and the sizes that follow from them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from stackwise.config.fields import Positive, PositiveInt, Probability, Section

MLA_SETTINGS = ("kv_rank", "q_rank", "rope_head_dim")
LINEAR_SETTINGS = ("feature_map", "random_features")
TIME_KNOTS = 65
"""Shares of masked positions that a learned time embedding has a vector for, evenly from 0 to 1."""


class ArchitectureConfig(Section):
    """How blocks make stacks, and stacks the rack."""

    n_stacks: PositiveInt | None = Field(None, description="stacks in the rack; null: training.progressive.max_stacks")
    blocks_per_stack: PositiveInt = Field(1, description="blocks (transformer layers) in a stack")


class ModelConfig(Section):
    """The rack: front, blocks, head."""

    vocab_size: PositiveInt | None = Field(None, description="token ids that the model knows; null: the tokenizer's")
    d_model: PositiveInt = Field(256, description="width of the residual stream")
    n_heads: PositiveInt = Field(4, description="attention heads; they divide d_model")
    n_kv_heads: PositiveInt | None = Field(
        None, description="key and value heads (grouped-query attention); null: n_heads"
    )
    d_ff: PositiveInt | None = Field(
        None, description="width inside the feed-forward; null: 4 d_model (gelu), 8/3 d_model rounded up to 32 (swiglu)"
    )
    architecture: ArchitectureConfig = Field(default_factory=lambda: ArchitectureConfig())
    attention: Literal["mha", "gqa", "mla", "linear"] | None = Field(
        None,
        description="mha (multi-head), gqa (grouped-query), mla (multi-head latent), linear (a feature map for the "
        "softmax); null: mha, or gqa where n_kv_heads is less than n_heads",
    )
    kv_rank: PositiveInt | None = Field(
        None,
        description="attention mla: width of the vector that all keys and values are made from; null: 4 heads' "
        "width, at most d_model",
    )
    q_rank: PositiveInt | None = Field(
        None, description="attention mla: width of the vector that queries are made from; null: the input itself"
    )
    rope_head_dim: PositiveInt | None = Field(
        None, description="attention mla: width of a head's rotary part, an even number; null: half a head's"
    )
    feature_map: Literal["elu", "relu", "performer"] = Field(
        "elu", description="attention linear: what stands for the softmax: elu (+ 1), relu, performer (random features)"
    )
    random_features: PositiveInt | None = Field(
        None, description="attention linear, feature_map performer: number of features; null: a head's width"
    )
    time_embedding: Literal["none", "sinusoidal", "learned"] = Field(
        "none",
        description="the masked share of a row as an input, embedded and added by the front: sinusoidal or learned",
    )
    time_embedding_dim: PositiveInt = Field(
        256, description="width of the time embedding's features, which two layers take to d_model"
    )
    norm: Literal["rmsnorm", "layernorm"] = Field(
        "rmsnorm", description="the norms of blocks and head: rmsnorm, or layernorm"
    )
    norm_eps: Positive = Field(1e-5, description="added to the variance inside a norm")
    positions: Literal["rope", "learned"] = Field("rope", description="rotary, or a learned table added by the front")
    rope_theta: Positive = Field(10_000.0, description="base of the rotary wavelengths")
    ffn: Literal["swiglu", "gelu"] = Field("swiglu", description="the feed-forward of a block: swiglu (gated), or gelu")
    bias: bool = Field(False, description="biases in linear layers")
    dropout: Probability = Field(0.0, description="dropout after attention and feed-forward, in training")
    tie_embeddings: bool = Field(
        True, description="the head projects with the token embedding; false: each stage has a projection of its own"
    )
    max_seq_len: PositiveInt | None = Field(None, description="longest sample the model takes; null: training.seq_len")
    init_std: Positive = Field(0.02, description="standard deviation of fresh weights")

    @property
    def n_blocks(self) -> int:
        """Blocks in the whole rack."""
        return (self.architecture.n_stacks or 1) * self.architecture.blocks_per_stack

    @property
    def kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def ffn_width(self) -> int:
        """Width inside the feed-forward, resolved."""
        if self.d_ff is not None:
            return self.d_ff
        return 4 * self.d_model if self.ffn == "gelu" else -(-8 * self.d_model // 3 // 32) * 32

    @property
    def latent_rank(self) -> int:
        """Width of the latent of keys and values (mla), resolved: DeepSeek-V2's is four heads wide."""
        return self.kv_rank or min(4 * self.head_dim, self.d_model)

    @property
    def rotary_width(self) -> int:
        """Rotary part of a head (mla), resolved; 0 where positions are learned."""
        if self.positions != "rope":
            return 0
        return self.rope_head_dim or max(2, self.head_dim // 4 * 2)

    @property
    def attention_parameters(self) -> int:
        """Parameters in one block's attention."""
        d, kv, bias = self.d_model, self.kv_heads * self.head_dim, int(self.bias)
        if self.attention != "mla":
            return 2 * d * d + 2 * d * kv + bias * (2 * d + 2 * kv)
        rank, turned, inner = self.latent_rank, self.rotary_width, self.q_rank or d
        queries = inner * (d + self.n_heads * turned) + (d * self.q_rank + self.q_rank if self.q_rank else 0)
        keys = d * (rank + turned) + rank + 2 * rank * d
        return queries + keys + d * d + bias * d

    @property
    def block_parameters(self) -> int:
        """Parameters in one block."""
        d, f, gated = self.d_model, self.ffn_width, self.ffn == "swiglu"
        ffn = (3 if gated else 2) * d * f + int(self.bias) * (d + f * (2 if gated else 1))
        return self.attention_parameters + ffn + 2 * d * (2 if self.norm == "layernorm" else 1)

    @property
    def time_parameters(self) -> int:
        """Parameters of the front's time embedding."""
        if self.time_embedding == "none":
            return 0
        width, d = self.time_embedding_dim, self.d_model
        return width * d + d + d * d + d + (TIME_KNOTS * width if self.time_embedding == "learned" else 0)

    def specification(self) -> dict[str, Any]:
        """What of it shapes a forward pass beside the weights; settings without effect are left out.

        Settings that came later are in only where they say something: what was identified before keeps its id.
        """
        later = {"attention", *MLA_SETTINGS, *LINEAR_SETTINGS, "time_embedding", "time_embedding_dim"}
        own = self.model_dump(exclude={"architecture", "init_std", "dropout", "tie_embeddings", *later})
        if self.attention == "mla":
            own |= {"attention": "mla", "kv_rank": self.latent_rank, "q_rank": self.q_rank}
            own["rope_head_dim"] = self.rotary_width
        if self.attention == "linear":
            own |= {"attention": "linear", "feature_map": self.feature_map}
            if self.feature_map == "performer":
                own["random_features"] = self.random_features or self.head_dim
        if self.time_embedding != "none":
            own |= {"time_embedding": self.time_embedding, "time_embedding_dim": self.time_embedding_dim}
        return own
