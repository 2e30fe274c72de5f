"""Directories of weights as others read them: safetensors in shards, their index; each appears whole or not at all.

Blocks trained for integers are packed as compressed-tensors does (`pack-quantized`): its names, shapes and settings.
Shapes in names: O outputs, I inputs, G groups of a row, b bits.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import torch
from torch import Tensor, nn

from stackwise.config.training import Quantization
from stackwise.durable import TEMPORARY, explain_full_disk, fsync_directory
from stackwise.errors import UsageError
from stackwise.files import open_to_write, read_json
from stackwise.model.formats import Integers
from stackwise.model.projections import AdaptedLinear, QuantizedLinear, projections
from stackwise.pretrained.families import TensorRef
from stackwise.pretrained.reading import ADAPTER_WEIGHTS, CONFIG_BYTES, FLOATS, INDEX, SINGLE, read_metadata

BUFFER_BYTES = 4 << 20
"""Bytes that are converted, turned and written at once: more than a row of any matrix."""

SHARD_BYTES = 5_000_000_000
"""Weights in one file, about, as Hugging Face has it."""

OURS = "stackwise"
"""What marks a directory as an export, which another may replace."""


_DTYPES = {getattr(torch, torch_name): name for name, (torch_name, _) in FLOATS.items()}
_DTYPES |= {torch.int8: "I8", torch.int32: "I32", torch.int64: "I64"}

_HEADER = {"__metadata__": {"format": "pt"}}


class ShardWriter:
    """Writes tensors one after another into files of safetensors; none is held.

    Args:
        directory: Where the files go; nobody reads it before `close`.
        names: The names that will come: so much room is left for the header of each file.
        shard_bytes: Weights in one file, at most (a single tensor may be more).
    """

    def __init__(self, directory: Path, names: Iterable[str], shard_bytes: int = SHARD_BYTES) -> None:
        self.directory, self.shard_bytes = directory, shard_bytes
        self.total_bytes = self.parameters = 0
        longest = {"dtype": "BF16", "shape": [1 << 24] * 2, "data_offsets": [1 << 50] * 2}
        self._room = len(json.dumps(_HEADER | dict.fromkeys(names, longest))) // 8 * 8 + 1024
        # One for all tensors: of buffers of its own for each, malloc would keep some.
        self._buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
        self._file: IO[bytes] | None = None
        self._table: dict[str, Any] = {}
        self._place = 0
        self._files: list[tuple[Path, list[str]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, name: str, pieces: Sequence[Tensor], turned: bool = False, dtype: torch.dtype | None = None) -> None:
        """Write a tensor, piece by piece.

        Args:
            name: Its name in the file.
            pieces: What is below each other in it.
            turned: The file has the transpose.
            dtype: Its dtype there; None: as it is.
        """
        dtype = dtype or pieces[0].dtype
        shape = [sum(map(len, pieces)), *pieces[0].shape[1:]] if len(pieces) > 1 else list(pieces[0].shape)
        shape = shape[::-1] if turned else shape
        numbers = torch.Size(shape).numel()
        nbytes = numbers * dtype.itemsize
        offsets = [self._place, self._place + nbytes]
        entry = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": offsets}
        full = self._place + nbytes > self.shard_bytes or len(json.dumps(self._table | {name: entry})) > self._room - 64
        if self._table and full:
            self._finish()
            entry["data_offsets"] = [0, nbytes]
        if self._file is None:
            self._file = open_to_write(self.directory / f"part-{len(self._files):05d}")
            self._file.seek(8 + self._room)
        for band in self._turned(pieces, dtype) if turned else self._bands(pieces, dtype):
            self._file.write(band.reshape(-1).view(torch.uint8).numpy().data)
        self._table[name] = entry
        self._place += nbytes
        self.total_bytes += nbytes
        self.parameters += numbers

    def _bands(self, pieces: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
        """Tensors below each other, piece by piece, in the buffer."""
        buffer = self._buffer.view(dtype)
        for tensor in pieces:
            for part in torch.split(tensor.detach().reshape(-1), len(buffer)):
                yield buffer[: len(part)].copy_(part)

    def _turned(self, pieces: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
        """The transpose of matrices below each other, some of its rows at a time, in the buffer."""
        rows = sum(map(len, pieces))
        buffer = self._buffer.view(dtype)[: len(self._buffer) // dtype.itemsize // rows * rows].view(-1, rows)
        for start in range(0, pieces[0].shape[1], len(buffer)):
            part = buffer[: pieces[0].shape[1] - start]
            for place, tensor in zip(torch.split(part, [len(tensor) for tensor in pieces], 1), pieces, strict=True):
                place.copy_(tensor.detach()[:, start : start + len(part)].T)
            yield part

    def _finish(self) -> None:
        assert self._file is not None
        header = json.dumps(_HEADER | self._table).encode().ljust(self._room)
        with self._file as file:
            file.seek(0)
            file.write(len(header).to_bytes(8, "little") + header)
            file.flush()
            os.fsync(file.fileno())
        self._files.append((self.directory / f"part-{len(self._files):05d}", list(self._table)))
        self._file, self._table, self._place = None, {}, 0

    def close(self) -> list[str]:
        """Finish the last file, give the files their names, and an index if they are several. Returns the names."""
        if self._table:
            self._finish()
        count = len(self._files)
        names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for (path, _), name in zip(self._files, names, strict=True):
            path.rename(path.with_name(name))
        if count > 1:
            where = {t: name for (_, held), name in zip(self._files, names, strict=True) for t in held}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(where.items()))}
            write_content(self.directory / INDEX, index)
        fsync_directory(self.directory)
        return names


@contextlib.contextmanager
def published(directory: Path, overwrite: bool) -> Iterator[Path]:
    """A directory beside the target to write into, which takes its place when the block ends well.

    Raises:
        UsageError: The target is in use.
        NoSpaceError: The disk is full; nothing is left behind.
    """
    _check_target(directory, overwrite)
    temporary = directory.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{directory.name}"
    with explain_full_disk(directory):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            fsync_directory(temporary)
            _replace(temporary, directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_content(path: Path, content: Any) -> None:
    """Write text as it is, anything else as JSON; it is on the disk when this returns."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
    with open_to_write(path) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


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
    if not _is_export(directory):
        raise UsageError(f"{directory} holds something else than an export: it is not replaced")


