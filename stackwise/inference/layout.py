"""How an exported directory is laid out: names of tensors, config.json, and which racks are LLaMA-shaped."""

from __future__ import annotations

import re
from typing import Any

from stackwise.config.model import ModelConfig
from stackwise.version import __version__

FORMAT = 1
"""Version of the `stackwise` entry in config.json."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
"""The only names of weight files that are read."""

LLAMA = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
"""A block's layers, and what Hugging Face's LLaMA calls them. The rotary convention is the same: no permutation."""


def is_llama(config: ModelConfig) -> bool:
    """Whether Hugging Face's LLaMA computes the same function."""
    alike = config.norm == "rmsnorm" and config.positions == "rope" and config.ffn == "swiglu"
    return alike and config.attention in (None, "mha", "gqa") and config.time_embedding == "none"


def front_name(name: str, llama: bool) -> str:
    """The exported name of a tensor of the front, such as `embedding.weight`."""
    return "model.embed_tokens.weight" if llama else f"front.{name}"


def block_name(index: int, name: str, llama: bool) -> str:
    """The exported name of a block's tensor, such as `attention.q.weight`."""
    if not llama:
        return f"blocks.{index}.{name}"
    layer, kind = name.rsplit(".", 1)
    return f"model.layers.{index}.{LLAMA[layer]}.{kind}"


def head_name(name: str, llama: bool) -> str:
    """The exported name of a tensor of the head: of its norm, or its `projection`."""
    if not llama:
        return f"head.{name}"
    return "lm_head.weight" if name == "projection" else f"model.{name}"


def config_json(
    config: ModelConfig,
    *,
    vocab_size: int,
    seq_len: int,
    tied: bool,
    causal: bool,
    dtype: str,
    mask_token_id: int | None,
    separator_id: int | None,
) -> dict[str, Any]:
    """The contents of config.json.

    For a LLaMA-shaped rack it is a LLaMA configuration; `is_causal: false` makes transformers 5 attend
    bidirectionally, as the rack does (transformers 4 attends causally whatever it says).
    """
    own = {
        "format": FORMAT,
        "version": __version__,
        "model": config.model_dump(mode="json") | {"tie_embeddings": tied},
        "vocab_size": vocab_size,
        "seq_len": seq_len,
        "causal": causal,
        "bidirectional": not causal,
        "mask_token_id": mask_token_id,
        "separator_id": separator_id,
    }
    if not is_llama(config):
        return {"model_type": "stackwise", "vocab_size": vocab_size, "dtype": dtype, "stackwise": own}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.n_blocks,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len or seq_len,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "attention_bias": config.bias,
        "attention_dropout": 0.0,
        "mlp_bias": config.bias,
        "tie_word_embeddings": tied,
        "is_causal": causal,
        "use_cache": causal,
        "bos_token_id": separator_id,
        "eos_token_id": separator_id,
        "pad_token_id": None,
        "dtype": dtype,
        "stackwise": own,
    }
