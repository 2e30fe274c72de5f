"""Families with a mixture of experts: Mixtral, Qwen 2 and Qwen 3 MoE. Files hold each expert's matrices. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from stackwise.config.model import ModelConfig
from stackwise.model.moe import MoE
from stackwise.pretrained.builtin import Qwen2, Rotary, attention_biases, windows
from stackwise.pretrained.families import Description
from stackwise.pretrained.keys import Keys

_EXPERT = re.compile(r"ffn\.experts\.(\d+)\.(gate|up|down)")


class Mixture(Rotary):
    """What they share: rotary attention, and gated experts with a router of softmax."""

    kinds: ClassVar[tuple[type[Any], ...]] = (MoE,)
    expert_names: ClassVar[Mapping[str, str]]
    """Of an expert's matrices, behind its number."""
    expert_base: ClassVar[str]
    """What their names begin with."""

    def block_name(self, stem: str) -> str:
        if (match := _EXPERT.fullmatch(stem)) is None:
            return super().block_name(stem)
        return f"{self.expert_base}experts.{match[1]}.{self.expert_names[match[2]]}"

    @staticmethod
    def router(keys: Keys, experts: str) -> dict[str, Any]:
        """Settings of the router; its auxiliary loss is of training alone."""
        keys.ignore("output_router_logits")
        if keys.get("rope_parameters") is None:
            keys.number("rope_theta", None)  # families differ in what is meant where it is left out
        weight = keys.get("router_aux_loss_coef", 0.001)
        known = type(weight) in (int, float) and 0 <= weight <= 1e15
        settings = {
            "kind": "moe",
            "experts": keys.size(experts, keys.get("num_local_experts")),
            "top_k": keys.size("num_experts_per_tok"),
        }
        return settings | {"aux_weight": float(weight) if known else 0.001}

    @staticmethod
    def router_keys(kind: MoE) -> dict[str, Any]:
        """The inverse."""
        weight = kind.aux_weight if kind.balance == "loss" else 0.0
        return {"num_experts_per_tok": kind.top_k, "router_aux_loss_coef": weight, "output_router_logits": False}


class Mixtral(Mixture):
    """Mixtral (arXiv 2401.04088)."""

    model_type: ClassVar[str] = "mixtral"
    architecture: ClassVar[str] = "MixtralForCausalLM"
    positions: ClassVar[int] = 131072
    kv_heads: ClassVar[int | None] = 8
    eps: ClassVar[float] = 1e-5
    expert_base: ClassVar[str] = "block_sparse_moe."
    expert_names: ClassVar[Mapping[str, str]] = {"gate": "w1", "up": "w3", "down": "w2"}
    block_names: ClassVar[Mapping[str, str]] = {**Rotary.block_names, "ffn.router": "block_sparse_moe.gate"}

    def own(self, keys: Keys, blocks: int) -> tuple[dict[str, Any], dict[str, Any]]:
        keys.ignore("router_jitter_noise")  # of training
        window = {} if keys.get("sliding_window") is None else {"window": keys.size("sliding_window")}
        return window, {"ffn": self.router(keys, "num_local_experts") | {"normalize": True}}

    def write(self, model: ModelConfig, description: Description) -> dict[str, Any] | None:
        if (config := super().write(model, description)) is None or not isinstance(model.ffn, MoE):
            return None
        size = windows(model)[0]
        config |= {"intermediate_size": model.ffn.expert_width(model), "sliding_window": size}
        return config | self.router_keys(model.ffn) | {"num_local_experts": model.ffn.experts}


