"""Chunks: how they are published, and how they are found, opened, checked and decoded.

A chunk is written first, then brought to the disk, then named and recorded in one transaction. LMDB's write lock spans
processes, so of two writers of one chunk exactly one publishes it. Several chunks may share a transaction, and wait for
the disk together: its flushes then cost a group little more than one.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from stackwise.errors import DamageError, NotFound
from stackwise.store.disk import Handle, LocalBackend
from stackwise.store.index import Index, Writing
from stackwise.store.records import BoundaryInfo, ChunkRecord, chunk_key

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

    def __init__(self, index: Index, backend: LocalBackend, info: BoundaryInfo) -> None:
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


Array = npt.NDArray[Any]


class ChunkDamage(DamageError):
    """A chunk is missing, truncated or changed; it was not delivered.

    Attributes:
        boundary: Its boundary's id.
        chunk: Its index.
        fault: `missing`, `truncated`, `changed`, or what is wrong with its record.
    """

    def __init__(self, boundary: str, chunk: int, fault: str) -> None:
        self.boundary, self.chunk, self.fault = boundary, chunk, fault
        super().__init__(
            f"boundary {boundary}, chunk {chunk}: {fault}",
            hint="`stackwise cache repair` recomputes what can be recomputed; `stackwise cache verify` finds the rest",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.boundary, self.chunk, self.fault)


class OpenChunk:
    """A chunk's files, open, with its record and which of its rows were checked."""

    __slots__ = ("checked", "digests", "handles", "record")

    def __init__(self, handles: list[Handle], record: ChunkRecord, checked: bytearray) -> None:
        self.handles, self.record, self.checked = handles, record, checked
        self.digests: list[int] = record.rows.tolist()

    def close(self) -> None:
        """Close the files."""
        for handle in self.handles:
            handle.close()


