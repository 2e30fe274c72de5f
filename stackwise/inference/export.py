"""A rack as one directory that others can load: config.json, safetensors, tokenizer.json; and back."""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.config.model import ModelConfig
from stackwise.durable import TEMPORARY, fsync_directory
from stackwise.errors import DamageError, NotFound, UsageError
from stackwise.inference.layout import (
    FORMAT,
    block_name,
    config_json,
    front_name,
    head_name,
    is_llama,
)
from stackwise.inference.shards import SHARD_BYTES, ShardWriter, read_tensors
from stackwise.model.block import Block, Stack
from stackwise.model.ends import Front, Head
from stackwise.model.layers import Rotary
from stackwise.model.quantized import QuantizedLinear, plain_layers
from stackwise.model.rack import Rack, StageModules


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


def export(
    directory: Path | str,
    front: Front,
    stages: Iterable[StageModules],
    model_config: ModelConfig,
    *,
    tokenizer_json: Path | str | None = None,
    mask_token_id: int | None = None,
    separator_id: int | None = None,
    causal: bool | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Exported:
    """Write a rack as a directory, its parts streaming through memory one after another.

    A LLaMA-shaped rack (RMSNorm, rotary positions, SwiGLU) becomes what transformers' `LlamaForCausalLM` loads, with
    equal logits; another one keeps its own names, and `load_rack` loads it. Adapters are merged, weights in a narrow
    format widened. The head is the last stage's; if it is tied, or still equal to the embedding, it stays tied, else
    it is written by itself. The directory appears whole or not at all.

    Args:
        directory: Where to; must not hold anything, but for an earlier export with `overwrite`.
        front: Tokens to vectors.
        stages: Lowest first; a generator that loads each when it is asked for it.
        model_config: The rack's configuration.
        tokenizer_json: Path of a tokenizer.json, or its text (beginning with a brace).
        mask_token_id: Recorded for generation.
        separator_id: Recorded as begin and end of text.
        causal: Recorded direction of attention; None: that of the last stage.
        dtype: Of the exported weights; None: as they are.
        shard_bytes: Weights in one file, about.
        overwrite: Replace an earlier export.

    Returns:
        What was written.

    Raises:
        UsageError: The directory is in use, the tokenizer is no JSON, stages that do not make up the rack.
        NoSpaceError: The disk is full; nothing is left behind.
    """
    directory = Path(directory)
    _check_target(directory, overwrite)
    tokenizer = _tokenizer(tokenizer_json)
    llama = is_llama(model_config)
    temporary = directory.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{directory.name}"
    temporary.mkdir(parents=True)
    try:
        writer = ShardWriter(temporary, shard_bytes)

        def add(name: str, tensor: Tensor) -> None:
            writer.add(name, tensor if dtype is None else tensor.to(dtype))

        for name, tensor in front.state_dict().items():
            add(front_name(name, llama), tensor)
        head, trained_causally, index = None, False, 0
        for stage in stages:
            head, trained_causally = stage.head, stage.causal is True
            for block in stage.blocks:
                for name, tensor in _merged(block).state_dict().items():
                    add(block_name(index, name, llama), tensor)
                index += 1
                del block
            del stage
        if head is None or index != model_config.n_blocks:
            raise UsageError(f"the stages hold {index} blocks, the rack has {model_config.n_blocks}")
        tied = model_config.tie_embeddings and (head.tied or _same(head.weight, front.embedding.weight))
        for name, tensor in head.norm.state_dict(prefix="norm.").items():
            add(head_name(name, llama), tensor)
        if not tied:
            add(head_name("projection", llama), head.weight)
        files = writer.close()
        direction = trained_causally if causal is None else causal
        config = config_json(
            model_config,
            vocab_size=front.embedding.num_embeddings,
            seq_len=front.max_seq_len,
            tied=tied,
            causal=direction,
            dtype=str(dtype or front.embedding.weight.dtype).removeprefix("torch."),
            mask_token_id=mask_token_id,
            separator_id=separator_id,
        )
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            (temporary / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
            about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": front.max_seq_len}
            (temporary / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
        _publish(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    told = read_export(directory)
    return Exported(
        **{**vars(told), "files": tuple(files), "bytes": writer.total_bytes, "parameters": writer.parameters}
    )


def _merged(block: nn.Module) -> nn.Module:
    narrow = any(isinstance(child, QuantizedLinear) for child in block.modules())
    return plain_layers(copy.deepcopy(block)) if narrow else block


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.detach().cpu(), b.detach().cpu())


def _check_target(directory: Path, overwrite: bool) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UsageError(f"{directory} is a file, not a directory")
    if not any(directory.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{directory} is not empty", hint="name another directory, or remove it first")
    try:
        read_export(directory)
    except (NotFound, DamageError):
        raise UsageError(f"{directory} holds something else than an export: it is not replaced") from None


def _publish(temporary: Path, directory: Path) -> None:
    fsync_directory(temporary)
    if directory.exists():
        aside = temporary.with_name(f"{temporary.name}.old")
        directory.rename(aside)
        temporary.rename(directory)
        shutil.rmtree(aside)
    else:
        temporary.rename(directory)
    fsync_directory(directory.parent)


def _tokenizer(source: Path | str | None) -> str | None:
    if source is None:
        return None
    try:
        inline = isinstance(source, str) and source.lstrip().startswith("{")
        text = str(source) if inline else Path(source).read_text(encoding="utf-8")
        json.loads(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"the tokenizer cannot be read: {error}") from None
    return text


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
        model = ModelConfig.model_validate(own["model"])
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