class QwenMixture(Mixture, Qwen2):
    """What both MoE generations of Qwen share: experts at some depths, a width of their own."""

    expert_base: ClassVar[str] = "mlp."
    expert_names: ClassVar[Mapping[str, str]] = {name: f"{name}_proj" for name in ("gate", "up", "down")}
    block_names: ClassVar[Mapping[str, str]] = {
        **Rotary.block_names,
        "ffn.router": "mlp.gate",
        **{f"ffn.shared.{name}": f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")},
        "ffn.shared_gate": "mlp.shared_expert_gate",
    }

    def experts(self, keys: Keys, blocks: int) -> dict[str, Any]:
        """Settings of the mixture."""
        every, dense = keys.size("decoder_sparse_step", 1), keys.get("mlp_only_layers", [])
        if not isinstance(dense, list) or any(type(place) is not int for place in dense):
            raise keys.refusal("mlp_only_layers", dense, "a list of blocks")
        places = [place for place in range(blocks) if place not in dense and (place + 1) % every == 0]
        if not places:
            raise keys.refusal("mlp_only_layers", dense, "blocks of which some are left with experts")
        settings = self.router(keys, "num_experts") | {"expert_dim": keys.size("moe_intermediate_size")}
        settings |= {"normalize": keys.flag("norm_topk_prob", False)}
        return settings | ({} if len(places) == blocks else {"at": places})

    @staticmethod
    def window(keys: Keys, blocks: int) -> dict[str, Any]:
        """See `Qwen2.window`; where windows are used, which blocks have them must be said."""
        kinds = keys.get("layer_types")
        if keys.flag("use_sliding_window", False):
            if kinds is None:
                raise keys.refusal("layer_types", kinds, "a kind for each block, as use_sliding_window is true")
            return Qwen2.window(keys, blocks)
        if kinds is not None and kinds != ["full_attention"] * blocks:
            raise keys.refusal("layer_types", kinds, "full_attention for each block, as use_sliding_window is false")
        keys.ignore("sliding_window", "max_window_layers")
        return {}

    def write(self, model: ModelConfig, description: Description) -> dict[str, Any] | None:
        if (config := super().write(model, description)) is None or not isinstance(model.ffn, MoE):
            return None
        kind, blocks = model.ffn, range(model.n_blocks)
        dense = [] if kind.at is None else [place for place in blocks if place not in kind.at]
        config |= {"num_experts": kind.experts, "moe_intermediate_size": kind.expert_width(model)}
        config |= {"norm_topk_prob": kind.normalizes, "decoder_sparse_step": 1, "mlp_only_layers": dense}
        return config | self.router_keys(kind)


class Qwen2Moe(QwenMixture):
    """Qwen 1.5 and 2 MoE (arXiv 2407.10671): experts that every token goes to, weighed by a sigmoid."""

    model_type: ClassVar[str] = "qwen2_moe"
    architecture: ClassVar[str] = "Qwen2MoeForCausalLM"
    kv_heads: ClassVar[int | None] = 16

    def own(self, keys: Keys, blocks: int) -> tuple[dict[str, Any], dict[str, Any]]:
        shared = {"shared_experts": 1, "shared_dim": keys.size("shared_expert_intermediate_size", 5632)}
        bias = {"bias": "qkv"} if keys.flag("qkv_bias", True) else {}
        ffn = self.experts(keys, blocks) | shared | {"shared_gate": True}
        return bias | self.window(keys, blocks), {"ffn": ffn}

    def write(self, model: ModelConfig, description: Description) -> dict[str, Any] | None:
        if (config := super().write(model, description)) is None or not isinstance(model.ffn, MoE):
            return None
        if not model.ffn.shared_gate:
            return None
        width = model.ffn.shared_width(model)
        return config | {"shared_expert_intermediate_size": width, "qkv_bias": attention_biases(model)[0]}


class Qwen3Moe(QwenMixture):
    """Qwen 3 MoE (arXiv 2505.09388): queries and keys are normed, no shared experts."""

    model_type: ClassVar[str] = "qwen3_moe"
    architecture: ClassVar[str] = "Qwen3MoeForCausalLM"
    kv_heads: ClassVar[int | None] = 4

    def own(self, keys: Keys, blocks: int) -> tuple[dict[str, Any], dict[str, Any]]:
        keys.only("use_sliding_window", False)
        bias = {"bias": "all"} if keys.flag("attention_bias", False) else {}
        return {"qk_norm": True} | bias | self.window(keys, blocks), {"ffn": self.experts(keys, blocks)}

    def write(self, model: ModelConfig, description: Description) -> dict[str, Any] | None:
        if (config := super().write(model, description)) is None or windows(model)[0] is not None:
            return None
        config = {key: value for key, value in config.items() if key not in ("layer_types", "max_window_layers")}
        return config | {"attention_bias": attention_biases(model)[0]}
