"""An exported directory: its names of tensors, its config.json, and the way back to a rack."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stackwise.config.model import ModelConfig
from stackwise.config.translations import read_model
from stackwise.errors import DamageError, NotFound, UsageError
from stackwise.model.block import Block, Stack
from stackwise.model.layers import Rotary
from stackwise.model.rack import Front, Head, Rack
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
    alike = config.norm == "rmsnorm" and config.positions == "rope" and config.ffn.llama
    return alike and config.attention.llama and config.time_embedding == "none"


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


@dataclass(frozen=True)
class Exported:
    """What an exported directory says of itself."""

    directory: Path
    llama: bool
    """Whether transformers loads it as LLaMA."""
    model: ModelConfig
    vocab_size: int
    seq_len: int
    causal: bool
    """Whether the rack attends causally; otherwise bidirectionally."""
    tied: bool
    mask_token_id: int | None
    separator_id: int | None
    files: tuple[str, ...] = ()
    bytes: int = 0
    parameters: int = 0


def read_export(directory: Path | str) -> Exported:
    """What an exported directory says of itself.

    Raises:
        NotFound: There is no export.
        UsageError: It is of a newer format.
        DamageError: Its config.json is damaged.
    """
    directory = Path(directory)
    path = directory / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        own = config["stackwise"]
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{directory} holds no export: there is no config.json") from None
    except (KeyError, TypeError):
        raise NotFound(f"{directory} was not exported by stackwise: its config.json has no stackwise entry") from None
    except (OSError, ValueError) as error:
        raise DamageError(f"{path} cannot be read: {error}") from None
    try:
        if own["format"] > FORMAT:
            raise UsageError(f"{directory} is of format {own['format']}; this version reads up to {FORMAT}")
        model = read_model(own["model"])
        return Exported(
            directory=directory,
            llama=is_llama(model),
            model=model,
            vocab_size=int(own["vocab_size"]),
            seq_len=int(own["seq_len"]),
            causal=bool(own["causal"]),
            tied=model.tie_embeddings,
            mask_token_id=own["mask_token_id"],
            separator_id=own["separator_id"],
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise DamageError(f"{path} is damaged: {error}") from None


def load_rack(directory: Path | str, device: torch.device | str = "cpu") -> Rack:
    """The rack of an exported directory, with equal logits (`read_export` says which way it attends).

    Raises:
        NotFound: There is no export.
        DamageError: A file or a tensor is missing, damaged, or of another shape.
    """
    about = read_export(directory)
    config, llama = about.model, about.llama
    with torch.device("meta"):
        front = Front(config, about.vocab_size, about.seq_len)
        blocks = [Block(config) for _ in range(config.n_blocks)]
        head = Head(config, about.vocab_size)
    parts: list[tuple[nn.Module, dict[str, str]]] = [
        (front, {name: front_name(name, llama) for name in front.state_dict()}),
        *((block, {name: block_name(i, name, llama) for name in block.state_dict()}) for i, block in enumerate(blocks)),
        (head, {name: head_name(name, llama) for name in head.state_dict()}),
    ]
    homes = {exported: (part, name) for part, names in parts for name, exported in names.items()}
    if about.tied:
        del homes[head_name("projection", llama)]
    for exported, tensor in read_tensors(about.directory, device):
        if exported not in homes:
            raise DamageError(f"{directory}: tensor {exported} belongs to no part of the rack")
        part, name = homes.pop(exported)
        if part.get_parameter(name).shape != tensor.shape:
            raise DamageError(f"{directory}: tensor {exported} has shape {list(tensor.shape)}")
        part.load_state_dict({name: tensor}, strict=False, assign=True)
    if homes:
        raise DamageError(f"{directory}: tensor {sorted(homes)[0]} is missing")
    for block in blocks:
        for child in block.modules():
            if isinstance(child, Rotary):
                child.rebuild(device)
    if about.tied:
        norm = head.norm
        head = Head(config, about.vocab_size, front.embedding.weight)
        head.norm = norm
    per_stack = config.architecture.blocks_per_stack
    stacks = [Stack(blocks[i : i + per_stack], i // per_stack) for i in range(0, len(blocks), per_stack)]
    return Rack(front, stacks, head)


def read_tensors(directory: Path, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an exported directory, one at a time.

    Raises:
        UsageError: An index that names other files than weights.
        DamageError: A file is missing or damaged.
    """
    for name in _files(directory):
        path = directory / name
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    yield key, file.get_tensor(key)
        except FileNotFoundError:
            raise DamageError(f"{path} is missing") from None
        except (SafetensorError, OSError) as error:
            raise DamageError(f"{path} cannot be read: {error}") from None


def _files(directory: Path) -> list[str]:
    index = directory / INDEX
    if not index.exists():
        return [SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"{index} cannot be read: {error}") from None
    for name in names:
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise UsageError(f"{index} names {name!r}, which is no file of weights")
    return names
