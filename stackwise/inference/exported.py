"""An exported directory: its names of tensors, its config.json, and the way back to a rack."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from stackwise.config.model import ModelConfig, NoTime
from stackwise.config.translations import read_model
from stackwise.errors import DamageError, NotFound, UsageError
from stackwise.files import open_regular, read_json
from stackwise.model.block import Block, Stack
from stackwise.model.build import rebuild_tables
from stackwise.model.rack import Front, Rack
from stackwise.registry import PLUGINS
from stackwise.text import printable
from stackwise.version import __version__

FORMAT = 1
"""Version of the `stackwise` entry in config.json."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
"""The only names of weight files that are read."""

HEADER_BYTES = 32 << 20
"""Most bytes of a weight file's header: some 300,000 tensors."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes that weights may have, as safetensors calls them."""

NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
"""What Hugging Face's LLaMA calls a block's norms; attention and feed-forward know the names of theirs."""


def is_llama(config: ModelConfig) -> bool:
    """Whether Hugging Face's LLaMA computes the same function."""
    alike = config.norm == "rmsnorm" and config.positions == "rope" and isinstance(config.time_embedding, NoTime)
    # What LLaMA lacks, and biases other than `bias` says, are in the specification alone.
    own = config.specification()
    plain = ModelConfig().specification() | {"head_size": config.head_dim}
    alike = alike and own.keys() <= plain.keys() and own["attention"].keys() <= {"kind", "kv_heads"}
    return alike and own["ffn"].keys() <= {"kind"} and None not in (config.attention.llama, config.ffn.llama)


def front_name(name: str, llama: bool) -> str:
    """The exported name of a tensor of the front, such as `embedding.weight`."""
    return "model.embed_tokens.weight" if llama else f"front.{name}"


def block_name(index: int, name: str, config: ModelConfig) -> str:
    """The exported name of a block's tensor, such as `attention.q.weight`."""
    if not is_llama(config):
        return f"blocks.{index}.{name}"
    part, rest = name.split(".", 1)
    if part in NORMS:
        return f"model.layers.{index}.{NORMS[part]}.{rest}"
    layer, kind = rest.rsplit(".", 1)
    names = (config.attention if part == "attention" else config.ffn).llama
    assert names is not None
    return f"model.layers.{index}.{names[layer]}.{kind}"


def head_name(name: str, llama: bool) -> str:
    """The exported name of a tensor of the head: of its norm, or its `projection`."""
    if not llama:
        return f"head.{name}"
    return "lm_head.weight" if name == "projection" else f"model.{name}"


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


def config_json(exported: Exported, dtype: str) -> dict[str, Any]:
    """The contents of config.json.

    For a LLaMA-shaped rack it is a LLaMA configuration; `is_causal: false` makes transformers 5 attend
    bidirectionally, as the rack does (transformers 4 attends causally whatever it says).
    """
    model, causal = exported.model, exported.causal
    entry = {
        "format": FORMAT,
        "version": __version__,
        "model": model.model_dump(mode="json") | {"tie_embeddings": exported.tied},
        "vocab_size": exported.vocab_size,
        "seq_len": exported.seq_len,
        "causal": causal,
        "bidirectional": not causal,
        "mask_token_id": exported.mask_token_id,
        "separator_id": exported.separator_id,
    }
    if not exported.llama:
        return {"model_type": "stackwise", "vocab_size": exported.vocab_size, "dtype": dtype, "stackwise": entry}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": exported.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.n_blocks,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_seq_len or exported.seq_len,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,
        "attention_bias": model.bias,
        "attention_dropout": 0.0,
        "mlp_bias": model.bias,
        "tie_word_embeddings": exported.tied,
        "is_causal": causal,
        "use_cache": causal,
        "bos_token_id": exported.separator_id,
        "eos_token_id": exported.separator_id,
        "pad_token_id": None,
        "dtype": dtype,
        "stackwise": entry,
    }


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
        config = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{directory} holds no export: there is no config.json") from None
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    entry = config.get("stackwise") if isinstance(config, dict) else None
    if not isinstance(entry, dict):
        raise NotFound(f"{directory} was not exported by stackwise: its config.json has no stackwise entry")
    try:
        if (written := _typed(entry, "format", int)) > FORMAT:
            raise UsageError(
                f"{directory} is of format {written}; this version reads up to {FORMAT}",
                hint="install a newer version of stackwise",
            )
        model = read_model(entry["model"])
        return Exported(
            directory=directory,
            llama=is_llama(model),
            model=model,
            vocab_size=_typed(entry, "vocab_size", int),
            seq_len=_typed(entry, "seq_len", int),
            causal=_typed(entry, "causal", bool),
            tied=model.tie_embeddings,
            mask_token_id=_typed(entry, "mask_token_id", int, type(None)),
            separator_id=_typed(entry, "separator_id", int, type(None)),
        )
    except UsageError:  # which is a ValueError
        raise
    except ValidationError as error:
        if any(fault["type"] == "kind" for fault in error.errors()):
            text = printable(error.errors()[0]["msg"])
            raise UsageError(
                f"{directory} has layers of a kind that is not here: {text}",
                hint=f"name the file that registers it in the environment: {PLUGINS}=FILE.py",
            ) from None
        raise _damaged(path, error) from None
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None


