"""Weights written part by part, and read back tensor by tensor: safetensors, in shards with an index where large."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stackwise.durable import explain_full_disk, fsync_directory
from stackwise.errors import DamageError, UsageError
from stackwise.inference.layout import INDEX, SHARD, SINGLE

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
        with explain_full_disk(path):
            save_file(self._held, path, metadata={"format": "pt"})
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
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
            (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        fsync_directory(self.directory)
        return names


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
