"""How chunks come to exist: written first, then brought to the disk, then named and recorded in one transaction.

LMDB's write lock spans processes, so of two writers of one chunk exactly one publishes it. Several staged chunks
may share a transaction, and wait for the disk together: its flushes then cost a group little more than one.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from stackwise.errors import NotFound
from stackwise.store.backend import Backend
from stackwise.store.index import Index
from stackwise.store.records import BoundaryInfo, ChunkRecord, chunk_key
from stackwise.store.tables import Writing

GROUP = 32
"""Chunks that share a transaction at most, where they come fast enough."""
_GROUP_BYTES = 64 << 20
"""What is written and waits for the disk, about: it takes as much of the page cache."""
_DIRECTORIES = 64
"""Chunk directories made at a time: their fsyncs cost one journal commit together."""


def array_key(boundary_id: str, array: str, chunk: int, dimensions: int) -> str:
    """Key of the file of a chunk: Zarr's default encoding, `<array>/c/<chunk>/0/0`."""
    return f"{boundary_id}/{array}/c/{chunk}" + "/0" * (dimensions - 1)


def chunk_keys(info: BoundaryInfo, chunk: int) -> list[str]:
    """Keys of the files of a chunk, one for each array of the codec."""
    return [
        array_key(info.id, spec.name, chunk, 1 + len(spec.row_shape(info.seq_len, info.d_model)))
        for spec in info.codec_object.arrays
    ]