def _typed(entry: dict[str, Any], key: str, *kinds: type) -> Any:
    value = entry[key]
    if type(value) not in kinds:  # not isinstance: true is an int
        raise TypeError(f"{key} is {value!r:.40}")
    return value


def _damaged(path: Path, error: Exception) -> DamageError:
    """The error for a file that cannot be understood, in one line."""
    if isinstance(error, DamageError):
        return error
    if isinstance(error, ValidationError):  # whose own text has many lines
        fault = error.errors()[0]
        reason = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
    else:
        reason = f"{'it has no ' if isinstance(error, KeyError) else ''}{error}".splitlines()[0]
    return DamageError(f"{path} cannot be read: {printable(reason)}", hint="export it again")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, as the file's header says."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def list_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of an exported directory, by name; the values are not read.

    Raises:
        UsageError: An index that names other files than weights.
        DamageError: A file is missing, damaged or no regular file, or two have a tensor of one name.
    """
    tensors: dict[str, StoredTensor] = {}
    for name in _files(directory):
        with _opened(directory / name) as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                if key in tensors:
                    raise DamageError(f"{directory}: tensor {printable(key)} is in two files", hint="export it again")
                part = file.get_slice(key)
                tensors[key] = StoredTensor(directory / name, tuple(part.get_shape()), part.get_dtype())
    return tensors


@contextlib.contextmanager
def _opened(path: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    try:
        # Links, FIFOs and headers without bound are refused before the library sees the file.
        with os.fdopen(open_regular(path), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > HEADER_BYTES:
            raise DamageError(f"{path} cannot be read: its header is said to have {length} bytes")
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except FileNotFoundError:
        raise DamageError(f"{path} is missing", hint="export it again") from None
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _files(directory: Path) -> list[str]:
    index = directory / INDEX
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except FileNotFoundError:
        return [SINGLE]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, error) from None
    for name in names:
        # A name is never joined to the directory unless it is one of ours: it could lead out of it.
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise UsageError(f"{index} names {name!r:.80}, which is no file of weights", hint="export it again")
    return names


def load_rack(directory: Path | str, device: torch.device | str = "cpu") -> Rack:
    """The rack of an exported directory, with equal logits (`read_export` says which way it attends).

    Raises:
        NotFound: There is no export.
        DamageError: A file or a tensor is missing, damaged, or of another shape.
    """
    about = read_export(directory)
    config, llama = about.model, about.llama
    stored = list_tensors(about.directory)
    embedding = stored.get(front_name("embedding.weight", llama))
    shape = (about.vocab_size, config.d_model)
    # Nothing is built before the sizes in config.json are known to be those of the files.
    if embedding is None or embedding.shape != shape or config.n_blocks > len(stored):
        what = "is missing" if embedding is None else f"has shape {list(embedding.shape)}, not {list(shape)}"
        many = f"{len(stored)} tensors for {config.n_blocks} blocks"
        reason = many if embedding is not None and embedding.shape == shape else f"the embedding {what}"
        raise DamageError(f"{directory}: {reason}", hint="export it again")
    try:
        with torch.device("meta"):
            front = Front(config, about.vocab_size, about.seq_len)
            blocks = [Block(config.at(index)) for index in range(config.n_blocks)]
            head = config.head.build(config, about.vocab_size)
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond what a tensor can have
        raise _damaged(about.directory / "config.json", error) from None
    parts: list[tuple[nn.Module, dict[str, str]]] = [
        (front, {name: front_name(name, llama) for name in front.state_dict()}),
        *(
            (block, {name: block_name(i, name, config) for name in block.state_dict()})
            for i, block in enumerate(blocks)
        ),
        (head, {name: head_name(name, llama) for name in head.state_dict()}),
    ]
    homes = {exported: (part, name) for part, names in parts for name, exported in names.items()}
    if about.tied:
        del homes[head_name("projection", llama)]
    _check_tensors(about.directory, homes, stored)
    for path in sorted({tensor.path for tensor in stored.values()}):
        with _opened(path, device) as file:
            for exported in file.keys():  # noqa: SIM118 - not a mapping
                part, name = homes[exported]
                part.load_state_dict({name: file.get_tensor(exported)}, strict=False, assign=True)
    for block in blocks:
        rebuild_tables(block, device)
    if about.tied:
        head.share(front.embedding.weight)
    per_stack = config.architecture.blocks_per_stack
    stacks = [Stack(blocks[i : i + per_stack], i // per_stack) for i in range(0, len(blocks), per_stack)]
    return Rack(front, stacks, head)


def _check_tensors(
    directory: Path, homes: Mapping[str, tuple[nn.Module, str]], stored: Mapping[str, StoredTensor]
) -> None:
    """Refuse tensors that the rack has no place for, before any of them is read."""
    for exported, tensor in stored.items():
        shown = f"{directory}: tensor {printable(exported)}"
        if exported not in homes:
            raise DamageError(f"{shown} belongs to no part of the rack", hint="export it again")
        part, name = homes[exported]
        shape = part.state_dict()[name].shape
        if tensor.shape != shape:
            raise DamageError(f"{shown} has shape {list(tensor.shape)}, not {list(shape)}", hint="export it again")
        if tensor.dtype not in FLOATS:
            raise DamageError(f"{shown} is {tensor.dtype}, no weight", hint="export it again")
    if missing := sorted(set(homes) - set(stored)):
        raise DamageError(f"{directory}: tensor {missing[0]} is missing", hint="export it again")
