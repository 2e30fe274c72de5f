"""Files of a stage in training: safetensors written and read tensor by tensor, and records under a seal.

No second copy of a state is in memory; and what was changed on the disk is noticed.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from stackwise import files
from stackwise.errors import StackWiseError
from stackwise.identity import digest

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
}  # fmt: skip
_NAMES = {name: dtype for dtype, name in _DTYPES.items()}
_PIECE = 16 << 20
"""Bytes that go to the file at once: hashing them and writing them leave the interpreter to others."""


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the digest of its own content, for `unsealed`."""
    return {**record, "seal": _seal(record)}


def unsealed(value: Any, format_number: int) -> dict[str, Any]:
    """A record as it was sealed, without format and seal; one of before there were seals is taken as it is.

    Raises:
        ValueError: It is none, of another format, or was changed.
    """
    if not isinstance(value, dict) or value.get("format") != format_number:
        raise ValueError("it is of another version of StackWise")
    record = {key: entry for key, entry in value.items() if key != "seal"}
    if "seal" in value and value["seal"] != _seal(record):
        raise ValueError("its record was changed")
    del record["format"]
    return record


def _seal(record: Mapping[str, Any]) -> str:
    return digest(json.dumps(record, sort_keys=True).encode())


def reason(error: BaseException) -> str:
    """What was wrong with a file, in one line."""
    text = error.message if isinstance(error, StackWiseError) else str(error)
    return (text.splitlines() or [type(error).__name__])[0]


def file_digest(path: Path, root: Path | None = None) -> str:
    """xxh3-128 of a regular file.

    Raises:
        IrregularFile: It is a link, a FIFO, a device, a directory.
        OSError: It cannot be read.
    """
    hashed, piece = xxhash.xxh3_128(), memoryview(bytearray(_PIECE))
    with io.FileIO(files.open_regular(path, root=root), "rb") as file:
        while count := file.readinto(piece):
            hashed.update(piece[:count])
    return hashed.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, flushed to the disk; one tensor at a time is copied off its device.

    Returns:
        xxh3-128 of the whole file.
    """
    table: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    hashed = xxhash.xxh3_128()
    with path.open("wb", buffering=0) as file:
        for data in (struct.pack("<Q", len(header)), header):
            hashed.update(data)
            file.write(data)
        for tensor in tensors.values():
            view = memoryview(_bytes(tensor.detach().cpu().contiguous()))
            while view.nbytes:
                hashed.update(view[:_PIECE])
                view = view[file.write(view[:_PIECE]) :]
        os.fsync(file.fileno())
    return hashed.hexdigest()


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for.

    The file may come from elsewhere: it is a regular file, every tensor lies within it, and nothing is taken on trust.

    Args:
        path: The file.
        root: A directory above it, below which there may be no links (see `files.open_regular`).

    Raises:
        ValueError: It is no safetensors file, or it is cut off.
        IrregularFile: It is a link, a FIFO, a device, a directory.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self._path, self._root = path, root
        with self._opened() as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(size - 8, files.METADATA_BYTES):
                raise ValueError(f"{path} is cut off, or no safetensors file")
            table = files.parse_json(file.read(length))
            self._begin = 8 + length
        if not isinstance(table, dict):
            raise ValueError(f"{path} is no safetensors file")
        table.pop("__metadata__", None)
        self._table: dict[str, tuple[torch.dtype, list[int], int]] = {}
        for name, entry in table.items():
            self._table[name] = self._checked(name, entry, size - self._begin)

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, which is not read."""
        return list(self._table[name][1])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, which is not read."""
        return self._table[name][0]

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, begin = self._table[name]
        tensor = torch.empty(shape, dtype=dtype)
        with self._opened() as file:
            file.seek(self._begin + begin)
            view = memoryview(_bytes(tensor))
            while view.nbytes:
                if not (count := file.readinto(view)):
                    raise ValueError(f"{self._path} is cut off")
                view = view[count:]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def _opened(self) -> io.FileIO:
        return io.FileIO(files.open_regular(self._path, root=self._root), "rb")

    def _checked(self, name: str, entry: Any, size: int) -> tuple[torch.dtype, list[int], int]:
        try:
            dtype, shape, (begin, end) = _NAMES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{self._path} says of {name} what no tensor can be") from None
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"{self._path} says of {name} what no tensor can be")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{self._path}: {name} takes other bytes than its shape and dtype say")
        if end > size:
            raise ValueError(f"{self._path} is cut off")
        return dtype, shape, begin


def _bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor on the CPU, shared with it."""
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
