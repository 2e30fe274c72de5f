"""Writing a boundary, chunk by chunk: each is on disk before the index says that it exists.

A chunk is staged (written under a temporary name), then brought to the disk, then named and recorded in one LMDB
transaction. LMDB's write lock spans processes, so of two writers of one chunk exactly one publishes it, and the
other's copy is thrown away. Before the commit nothing happened; after it, the chunk survives anything. Several chunks
may share a transaction, and wait for the disk together: its flushes then cost a group little more than one.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import xxhash

from stackwise.durable import is_full_disk
from stackwise.errors import NoSpaceError, NotFound, UsageError
from stackwise.store import disk
from stackwise.store.chunks import Array, ChunkRecord, chunk_files, chunk_key, row_digests
from stackwise.store.disk import BoundaryFiles, Staged
from stackwise.store.index import Index, Reading, Writing
from stackwise.store.layout import Lease
from stackwise.store.records import BoundaryInfo

if TYPE_CHECKING:
    import torch

_GROUP = 32
"""Chunks that share a transaction at most, where they come fast enough."""
_GROUP_BYTES = 64 << 20
"""What is written and waits for the disk, about: it takes as much of the page cache."""
_WAITING = 2
"""Encoded chunks that wait to be written at most: the memory that writing behind takes."""
_DIRECTORIES = 64
"""Chunk directories made at a time: their fsyncs cost one journal commit together."""


@dataclass(frozen=True)
class StagedChunk:
    """A chunk that is written under temporary names, with the record that will publish it."""

    chunk: int
    record: ChunkRecord
    files: list[Staged]

    def discard(self) -> None:
        """Remove its files."""
        for file in self.files:
            file.discard()


def boundary_now(view: Reading, boundary_id: str) -> BoundaryInfo:
    """A boundary as a transaction sees it.

    Raises:
        NotFound: It was removed.
    """
    key = bytes.fromhex(boundary_id)
    raw = view.get("boundaries", key)
    if raw is None:
        raise NotFound(f"boundary {boundary_id} is no longer in the store")
    return BoundaryInfo.decode(key, raw)


class Publisher:
    """Stages and publishes the chunks of one boundary."""

    def __init__(self, index: Index, files: BoundaryFiles, info: BoundaryInfo) -> None:
        self._index, self._files, self._info = index, files, info
        self._prepared: set[int] = set()

    def stage(self, chunk: int, arrays: list[Array]) -> StagedChunk:
        """Write a chunk's encoded arrays under temporary names; the disk begins with them while they are digested."""
        info, codec = self._info, self._info.codec_object
        if chunk not in self._prepared:
            batch = range(chunk, min(chunk + _DIRECTORIES, info.chunks))  # those likely to be next, too
            # Made and synced for many chunks at once: a directory of its own for each would cost each an fsync.
            self._files.prepare([key for number in batch for key in chunk_files(info, number)])
            self._prepared.update(batch)
        sizes, digests, staged = [], [], []
        try:
            for key, array in zip(chunk_files(info, chunk), arrays, strict=True):
                missing = info.chunk_rows - len(array)  # a last chunk is padded to full size, as Zarr has it
                if codec.compression == "none":
                    # By a hole, which takes no blocks.
                    sizes.append(info.chunk_rows * (array.nbytes // len(array)))
                    digests.append(bytes(16))
                    staged.append(self._files.stage(key, [array], sizes[-1]))
                else:
                    if missing:
                        array = np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])
                    packed = codec.compress(array)
                    sizes.append(len(packed))
                    digests.append(xxhash.xxh3_128_digest(packed))
                    staged.append(self._files.stage(key, [packed]))
        except BaseException:
            for file in staged:
                file.discard()
            raise
        return StagedChunk(chunk, ChunkRecord(tuple(sizes), tuple(digests), row_digests(arrays)), staged)

    def publish(self, group: list[StagedChunk], *, over: bool = False) -> list[bool]:
        """Bring staged chunks to the disk, and publish them in one transaction; for each, whether this published it.

        Args:
            group: The chunks.
            over: Replace what is published (repair alone); by default it stays, and the copy is thrown away.
        """
        published: list[bool] = []
        try:
            # Outside the transaction: LMDB has one writer, and every other process would wait for this disk.
            for file in [file for staged in group for file in staged.files]:
                file.settle()
            published = self._index.update(lambda view: self._publish(view, group, over))
        finally:
            for at, staged in enumerate(group):
                if not (published and published[at]):
                    staged.discard()
        return published

    def _publish(self, view: Writing, group: list[StagedChunk], over: bool) -> list[bool]:
        info, published, installed = boundary_now(view, self._info.id), [], []
        for staged in group:
            key = chunk_key(info.id, staged.chunk)
            old = view.get("chunks", key)
            # Two writers may have computed the same chunk: the first stays, so that readers see it never change.
            published.append(old is None or over)
            if not published[-1]:
                continue
            installed += list(zip(staged.files, chunk_files(info, staged.chunk), strict=True))
            view.put("chunks", key, staged.record.encode())
            if old is None:
                size = info.stored_bytes + sum(staged.record.sizes)
                info = replace(info, published=info.published + 1, stored_bytes=size)
        # Named before the transaction commits: a record never names a file that is not there.
        self._files.install(installed)
        view.put("boundaries", bytes.fromhex(info.id), info.encode())
        return published


