"""safetensors files in a stream: written and read tensor by tensor, so that no second copy of a state is in memory."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_NAMES = {name: dtype for dtype, name in _DTYPES.items()}
_PIECE = 16 << 20
"""Bytes that go to the file at once: hashing them and writing them leave the interpreter to others."""


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
    digest = xxhash.xxh3_128()
    with path.open("wb", buffering=0) as file:
        for data in (struct.pack("<Q", len(header)), header):
            digest.update(data)
            file.write(data)
        for tensor in tensors.values():
            view = memoryview(_bytes(tensor.detach().cpu().contiguous()))
            while view.nbytes:
                digest.update(view[:_PIECE])
                view = view[file.write(view[:_PIECE]) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


class Tensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for.

    Raises:
        ValueError: The file is none.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            self._table = {k: v for k, v in json.loads(file.read(length)).items() if k != "__metadata__"}
            self._begin = 8 + length

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, which is not read."""
        return list(self._table[name]["shape"])

    def __getitem__(self, name: str) -> Tensor:
        entry = self._table[name]
        tensor = torch.empty(entry["shape"], dtype=_NAMES[entry["dtype"]])
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._begin + entry["data_offsets"][0])
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


def _bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor on the CPU, shared with it."""
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
