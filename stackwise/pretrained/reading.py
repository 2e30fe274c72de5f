"""Tensors of safetensors files, as they come from elsewhere: headers checked, then each read straight to its place.

Headers and digests import no torch; no more of a tensor is in memory than the tensor as it stays, and a band of it.
"""

from __future__ import annotations

import io
import itertools
import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stackwise import files
from stackwise.errors import UsageError, line_of
from stackwise.identity import Hex, content_id, digest, digest_of_pieces
from stackwise.pretrained.families import TensorRef
from stackwise.text import printable

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CONFIG_BYTES = 4 << 20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FOREIGN = (".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".ot")
"""What weights of other formats end with, which run no code, and are not read."""

SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
"""Names of weight files that an index may have: of the directory itself, and of nothing else."""

HEADER_BYTES = 32 << 20
"""Most bytes of a weight file's header: some 300,000 tensors."""

BAND_BYTES = 1 << 20
"""Bytes that are read or written at once where a tensor is turned."""
CHECKED = 1 << 16
"""Numbers that are looked at together: a few hundred kB beside the tensor."""

EXPONENTS = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}
"""The bits that are all set in nan and in infinity alone."""

FLOATS = {"F64": ("float64", "<u8"), "F32": ("float32", "<u4"), "F16": ("float16", "<u2"), "BF16": ("bfloat16", "<u2")}
"""The dtypes that weights may have, as safetensors, torch and (in bits alone) numpy call them."""