class _Background:
    """Threads that write and publish chunks while the caller computes the next ones.

    One writes into the page cache; the other waits for the disk, and publishes together what was written meanwhile: the
    slower the disk, the larger its groups. After an error nothing more is written; every later `put` and `flush`
    raises it.
    """

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._waiting: deque[tuple[int, list[Array]]] = deque()
        self._ready: list[StagedChunk] = []
        self._pending = 0
        self._stopping = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        roles = {"write": (self._next_waiting, self._stage), "publish": (self._next_group, self._publish)}
        self._threads = [
            threading.Thread(target=self._serve, args=role, name=f"stackwise-{name}", daemon=True)
            for name, role in roles.items()
        ]
        for thread in self._threads:
            thread.start()

    def put(self, chunk: int, arrays: list[Array]) -> None:
        """Hand over a chunk's encoded arrays; waits while enough chunks wait already."""
        with self._changed:
            # Bounded: else a slow disk would let activations pile up in memory.
            self._changed.wait_for(lambda: len(self._waiting) < _WAITING or self._error is not None)
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

    def _serve(self, take: Callable[[], Any], work: Callable[[Any], None]) -> None:
        """A thread: take what there is to do, until there is nothing more to come; do it without the lock."""
        while True:
            with self._changed:
                if not (item := take()):
                    return
                self._changed.notify_all()
            try:
                work(item)
            except BaseException as error:
                self._fail(error)

    def _next_waiting(self) -> tuple[int, list[Array]] | None:
        self._changed.wait_for(lambda: self._waiting or self._stopping)
        return self._waiting.popleft() if self._waiting else None

    def _next_group(self) -> list[StagedChunk]:
        self._changed.wait_for(lambda: self._ready or (self._stopping and self._pending <= 0))
        group, self._ready = self._ready, []
        return group

    def _stage(self, item: tuple[int, list[Array]]) -> None:
        staged = self._publisher.stage(*item)
        with self._changed:
            self._changed.wait_for(lambda: self._has_room() or self._error is not None)
            if self._error is None:
                self._ready.append(staged)
                self._changed.notify_all()
                return
        staged.discard()

    def _has_room(self) -> bool:
        """Whether the next group may grow: not too far ahead of the disk."""
        ready = sum(sum(staged.record.sizes) for staged in self._ready)
        return len(self._ready) < _GROUP and ready < _GROUP_BYTES

    def _publish(self, group: list[StagedChunk]) -> None:
        self._publisher.publish(group)
        with self._changed:
            self._pending -= len(group)
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            # The first is the cause; those after it mostly follow from it.
            self._error = self._error or error
            group, self._ready = self._ready, []
            self._waiting.clear()
            # Nobody is to wait for what will never be written.
            self._pending = 0
            self._changed.notify_all()
        for staged in group:
            staged.discard()


