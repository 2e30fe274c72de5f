"""The kinds of attention and feed-forward: their settings and facts. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stackwise.config.fields import Size
from stackwise.config.kinds import Attention, Fault, FeedForward, Matrix

if TYPE_CHECKING:
    from torch import nn

    from stackwise.config.model import ModelConfig


class MultiHead(Attention):
    """Softmax attention with keys and values for each head (arXiv 1706.03762)."""

    # The rotary convention is the same: no permutation.
    llama: ClassVar[Mapping[str, str] | None] = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
    }

    def matrices(self, model: ModelConfig) -> dict[str, Matrix]:
        """See `BlockPart.matrices`."""
        d, kv, bias = model.d_model, self.key_heads(model) * model.head_dim, model.bias
        return {
            "q": Matrix(d, d, bias),
            "k": Matrix(kv, d, bias),
            "v": Matrix(kv, d, bias),
            "o": Matrix(d, d, bias),
        }

    def kept(self, model: ModelConfig) -> int:
        """Both norms' inputs and outputs, queries and output; keys and values (arXiv 2205.05198, section 4.1)."""
        return 8 * model.d_model + 2 * self.key_heads(model) * model.head_dim

    def build(self, model: ModelConfig) -> nn.Module:
        """See `Attention.build`."""
        from stackwise.model.attention import SoftmaxAttention

        return SoftmaxAttention(model)

    def specification(self, model: ModelConfig) -> dict[str, Any]:
        """The same for mha and for gqa with as many heads of keys and values: they compute the same."""
        return {"kind": "softmax", "kv_heads": self.key_heads(model)}


class GroupedQuery(MultiHead):
    """Softmax attention whose heads share keys and values in groups (arXiv 2305.13245)."""

    kv_heads: Size = Field(description="heads of keys and values; they divide n_heads")

    def key_heads(self, model: ModelConfig) -> int:
        """See `Attention.key_heads`."""
        return self.kv_heads

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        """See `Attention.faults`."""
        yield from _divides(self.kv_heads, model)