class ChunkSource:
    """The chunks of one boundary."""

    def __init__(self, index: Index, backend: LocalBackend, info: BoundaryInfo) -> None:
        self._index, self._backend, self.info = index, backend, info
        self._specs = info.codec_object.arrays
        self._shapes = [spec.row_shape(info.seq_len, info.d_model) for spec in self._specs]
        self.row_bytes = [spec.row_bytes(info.seq_len, info.d_model) for spec in self._specs]
        self._checked: dict[int, bytearray] = {}

    def checked(self, chunk: int) -> bytearray | None:
        """Which rows of a chunk were compared with their digests, one byte a row; None where none was."""
        return self._checked.get(chunk)

    def record(self, chunk: int) -> ChunkRecord:
        """The published record of a chunk.

        Raises:
            NotFound: It is not published yet, or its boundary was removed.
            ChunkDamage: The record is missing from a complete boundary, or is not one.
        """
        with self._index.read() as view:
            raw = view.get("chunks", chunk_key(self.info.id, chunk))
        return self.parse(chunk, raw)

    def parse(self, chunk: int, raw: bytes | None) -> ChunkRecord:
        """As `record`, of what the index has."""
        info = self.info
        if raw is None:
            if info.state != "complete":
                raise NotFound(f"chunk {chunk} of boundary {info.id} is not written yet")
            raise ChunkDamage(info.id, chunk, "its record is missing")
        start, stop = info.chunk_span(chunk)
        try:
            record = ChunkRecord.decode(raw, rows=stop - start, files=len(self._specs))
        except ValueError as error:
            raise ChunkDamage(info.id, chunk, str(error)) from error
        if info.codec_object.compression == "none":
            if any(size != rb * info.chunk_rows for size, rb in zip(record.sizes, self.row_bytes, strict=True)):
                raise ChunkDamage(info.id, chunk, "its record claims another size")
        elif any(size > rb * info.chunk_rows * 2 + 4096 for size, rb in zip(record.sizes, self.row_bytes, strict=True)):
            raise ChunkDamage(info.id, chunk, "its record claims an absurd size")
        return record

    def open(self, chunk: int, record: ChunkRecord | None = None) -> OpenChunk:
        """Open a chunk's files; their sizes are checked, their content is not yet.

        Raises:
            ChunkDamage: A file is missing or of another size.
        """
        record = record or self.record(chunk)
        handles: list[Handle] = []
        try:
            for key, size in zip(chunk_keys(self.info, chunk), record.sizes, strict=True):
                try:
                    handles.append(self._backend.open(key))
                except PermissionError:
                    raise  # it is not damaged: this user may not read it
                except OSError as error:
                    fault = "missing" if isinstance(error, FileNotFoundError | NotADirectoryError) else "unreadable"
                    raise ChunkDamage(self.info.id, chunk, fault) from error
                if handles[-1].size != size:
                    fault = "truncated" if handles[-1].size < size else "longer than it was written"
                    raise ChunkDamage(self.info.id, chunk, fault)
        except BaseException:
            for handle in handles:
                handle.close()
            raise
        rows = len(record.rows)
        checked = self._checked.setdefault(chunk, bytearray(rows))
        return OpenChunk(handles, record, checked)

    def read_rows(self, opened: OpenChunk, chunk: int, first: int, arrays: list[Array]) -> None:
        """Read consecutive rows of an uncompressed chunk into `arrays`, unchecked."""
        for handle, row_bytes, array in zip(opened.handles, self.row_bytes, arrays, strict=True):
            flat = array.reshape(-1).view(np.uint8)
            try:
                count = handle.read_into(flat, first * row_bytes)
            except OSError as error:
                raise ChunkDamage(self.info.id, chunk, f"unreadable ({error.strerror or error})") from error
            if count != flat.nbytes:
                raise ChunkDamage(self.info.id, chunk, "truncated")

    def check_rows(self, opened: OpenChunk, chunk: int, first: int, arrays: list[Array]) -> None:
        """Compare rows that were read with their digests, and remember that they were right."""
        stop = first + len(arrays[0])
        found = row_digests(arrays)
        if not np.array_equal(found, opened.record.rows[first:stop]):
            raise ChunkDamage(self.info.id, chunk, "changed")
        opened.checked[first:stop] = b"\1" * (stop - first)

    def load(self, chunk: int, *, check: bool | None = None, record: ChunkRecord | None = None) -> list[Array]:
        """The stored arrays of a whole chunk ([n, seq, d_model], and [n, seq] of scales), decompressed and checked.

        Args:
            chunk: Its index.
            check: Compare digests: always, never, or (None) unless this source did before.
            record: Its record; by default what the index has.

        Raises:
            ChunkDamage: It is missing, truncated or changed.
        """
        opened = self.open(chunk, record)
        try:
            rows = len(opened.record.rows)
            needs = check if check is not None else not all(opened.checked)
            if self.info.codec_object.compression == "none":
                arrays = [
                    np.empty((rows, *shape), spec.numpy) for spec, shape in zip(self._specs, self._shapes, strict=True)
                ]
                self.read_rows(opened, chunk, 0, arrays)
            else:
                arrays = [part[:rows] for part in self._decompress(opened, chunk, needs)]
            if needs:
                self.check_rows(opened, chunk, 0, arrays)
            return arrays
        finally:
            opened.close()

    def _decompress(self, opened: OpenChunk, chunk: int, check: bool) -> list[Array]:
        info, arrays = self.info, []
        for handle, spec, shape, size, digest in zip(
            opened.handles, self._specs, self._shapes, opened.record.sizes, opened.record.digests, strict=True
        ):
            data = bytearray(size)
            if handle.read_into(data, 0) != size:
                raise ChunkDamage(info.id, chunk, "truncated")
            # Compared before it is decompressed: a decoder gets no bytes that were not written here.
            if check and xxhash.xxh3_128_digest(data) != digest:
                raise ChunkDamage(info.id, chunk, "changed")
            out = np.empty((info.chunk_rows, *shape), spec.numpy)
            try:
                info.codec_object.decompress(bytes(data), out)
            except ValueError as error:
                raise ChunkDamage(info.id, chunk, "changed") from error
            arrays.append(out)
        return arrays

    def fault(self, chunk: int, raw: bytes | None, *, fast: bool = False) -> str | None:
        """What is wrong with a chunk whose record is `raw`; None where nothing is.

        Args:
            chunk: Its index.
            raw: Its record, as the index has it.
            fast: Compare only existence and sizes.
        """
        try:
            record = self.parse(chunk, raw)
            if fast:
                self.open(chunk, record).close()
            else:
                self.load(chunk, check=True, record=record)
        except ChunkDamage as damage:
            return damage.fault
        except NotFound:
            return None
        return None