def _is_export(directory: Path) -> bool:
    """Whether a directory is an export, of a model or of adapters."""
    with contextlib.suppress(OSError, ValueError):
        config = read_json(directory / "config.json", limit=CONFIG_BYTES)
        if isinstance(config, dict) and isinstance(config.get(OURS), dict):
            return True
    with contextlib.suppress(OSError, ValueError):  # peft's own configuration has no place for a mark
        return OURS in read_metadata(directory / ADAPTER_WEIGHTS)
    return False


def _replace(temporary: Path, directory: Path) -> None:
    if directory.exists():
        aside = temporary.with_name(f"{temporary.name}.old")
        directory.rename(aside)
        temporary.rename(directory)
        shutil.rmtree(aside)
    else:
        temporary.rename(directory)
    fsync_directory(directory.parent)


FORMAT = "pack-quantized"
PACKED, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
INPUT_SCALE, INPUT_ZERO = "input_scale", "input_zero_point"
KINDS = (PACKED, SCALE, ZERO, SHAPE, INPUT_SCALE, INPUT_ZERO)
"""What stands for a layer's `weight`: int32 [O, I b / 32], float [O, G], int32 [O b / 32, G], and both sizes.

Where what enters is rounded in a fixed range, the grid that spans it, too: float [1], int8 [1].
"""

WIDEN = "export it with --format hf: its weights are then the rounded ones"


class CompressedPart(dict[str, Tensor]):
    """A block's tensors, four in place of each weight that is packed; `settings` of the packed ones."""

    settings: Quantization


def compressed_part(block: nn.Module, part: str) -> CompressedPart:
    """A block's tensors with its packed integers in place of weights.

    Raises:
        UsageError: Its weights are no integers, or what compressed-tensors has no form for.
    """
    state, settings = CompressedPart(block.state_dict()), set[str]()
    for path, layer in projections(block).items():
        codec = layer.codec if isinstance(layer, QuantizedLinear) else None
        if not isinstance(codec, Integers) or not layer.packed:
            raise UsageError(f"{part} was not trained for integers (training.quantization)", hint=WIDEN)
        if isinstance(layer, AdaptedLinear):
            raise UsageError(f"{part} has adapters beside its integers", hint=WIDEN)
        group = codec.settings.group
        if isinstance(group, int) and layer.in_features % group:
            raise UsageError(f"{part} {path}: groups of {group} do not divide {layer.in_features}", hint=WIDEN)
        state.settings = codec.settings
        settings.add(codec.settings.name)
        for name in ("codes", "scales", "zeros"):
            state.pop(f"{path}.{name}", None)
        state.update({f"{path}.{name}": tensor for name, tensor in _layer(layer, codec).items()})
    if len(settings) != 1:
        raise UsageError(f"{part} has no weights that integers could stand for", hint=WIDEN)
    return state