class Latent(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from one narrow vector a token."""

    kv_rank: Size | None = Field(
        None, description="width of the vector that all keys and values are made from; null: 4 heads', at most d_model"
    )
    q_rank: Size | None = Field(
        None, description="width of the vector that queries are made from; null: the input itself"
    )
    rope_head_dim: Size | None = Field(
        None, description="width of a head's rotary part, an even number; null: half a head's"
    )

    def latent_rank(self, model: ModelConfig) -> int:
        """Width of the latent of keys and values, resolved: DeepSeek-V2's is four heads wide."""
        return self.kv_rank or min(4 * model.head_dim, model.d_model)

    def rotary_width(self, model: ModelConfig) -> int:
        """Rotary part of a head, resolved; 0 where positions are learned."""
        if model.positions != "rope":
            return 0
        return self.rope_head_dim or max(2, model.head_dim // 4 * 2)

    def matrices(self, model: ModelConfig) -> dict[str, Matrix]:
        """See `BlockPart.matrices`; without rotary positions, or a latent of the queries, theirs are left out."""
        d, rank, turned, inner = model.d_model, self.latent_rank(model), self.rotary_width(model), self.q_rank
        matrices = {"q_down": Matrix(inner, d)} if inner else {}
        matrices |= {"q_up": Matrix(d, inner or d), "kv_down": Matrix(rank, d)}
        matrices |= {"k_up": Matrix(d, rank), "v_up": Matrix(d, rank), "o": Matrix(d, d, model.bias)}
        if turned:
            matrices |= {"q_rotary": Matrix(model.n_heads * turned, inner or d), "k_rotary": Matrix(turned, d)}
        return matrices

    def other_parameters(self, model: ModelConfig) -> int:
        """The norms behind the compressions."""
        return self.latent_rank(model) + (self.q_rank or 0)

    def kept(self, model: ModelConfig) -> int:
        """As of multi-head, and the rotary parts, the latents beside their norms, and a copy of the output."""
        numbers = 8 * model.d_model + 2 * model.n_heads * model.head_dim
        numbers += 5 * model.n_heads * self.rotary_width(model)
        return numbers + 2 * (self.latent_rank(model) + (self.q_rank or 0)) + model.d_model

    def build(self, model: ModelConfig) -> nn.Module:
        """See `Attention.build`."""
        from stackwise.model.attention import LatentAttention

        return LatentAttention(model, self)

    def specification(self, model: ModelConfig) -> dict[str, Any]:
        """See `Attention.specification`."""
        return self.plain() | {"kv_rank": self.latent_rank(model), "rope_head_dim": self.rotary_width(model)}

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        """See `Attention.faults`."""
        if self.rotary_width(model) % 2:
            yield "rope_head_dim", f"rotary positions need an even width, not {self.rotary_width(model)}"


class Linear(MultiHead):
    """Linear attention (arXiv 2006.16236): a feature map in place of the softmax."""

    llama: ClassVar[Mapping[str, str] | None] = None
    anneals: ClassVar[bool] = False

    kv_heads: Size | None = Field(None, description="heads of keys and values; null: n_heads")
    feature_map: Literal["elu", "relu", "performer"] = Field(
        "elu", description="what stands for the softmax: elu (+ 1), relu, performer (random features)"
    )
    random_features: Size | None = Field(
        None, description="feature_map performer: number of features; null: a head's width"
    )

    def key_heads(self, model: ModelConfig) -> int:
        """See `Attention.key_heads`."""
        return self.kv_heads or model.n_heads

    def features(self, model: ModelConfig) -> int:
        """Random features of a head; 0 where the map has none."""
        return (self.random_features or model.head_dim) if self.feature_map == "performer" else 0

    def kept(self, model: ModelConfig) -> int:
        """As of multi-head, and three times the width of the features, of queries, keys and what they make."""
        return super().kept(model) + 3 * (model.d_model + self.features(model) * model.n_heads)

    def build(self, model: ModelConfig) -> nn.Module:
        """See `Attention.build`."""
        from stackwise.model.linear_attention import LinearAttention

        return LinearAttention(model, self)

    def specification(self, model: ModelConfig) -> dict[str, Any]:
        """See `Attention.specification`."""
        return self.plain() | {"kv_heads": self.key_heads(model), "random_features": self.features(model)}

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        """See `Attention.faults`."""
        yield from _divides(self.key_heads(model), model)


def _divides(kv_heads: int, model: ModelConfig) -> Iterator[Fault]:
    if model.n_heads % kv_heads:
        text = f"{kv_heads} key and value heads do not divide {model.n_heads} heads: take a divisor of it"
        yield "kv_heads", text


class SwiGLU(FeedForward):
    """A gated feed-forward (arXiv 2002.05202)."""

    llama: ClassVar[Mapping[str, str] | None] = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}

    def width(self, d_model: int) -> int:
        """8/3 of d_model, rounded up to a multiple of 32."""
        return -(-8 * d_model // 3 // 32) * 32

    def matrices(self, model: ModelConfig) -> dict[str, Matrix]:
        """See `BlockPart.matrices`."""
        return {"gate": Matrix(model.ffn_width, model.d_model, model.bias)} | _up_and_down(model)

    def build(self, model: ModelConfig) -> nn.Module:
        """See `FeedForward.build`."""
        from stackwise.model import layers

        return layers.SwiGLUFeedForward(model)

    def kept(self, model: ModelConfig) -> int:
        """What leaves the gate, its SiLU, what leaves `up`, and their product."""
        return 4 * model.ffn_width


class GELU(FeedForward):
    """Two matrices with a GELU (arXiv 1606.08415) between them."""

    def matrices(self, model: ModelConfig) -> dict[str, Matrix]:
        """See `BlockPart.matrices`."""
        return _up_and_down(model)

    def build(self, model: ModelConfig) -> nn.Module:
        """See `FeedForward.build`."""
        from stackwise.model import layers

        return layers.GELUFeedForward(model)

    def kept(self, model: ModelConfig) -> int:
        """What leaves `up`, and its GELU."""
        return 2 * model.ffn_width


def _up_and_down(model: ModelConfig) -> dict[str, Matrix]:
    d, f = model.d_model, model.ffn_width
    return {"up": Matrix(f, d, model.bias), "down": Matrix(d, f, model.bias)}
