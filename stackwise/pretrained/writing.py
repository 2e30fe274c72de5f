"""A rack as a directory that others can load: config.json, safetensors (in shards where large), tokenizer.

Parts stream through memory one after another, each tensor straight into its place in a file.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.config.adapters import AdaptersConfig
from stackwise.config.model import ModelConfig
from stackwise.config.training import Quantization
from stackwise.errors import UsageError
from stackwise.files import open_to_write, parse_json, read_bytes, read_json, read_text
from stackwise.model.projections import QuantizedLinear, plain_layers
from stackwise.model.rack import Front, Head, StageModules
from stackwise.pretrained.adapters import SETTINGS, as_peft, peft_settings, peft_tensors
from stackwise.pretrained.checkpoint import Checkpoint
from stackwise.pretrained.families import (
    BLOCK,
    FRONT,
    HEAD,
    Description,
    Family,
    TensorRef,
    config_json,
    family_of,
)
from stackwise.pretrained.keys import SPECIAL
from stackwise.pretrained.reading import ADAPTER_WEIGHTS
from stackwise.pretrained.shards import (
    KINDS,
    OURS,
    PACKED,
    SHARD_BYTES,
    CompressedPart,
    ShardWriter,
    compressed_part,
    compressed_refs,
    published,
    quantization_config,
    write_content,
)
from stackwise.version import __version__

BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)
"""What an export takes over from the checkpoint that it came from, beside the tokenizer itself."""

Part = tuple[str, Mapping[str, Tensor]]
"""The name of a part, and its tensors."""


@dataclass(frozen=True)
class ExportOptions:
    """What is written beside the weights, and how.

    Args:
        tokenizer_json: Path of a tokenizer.json, or its text (beginning with a brace).
        mask_token_id: Recorded for generation.
        separator_id: Recorded as begin and end of text.
        causal: Recorded direction of attention; None: that of the first stage.
        dtype: Of the exported weights; None: as they are.
        shard_bytes: Weights in one file, about.
        overwrite: Replace an earlier export.
        compressed: Blocks trained for integers as compressed-tensors packs them; otherwise widened.
        native: Under StackWise's own names, also where a family of Hugging Face describes the rack.
        source: The checkpoint that the weights came from: its family goes before others, and what lies beside its
            weights comes along.
    """

    tokenizer_json: Path | str | None = None
    mask_token_id: int | None = None
    separator_id: int | None = None
    causal: bool | None = None
    dtype: torch.dtype | None = None
    shard_bytes: int = SHARD_BYTES
    overwrite: bool = False
    compressed: bool = False
    native: bool = False
    source: Checkpoint | None = None


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        directory: Where it is.
        family: The `model_type` that it has: "stackwise" where no family of Hugging Face describes the rack.
        tied: Whether the head is the embedding.
        files: The files of weights.
        bytes: Bytes of the weights.
        parameters: Numbers in them.
    """

    directory: Path
    family: str
    tied: bool
    files: tuple[str, ...]
    bytes: int
    parameters: int


def export(
    directory: Path | str,
    front: Front,
    stages: Iterable[StageModules],
    model: ModelConfig,
    options: ExportOptions | None = None,
) -> Exported:
    """Write a rack as a directory, its parts streaming through memory one after another.

    A rack that a family of Hugging Face describes becomes what transformers loads, with equal logits; another one
    keeps its own names, and `load_rack` loads it. Adapters are merged, weights in a narrow format widened. The head is
    the last stage's; if it is tied, or still equal to the embedding, it stays tied, else it is written by itself. The
    directory appears whole or not at all.

    Args:
        directory: Where to; must not hold anything, but for an earlier export with `overwrite`.
        front: Tokens to vectors.
        stages: Lowest first; a generator that loads each when it is asked for it.
        model: The rack's configuration.
        options: What else is written, and how.

    Raises:
        UsageError: The directory is in use, the tokenizer is no JSON, stages that do not make up the rack, a rack in
            columns.
        NoSpaceError: The disk is full; nothing is left behind.
    """
    if model.stream.columns > 1:
        hint = "stackwise eval and generate use the run itself (--run)"
        raise UsageError("no format of models has a rack in columns (training.continual: columns)", hint=hint)
    options = _known_ids(options or ExportOptions(), front.embedding.num_embeddings)
    remaining = iter(stages)
    first = [stage for _, stage in zip(range(1), remaining, strict=False)]
    causal = options.causal if options.causal is not None else bool(first) and first[0].causal is True
    ids = {"mask_token_id": options.mask_token_id}
    if options.separator_id is not None:
        ids |= {"bos_token_id": options.separator_id, "eos_token_id": options.separator_id}
    if options.source is not None:
        theirs = {key: token for key, token in options.source.description.special_ids.items() if token is not None}
        ids = {**ids, **theirs, **({} if ids["mask_token_id"] is None else {"mask_token_id": ids["mask_token_id"]})}
    description = Description(
        model.model_dump(mode="json"), front.embedding.num_embeddings, front.max_seq_len, causal, special_ids=ids
    )
    return _publish(
        Path(directory), _parts(front, _again(first, remaining), model, options.compressed), description, options
    )


