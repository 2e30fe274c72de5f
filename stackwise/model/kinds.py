"""The kinds of attention, feed-forward and head: their settings and facts.

No torch here but where a kind builds something.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from stackwise.config.fields import Positive, Size
from stackwise.config.kinds import Attention, Fault, FeedForward, HeadKind, Matrix, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stackwise.config.model import ModelConfig

Activation = Literal["gelu", "gelu_tanh", "relu"]
ACTIVATIONS = "gelu (exact), gelu_tanh (its approximation, GPT-2's), relu"


class Windowed(Attention):
    """Attention that may look back over a window alone (Longformer, arXiv 2004.05150; Mistral, arXiv 2310.06825)."""

    window: Size | None = Field(
        None,
        description="positions that one sees where attention looks back, itself among them; null: all. Attention that "
        "sees in both directions has none, unless window_sides is both",
    )
    window_sides: Literal["back", "both"] = Field(
        "back",
        description="back: the window limits what is behind a position alone; both: what is ahead of it as well, so "
        "that attention in both directions is local (ModernBERT)",
    )
    window_blocks: list[Annotated[int, Field(ge=0, lt=1024)]] | None = Field(
        None, description="the blocks that have the window, 0 the lowest; null: all"
    )
    window_rope_theta: Positive | None = Field(
        None, description="base of the rotary wavelengths in blocks that have the window; null: model.rope_theta"
    )

    def in_block(self, block: int) -> Attention:
        if self.window_blocks is None:
            return self
        unset = {} if block in self.window_blocks else dict.fromkeys(("window", "window_rope_theta"))
        return self.model_copy(update={**unset, "window_blocks": None})

    def chosen(self, blocks: Sequence[int]) -> Attention:
        if self.window_blocks is None:
            return self
        places = [place for place, block in enumerate(blocks) if block in self.window_blocks]
        return self.model_copy(update={"window_blocks": places})

    def window_specification(self) -> dict[str, Any]:
        """What of the window shapes a forward pass; empty: there is none."""
        if self.window is None or self.window_blocks == []:
            return {}
        spec: dict[str, Any] = {} if self.window_sides == "back" else {"window_sides": self.window_sides}
        spec |= {} if self.window_blocks is None else {"window_blocks": sorted(set(self.window_blocks))}
        spec |= {} if self.window_rope_theta is None else {"window_rope_theta": self.window_rope_theta}
        return {"window": self.window} | spec

    def rope_theta(self, model: ModelConfig) -> float:
        return self.window_rope_theta or super().rope_theta(model)

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        if self.window is None:
            fields = type(self).model_fields
            for key in ("window_blocks", "window_sides", "window_rope_theta"):
                if getattr(self, key) != fields[key].default:
                    yield key, "there is no window: set model.attention.window too"
        if self.window_rope_theta is not None and model.positions != "rope":
            yield "window_rope_theta", f"model.positions is {model.positions}: there are no wavelengths"
        beyond = [block for block in self.window_blocks or () if block >= model.n_blocks]
        if beyond and model.architecture.n_stacks is not None:
            yield "window_blocks", f"there is no block {beyond[0]}: the rack has 0 to {model.n_blocks - 1}"


class Projected(Attention):
    """Attention of queries, keys and values that are each one matrix of the input."""

    bias: Literal["all", "qkv", "none"] | None = Field(
        None, description="biases: all, qkv (Qwen 2), none; null: as model.bias"
    )
    qk_norm: bool = Field(
        False, description="an RMS norm over every head's queries and keys, before rotary positions (Qwen 3)"
    )

    def biases(self, model: ModelConfig) -> tuple[bool, bool]:
        """Whether queries, keys and values have biases, and whether the output has one."""
        if self.bias is None:
            return model.bias, model.bias
        return self.bias != "none", self.bias == "all"

    def matrices(self, model: ModelConfig) -> dict[str, Matrix]:
        d, heads, kv = model.d_model, model.heads_width, self.key_heads(model) * model.head_dim
        inner, outer = self.biases(model)
        return {
            "q": Matrix(heads, d, inner),
            "k": Matrix(kv, d, inner),
            "v": Matrix(kv, d, inner),
            "o": Matrix(d, heads, outer),
        }

    def other_parameters(self, model: ModelConfig) -> int:
        """The norms of queries and keys."""
        return 2 * model.head_dim if self.qk_norm else 0

    def kept(self, model: ModelConfig) -> int:
        """Both norms' inputs and outputs, queries and output; keys and values (arXiv 2205.05198, section 4.1).

        A norm of queries and keys keeps what enters and what leaves it.
        """
        heads, keys = model.heads_width, self.key_heads(model) * model.head_dim
        return 6 * model.d_model + (4 if self.qk_norm else 2) * (heads + keys)

    def projected_specification(self, model: ModelConfig) -> dict[str, Any]:
        """What of biases and norms differs from what `model.bias` alone says."""
        biases = self.biases(model)
        spec: dict[str, Any] = {} if biases == (model.bias, model.bias) else {"bias": self.bias}
        return spec | ({"qk_norm": True} if self.qk_norm else {})


class MultiHead(Windowed, Projected):
    """Softmax attention with keys and values for each head (arXiv 1706.03762)."""

    scales_scores: ClassVar[bool] = True

    def tensor_plan(self, model: ModelConfig) -> TensorPlan:
        """See `BlockPart.tensor_plan`: whole heads, with their keys and values."""
        layers: dict[str, Literal["column", "row", "heads"]] = {"q": "column", "k": "column", "v": "column", "o": "row"}
        norms: dict[str, Literal["heads"]] = {"q_norm": "heads", "k_norm": "heads"} if self.qk_norm else {}
        counts = {"model.n_heads": model.n_heads, "model.attention.kv_heads": self.key_heads(model)}
        return TensorPlan(layers | norms, counts)

    def build(self, model: ModelConfig) -> nn.Module:
        from stackwise.model.attention import SoftmaxAttention

        return SoftmaxAttention(model, self)

    def specification(self, model: ModelConfig) -> dict[str, Any]:
        """The same for mha and for gqa with as many heads of keys and values: they compute the same."""
        spec = {"kind": "softmax", "kv_heads": self.key_heads(model)}
        return spec | self.projected_specification(model) | self.window_specification()


class GroupedQuery(MultiHead):
    """Softmax attention whose heads share keys and values in groups (arXiv 2305.13245)."""

    kv_heads: Size = Field(description="heads of keys and values; they divide n_heads")

    def key_heads(self, model: ModelConfig) -> int:
        return self.kv_heads

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        yield from _divides(self.kv_heads, model)
        yield from super().faults(model)


class Latent(Windowed):
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
        if model.positions != "rope":
            return 0
        return self.rope_head_dim or max(2, model.head_dim // 4 * 2)

    def matrices(self, model: ModelConfig) -> dict[str, Matrix]:
        """See `BlockPart.matrices`; without rotary positions, or a latent of the queries, theirs are left out."""
        d, rank, turned, inner = model.d_model, self.latent_rank(model), self.rotary_width(model), self.q_rank
        matrices = {"q_down": Matrix(inner, d)} if inner else {}
        heads = model.heads_width
        matrices |= {"q_up": Matrix(heads, inner or d), "kv_down": Matrix(rank, d)}
        matrices |= {"k_up": Matrix(heads, rank), "v_up": Matrix(heads, rank), "o": Matrix(d, heads, model.bias)}
        if turned:
            matrices |= {"q_rotary": Matrix(model.n_heads * turned, inner or d), "k_rotary": Matrix(turned, d)}
        return matrices

    def other_parameters(self, model: ModelConfig) -> int:
        """The norms behind the compressions."""
        return self.latent_rank(model) + (self.q_rank or 0)

    def kept(self, model: ModelConfig) -> int:
        """As of multi-head, and the rotary parts, the latents beside their norms, and a copy of the output."""
        numbers = 6 * model.d_model + 4 * model.heads_width
        numbers += 5 * model.n_heads * self.rotary_width(model)
        return numbers + 2 * (self.latent_rank(model) + (self.q_rank or 0)) + model.heads_width

    def build(self, model: ModelConfig) -> nn.Module:
        from stackwise.model.attention import LatentAttention

        return LatentAttention(model, self)

    def specification(self, model: ModelConfig) -> dict[str, Any]:
        spec = {"kind": self.name, "q_rank": self.q_rank}
        spec |= {"kv_rank": self.latent_rank(model), "rope_head_dim": self.rotary_width(model)}
        return spec | self.window_specification()

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        if self.rotary_width(model) % 2:
            yield "rope_head_dim", f"rotary positions need an even width, not {self.rotary_width(model)}"
        yield from super().faults(model)


class Linear(Projected):
    """Linear attention (arXiv 2006.16236): a feature map in place of the softmax."""

    kv_heads: Size | None = Field(None, description="heads of keys and values; null: n_heads")
    feature_map: Literal["elu", "relu", "performer"] = Field(
        "elu", description="what stands for the softmax: elu (+ 1), relu, performer (random features)"
    )
    random_features: Size | None = Field(
        None, description="feature_map performer: number of features; null: a head's width"
    )

    def key_heads(self, model: ModelConfig) -> int:
        return self.kv_heads or model.n_heads

    def features(self, model: ModelConfig) -> int:
        """Random features of a head; 0 where the map has none."""
        return (self.random_features or model.head_dim) if self.feature_map == "performer" else 0

    def kept(self, model: ModelConfig) -> int:
        """As of multi-head, and three times the width of the features, of queries, keys and what they make."""
        return super().kept(model) + 3 * (model.heads_width + self.features(model) * model.n_heads)

    def build(self, model: ModelConfig) -> nn.Module:
        from stackwise.model.linear_attention import LinearAttention

        return LinearAttention(model, self)

    def specification(self, model: ModelConfig) -> dict[str, Any]:
        spec = {"kind": self.name, "kv_heads": self.key_heads(model), "feature_map": self.feature_map}
        return spec | {"random_features": self.features(model)} | self.projected_specification(model)

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        yield from _divides(self.key_heads(model), model)


def _divides(kv_heads: int, model: ModelConfig) -> Iterator[Fault]:
    if model.n_heads % kv_heads:
        text = f"{kv_heads} key and value heads do not divide {model.n_heads} heads: take a divisor of it"
        yield "kv_heads", text


class Biased(FeedForward):
    """A feed-forward that may have biases of its own."""

    bias: bool | None = Field(None, description="biases; null: as model.bias")

    def has_bias(self, model: ModelConfig) -> bool:
        """Whether its layers have biases."""
        return model.bias if self.bias is None else self.bias

    def matrices(self, model: ModelConfig) -> dict[str, Matrix]:
        d, f, bias = model.d_model, model.ffn_width, self.has_bias(model)
        return {"up": Matrix(f, d, bias), "down": Matrix(d, f, bias)}

    def tensor_plan(self, model: ModelConfig) -> TensorPlan:
        layers: dict[str, Literal["column", "row"]] = {
            name: "row" if name == "down" else "column" for name in self.matrices(model)
        }
        return TensorPlan(layers, {"model.d_ff": model.ffn_width})

    def specification(self, model: ModelConfig) -> dict[str, Any]:
        spec = {"bias": self.bias} if self.has_bias(model) != model.bias else {}
        return {"kind": self.name} | spec


class Gated(Biased):
    """A gated feed-forward (arXiv 2002.05202): down(activation(gate x) · up x)."""

    def width(self, d_model: int) -> int:
        """8/3 of d_model, rounded up to a multiple of 32."""
        return -(-8 * d_model // 3 // 32) * 32

    def matrices(self, model: ModelConfig) -> dict[str, Matrix]:
        return {"gate": Matrix(model.ffn_width, model.d_model, self.has_bias(model))} | super().matrices(model)

    def kept(self, model: ModelConfig) -> int:
        """What leaves the gate, its activation, what leaves `up`, and their product."""
        return 4 * model.ffn_width


class SwiGLU(Gated):
    """Its activation is SiLU."""

    def build(self, model: ModelConfig) -> nn.Module:
        from stackwise.model import layers

        return layers.GatedFeedForward(model.d_model, model.ffn_width, bias=self.has_bias(model))


class GeGLU(Gated):
    """Its activation is GELU (ModernBERT, arXiv 2412.13663), or one of its kin."""

    activation: Activation = Field("gelu", description=ACTIVATIONS)

    def build(self, model: ModelConfig) -> nn.Module:
        from stackwise.model import layers

        return layers.GatedFeedForward(model.d_model, model.ffn_width, self.activation, bias=self.has_bias(model))

    def specification(self, model: ModelConfig) -> dict[str, Any]:
        return super().specification(model) | {"activation": self.activation}


class GELU(Biased):
    """Two matrices with an activation between them, by default the exact GELU (arXiv 1606.08415)."""

    activation: Activation = Field("gelu", description=ACTIVATIONS)

    def build(self, model: ModelConfig) -> nn.Module:
        from stackwise.model import layers

        return layers.GELUFeedForward(model, self)

    def kept(self, model: ModelConfig) -> int:
        """What leaves `up`, and its activation."""
        return 2 * model.ffn_width

    def specification(self, model: ModelConfig) -> dict[str, Any]:
        spec = super().specification(model)
        return spec if self.activation == "gelu" else spec | {"activation": self.activation}


class LinearHead(HeadKind):
    """A norm and the projection."""

    norm: bool = Field(True, description="the norm before the projection; false: none")

    def parameters(self, model: ModelConfig, vocab_size: int) -> int:
        return model.norm_parameters if self.norm else 0

    def specification(self) -> dict[str, Any]:
        return {} if self.norm else super().specification()

    def build(self, model: ModelConfig, vocab_size: int, embedding: Tensor | None = None) -> nn.Module:
        return model.stream.head(model, vocab_size, embedding)  # type: ignore[no-any-return]


class TransformHead(HeadKind):
    """BERT's masked-LM head (arXiv 1810.04805): a layer, an activation, a norm, the projection with a bias."""

    activation: Activation = Field("gelu", description=ACTIVATIONS)
    input_norm: bool = Field(False, description="a norm before the layer, for blocks whose norms come first")
    layer_bias: bool = Field(True, description="a bias of the layer")
    bias: bool = Field(True, description="a bias of the projection")

    def parameters(self, model: ModelConfig, vocab_size: int) -> int:
        layer = model.d_model * (model.d_model + self.layer_bias)
        return layer + (1 + self.input_norm) * model.norm_parameters + self.bias * vocab_size

    def specification(self) -> dict[str, Any]:
        """See `HeadKind.specification`; settings that came later are left out at their defaults."""
        later = {key: type(self).model_fields[key].default for key in ("input_norm", "layer_bias", "bias")}
        return {key: value for key, value in super().specification().items() if later.get(key) != value}

    def build(self, model: ModelConfig, vocab_size: int, embedding: Tensor | None = None) -> nn.Module:
        from stackwise.model.rack import TransformHead

        return TransformHead(model, self, vocab_size, embedding)
