"""Small models of transformers with random weights, one of each family, saved as their library saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "rope_theta": 5000.0},
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
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
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    kind = name.partition("-")[0]
    config = AutoConfig.for_model(kind, **(COMMON | FAMILIES[name] | settings))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():  # fresh norms and biases would hide a mistake
            for parameter in model.parameters():
                parameter.normal_(1.0 if parameter.ndim < 2 else 0.0, 0.2)
    model = model.to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    return model