def export_checkpoint(
    directory: Path | str,
    checkpoint: Checkpoint,
    options: ExportOptions | None = None,
    load: Callable[[str], Mapping[str, Tensor]] | None = None,
) -> Exported:
    """Write a checkpoint as an export, one part in memory: where nothing is converted, with the same tensors.

    Args:
        directory: Where to.
        checkpoint: The checkpoint.
        options: How.
        load: Gives the tensors of a part in place of those of the checkpoint.

    Raises:
        UsageError: The directory is in use.
        NoSpaceError: The disk is full; nothing is left behind.
    """
    options = dataclasses.replace(
        options or ExportOptions(), source=checkpoint, tokenizer_json=checkpoint.tokenizer_json
    )
    parts = ((part, (load or checkpoint.load)(part)) for part in checkpoint.parts)
    return _publish(Path(directory), parts, checkpoint.description, options, checkpoint.base)


def export_adapters(
    directory: Path | str,
    checkpoint: Checkpoint,
    adapters: AdaptersConfig,
    parts: Iterable[Part],
    options: ExportOptions,
) -> Exported:
    """Write adapters beside a checkpoint as peft has them: PeftModel.from_pretrained loads them over the checkpoint.

    Args:
        directory: Where to.
        checkpoint: What they are beside.
        adapters: Their settings.
        parts: Each block, and its adapters as its state dict has them.
        options: How.

    Raises:
        UsageError: The directory is in use, or no class of transformers loads the checkpoint.
        NoSpaceError: The disk is full; nothing is left behind.
    """
    from safetensors.torch import save_file

    if checkpoint.family.native:
        raise UsageError(
            f"{checkpoint.directory} is no model of transformers, and peft has nothing to put adapters on",
            hint="--format hf merges them",
        )
    modules = as_peft(checkpoint, dict(parts))
    tensors = peft_tensors(modules, options.dtype)
    settings = peft_settings(checkpoint, modules, rslora=adapters.rslora, dropout=adapters.dropout)
    with published(Path(directory), options.overwrite) as temporary:
        save_file(tensors, temporary / ADAPTER_WEIGHTS, metadata={"format": "pt", OURS: __version__})
        write_content(temporary / SETTINGS, settings)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return Exported(Path(directory), checkpoint.family.model_type, False, (ADAPTER_WEIGHTS,), nbytes, numbers)


def _again(first: list[StageModules], remaining: Iterator[StageModules]) -> Iterator[StageModules]:
    """A stage that was looked at, and the others; it is not held while they are loaded."""
    while first:
        yield first.pop()
    yield from remaining


def _parts(front: Front, stages: Iterable[StageModules], model: ModelConfig, compressed: bool) -> Iterator[Part]:
    """The parts of a rack, each in memory while it is written."""
    yield FRONT, front.state_dict()
    head: Head | None = None
    index = 0
    for stage in stages:
        head = stage.head
        for block in stage.blocks:
            if index < model.n_blocks:
                part = f"{BLOCK}{index}"
                yield part, compressed_part(block, part) if compressed else _merged(block).state_dict()
            index += 1
            del block
        del stage  # or two stages would be in memory while the next one is loaded
    if head is None or index != model.n_blocks:
        raise UsageError(f"the stages hold {index} blocks, the rack has {model.n_blocks}")
    state = head.state_dict()
    tied = model.tie_embeddings and (head.tied or _same(head.weight, front.embedding.weight))
    state.pop("projection", None)
    yield HEAD, state if tied else state | {"projection": head.weight}


def _publish(
    directory: Path, parts: Iterable[Part], description: Description, options: ExportOptions, base: str | None = None
) -> Exported:
    """Write everything that an export has."""
    tokenizer = _tokenizer(options.tokenizer_json)
    with published(directory, options.overwrite) as temporary:
        exported = _write(temporary, parts, description, options, base)
        if options.source is not None:
            _take_along(options.source.directory, temporary)
        if tokenizer is not None:
            write_content(temporary / "tokenizer.json", tokenizer)
            special = _special_tokens(tokenizer, options.separator_id, options.mask_token_id)
            about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": description.max_seq_len}
            _write_settings(temporary / "tokenizer_config.json", {**about, **special})
            _write_settings(temporary / "special_tokens_map.json", special)
    return dataclasses.replace(exported, directory=directory)