class BoundaryWriter:
    """Writes the chunks of one boundary; made by `ActivationStore.writer`.

    Several writers, in threads or processes, may write other chunks of one boundary at the same time. It holds a
    lease, so the boundary is never dropped meanwhile. A later writer of the same boundary goes on where this one
    stopped: see `missing`.

    Args:
        index: The index.
        files: Where boundaries lie.
        info: The boundary.
        lease: Held until it is closed.
        describe: Writes the columns and the Zarr metadata of the boundary, once all chunks are published.
    """

    def __init__(
        self,
        index: Index,
        files: BoundaryFiles,
        info: BoundaryInfo,
        lease: Lease,
        describe: Callable[[BoundaryInfo], None],
    ) -> None:
        self._index, self._files, self._info, self._lease, self._describe = index, files, info, lease, describe
        self._publisher = Publisher(index, files, info)
        self.share = (0, 1)
        """(k, n): of every n chunks it writes the k-th alone, as one of n processes do that together."""
        self.completes = True
        """Whether `finish` makes the boundary complete; False: somebody does it later, as others still write."""
        self._background: _Background | None = None
        self._began, self._lacked = time.monotonic(), info.chunks - info.published

    @property
    def info(self) -> BoundaryInfo:
        """The boundary, as the index has it now."""
        with self._index.read() as view:
            return boundary_now(view, self._info.id)

    @property
    def missing(self) -> list[int]:
        """Indices of the chunks of its share that are not published yet, in order."""
        with self._index.read() as view:
            keys = view.keys("chunks", bytes.fromhex(self._info.id))
        # A chunk's key is the boundary's id and its number, so that LMDB has them in order.
        have = {int.from_bytes(key[16:], "big") for key in keys}
        first, every = self.share
        return [chunk for chunk in range(first, self._info.chunks, every) if chunk not in have]

    def chunk_rows_of(self, chunk: int) -> tuple[int, int]:
        """(first row, row after the last) of a chunk."""
        if not 0 <= chunk < self._info.chunks:
            raise UsageError(f"boundary {self._info.id} has chunks 0 to {self._info.chunks - 1}, not {chunk}")
        return self._info.chunk_span(chunk)

    def write_chunk(self, chunk: int, x: torch.Tensor | Array) -> bool:
        """Encode, write and publish a chunk; on return it survives kill -9 and power loss.

        Args:
            chunk: Its index.
            x: Its rows [n, seq_len, d_model], floating point, on any device.

        Returns:
            Whether this call published it; False where it was published before, which stays as it is.

        Raises:
            UsageError: Wrong index or shape, or a number that the codec cannot store.
            NoSpaceError: The disk is full; what was published before stays, and a later call goes on.
        """
        return self.put(chunk, self._encoded(chunk, x))

    def put(self, chunk: int, arrays: list[Array]) -> bool:
        """As `write_chunk`, of arrays as they are stored in another store (`BoundaryReader.stored`)."""
        with self._explained():
            return self._publisher.publish([self._publisher.stage(chunk, arrays)])[0]

    def submit(self, chunk: int, x: torch.Tensor | Array, *, copy: bool = True) -> None:
        """As `write_chunk`, but written behind: a thread writes while the caller computes the next chunk.

        Chunks that come fast share a transaction, so this is the fast way to write many. A chunk is published, and
        survives anything, when `flush` or `finish` returns; a kill before loses the last few alone.

        Args:
            chunk: Its index.
            x: Its rows [n, seq_len, d_model].
            copy: Make `x` the caller's again on return (encoding copies it anyway, unless it is on the CPU and of
                the stored type already). Without, `x` must stay as it is until `flush`.

        Raises:
            UsageError, NoSpaceError: As `write_chunk`, of this chunk or of one submitted before.
        """
        arrays = self._encoded(chunk, x)
        memory = (x if isinstance(x, np.ndarray) else _memory(x)) if copy else None
        if memory is not None and np.may_share_memory(arrays[0], memory):
            arrays = [array.copy() for array in arrays]
        if self._background is None:
            self._background = _Background(self._publisher)
        with self._explained():
            self._background.put(chunk, arrays)

    def flush(self) -> None:
        """Wait until every submitted chunk is published.

        Raises:
            NoSpaceError: The disk is full; what was published before stays.
        """
        if self._background is not None:
            with self._explained():
                self._background.flush()

    def _encoded(self, chunk: int, x: torch.Tensor | Array) -> list[Array]:
        info = self._info
        start, stop = self.chunk_rows_of(chunk)
        expected = (stop - start, info.seq_len, info.d_model)
        if tuple(x.shape) != expected:
            raise UsageError(f"chunk {chunk} of boundary {info.id} is {list(expected)}, not {list(x.shape)}")
        return info.codec_object.encode(x)

    def finish(self, cost: float | None = None) -> BoundaryInfo:
        """Make the boundary complete: its columns and Zarr metadata are written, then its state changes.

        A writer of a share makes it so for its chunks; one of the whole does the rest when all have.

        Args:
            cost: Seconds that computing it took, where the writer did other things in between; by default the time
                since the writer was made.

        Raises:
            UsageError: Chunks are missing.
            NoSpaceError: The disk is full; calling again goes on.
        """
        self.flush()
        info, missing = self.info, self.missing
        if missing:
            raise UsageError(f"boundary {info.id} lacks {len(missing)} of its {info.chunks} chunks")
        if info.state == "complete" or self.share[1] > 1 or not self.completes:
            return info
        # What this writer did not write is taken to have cost as much a chunk.
        measured = (time.monotonic() - self._began) * info.chunks / max(1, self._lacked) if cost is None else cost

        def complete(view: Writing) -> BoundaryInfo:
            now = boundary_now(view, info.id)
            # A cost that was said at the beginning is kept: it is of the whole, and this writer may have seen a part.
            done = replace(now, state="complete", cost=now.cost or measured)
            view.put("boundaries", bytes.fromhex(info.id), done.encode())
            return done

        with self._explained():
            # Before the state changes: what calls itself complete can be read without the index.
            self._describe(info)
            return self._index.update(complete)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say of a full disk what the boundary still needs."""
        try:
            yield
        except OSError as error:
            if not is_full_disk(error):
                raise
            missing, info = len(self.missing), self._info
            need = missing * info.chunk_rows * info.codec_object.row_bytes(info.seq_len, info.d_model)
            raise NoSpaceError(
                f"no space left for boundary {info.id}: {missing} of its {info.chunks} chunks are still to be "
                f"written, up to {need:,} bytes; {disk.free_bytes(self._files.root):,} are free",
                hint="`stackwise cache gc` frees what no run needs; then run the same command again: it goes on",
            ) from error

    def close(self) -> None:
        """Publish what was submitted, and let go of the lease. What was published stays.

        Raises:
            NoSpaceError: As `flush`.
        """
        background, self._background = self._background, None
        try:
            if background is not None:
                background.stop()
                with self._explained():
                    background.flush()
        finally:
            self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # what went wrong before is what is to be seen
            with contextlib.suppress(Exception):
                self.close()


def _memory(x: torch.Tensor) -> Array | None:
    """The memory of a CPU tensor; None where it lies elsewhere or is strided, and encoding copied it anyway."""
    if x.device.type != "cpu" or not x.is_contiguous():
        return None
    import torch

    return x.detach().reshape(-1).view(torch.uint8).numpy()
