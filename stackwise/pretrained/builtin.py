"""The families that StackWise knows: LLaMA and its kin, GPT-2, BERT, RoBERTa, and its own. No torch here."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from stackwise.config.model import ModelConfig
from stackwise.errors import UsageError
from stackwise.model.kinds import GELU, MultiHead, SwiGLU
from stackwise.pretrained.families import BLOCK, HEAD, Description, Family, TensorRef, part_shapes
from stackwise.pretrained.keys import ORIGINAL, Keys, check_format, dynamic_reach, rope_keys, rope_settings, special_ids


class Rotary(Family):
    """What LLaMA and its kin share: RMSNorm, rotary positions, SwiGLU."""

    block_names: ClassVar[Mapping[str, str]] = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        **{f"attention.{name}": f"self_attn.{name}_proj" for name in "qkvo"},
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        **{f"ffn.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    }
    positions: ClassVar[int] = 2048
    """`max_position_embeddings` where it is left out."""
    kv_heads: ClassVar[int | None] = None
    """`num_key_value_heads` where it is left out; None: all heads."""
    head_dim: ClassVar[int | None] = None
    """`head_dim` where it is left out; None: what the heads leave of the width."""
    eps: ClassVar[float] = 1e-6
    """`rms_norm_eps` where it is left out."""
    kinds: ClassVar[tuple[type[Any], ...]] = (SwiGLU,)
    """Feed-forwards that it has."""

    @abc.abstractmethod
    def own(self, keys: Keys, blocks: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings of the family: those of the attention beside its heads, and those of the model."""

    def read(self, config: Mapping[str, Any]) -> Description:
        keys = Keys(config)
        width, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
        blocks, seq_len = keys.size("num_hidden_layers"), keys.size("max_position_embeddings", self.positions)
        kv_heads = keys.size("num_key_value_heads", self._default(keys, "num_key_value_heads", self.kv_heads, heads))
        head = keys.size("head_dim", self._default(keys, "head_dim", self.head_dim, width // heads))
        keys.choice("hidden_act", "silu", {"silu": "silu", "swish": "silu"})
        attention, more = self.own(keys, blocks)
        kind = {"kind": "mha"} if kv_heads == heads else {"kind": "gqa", "kv_heads": kv_heads}
        model: dict[str, Any] = {
            "d_model": width,
            "n_heads": heads,
            "d_ff": keys.size("intermediate_size"),
            "architecture": {"n_stacks": blocks, "blocks_per_stack": 1},
            "attention": kind | attention,
            "norm_eps": keys.number("rms_norm_eps", self.eps, 1.0),
            "tie_embeddings": keys.flag("tie_word_embeddings", False),
        }
        rope = rope_settings(keys, seq_len)
        seq_len = dynamic_reach(rope) or seq_len
        model |= rope | more | {"max_seq_len": seq_len}
        if head * heads != width:
            model["head_size"] = head
        causal, notes = keys.flag("is_causal", True), keys.dropout("attention_dropout")
        keys.finish()
        return Description(model, keys.size("vocab_size"), seq_len, causal, special_ids=special_ids(keys), notes=notes)

    @staticmethod
    def _default(keys: Keys, key: str, left_out: int | None, null: int) -> int:
        return null if left_out is None or keys.is_null(key) else left_out

    def write(self, model: ModelConfig, description: Description) -> dict[str, Any] | None:
        if model.norm != "rmsnorm" or model.positions != "rope":
            return None
        if not isinstance(model.attention, MultiHead) or not isinstance(model.ffn, self.kinds):
            return None
        scaling, dynamic = model.rope_scaling, model.rope_scaling.name == "dynamic"
        return {
            "hidden_size": model.d_model,
            "intermediate_size": model.ffn_width,
            "num_hidden_layers": model.n_blocks,
            "num_attention_heads": model.n_heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": getattr(scaling, ORIGINAL) if dynamic else description.max_seq_len,
            "rms_norm_eps": model.norm_eps,
            "initializer_range": model.init_std,
            **rope_keys(model),
            "attention_dropout": 0.0,
            "tie_word_embeddings": model.tie_embeddings,
            "is_causal": description.causal,  # which transformers 5 obeys, and 4 does not
            "use_cache": description.causal,
        }


class Llama(Rotary):
    """LLaMA 1 to 3 (arXiv 2302.13971, 2407.21783)."""

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"

    def own(self, keys: Keys, blocks: int) -> tuple[dict[str, Any], dict[str, Any]]:
        keys.ignore("pretraining_tp")  # how products are cut, not what they are
        attention, ffn = keys.flag("attention_bias", False), keys.flag("mlp_bias", False)
        return {}, {"bias": attention} | ({} if attention == ffn else {"ffn": {"kind": "swiglu", "bias": ffn}})

    def write(self, model: ModelConfig, description: Description) -> dict[str, Any] | None:
        if (config := super().write(model, description)) is None:
            return None
        return config | {"attention_bias": attention_biases(model)[0], "mlp_bias": ffn_bias(model)}


class Mistral(Rotary):
    """Mistral (arXiv 2310.06825), and Mistral Nemo, whose heads are narrower than its width."""

    model_type: ClassVar[str] = "mistral"
    architecture: ClassVar[str] = "MistralForCausalLM"
    positions: ClassVar[int] = 131072
    kv_heads: ClassVar[int | None] = 8

    def own(self, keys: Keys, blocks: int) -> tuple[dict[str, Any], dict[str, Any]]:
        window = None if keys.is_null("sliding_window") else keys.size("sliding_window", 4096)
        keys.ignore("sliding_window")
        return {} if window is None else {"window": window}, {}

    def write(self, model: ModelConfig, description: Description) -> dict[str, Any] | None:
        if (config := super().write(model, description)) is None:
            return None
        return config | {"sliding_window": windows(model)[0]}


class Qwen2(Rotary):
    """Qwen 2 and 2.5 (arXiv 2407.10671): queries, keys and values have biases."""

    model_type: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"
    positions: ClassVar[int] = 32768
    kv_heads: ClassVar[int | None] = 32

    def own(self, keys: Keys, blocks: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"bias": "qkv"} | self.window(keys, blocks), {}

    @staticmethod
    def window(keys: Keys, blocks: int) -> dict[str, Any]:
        """Settings of the sliding window: of the blocks that `layer_types` names, else of the upper ones."""
        size = None if keys.get("sliding_window") is None else keys.size("sliding_window")
        if not keys.flag("use_sliding_window", False):
            size = None
        first, full, sliding = keys.get("max_window_layers", 28), "full_attention", "sliding_attention"
        if type(first) is not int or first < 0:
            raise keys.refusal("max_window_layers", first, "a number of blocks")
        kinds = keys.get("layer_types")
        if kinds is None:
            kinds = [sliding if size is not None and index >= first else full for index in range(blocks)]
        if not isinstance(kinds, list) or len(kinds) != blocks or any(kind not in (full, sliding) for kind in kinds):
            raise keys.refusal("layer_types", kinds, f"{full} or {sliding} for each of {blocks} blocks")
        having = [index for index, kind in enumerate(kinds) if kind == sliding]
        if having and size is None:
            raise keys.refusal("layer_types", sliding, f"{full}, as there is no sliding_window in use")
        if not having:
            return {}
        return {"window": size} | ({} if len(having) == blocks else {"window_blocks": having})

    def write(self, model: ModelConfig, description: Description) -> dict[str, Any] | None:
        if (config := super().write(model, description)) is None:
            return None
        size, having = windows(model)
        kinds = ["sliding_attention" if index in having else "full_attention" for index in range(model.n_blocks)]
        used = {"use_sliding_window": size is not None, "sliding_window": size, "layer_types": kinds}
        return config | used | {"max_window_layers": min(having, default=model.n_blocks)}


class Qwen3(Qwen2):
    """Qwen 3 (arXiv 2505.09388): queries and keys are normed, heads have a width of their own."""

    model_type: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"
    head_dim: ClassVar[int | None] = 128

    def own(self, keys: Keys, blocks: int) -> tuple[dict[str, Any], dict[str, Any]]:
        bias = {"bias": "all"} if keys.flag("attention_bias", False) else {}
        return {"qk_norm": True} | bias | self.window(keys, blocks), {}

    def write(self, model: ModelConfig, description: Description) -> dict[str, Any] | None:
        config = super().write(model, description)
        return None if config is None else config | {"attention_bias": attention_biases(model)[0]}


GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
"""Activations by their names in config.json, the name that an export writes before others of the same."""


class GPT2(Family):
    """GPT-2 (Radford et al., 2019): its matrices are the other way round in files, and three stand in one."""

    model_type: ClassVar[str] = "gpt2"
    architecture: ClassVar[str] = "GPT2LMHeadModel"
    base: ClassVar[str] = "transformer."
    block: ClassVar[str] = "h.{}."
    front_names: ClassVar[Mapping[str, str]] = {"embedding": "wte", "positions": "wpe"}
    block_names: ClassVar[Mapping[str, str]] = {
        "attention_norm": "ln_1",
        "ffn_norm": "ln_2",
        **{f"attention.{name}": "attn.c_attn" for name in "qkv"},
        "attention.o": "attn.c_proj",
        "ffn.up": "mlp.c_fc",
        "ffn.down": "mlp.c_proj",
    }
    head_names: ClassVar[Mapping[str, str]] = {"norm": "ln_f"}
    ignored: ClassVar[Sequence[str]] = (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",)

    def read(self, config: Mapping[str, Any]) -> Description:
        keys = Keys(config)
        width, seq_len = keys.size("n_embd"), keys.size("n_positions", 1024)
        keys.ignore("n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels")
        keys.ignore("summary_first_dropout")
        keys.only("scale_attn_weights", True)
        for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
            keys.only(key, False)
        model = {
            "d_model": width,
            "n_heads": keys.size("n_head"),
            "d_ff": keys.size("n_inner", 4 * width),
            "architecture": {"n_stacks": keys.size("n_layer"), "blocks_per_stack": 1},
            "attention": {"kind": "mha"},
            "ffn": {"kind": "gelu", "activation": keys.choice("activation_function", "gelu_new", GELUS)},
            "norm": "layernorm",
            "norm_eps": keys.number("layer_norm_epsilon", 1e-5, 1.0),
            "positions": "learned",
            "bias": True,
            "tie_embeddings": keys.flag("tie_word_embeddings", True),
            "max_seq_len": seq_len,
        }
        causal = keys.flag("is_causal", True)
        notes = keys.dropout("resid_pdrop", "embd_pdrop", "attn_pdrop")
        keys.finish()
        return Description(model, keys.size("vocab_size"), seq_len, causal, special_ids=special_ids(keys), notes=notes)

    def write(self, model: ModelConfig, description: Description) -> dict[str, Any] | None:
        if model.norm != "layernorm" or model.positions != "learned" or not isinstance(model.ffn, GELU):
            return None
        return {
            "n_embd": model.d_model,
            "n_inner": model.ffn_width,
            "n_layer": model.n_blocks,
            "n_head": model.n_heads,
            "n_positions": description.max_seq_len,
            "activation_function": activation_key(model.ffn.activation),
            "layer_norm_epsilon": model.norm_eps,
            "initializer_range": model.init_std,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout),
            "tie_word_embeddings": model.tie_embeddings,
            "is_causal": description.causal,
            "use_cache": description.causal,
        }

    def refs(self, description: Description, part: str, base: str, stored: Iterable[str] = ()) -> dict[str, TensorRef]:
        refs, width = super().refs(description, part, base, stored), description.config.d_model
        if not part.startswith(BLOCK):
            return refs
        for name, ref in refs.items():
            kind = name.split(".")[1]
            rows = ("qkv".index(kind) * width, ("qkv".index(kind) + 1) * width) if kind in ("q", "k", "v") else None
            turned = name.endswith(".weight") and "norm" not in name
            refs[name] = dataclasses.replace(ref, transpose=turned, rows=rows)
        return refs


def attention_biases(model: ModelConfig) -> tuple[bool, bool]:
    """Whether queries, keys and values have biases, and whether the output has one."""
    matrices = model.attention.matrices(model)
    return matrices["q"].bias, matrices["o"].bias


def ffn_bias(model: ModelConfig) -> bool:
    """Whether the feed-forward has biases."""
    return model.ffn.matrices(model)["down"].bias


def windows(model: ModelConfig) -> tuple[int | None, list[int]]:
    """How far attention looks back, and in which blocks."""
    assert isinstance(model.attention, MultiHead)
    size, having = model.attention.window, model.attention.window_blocks
    if size is None:
        return None, []
    return size, list(range(model.n_blocks)) if having is None else list(having)


def activation_key(activation: str) -> str:
    """What config.json calls an activation."""
    return next(key for key, value in GELUS.items() if value == activation)


class StackWise(Family):
    """A rack that no other family describes, under the names of its own parts."""

    model_type: ClassVar[str] = "stackwise"
    architecture: ClassVar[str] = "StackWise"
    native: ClassVar[bool] = True

    def read(self, config: Mapping[str, Any]) -> Description:
        entry = config.get("stackwise")
        if not isinstance(entry, dict):
            raise UsageError("it has no stackwise entry", hint="export it again")
        keys = Keys(entry)
        check_format(entry)
        settings = keys.get("model")
        if not isinstance(settings, dict):
            raise keys.refusal("model", settings, "the settings of a rack")
        return Description(
            settings,
            keys.size("vocab_size"),
            keys.size("seq_len"),
            keys.flag("causal", False),
            special_ids={"mask_token_id": keys.token("mask_token_id"), "eos_token_id": keys.token("separator_id")},
        )

    def write(self, model: ModelConfig, description: Description) -> dict[str, Any] | None:
        """See `Family.write`; every rack is of it."""
        return {
            "stackwise": {
                "model": model.model_dump(mode="json"),
                "vocab_size": description.vocab_size,
                "seq_len": description.max_seq_len,
            }
        }

    def refs(self, description: Description, part: str, base: str, stored: Iterable[str] = ()) -> dict[str, TensorRef]:
        """See `Family.refs`: kinds from outside have tensors of which the files alone know."""
        names = dict.fromkeys(self.own_names(part, part_shapes(description, part)))
        place = self.own_names(part, [""])[0]
        names |= dict.fromkeys(name for name in stored if name.startswith(place))
        if part == HEAD and description.config.tie_embeddings:
            names.pop(f"{place}projection", None)
        return {name.removeprefix(place): TensorRef("", name) for name in names}

    def own_names(self, part: str, names: Iterable[str]) -> list[str]:
        return [f"{part.replace(BLOCK, 'blocks.')}.{name}" for name in names]

    def tied(self, description: Description) -> list[str]:
        return []