def row_digests(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[np.uint64]:
    """xxh3-64 of each row [n]; with a scale array, the digest of the scale's row seeds that of the row."""
    seeds = row_digests(arrays[1:]).tolist() if len(arrays) > 1 else [0] * len(arrays[0])
    flat = arrays[0].reshape(-1).view(np.uint8)
    view, size, of = flat.data, flat.nbytes // len(arrays[0]), xxhash.xxh3_64_intdigest
    found = (of(view[at * size : (at + 1) * size], seed) for at, seed in enumerate(seeds))
    return np.fromiter(found, np.uint64, len(seeds))


@dataclass(frozen=True)
class StagedChunk:
    """A chunk that is written under temporary names, with the record that will publish it."""

    chunk: int
    record: ChunkRecord
    files: tuple[Any, ...]


class Publisher:
    """Stages and publishes the chunks of one boundary."""

    def __init__(self, index: Index, backend: Backend, info: BoundaryInfo) -> None:
        self._index, self._backend, self._info = index, backend, info
        self._codec = info.codec_object
        self._shapes = [spec.row_shape(info.seq_len, info.d_model) for spec in self._codec.arrays]
        self._prepared: set[int] = set()

    def stage(self, chunk: int, arrays: list[npt.NDArray[Any]]) -> StagedChunk:
        """Write a chunk's encoded arrays under temporary names; the disk begins with them while they are digested."""
        info, codec = self._info, self._codec
        self._prepare(chunk)
        sizes, digests, staged = [], [], []
        try:
            for key, array, shape in zip(chunk_keys(info, chunk), arrays, self._shapes, strict=True):
                if codec.compression == "none":
                    # A last chunk is padded to full size, as Zarr has it: by a hole, which takes no blocks.
                    sizes.append(info.chunk_rows * int(np.prod(shape)) * array.dtype.itemsize)
                    digests.append(bytes(16))
                    staged.append(self._backend.stage(key, [array], sizes[-1]))
                else:
                    if len(array) < info.chunk_rows:
                        array = np.concatenate([array, np.zeros((info.chunk_rows - len(array), *shape), array.dtype)])
                    packed = codec.compress(array)
                    sizes.append(len(packed))
                    digests.append(xxhash.xxh3_128_digest(packed))
                    staged.append(self._backend.stage(key, [packed]))
        except BaseException:
            for item in staged:
                self._backend.discard(item)
            raise
        return StagedChunk(chunk, ChunkRecord(tuple(sizes), tuple(digests), row_digests(arrays)), tuple(staged))

    def publish(self, group: list[StagedChunk], *, over: bool = False) -> list[bool]:
        """Bring staged chunks to the disk, and publish them in one transaction; for each, whether this published it.

        Args:
            group: The chunks.
            over: Replace what is published (repair alone); by default it stays, and the copy is thrown away.
        """
        published: list[bool] = []
        try:
            self._backend.settle([file for staged in group for file in staged.files])
            published = self._index.update(lambda view: self._publish(view, group, over))
        finally:
            for at, staged in enumerate(group):
                if not (published and published[at]):
                    self.discard(staged)
        return published

    def discard(self, staged: StagedChunk) -> None:
        """Remove a staged chunk's files."""
        for item in staged.files:
            self._backend.discard(item)

    def _publish(self, view: Writing, group: list[StagedChunk], over: bool) -> list[bool]:
        raw_id = bytes.fromhex(self._info.id)
        raw = view.get("boundaries", raw_id)
        if raw is None:
            raise NotFound(f"boundary {self._info.id} is no longer in the store")
        info, result, installed = BoundaryInfo.decode(raw_id, raw), [], []
        for staged in group:
            key = chunk_key(info.id, staged.chunk)
            old = view.get("chunks", key)
            if old is not None and not over:
                result.append(False)
                continue
            installed += list(zip(staged.files, chunk_keys(info, staged.chunk), strict=True))
            view.put("chunks", key, staged.record.encode())
            if old is None:
                size = info.stored_bytes + sum(staged.record.sizes)
                info = replace(info, published=info.published + 1, stored_bytes=size)
            result.append(True)
        self._backend.install(installed)
        view.put("boundaries", raw_id, info.encode())
        return result

    def _prepare(self, chunk: int) -> None:
        """Make the directories of this chunk and of those likely to be next."""
        if chunk not in self._prepared:
            batch = range(chunk, min(chunk + _DIRECTORIES, self._info.chunks))
            self._backend.prepare([key for number in batch for key in chunk_keys(self._info, number)])
            self._prepared.update(batch)


class Background:
    """Threads that write and publish chunks while the caller computes the next ones.

    One writes into the page cache; the other waits for the disk, and publishes together what was written meanwhile: the
    slower the disk, the larger its groups. After an error nothing more is written; every later `put` and `flush`
    raises it.
    """

    def __init__(self, publisher: Publisher, depth: int = 2) -> None:
        self._publisher, self._depth = publisher, depth
        self._waiting: deque[tuple[int, list[npt.NDArray[Any]]]] = deque()
        self._ready: list[StagedChunk] = []
        self._pending = 0
        self._stopping = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=work, name=f"stackwise-{name}", daemon=True)
            for name, work in (("write", self._write), ("publish", self._publish))
        ]
        for thread in self._threads:
            thread.start()

    def put(self, chunk: int, arrays: list[npt.NDArray[Any]]) -> None:
        """Hand over a chunk's encoded arrays; waits while `depth` chunks wait already."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < self._depth or self._error is not None)
            self._raise()
            self._waiting.append((chunk, arrays))
            self._pending += 1
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all that was handed over is published; raise what went wrong."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending <= 0 or self._error is not None)
            self._raise()

    def stop(self) -> None:
        """End the threads, after what was handed over."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if not self._waiting:
                    return
                item = self._waiting.popleft()
                self._changed.notify_all()
            try:
                staged = self._publisher.stage(*item)
            except BaseException as error:
                self._fail(error)
                continue
            with self._changed:
                self._changed.wait_for(lambda: self._has_room() or self._error is not None)
                if self._error is None:
                    self._ready.append(staged)
                    self._changed.notify_all()
                    continue
            self._publisher.discard(staged)

    def _has_room(self) -> bool:
        """Whether the next group may grow: not too far ahead of the disk."""
        ready = sum(sum(staged.record.sizes) for staged in self._ready)
        return len(self._ready) < GROUP and ready < _GROUP_BYTES

    def _publish(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or (self._stopping and self._pending <= 0))
                if not self._ready:
                    return
                group, self._ready = self._ready, []
                self._changed.notify_all()
            try:
                self._publisher.publish(group)
            except BaseException as error:
                self._fail(error)
            else:
                with self._changed:
                    self._pending -= len(group)
                    self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            group, self._ready = self._ready, []
            self._waiting.clear()
            self._pending = 0
            self._changed.notify_all()
        self._discard(group)

    def _discard(self, group: list[StagedChunk]) -> None:
        for staged in group:
            self._publisher.discard(staged)
