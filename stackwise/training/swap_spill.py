"""Tensors of a swapped stage that live for one step: in memory as far as a budget goes, beyond it in files."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from stackwise import durable, files
from stackwise.training.lanes import Lane

THREADS = 3
T = TypeVar("T")


class Spill:
    """Holds tensors that live for one step: in memory up to `budget` bytes, beyond it in files that nothing syncs.

    A crash loses them, and the next one empties the directory. Threads write and read: what is handed in leaves the
    device while that computes, and what is asked for ahead (`bring`) is there when it is needed.
    """

    def __init__(self, directory: Path, budget: int, lane: Lane | None = None) -> None:
        self.directory, self.budget, self.lane = directory, budget, lane or Lane(torch.device("cpu"))
        self.bytes_in_memory = 0
        self.bytes_on_disk = 0
        self._memory: dict[Hashable, Tensor | Future[Tensor]] = {}
        self._files: dict[Hashable, tuple[Path, torch.dtype, torch.Size, Future[None]]] = {}
        self._sizes: dict[Hashable, int] = {}  # of what is in memory
        self._brought: dict[Hashable, Future[Tensor]] = {}
        self._leaving: deque[Future[Any]] = deque()  # what is still handed over, the oldest first
        self._made = 0
        self._pool = ThreadPoolExecutor(THREADS, "swap-spill")
        self.clear()

    def clear(self) -> None:
        """Drop everything."""
        for key in [*self._memory, *self._files]:
            self.drop(key)
        self._leaving.clear()
        files.remove_tree(self.directory)

    def close(self) -> None:
        """Drop everything, and let the threads go."""
        self.clear()
        self._pool.shutdown()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._memory or key in self._files

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Hold a tensor in place of what was under the key; it must not be written to any more.

        Raises:
            NoSpaceError: The disk is full (at a later call too).
        """
        self.drop(key)
        tensor, on_host = tensor.detach(), tensor.device.type == "cpu"
        mark = self.lane.mark()
        if self.bytes_in_memory + tensor.nbytes <= self.budget:
            self._sizes[key] = tensor.nbytes
            self.bytes_in_memory += tensor.nbytes
            if on_host:  # a view would keep all of what it is a view of
                self._memory[key] = tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
            else:
                self._memory[key] = self._left(self._pool.submit(self._down, tensor, mark))
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / str(self._made)
        self._made += 1
        written = self._left(self._pool.submit(self._write, path, tensor, mark))
        self._files[key] = path, tensor.dtype, tensor.shape, written
        self.bytes_on_disk += tensor.nbytes

    def bring(self, key: Hashable) -> None:
        """Begin to bring what is under a key to the device, if anything is: `get` will ask for it soon."""
        if key in self and key not in self._brought and not self._is_there(key):
            self._brought[key] = self._pool.submit(self._sent, key)

    def get(self, key: Hashable) -> Tensor:
        """The tensor under a key, on the device. It must not be written to."""
        if self._is_there(key):
            return self.held(key)
        brought = self._brought.pop(key, None)
        tensor = self._sent(key) if brought is None else brought.result()
        self.lane.use([tensor])
        return tensor

    def take(self, key: Hashable) -> Tensor:
        """The tensor under a key, which is then dropped."""
        tensor = self.get(key)
        self.drop(key)
        return tensor

    def drop(self, key: Hashable) -> None:
        """Forget what is under a key, if anything is."""
        if (brought := self._brought.pop(key, None)) is not None:
            wait([brought])
        if self._memory.pop(key, None) is not None:
            self.bytes_in_memory -= self._sizes.pop(key)
        if (entry := self._files.pop(key, None)) is not None:
            path, dtype, shape, written = entry
            wait([written])
            self.bytes_on_disk -= shape.numel() * dtype.itemsize
            path.unlink(missing_ok=True)

    def _is_there(self, key: Hashable) -> bool:
        return key in self._memory and self.lane.device.type == "cpu"

    def _left(self, leaving: Future[T]) -> Future[T]:
        """Let no more than a few tensors be on their way; what went wrong with one is raised here."""
        self._leaving.append(leaving)
        while len(self._leaving) > 2 * THREADS or (self._leaving and self._leaving[0].done()):
            self._leaving.popleft().result()
        return leaving

    def _down(self, tensor: Tensor, mark: Any) -> Tensor:
        return self.lane.down({"": tensor}, mark)[""]

    def _write(self, path: Path, tensor: Tensor, mark: Any) -> None:
        data = self._down(tensor, mark)
        with durable.explain_full_disk(path), path.open("wb", buffering=0) as file:
            left = memoryview(data.reshape(-1).view(torch.uint8).numpy().data)
            while left:
                left = left[file.write(left) :]

    def held(self, key: Hashable) -> Tensor:
        """What is under a key, in the host's memory."""
        if (held := self._memory.get(key)) is not None:
            return held if isinstance(held, Tensor) else held.result()
        path, dtype, shape, written = self._files[key]
        written.result()
        data = self.lane.buffers.lend(shape.numel() * dtype.itemsize)
        with path.open("rb", buffering=0) as file:
            left = memoryview(data.numpy().data)
            while left:
                if not (count := file.readinto(left)):
                    raise ValueError(f"{path} is cut off")
                left = left[count:]
        return data.view(dtype).view(shape)

    def _sent(self, key: Hashable) -> Tensor:
        held = self.held(key)
        with self.lane.sending():
            return held.to(self.lane.device, non_blocking=True)
