"""Small models of transformers with random weights, one of each family, saved as their library saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

GPT2: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 1,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "rope_theta": 5000.0},
    "llama-biases": {"attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "llama-3": {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16, "rope_theta": 5e5}},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "mlp_bias": True},
    "llama-dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        "max_position_embeddings": 16,
    },
    "llama-yarn": {"rope_parameters": YARN | {"rope_theta": 1e4}},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 7, "head_dim": 12},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2-windows": {
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7},
    "qwen2_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_key_value_heads": 2},
        **{"shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    },
    "qwen3_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_key_value_heads": 2},
        **{"norm_topk_prob": True, "head_dim": 16},
    },
    "gpt2": GPT2,
    "gpt2-untied": GPT2 | {"tie_word_embeddings": False, "n_inner": None, "activation_function": "relu"},
    "bert": {"type_vocab_size": 2},
    "bert-untied": {"tie_word_embeddings": False, "hidden_act": "gelu_new"},
    "roberta": {"type_vocab_size": 1, "pad_token_id": 1},
    "modernbert": {"local_attention": 8, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0},
    "modernbert-biases": {
        **{"local_attention": 6, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "norm_bias": True},
        **{"attention_bias": True, "classifier_bias": True, "decoder_bias": False, "tie_word_embeddings": False},
        **{"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    },
}
"""Settings of each; what follows a dash tells several of one family apart."""

COMMON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def make(
    name: str, directory: Path, *, shard: str = "20KB", dtype: torch.dtype = torch.float32, **settings: Any
) -> Any:
    """Save a model, and return it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, logging

    logging.disable_progress_bar()
    kind = name.partition("-")[0]
    common = {"vocab_size": 99} if kind == "gpt2" else COMMON
    config = AutoConfig.for_model(kind, **(common | FAMILIES[name] | settings))
    auto = AutoModelForMaskedLM if kind in ("bert", "roberta", "modernbert") else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config).eval()
        with torch.no_grad():  # fresh norms and biases would hide a mistake
            for parameter in model.parameters():
                parameter.normal_(1.0 if parameter.ndim < 2 else 0.0, 0.2)
            if name == "bert-untied":  # whose second bias nothing reads
                model.cls.predictions.bias.copy_(model.cls.predictions.decoder.bias)
    model = model.to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    return model
