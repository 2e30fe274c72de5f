"""The rack's settings, and the sizes that follow from them; in which direction attention looks. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stackwise.config.fields import Positive, Probability, Section, Size, Small
from stackwise.config.kinds import Attention, FeedForward, HeadKind, Kind, RopeScaling, Stream, choice
from stackwise.registry import Registry


@dataclass(frozen=True)
class BlockCausal:
    """Attention within blocks of positions, and causal between them (BD3-LM, arXiv 2503.09573, section 3).

    Attributes:
        size: Positions in a block.
        paired: A row is a noised copy of the sample followed by the clean one. A noised position sees its own noised
            block and the clean blocks before it; a clean position sees the clean blocks up to its own.
    """

    size: int
    paired: bool = False


Direction = bool | BlockCausal
"""False: every position sees all others. True: none sees those that follow."""


TIME_KNOTS = 65
"""Shares of masked positions that a learned time embedding has a vector for, evenly from 0 to 1."""


TIME_EMBEDDINGS: Registry[type[Any]] = Registry(
    "time embedding",
    f"{__name__}:TimeEmbedding",
    __name__,
    {"none": "NoTime", "sinusoidal": "Sinusoidal", "learned": "LearnedTime"},
)


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
        return self.width * d_model + d_model + d_model * d_model + d_model


class LearnedTime(Sinusoidal):
    """A table of vectors at even shares, linear in between, and two layers."""

    def parameters(self, d_model: int) -> int:
        return super().parameters(d_model) + TIME_KNOTS * self.width


class ArchitectureConfig(Section):
    """How blocks make stacks, and stacks the rack."""

    n_stacks: Small | None = Field(None, description="stacks in the rack; null: training.progressive.max_stacks")
    blocks_per_stack: Small = Field(1, description="blocks (transformer layers) in a stack")


class ModelConfig(Section):
    """The rack: front, blocks, head."""

    vocab_size: Size | None = Field(None, description="token ids that the model knows; null: the tokenizer's")
    d_model: Size = Field(256, description="width of the residual stream")
    stream: Stream = choice(
        Stream, "how the residual stream is divided; with columns, n_heads and d_ff are those of one column"
    )
    n_heads: Size = Field(4, description="attention heads; they divide d_model where head_size is null")
    head_size: Size | None = Field(None, description="width of an attention head; null: d_model / n_heads")
    d_ff: Size | None = Field(None, description="width inside the feed-forward; null: what model.ffn takes")
    architecture: ArchitectureConfig = Field(default_factory=lambda: ArchitectureConfig())
    attention: Attention = choice(Attention, "what queries, keys and values are made of, and how they meet")
    time_embedding: TimeEmbedding = choice(TimeEmbedding, "the masked share of a row as an input of the front")
    norm: Literal["rmsnorm", "layernorm"] = Field(
        "rmsnorm", description="the norms of blocks and head: rmsnorm, or layernorm"
    )
    norm_place: Literal["pre", "post"] = Field(
        "pre", description="norms before attention and feed-forward, or (post) after each is added: norm(x + f(x))"
    )
    norm_eps: Positive = Field(1e-5, description="added to the variance inside a norm")
    norm_bias: bool = Field(True, description="norm layernorm: biases in its norms")
    first_norm: bool = Field(
        True, description="the norm before the lowest block's attention; false: none (ModernBERT norms its embeddings)"
    )
    positions: Literal["rope", "learned"] = Field("rope", description="rotary, or a learned table added by the front")
    position_offset: Annotated[int, Field(ge=0, le=1 << 16)] = Field(
        0, description="rows of the learned table before that of position 0 (RoBERTa: 2)"
    )
    rope_theta: Positive = Field(10_000.0, description="base of the rotary wavelengths")
    rope_scaling: RopeScaling = choice(
        RopeScaling, "rotary positions beyond the length of training, as in Hugging Face"
    )
    embedding_norm: bool = Field(False, description="a norm behind the front's embeddings (BERT)")
    token_types: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="rows of a table of token types, the first of which is added to every token (BERT: 2); 0: none"
    )
    ffn: FeedForward = choice(FeedForward, "the feed-forward of a block")
    head: HeadKind = choice(HeadKind, "from the vectors that leave a stage to logits")
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
        return self.head_size or self.d_model // self.stream.columns // self.n_heads

    @property
    def heads_width(self) -> int:
        """Width of all attention heads together."""
        return self.n_heads * self.head_dim

    @property
    def keeps_cache(self) -> bool:
        """Whether what earlier positions left can be kept while a row grows: generation else goes over all of them."""
        steady = self.rope_scaling.reach(1) == self.rope_scaling.reach(1 << 24)
        return self.attention.caches and self.stream.caches and steady

    @property
    def ffn_width(self) -> int:
        """Width inside the feed-forward, resolved."""
        return self.d_ff or self.ffn.width(self.d_model // self.stream.columns)

    @property
    def column(self) -> ModelConfig:
        """The settings of one column of the stream, as of a rack of its own."""
        if self.stream.columns == 1:
            return self
        attention, ffn = (getattr(part, "inner", part) for part in (self.attention, self.ffn))
        width, stream = self.d_model // self.stream.columns, Stream.of(Stream.default)
        return self.model_copy(update={"d_model": width, "stream": stream, "attention": attention, "ffn": ffn})

    @property
    def block_parameters(self) -> int:
        """Parameters in one block, resolved (`at`)."""
        return (
            self.attention.parameters(self) + self.ffn.parameters(self) + (1 + self.first_norm) * self.norm_parameters
        )

    @property
    def active_parameters(self) -> int:
        """Parameters of one block, resolved (`at`), that a token goes through."""
        return self.block_parameters - self.ffn.parameters(self) + self.ffn.active_parameters(self)

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm over d_model."""
        return self.d_model * (2 if self.norm == "layernorm" and self.norm_bias else 1)

    def front_parameters(self, vocab_size: int, seq_len: int) -> int:
        """Parameters of the front.

        Args:
            vocab_size: Ids that it knows.
            seq_len: Longest sample, where `max_seq_len` is None.
        """
        rows = vocab_size + self.token_types
        if self.positions == "learned":
            rows += (self.max_seq_len or seq_len) + self.position_offset
        norm = self.norm_parameters if self.embedding_norm else 0
        return rows * self.d_model + norm + self.time_embedding.parameters(self.d_model)

    def head_parameters(self, vocab_size: int, *, shared: bool) -> int:
        """Parameters of the head.

        Args:
            vocab_size: Width of the logits.
            shared: The projection is the front's.
        """
        return self.head.parameters(self, vocab_size) + (0 if shared else vocab_size * self.d_model)

    def at(self, block: int) -> ModelConfig:
        """The settings of one block: what applies to some blocks alone is resolved for it.

        Args:
            block: Its place in the rack, 0 the lowest.
        """
        attention, ffn = self.stream.parts(self.attention.in_block(block), self.ffn.in_block(block))
        normed = self.first_norm or block > 0
        if attention is self.attention and ffn is self.ffn and normed == self.first_norm:
            return self
        return self.model_copy(update={"attention": attention, "ffn": ffn, "first_norm": normed})

    def alike(self, block: int, other: int) -> bool:
        """Whether two blocks, by their places, have the same layers, so that one may have the other's weights."""
        layers = [(here.first_norm, type(here.attention), type(here.ffn)) for here in (self.at(block), self.at(other))]
        return layers[0] == layers[1]

    def total(self, fact: Callable[[ModelConfig], int], blocks: Iterable[int] | None = None) -> int:
        """The sum over blocks, all or some by their places, of what the settings of one come to."""
        return sum(fact(self.at(block)) for block in (range(self.n_blocks) if blocks is None else blocks))

    def specification(self) -> dict[str, Any]:
        """What of it shapes a forward pass beside the weights; settings without effect are left out.

        So are those that came later, at their defaults: recipes of what was trained before them stay.
        """
        spec = self.model_dump(
            include={"d_model", "n_heads", "norm", "norm_eps", "positions", "bias"}
            | ({"max_seq_len"} if self.positions == "learned" else {"rope_theta"})
        )
        spec |= {"d_ff": self.ffn_width}
        spec |= {
            "attention": self.attention.specification(self) | self.attention.code,
            "ffn": self.ffn.specification(self) | self.ffn.code,
        }
        spec |= {"time_embedding": self.time_embedding.plain()}
        if self.heads_width != self.d_model:
            spec["head_size"] = self.head_dim
        later = self.model_dump(
            include={"norm_place", "position_offset", "embedding_norm", "token_types", "first_norm"}
        )
        later |= {"norm_bias": self.norm_bias or self.norm != "layernorm"}
        spec |= {key: value for key, value in later.items() if value != type(self).model_fields[key].default}
        spec |= {"rope_scaling": scaling} if (scaling := self.rope_scaling.specification()) else {}
        spec |= {"stream": stream} if (stream := self.stream.specification()) else {}
        return spec | ({"head": head} if (head := self.head.specification()) else {})