AGAIN = "get the checkpoint again"
COPY = "copy it with what its links lead to: cp -rL DIR NEW"
"""What to do with a directory of links, as Hugging Face's cache is."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, as the file's header says: its first byte is the `begin`th of the file."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * np.dtype(FLOATS[self.dtype][1]).itemsize if self.dtype in FLOATS else 0


def read_metadata(path: Path) -> dict[str, Any]:
    """What a safetensors file says of itself beside its tensors; empty where it says nothing.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no safetensors file.
    """
    with os.fdopen(files.open_regular(path), "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        table = files.parse_json(file.read(length)) if length <= HEADER_BYTES else {}
    metadata = table.get("__metadata__") if isinstance(table, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name, whatever their dtype; the values are not read.

    Raises:
        UsageError: The file is missing, cut off, no regular file, or no safetensors.
    """

    def broken(why: str) -> UsageError:
        return UsageError(f"{path} cannot be read: {printable(why)}", hint=COPY if path.is_symlink() else AGAIN)

    try:
        with os.fdopen(files.open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise broken("it is cut off, or no safetensors file")
            if length > HEADER_BYTES:
                raise broken(f"its header is said to have {length} bytes")
            table = files.parse_json(file.read(length))
    except FileNotFoundError:
        raise UsageError(f"{path} is missing", hint=AGAIN) from None
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise broken(line_of(error)) from None
    if not isinstance(table, dict):
        raise broken("its header is no table of tensors")
    table.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    ranges: list[tuple[int, int]] = []
    for name, entry in table.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (KeyError, TypeError, ValueError):
            raise broken(f"its header says of {name} what no tensor can be") from None
        if not isinstance(dtype, str) or len(shape) > 8 or any(type(n) is not int or n < 0 for n in numbers):
            raise broken(f"its header says of {name} what no tensor can be")
        tensor = StoredTensor(path.name, tuple(shape), dtype, 8 + length + begin)
        if dtype in FLOATS and end - begin != tensor.nbytes:
            raise broken(f"{name} takes other bytes than its shape and dtype say")
        if begin > end or end > size - 8 - length:
            raise broken("it is cut off")
        tensors[name] = tensor
        ranges.append((begin, end))
    # As the format has it: nothing between tensors, before or behind them, and no byte of two.
    ranges.sort()
    if any(end != begin for (_, end), (begin, _) in itertools.pairwise([(0, 0), *ranges, (size - 8 - length, 0)])):
        raise broken("its tensors do not lie one behind the other")
    return tensors


class Reader:
    """Reads tensors of a directory's files, each straight into memory of its own.

    Args:
        directory: Where the files are.
        tables: The headers of files that were read already.
    """

    def __init__(self, directory: Path, tables: Mapping[str, dict[str, StoredTensor]] | None = None) -> None:
        self._directory = directory
        self._tables = dict(tables or {})

    def stored(self, ref: TensorRef) -> StoredTensor:
        """What the file's header says of a tensor.

        Raises:
            UsageError: There is none, or its file cannot be read.
        """
        if not SHARD.fullmatch(ref.file):
            raise UsageError(f"{printable(ref.file)!r:.80} is no file of weights", hint=AGAIN)
        if ref.file not in self._tables:
            self._tables[ref.file] = read_header(self._directory / ref.file)
        if ref.name not in self._tables[ref.file]:
            raise UsageError(f"{self._directory / ref.file} has no tensor {printable(ref.name)}", hint=AGAIN)
        return self._tables[ref.file][ref.name]

    def shape(self, ref: TensorRef) -> tuple[int, ...]:
        """The shape of a tensor, as its part has it."""
        shape = self.stored(ref).shape
        shape = shape[::-1] if ref.transpose else shape
        return shape if ref.rows is None else (ref.rows[1] - ref.rows[0], *shape[1:])

    def bands(self, ref: TensorRef) -> Iterator[bytes]:
        """The bytes of a tensor that is not turned, piece by piece."""
        stored, path = self.stored(ref), self._directory / ref.file
        first, last = self._range(ref)
        with io.FileIO(files.open_regular(path), "rb") as file:
            file.seek(stored.begin + first)
            while first < last:
                if not (piece := file.read(min(BAND_BYTES, last - first))):
                    raise UsageError(f"{path} cannot be read: it is cut off", hint=AGAIN)
                first += len(piece)
                self._check_finite(ref, np.frombuffer(piece, FLOATS[stored.dtype][1]))
                yield piece

    def _range(self, ref: TensorRef) -> tuple[int, int]:
        """First and last byte of a tensor that is not turned, counted from that of the file's tensor."""
        stored = self.stored(ref)
        if ref.rows is None:
            return 0, stored.nbytes
        row = stored.nbytes // max(1, stored.shape[0])
        return ref.rows[0] * row, ref.rows[1] * row

    def read(self, ref: TensorRef) -> np.ndarray[Any, Any]:
        """A tensor as its part has it, in unsigned integers of its dtype's width.

        Raises:
            UsageError: It is not in its file, or the file is cut off.
        """
        stored, shape = self.stored(ref), self.shape(ref)
        values = _empty(shape, FLOATS[stored.dtype][1])
        path = self._directory / ref.file
        with io.FileIO(files.open_regular(path), "rb") as file:
            if not ref.transpose:
                file.seek(stored.begin + self._range(ref)[0])
                _fill(file, values, path)
                self._check_finite(ref, values.reshape(-1))
                return values
            # Turned in bands of the file's rows: never is the whole of it in memory beside the result.
            rows, columns = stored.shape
            first, last = ref.rows or (0, columns)
            step = max(1, BAND_BYTES // max(1, columns * values.itemsize))
            file.seek(stored.begin)
            band = _empty((min(step, rows), columns), values.dtype.str)
            for start in range(0, rows, step):
                band = band[: rows - start]
                _fill(file, band, path)
                values[:, start : start + len(band)] = band[:, first:last].T
        self._check_finite(ref, values.reshape(-1))
        return values

    def _check_finite(self, ref: TensorRef, values_N: np.ndarray[Any, Any]) -> None:
        """Refuse weights that are no numbers, a slice at a time: the slice stays in the processor's cache.

        Raises:
            UsageError: There is one.
        """
        exponent = values_N.dtype.type(EXPONENTS[self.stored(ref).dtype])
        for first in range(0, len(values_N), CHECKED):
            if (values_N[first : first + CHECKED] & exponent).max(initial=0) == exponent:
                raise UsageError(
                    f"{self._directory / ref.file}: tensor {printable(ref.name)} has values that are nan or infinite",
                    hint=f"{AGAIN}; no training and no loss can come of it",
                )

    def digest(self, ref: TensorRef) -> Hex:
        """The digest of a tensor's bytes, as its part has it."""
        if ref.transpose:
            return digest(self.read(ref).reshape(-1).view(np.uint8))
        return digest_of_pieces(self.bands(ref))

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        """The same as a tensor of torch, in the file's dtype."""
        import torch

        values, name = self.read(ref), FLOATS[self.stored(ref).dtype][0]
        signed: torch.Tensor = torch.from_numpy(values.view(values.dtype.str.replace("u", "i")))
        return signed.view(getattr(torch, name))

    def converted(self, ref: TensorRef, dtype: torch.dtype | None, rows: int | None) -> tuple[torch.Tensor, Hex]:
        """The same in another dtype, and the digest of its bytes in the file: no more of them is in memory than a band.

        Args:
            rows: Rows that it is to have at least; those that it lacks are the mean of the others.
        """
        import torch

        shape = self.shape(ref)
        count, narrow = math.prod(shape), getattr(torch, FLOATS[self.stored(ref).dtype][0])
        result = torch.empty((max(rows or 0, shape[0]), *shape[1:]) if shape else (), dtype=dtype or narrow)
        if ref.transpose:  # its bytes come in another order
            tensor = self.tensor(ref)
            result.view(-1)[:count].copy_(tensor.view(-1))
            hashed = digest(tensor.view(-1).view(torch.uint8).numpy())
        else:
            flat, first = result.view(-1), 0

            def pieces() -> Iterator[bytes]:
                nonlocal first
                for piece in self.bands(ref):
                    values = torch.frombuffer(bytearray(piece), dtype=narrow)
                    flat[first : first + len(values)].copy_(values)
                    first += len(values)
                    yield piece

            hashed = digest_of_pieces(pieces())
        if shape and len(result) > shape[0]:
            _complete(result, shape[0], narrow)
        return result, hashed


def _complete(result_VX: torch.Tensor, known: int, narrow: torch.dtype) -> None:
    """Let the rows from `known` on be the mean of those before, as the file's dtype has it."""
    import torch

    total_X = torch.zeros(result_VX.shape[1:], dtype=torch.float64)
    for first in range(0, known, 1 << 12):  # never the whole of it in float64
        total_X += result_VX[first : min(known, first + (1 << 12))].sum(0, dtype=torch.float64)
    result_VX[known:] = (total_X / known).to(narrow).to(result_VX.dtype)


def _empty(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """Memory of its own, which goes back to the system when it is freed: malloc may keep it."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if nbytes < 1 << 20:
        return np.empty(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype).reshape(shape)


def _fill(file: io.FileIO, values: np.ndarray[Any, Any], path: Path) -> None:
    view = values.reshape(-1).view(np.uint8).data
    while view.nbytes:
        count = file.readinto(view)
        if not count:
            raise UsageError(f"{path} cannot be read: it is cut off", hint=AGAIN)
        view = view[count:]


def read_part(
    directory: Path | str, refs: Mapping[str, TensorRef], dtype: torch.dtype | None, sizes: Mapping[str, int]
) -> tuple[dict[str, torch.Tensor], Hex]:
    """The tensors of a part in a dtype, and the part's digest in that of its files.

    They are read one after another, each straight to where it stays: beside the part as it trains, there is no more in
    memory than a band of one tensor (of one that is turned, as GPT-2's are, the tensor).

    Args:
        directory: The checkpoint.
        refs: For each tensor of the part where it is (`Checkpoint.names`).
        dtype: What they are converted to; None: each stays in its file's.
        sizes: For tensors with a row for each id, how many rows they are to have: see `Reader.converted`.

    Raises:
        UsageError: A file is missing, cut off, lacks a tensor, or has values that are no numbers.
    """
    reader, tensors, entries = Reader(Path(directory)), {}, []
    for name, ref in sorted(refs.items()):
        tensors[name], hashed = reader.converted(ref, dtype, sizes.get(name))
        entries.append([name, FLOATS[reader.stored(ref).dtype][0], list(reader.shape(ref)), hashed])
    return tensors, content_id("part", entries)
