"""Tensors that live for one step: in memory up to a budget, beyond it in files that nothing indexes or syncs."""

from __future__ import annotations

import shutil
from collections.abc import Hashable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stackwise import durable


class Spill:
    """Holds tensors by key. A crash loses them, and the next one empties the directory.

    Args:
        directory: Where files go; emptied.
        budget: Bytes kept in memory.
    """

    def __init__(self, directory: Path, budget: int) -> None:
        self.directory, self.budget = directory, budget
        self.bytes_in_memory = 0
        self.bytes_on_disk = 0
        self._memory: dict[Hashable, Tensor] = {}
        self._files: dict[Hashable, tuple[Path, torch.dtype, torch.Size]] = {}
        self._made = 0
        self.clear()

    def clear(self) -> None:
        """Drop everything."""
        self._memory.clear()
        self._files.clear()
        self.bytes_in_memory = self.bytes_on_disk = 0
        shutil.rmtree(self.directory, ignore_errors=True)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._memory or key in self._files

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Hold a tensor; what was under the key is dropped.

        Raises:
            NoSpaceError: The disk is full.
        """
        self.drop(key)
        tensor = tensor.detach().cpu()
        if self.bytes_in_memory + tensor.nbytes <= self.budget:
            # A view would keep all of what it is a view of.
            self._memory[key] = tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
            self.bytes_in_memory += tensor.nbytes
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / str(self._made)
        self._made += 1
        with durable.explain_full_disk(path), path.open("wb", buffering=0) as file:
            left = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            while left:
                left = left[file.write(left) :]
        self._files[key] = path, tensor.dtype, tensor.shape
        self.bytes_on_disk += tensor.nbytes

    def get(self, key: Hashable) -> Tensor:
        """The tensor under a key, on the CPU. It must not be written to.

        Raises:
            KeyError: There is none.
        """
        if key in self._memory:
            return self._memory[key]
        path, dtype, shape = self._files[key]
        return torch.from_numpy(np.fromfile(path, dtype=np.uint8)).view(dtype).reshape(shape)

    def take(self, key: Hashable) -> Tensor:
        """The tensor under a key, which is then dropped.

        Raises:
            KeyError: There is none.
        """
        tensor = self.get(key)
        self.drop(key)
        return tensor

    def drop(self, key: Hashable) -> None:
        """Forget what is under a key, if anything is."""
        if (tensor := self._memory.pop(key, None)) is not None:
            self.bytes_in_memory -= tensor.nbytes
        if (held := self._files.pop(key, None)) is not None:
            path, dtype, shape = held
            self.bytes_on_disk -= shape.numel() * dtype.itemsize
            path.unlink(missing_ok=True)
