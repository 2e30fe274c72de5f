"""Blocks, front and head against `transformers` modules of random weights: the same logits at every position."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from stackwise.config.model import Direction, ModelConfig
from stackwise.model import Rack, build_rack

VOCAB, S, D, H = 40, 24, 32, 4

LLAMA = {
    "model.embed_tokens": "front.embedding",
    "model.norm": "head.norm",
    "lm_head.weight": "head.projection",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{name}_proj": f"attention.{name}" for name in "qkvo"},
    **{f"mlp.{name}_proj": f"ffn.{name}" for name in ("gate", "up", "down")},
}
GPT2 = {
    "transformer.wte": "front.embedding",
    "transformer.wpe": "front.positions",
    "transformer.ln_f": "head.norm",
    "lm_head.weight": "head.projection",
    "ln_1": "attention_norm",
    "ln_2": "ffn_norm",
    "attn.c_proj": "attention.o",
    "mlp.c_fc": "ffn.up",
    "mlp.c_proj": "ffn.down",
}
BERT = {
    "embeddings.word_embeddings": "front.embedding",
    "embeddings.position_embeddings": "front.positions",
    "embeddings.token_type_embeddings": "front.types",
    "embeddings.LayerNorm": "front.norm",
    "attention.self.query": "attention.q",
    "attention.self.key": "attention.k",
    "attention.self.value": "attention.v",
    "attention.output.dense": "attention.o",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "ffn.up",
    "output.dense": "ffn.down",
    "output.LayerNorm": "ffn_norm",
    "cls.predictions.transform.dense": "head.dense",
    "cls.predictions.transform.LayerNorm": "head.norm",
    "cls.predictions.bias": "head.bias",
    "lm_head.dense": "head.dense",
    "lm_head.layer_norm": "head.norm",
    "lm_head.bias": "head.bias",
}
BASE = {"vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": H}
ROTARY = BASE | {"intermediate_size": 48, "max_position_embeddings": 64, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
OURS: dict[str, Any] = {"d_model": D, "n_heads": H, "architecture": {"n_stacks": 3}, "max_seq_len": 64}
GQA = {"kind": "gqa", "kv_heads": 2}
ROPE = OURS | {"d_ff": 48, "norm_eps": 1e-6, "attention": GQA}
OLD = {"norm": "layernorm", "positions": "learned", "bias": True, "d_ff": 48}
POST = OURS | OLD | {"norm_eps": 1e-12, "norm_place": "post", "embedding_norm": True, "head": "transform"}

FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "llama": ("Llama", ROTARY | {"attention_bias": True}, ROPE | {"attention": GQA | {"bias": "all"}}, LLAMA),
    "llama-mlp-bias": ("Llama", ROTARY | {"mlp_bias": True}, ROPE | {"ffn": {"kind": "swiglu", "bias": True}}, LLAMA),
    "mistral": (
        "Mistral",
        ROTARY | {"head_dim": 12, "sliding_window": 5},
        ROPE | {"head_size": 12, "attention": GQA | {"window": 5}},
        LLAMA,
    ),
    "qwen2": (
        "Qwen2",
        ROTARY | {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        ROPE | {"attention": GQA | {"bias": "qkv", "window": 7, "window_blocks": [1, 2]}},
        LLAMA,
    ),
    "qwen3": (
        "Qwen3",
        ROTARY | {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        ROPE | {"head_size": 16, "rope_theta": 1e6, "attention": GQA | {"qk_norm": True}},
        LLAMA,
    ),
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCAB, "n_embd": D, "n_layer": 3, "n_head": H, "n_positions": 64, "n_inner": 48},
        OURS | OLD | {"ffn": {"kind": "gelu", "activation": "gelu_tanh"}},
        GPT2,
    ),
    "bert": (
        "Bert",
        BASE | {"intermediate_size": 48, "max_position_embeddings": 64},
        POST | {"ffn": "gelu", "token_types": 2},
        BERT,
    ),
    "bert-relu": (
        "Bert",
        BASE | {"intermediate_size": 48, "max_position_embeddings": 64, "hidden_act": "relu"},
        POST
        | {"ffn": {"kind": "gelu", "activation": "relu"}, "head": {"kind": "transform", "activation": "relu"}}
        | {"token_types": 2},
        BERT,
    ),
    "roberta": (
        "Roberta",
        BASE | {"intermediate_size": 48, "max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1},
        POST | {"ffn": "gelu", "token_types": 1, "position_offset": 2},
        BERT,
    ),
}


def theirs(family: str, settings: Mapping[str, Any]) -> Any:
    """A model of transformers with weights that are all drawn, norms and biases too."""
    config = getattr(transformers, f"{family}Config")(**settings)
    config._attn_implementation = "eager"
    kind = "ForMaskedLM" if family in ("Bert", "Roberta") else "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{family}{kind}")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if re.search(r"(norm|LayerNorm|ln_.)\.weight$", name) else 0.0
            parameter.normal_(centre, 0.15, generator=generator)
    return model


def copied(model: Any, family: str, settings: Mapping[str, Any], names: Mapping[str, str]) -> Rack:
    """Our rack with the weights of a model of transformers."""
    config = ModelConfig.model_validate(dict(settings) | {"tie_embeddings": model.config.tie_word_embeddings})
    rack = build_rack(config, VOCAB, 0, S).eval()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.named_parameters():
        layer = re.search(r"(?:layers?|transformer\.h)\.(\d+)\.(.*)", name)
        home, rest = (f"stacks.{layer[1]}.blocks.0.", layer[2]) if layer else ("", name)
        if family == "GPT2" and layer and not rest.startswith("ln") and tensor.ndim == 2:
            tensor = tensor.T  # a Conv1D
        if rest.startswith("attn.c_attn"):
            parts = tensor.split(D)
            tensors |= {f"{home}attention.{q}.{rest[12:]}": part for q, part in zip("qkv", parts, strict=True)}
            continue
        rest = rest.removeprefix("bert.").removeprefix("roberta.")
        found = max((key for key in names if rest.startswith(key)), key=len)
        tensors[home + names[found] + rest[len(found) :]] = tensor
    rack.load_state_dict({name: tensor.detach().clone() for name, tensor in tensors.items()}, strict=True)
    return rack


def mask4d(segments: Tensor, causal: bool, window: int | None) -> Tensor:
    place = torch.arange(segments.shape[1])
    seen = segments[:, :, None] == segments[:, None, :]
    if causal:
        seen = seen & (place[:, None] >= place)
        if window is not None:
            seen = seen & (place[:, None] - place < window)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


def close(ours: Tensor, others: Tensor) -> None:
    assert others.abs().max() > 0.5, "the logits are too small to say anything"
    torch.testing.assert_close(ours, others, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_family_computes_the_same(name: str) -> None:
    family, settings, own, names = FAMILIES[name]
    model, causal = theirs(family, settings), family not in ("Bert", "Roberta")
    rack = copied(model, family, own, names)
    config = ModelConfig.model_validate(own)
    assert sum(p.numel() for p in rack.front.parameters()) == config.front_parameters(VOCAB, S)
    tied = model.config.tie_word_embeddings
    assert sum(p.numel() for p in rack.head.parameters()) == config.head_parameters(VOCAB, shared=tied)
    assert {sum(p.numel() for p in block.parameters()) for block in rack.blocks} == {config.block_parameters}
    ids = torch.randint(3, VOCAB, (2, S), generator=torch.Generator().manual_seed(2))
    direction: Direction = causal
    close(rack(ids, direction), model(ids).logits)
    # Two documents in a row, whose positions run on, as those of a row do here.
    segments = torch.zeros(2, S, dtype=torch.int64)
    segments[0, 9:], segments[1, 17:] = 1, 1
    offset = own.get("position_offset", 0)
    place = torch.arange(S).expand(2, S) + offset
    layers = getattr(model.config, "layer_types", None) or ["sliding_attention" if name == "mistral" else ""] * 3
    window = getattr(model.config, "sliding_window", None)
    masks = {kind: mask4d(segments, causal, window if kind == "sliding_attention" else None) for kind in {*layers}}
    given: Any = next(iter(masks.values())) if len(masks) == 1 else masks
    close(rack(ids, direction, segments), model(ids, attention_mask=given, position_ids=place).logits)
    # Padding is a document of its own: what precedes it does not see it.
    real = torch.ones(2, S, dtype=torch.int64)
    real[0, 20:], real[1, 13:] = 0, 0
    padded = model(ids, attention_mask=real, position_ids=place).logits
    close(rack(ids, direction, 1 - real)[real.bool()], padded[real.bool()])


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-mscale": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 0.3,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "truncate": False,
    },
    "yarn-factor": {"factor": 2.0, "original_max_position_embeddings": 16, "attention_factor": 1.7},
}


@pytest.mark.parametrize("length", [12, 16, S])
@pytest.mark.parametrize("name", SCALINGS)
@torch.no_grad()
def test_rope_scaling_is_that_of_transformers(name: str, length: int) -> None:
    kind, settings = name.partition("-")[0], SCALINGS[name]
    rope = {"rope_type": kind, "rope_theta": 100.0} | settings
    # The wavelengths of a head of 16 lie on both sides of both bounds.
    model = theirs("Llama", ROTARY | {"head_dim": 16, "max_position_embeddings": 16, "rope_parameters": rope})
    scaling = {"kind": kind} | settings
    if kind == "dynamic":
        scaling["original_max_position_embeddings"] = 16
    rack = copied(model, "Llama", ROPE | {"head_size": 16, "rope_theta": 100.0, "rope_scaling": scaling}, LLAMA)
    ids = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(2))
    rack(torch.zeros(1, 20, dtype=torch.int64))  # a row of another length leaves nothing behind
    close(rack(ids, True), model(ids).logits)
    plain = copied(model, "Llama", ROPE | {"head_size": 16, "rope_theta": 100.0}, LLAMA)
    same = torch.allclose(plain(ids, True), rack(ids, True), atol=1e-4)
    assert same == (kind == "dynamic" and length <= 16)
    frequencies, factor = rack.blocks[0].attention.rotary.scaling.frequencies(16, 100.0, length)  # type: ignore[union-attr]
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # to the last bit: training in float64 is compared with that of transformers
    want, want_factor = ROPE_INIT_FUNCTIONS[kind](model.config, torch.device("cpu"), seq_len=torch.tensor(length))
    assert torch.equal(frequencies, want)
    assert factor == want_factor