def _write(
    directory: Path, parts: Iterable[Part], description: Description, options: ExportOptions, base: str | None
) -> Exported:
    """Weights, config.json and generation_config.json."""
    source = options.source
    family = family_of(description, "stackwise" if options.native else source.family.model_type if source else None)
    base = base if base is not None and source and source.family.model_type == family.model_type else family.base
    # Whether the head is tied is known when it comes: until then, names are those of one of its own.
    whole = description.untied()
    names = [ref.name for part in whole.parts for ref in family.refs(whole, part, base).values()]
    room = [*names, *family.copies(whole).values()]
    if options.compressed:
        room += [f"{name}.{kind}" for name in names for kind in KINDS]
    tied, dtype, architectures = True, options.dtype, [family.architecture]
    integers: dict[str, Quantization] = {}
    with ShardWriter(directory, room, options.shard_bytes) as writer:
        for part, tensors in parts:
            if part == HEAD:
                tied = "projection" not in tensors and description.config.tie_embeddings
                if not tensors and source is not None:
                    architectures = source.raw.get("architectures", architectures)
            else:
                dtype = dtype or next(iter(tensors.values())).dtype
            for name, pieces, turned in _stored(family, description if tied else whole, base, part, tensors):
                if isinstance(tensors, CompressedPart) and name.endswith(f".{PACKED}"):
                    integers[name.removesuffix(f".{PACKED}")] = tensors.settings
                writer.add(name, pieces, turned, options.dtype if pieces[0].is_floating_point() else None)
                del pieces
            del tensors  # or two parts would be in memory while the next one is loaded
        files = writer.close()
    config = config_json(family, description if tied else whole) | {"architectures": architectures}
    if integers:
        config["quantization_config"] = quantization_config(integers, ["lm_head"])
    if source is not None:  # of several ids that end a text, as they were
        config |= {key: source.raw[key] for key in SPECIAL[:3] if source.raw.get(key) is not None}
    write_content(directory / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    if description.causal and not family.native:
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_content(directory / "generation_config.json", {"_from_model_config": True, **ids})
    return Exported(directory, family.model_type, tied, tuple(files), writer.total_bytes, writer.parameters)


def _stored(
    family: Family, description: Description, base: str, part: str, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, list[Tensor], bool]]:
    """The tensors of a part as the family's files have them: name, what is below each other, whether it is turned."""
    refs = family.refs(description, part, base, family.own_names(part, tensors))
    if isinstance(tensors, CompressedPart):
        refs = compressed_refs(refs, tensors)
    files: dict[str, list[tuple[TensorRef, Tensor]]] = {}
    for name, ref in refs.items():
        if name in tensors:
            files.setdefault(ref.name, []).append((ref, tensors[name]))
    copies = family.copies(description)
    for name, pieces in files.items():
        pieces.sort(key=lambda piece: piece[0].rows or (0, 0))
        yield name, [tensor for _, tensor in pieces], pieces[0][0].transpose
        if name in copies:
            yield copies[name], [tensor for _, tensor in pieces], pieces[0][0].transpose


def _take_along(source: Path, directory: Path) -> None:
    """Copy what lies beside the weights of a checkpoint."""
    for name in BESIDE:
        with contextlib.suppress(FileNotFoundError):
            data = read_bytes(source / name)
            with open_to_write(directory / name) as file:
                file.write(data)


def _write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings of a tokenizer; those that came along stay."""
    try:
        there = read_json(path)
    except (OSError, ValueError):
        there = {}
    if settings := {**settings, **(there if isinstance(there, dict) else {})}:
        write_content(path, settings)


def _merged(block: nn.Module) -> nn.Module:
    narrow = any(isinstance(child, QuantizedLinear) for child in block.modules())
    return plain_layers(copy.deepcopy(block)) if narrow else block


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.detach().cpu(), b.detach().cpu())


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


def _known_ids(options: ExportOptions, size: int) -> ExportOptions:
    """The options without a mask token that the model has no row for, as one that masks nothing has none."""
    text, mask = _tokenizer(options.tokenizer_json), options.mask_token_id
    parsed = None if text is None else parse_json(text)
    if isinstance(parsed, dict) and isinstance(added := parsed.get("added_tokens"), list):
        within = [entry for entry in added if not isinstance(entry, dict) or entry.get("id", 0) < size]
        if len(within) < len(added):
            text = json.dumps({**parsed, "added_tokens": within}, ensure_ascii=False)
    return dataclasses.replace(
        options, tokenizer_json=text, mask_token_id=mask if mask is None or mask < size else None
    )


def _special_tokens(tokenizer: str, separator_id: int | None, mask_id: int | None) -> dict[str, str]:
    """The special tokens under the names that transformers gives them, where the tokenizer has added words for them."""
    parsed = parse_json(tokenizer)
    added = parsed.get("added_tokens") if isinstance(parsed, dict) else None
    words = {entry.get("id"): entry.get("content") for entry in added or () if isinstance(entry, dict)}
    ids = {"eos_token": separator_id, "mask_token": mask_id}
    named = {name: words.get(number) for name, number in ids.items()}
    return {name: word for name, word in named.items() if isinstance(word, str)}