def compressed_refs(refs: Mapping[str, TensorRef], part: CompressedPart) -> dict[str, TensorRef]:
    """Where the tensors of a part go, of which some weights are packed.

    Raises:
        UsageError: The family has layers in another form than a matrix of their own.
    """
    compressed: dict[str, TensorRef] = {}
    for name, ref in refs.items():
        stem = name.removesuffix("weight")
        if f"{stem}{PACKED}" not in part:
            compressed[name] = ref
            continue
        if ref.transpose or ref.rows is not None:
            raise UsageError(f"{ref.name} is no linear layer that compressed-tensors could pack", hint=WIDEN)
        for kind in KINDS:
            if f"{stem}{kind}" in part:
                compressed[f"{stem}{kind}"] = TensorRef(ref.file, f"{ref.name.removesuffix('weight')}{kind}")
    return compressed


def _layer(layer: QuantizedLinear, codec: Integers) -> dict[str, Tensor]:
    outputs, inputs, bits = layer.out_features, layer.in_features, codec.settings.bits
    held = {name: getattr(layer, name).detach() for name in layer.layout}
    rows, columns = codec.grid(outputs, inputs)
    scales = held["scales"].view(rows, columns)
    tensors = {
        PACKED: _words(codec.numbers(held["codes"], outputs, inputs), bits),
        SCALE: scales if codec.settings.group != "tensor" else scales.flatten(),
        SHAPE: torch.tensor([outputs, inputs]),
    }
    if layer.span is not None and layer.rounds is not None:
        tensors[INPUT_SCALE], zero = layer.rounds.spanning(*torch.split(layer.span.float(), 1))
        if not layer.rounds.settings.symmetric:
            tensors[INPUT_ZERO] = zero.to(torch.int8)
    if "zeros" not in held:
        return tensors
    zeros = held["zeros"].view(rows, columns)
    if codec.settings.group == "tensor":
        return tensors | {ZERO: zeros.flatten()}
    return tensors | {ZERO: _words((zeros.long() - codec.low).T, bits).T.contiguous()}


def _words(numbers_RN: Tensor, bits: int) -> Tensor:
    """Numbers of b bits, int64 [R, N], as int32 [R, N b / 32]: each row by itself, the first in the lowest bits."""
    rows, count = numbers_RN.shape
    padded = torch.nn.functional.pad(numbers_RN, (0, -count % 32)).view(rows, -1, 32)
    words = torch.zeros(*padded.shape[:2], bits, dtype=torch.int64)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        words[..., word] |= padded[..., place] << shift
        if shift + bits > 32:  # the rest of it opens the next word
            words[..., word + 1] |= padded[..., place] >> (32 - shift)
    flat = words.flatten(1)[:, : -(-count * bits // 32)]
    return (((flat & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)


def quantization_config(layers: Mapping[str, Quantization], others: Iterable[str]) -> dict[str, Any]:
    """The entry `quantization_config` of config.json.

    Args:
        layers: Names of the layers that are packed, each with its settings.
        others: Names of the linear layers that are not.
    """
    groups: dict[str, tuple[Quantization, list[str]]] = {}
    for name, settings in layers.items():
        groups.setdefault(settings.name, (settings, []))[1].append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": sorted(others),
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "weights": _scheme(settings),
                "input_activations": _activations(settings),
                "output_activations": None,
                # Said again: where activations are rounded too, the library would take another form by itself.
                "format": FORMAT,
            }
            for number, (settings, names) in enumerate(groups.values())
        },
    }


def _scheme(settings: Quantization) -> dict[str, Any]:
    group = settings.group if isinstance(settings.group, int) else None
    strategy = "group" if group else settings.group
    return {
        "num_bits": settings.bits,
        "type": "int",
        "symmetric": settings.symmetric,
        "strategy": strategy,
        "group_size": group,
        "dynamic": False,
    }


def _activations(settings: Quantization) -> dict[str, Any] | None:
    if settings.activations is None:
        return None
    dynamic = settings.activations_range == "token"
    how = {"type": "int", "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
    return {"num_bits": settings.activations, "symmetric": settings.activations_symmetric} | how
