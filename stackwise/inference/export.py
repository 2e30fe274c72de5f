"""A rack as one directory that others can load: config.json, safetensors (in shards where large), tokenizer.json."""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stackwise.config.model import ModelConfig
from stackwise.durable import TEMPORARY, explain_full_disk, fsync_directory
from stackwise.errors import DamageError, NotFound, UsageError
from stackwise.files import open_to_write, parse_json, read_text
from stackwise.inference.exported import (
    INDEX,
    SINGLE,
    Exported,
    block_name,
    config_json,
    front_name,
    head_name,
    is_llama,
    read_export,
)
from stackwise.model.projections import QuantizedLinear, plain_layers
from stackwise.model.rack import Front, StageModules

SHARD_BYTES = 5_000_000_000
"""Weights in one file, about: what is held before it is written. As Hugging Face has it."""


class ShardWriter:
    """Collects tensors up to a shard's size, writes them, and forgets them.

    Args:
        directory: Where the files go; nobody reads it before `close`.
        shard_bytes: Weights in one file, at most (a single tensor may be more).
    """

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.directory, self.shard_bytes = directory, shard_bytes
        self.total_bytes = 0
        self.parameters = 0
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._files: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it may be written now or later, so the caller must not change it."""
        tensor = tensor.detach().to("cpu").contiguous()
        if self._held and self._held_bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        self._held[name] = tensor
        self._held_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes
        self.parameters += tensor.numel()

    def _flush(self) -> None:
        path = self.directory / f"part-{len(self._files):05d}"
        save_file(self._held, path, metadata={"format": "pt"})
        with path.open("rb") as file:
            os.fsync(file.fileno())
        self._files.append((path, list(self._held)))
        self._held, self._held_bytes = {}, 0

    def close(self) -> list[str]:
        """Write what is held, give the files their names, and an index if they are several. Returns the names."""
        if self._held or not self._files:
            self._flush()
        count = len(self._files)
        names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for (path, _), name in zip(self._files, names, strict=True):
            path.rename(path.with_name(name))
        if count > 1:
            where = {t: name for (_, held), name in zip(self._files, names, strict=True) for t in held}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(where.items()))}
            _write_json(self.directory / INDEX, index)
        fsync_directory(self.directory)
        return names


@dataclass(frozen=True)
class ExportOptions:
    """What is written beside the weights, and how.

    Args:
        tokenizer_json: Path of a tokenizer.json, or its text (beginning with a brace).
        mask_token_id: Recorded for generation.
        separator_id: Recorded as begin and end of text.
        causal: Recorded direction of attention; None: that of the last stage.
        dtype: Of the exported weights; None: as they are.
        shard_bytes: Weights in one file, about.
        overwrite: Replace an earlier export.
    """

    tokenizer_json: Path | str | None = None
    mask_token_id: int | None = None
    separator_id: int | None = None
    causal: bool | None = None
    dtype: torch.dtype | None = None
    shard_bytes: int = SHARD_BYTES
    overwrite: bool = False


def export(
    directory: Path | str,
    front: Front,
    stages: Iterable[StageModules],
    model: ModelConfig,
    options: ExportOptions | None = None,
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
        model: The rack's configuration.
        options: What else is written, and how.

    Returns:
        What was written.

    Raises:
        UsageError: The directory is in use, the tokenizer is no JSON, stages that do not make up the rack.
        NoSpaceError: The disk is full; nothing is left behind.
    """
    directory, options = Path(directory), options or ExportOptions()
    _check_target(directory, options.overwrite)
    tokenizer = _tokenizer(options.tokenizer_json)
    temporary = directory.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{directory.name}"
    with explain_full_disk(directory):
        temporary.mkdir(parents=True)
        try:
            written = _write(temporary, front, stages, model, options)
            if tokenizer is not None:
                _write_json(temporary / "tokenizer.json", tokenizer)
                special = _special_tokens(tokenizer, options.separator_id, options.mask_token_id)
                about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": front.max_seq_len}
                _write_json(temporary / "tokenizer_config.json", {**about, **special})
                if special:
                    _write_json(temporary / "special_tokens_map.json", special)
            _publish(temporary, directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return replace(written, directory=directory)


def _write(
    directory: Path, front: Front, stages: Iterable[StageModules], model: ModelConfig, options: ExportOptions
) -> Exported:
    """Weights and config.json."""
    writer, llama = ShardWriter(directory, options.shard_bytes), is_llama(model)

    def add(name: str, tensor: Tensor) -> None:
        writer.add(name, tensor if options.dtype is None else tensor.to(options.dtype))

    for name, tensor in front.state_dict().items():
        add(front_name(name, llama), tensor)
    head, trained_causally, index = None, False, 0
    for stage in stages:
        head, trained_causally = stage.head, stage.causal is True
        for block in stage.blocks:
            for name, tensor in _merged(block).state_dict().items():
                add(block_name(index, name, model), tensor)
            index += 1
            del block
        del stage  # or two stages would be in memory while the next one is loaded
    if head is None or index != model.n_blocks:
        raise UsageError(f"the stages hold {index} blocks, the rack has {model.n_blocks}")
    tied = model.tie_embeddings and (head.tied or _same(head.weight, front.embedding.weight))
    for name, tensor in head.state_dict().items():
        if name != "projection":
            add(head_name(name, llama), tensor)
    if not tied:
        add(head_name("projection", llama), head.weight)
    files = writer.close()
    exported = Exported(
        directory,
        llama,
        model,
        vocab_size=front.embedding.num_embeddings,
        seq_len=front.max_seq_len,
        causal=trained_causally if options.causal is None else options.causal,
        tied=tied,
        mask_token_id=options.mask_token_id,
        separator_id=options.separator_id,
        files=tuple(files),
        bytes=writer.total_bytes,
        parameters=writer.parameters,
    )
    dtype = str(options.dtype or front.embedding.weight.dtype).removeprefix("torch.")
    _write_json(directory / "config.json", config_json(exported, dtype))
    return exported


def _write_json(path: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
    with open_to_write(path) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _merged(block: nn.Module) -> nn.Module:
    narrow = any(isinstance(child, QuantizedLinear) for child in block.modules())
    return plain_layers(copy.deepcopy(block)) if narrow else block


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.detach().cpu(), b.detach().cpu())


def _check_target(directory: Path, overwrite: bool) -> None:
    if directory.is_symlink():  # replacing it would leave what it leads to behind
        raise UsageError(f"{directory} is a symbolic link", hint="name the directory that it leads to")
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
        text = str(source) if inline else read_text(Path(source))
        parse_json(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"the tokenizer cannot be read: {error}") from None
    return text


def _special_tokens(tokenizer: str, separator_id: int | None, mask_id: int | None) -> dict[str, str]:
    """The special tokens under the names that transformers gives them, where the tokenizer has added words for them."""
    parsed = parse_json(tokenizer)
    added = parsed.get("added_tokens") if isinstance(parsed, dict) else None
    words = {entry.get("id"): entry.get("content") for entry in added or () if isinstance(entry, dict)}
    ids = {"eos_token": separator_id, "mask_token": mask_id}
    named = {name: words.get(number) for name, number in ids.items()}
    return {name: word for name, word in named.items() if isinstance(word, str)}
