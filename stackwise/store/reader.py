"""Reading a boundary: any rows in any order, straight into their places in a batch."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt
import xxhash

from stackwise.errors import UsageError
from stackwise.store.chunks import Array, ChunkDamage, ChunkSource, OpenChunk
from stackwise.store.disk import BoundaryFiles
from stackwise.store.index import Index
from stackwise.store.layout import Lease
from stackwise.store.memory import BufferPool, Bytes, ChunkMaps, Threads
from stackwise.store.order import Prefetcher, RowOrder, Rows
from stackwise.store.records import BoundaryInfo

if TYPE_CHECKING:
    import torch

Batch = tuple[Rows, "torch.Tensor"]

_OPEN_FILES = 192
_DIRECT_ROW_BYTES = 1 << 14
"""Streaming smaller rows, one call a row costs more than copying them out of whole chunks."""
LARGE = 4 << 20
"""Bytes of a row or a chunk from which several are read at once, a thread each: below, handing over costs more."""
PIECE = 1 << 20
"""Bytes of a large row that are read and then digested while they lie in the processor's cache."""
_CACHED_BYTES = 512 << 20
SLOW = 2e9
"""Bytes a second below which the disk, not memory, is being read, and asking ahead pays."""


@dataclass(frozen=True, slots=True)
class _LargeRow:
    """A row of an uncompressed file, and its place in a batch."""

    boundary: str
    chunk: int
    row: int  # within the chunk
    part: int  # which of the codec's arrays
    place: Bytes  # uint8 [row_bytes]
    mapped: Bytes | None  # the chunk's bytes [rows, row_bytes], checked; None: it is read
    opened: OpenChunk

    def bring(self) -> bool:
        """Fill the place; whether it was read. Raises ChunkDamage: it is unreadable, truncated or changed."""
        if self.mapped is not None:
            np.copyto(self.place, self.mapped[self.row])
            return False
        view, size, file = self.place.data, self.place.nbytes, self.opened.files[self.part]
        # A row with a scale beside it is checked when both are there.
        check = len(self.opened.files) == 1 and not self.opened.checked[self.row]
        digest = xxhash.xxh3_64()
        for at in range(0, size, PIECE):
            piece = view[at : at + PIECE]
            try:
                count = file.read_into(piece, self.row * size + at)
            except OSError as error:
                raise ChunkDamage(self.boundary, self.chunk, f"unreadable ({error.strerror or error})") from error
            if count != len(piece):
                raise ChunkDamage(self.boundary, self.chunk, "truncated")
            if check:
                digest.update(piece)
        if check:
            if digest.intdigest() != self.opened.digests[self.row]:
                raise ChunkDamage(self.boundary, self.chunk, "changed")
            self.opened.checked[self.row] = 1
        return True


class BoundaryReader:
    """Reads one boundary; made by `ActivationStore.reader`. Safe to use from several threads.

    It holds a lease, so the boundary is not dropped or evicted while it is open. A row's digest is checked when
    this reader first reads it.

    Attributes:
        info: The boundary.
    """

    def __init__(self, index: Index, files: BoundaryFiles, info: BoundaryInfo, lease: Lease) -> None:
        self.info = info
        self._lease = lease
        self._source = ChunkSource(index, files, info)
        self._codec = info.codec_object
        self._pool = BufferPool()
        self._open: OrderedDict[int, OpenChunk] = OrderedDict()
        self._loaded: OrderedDict[int, list[Array]] = OrderedDict()
        self._loaded_limit = 4
        self._rows_read = 0
        self._maps = ChunkMaps(self._source, self._opened, None if self._codec.compression == "none" else 0)
        self._lock = threading.RLock()
        self._threads = Threads()
        self._closed = False

    def read(self, rows: npt.ArrayLike, out: torch.Tensor | None = None) -> torch.Tensor:
        """Activations [n, seq_len, d_model] of `rows` (any integers in range, any order, repeats allowed).

        Args:
            rows: Row numbers, integers [n].
            out: A contiguous CPU tensor [n, seq_len, d_model] of the boundary's dtype to read into.

        Returns:
            `out`, or a tensor of the boundary's dtype, on the CPU, that is the caller's to keep.

        Raises:
            UsageError: A row is out of range, or `out` does not fit.
            ChunkDamage: A chunk is missing, truncated or changed; named by boundary and chunk.
            NotFound: A chunk is not written yet.
        """
        return self._gather(self._checked_rows(rows), out, whole=self._codec.compression != "none")

    def stored(self, chunk: int) -> list[Array]:
        """The arrays of a whole chunk as they are stored, checked; `BoundaryWriter.put` takes them."""
        with self._lock:
            return self._source.load(chunk)

    def stream(self, order: RowOrder, batch_size: int, start: int = 0, every: int = 1) -> Iterator[Batch]:
        """Endless batches in the given order.

        Args:
            order: Which rows, and in which order.
            batch_size: Rows of a batch, B.
            start: Number of the first batch: the whole state of a reader.
            every: Each so-many-th batch alone, as where several processes share them.

        Yields:
            (rows int64 [B], activations [B, seq_len, d_model]); both are the consumer's to keep.
        """
        if order.rows != self.info.rows:
            raise UsageError(f"the order is over {order.rows} rows, the boundary has {self.info.rows}")
        whole = self.expect(order)
        number, advised, slow = start, -1, False
        while True:
            rows = order.batch(number, batch_size)
            # One window ahead, once: asking for what lies in memory costs a call a file.
            if slow:
                advised = self._advise(order, (number + 1) * batch_size, advised)
            before, began = self._rows_read, time.perf_counter()
            x = self._gather(rows, None, whole=whole)
            # Of a batch that lay in memory the disk knows nothing: asking ahead would only cost.
            cold = 2 * (self._rows_read - before) > len(rows) and not whole
            slow = cold and x.nbytes / max(time.perf_counter() - began, 1e-9) < SLOW
            yield rows, x
            # The consumer's alone now: the pool gives its memory out again when nobody has it.
            del x
            number += every

    def expect(self, order: RowOrder) -> bool:
        """Get ready for reads in this order; whether whole chunks are then kept in memory, and how many, follows."""
        small = min(self._source.row_bytes[0], sum(self._source.row_bytes)) < _DIRECT_ROW_BYTES
        whole = self._codec.compression != "none" or small
        if whole:
            self._loaded_limit = self._window_chunks(order)
        return whole

    def batches(self, order: RowOrder, batch_size: int, start: int = 0, prefetch: int = 2) -> Prefetcher[Batch]:
        """`stream` behind a background thread that stays `prefetch` batches ahead; close it when done."""
        return Prefetcher(self.stream(order, batch_size, start), depth=prefetch)

    def _window_chunks(self, order: RowOrder) -> int:
        """Chunks on disk that two windows of the order touch, as far as memory allows."""
        touched = -(-order.chunk_rows // self.info.chunk_rows) + 1  # chunks on disk that one of the order touches
        chunks = 2 * order.window_chunks * touched + 2
        chunk_bytes = sum(self._source.row_bytes) * self.info.chunk_rows
        return max(2, min(chunks, _CACHED_BYTES // max(1, chunk_bytes), self.info.chunks))

    def _checked_rows(self, rows: npt.ArrayLike) -> Rows:
        numbers = np.asarray(rows)
        if numbers.ndim != 1 or (numbers.dtype.kind not in "iu" and numbers.size):
            raise UsageError(f"rows are integers [n], not {numbers.dtype} {list(numbers.shape)}")
        numbers = numbers.astype(np.int64)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= self.info.rows):
            raise UsageError(f"boundary {self.info.id} has rows 0 to {self.info.rows - 1}")
        return numbers

    def _gather(self, rows: Rows, out: torch.Tensor | None, *, whole: bool) -> torch.Tensor:
        import torch

        shape, dtype = (len(rows), self.info.seq_len, self.info.d_model), self._codec.decoded
        if out is None:
            out = self._pool.tensor(shape, dtype)
        fits = tuple(out.shape) == shape and out.dtype is getattr(torch, dtype)
        if not (fits and out.device.type == "cpu" and out.is_contiguous()):
            raise UsageError(f"`out` is to be a contiguous CPU tensor {list(shape)} of {dtype}")
        if not len(rows):
            return out
        with self._lock:
            if self._closed:
                raise UsageError(f"the reader of boundary {self.info.id} is closed")
            if self._codec.direct:
                bits = out.view(torch.uint16) if out.dtype is torch.bfloat16 else out  # numpy has no bfloat16
                self._fill(rows, [bits.numpy()], whole)
                return out
            specs = zip(self._source.specs, self._source.row_shapes, strict=True)
            stored = [np.empty((len(rows), *row_shape), spec.numpy) for spec, row_shape in specs]
            self._fill(rows, stored, whole)
        self._codec.decode(stored, out)
        return out

    def _fill(self, rows: Rows, arrays: list[Array], whole: bool) -> None:
        """Bring rows of the stored arrays to their places, checked."""
        if whole:
            self._from_loaded(rows, arrays)
            return
        for part, array in enumerate(arrays):
            scatter = self._scatter if self._source.row_bytes[part] < LARGE else self._scatter_large
            scatter(rows, array.reshape(-1).view(np.uint8), part)
        if len(arrays) == 1:
            return
        for at, row in enumerate(rows.tolist()):  # a row with a scale is checked when both are there
            chunk, within = divmod(row, self.info.chunk_rows)
            opened = self._opened(chunk)
            if not opened.checked[within]:
                self._source.check_rows(opened, chunk, within, [array[at : at + 1] for array in arrays])

    def _scatter(self, rows: Rows, flat: Bytes, part: int) -> None:
        """Bring each row of one array straight into its place, and check it where it is checked by itself."""
        check, row_bytes = len(self._source.specs) == 1, self._source.row_bytes[part]
        preadv, digest = os.preadv, xxhash.xxh3_64_intdigest
        view, places = flat.data, flat.reshape(len(rows), row_bytes)
        numbers = rows // self.info.chunk_rows
        chunks, within = numbers.tolist(), (rows - numbers * self.info.chunk_rows).tolist()
        mapped = self._maps.rows(chunks, within, part)
        current, opened = -1, None
        for at, (chunk, row) in enumerate(zip(chunks, within, strict=True)):
            # It was checked when it was mapped, and costs no call.
            if chunk in mapped:
                places[at] = mapped[chunk][row]
                continue
            # Rows of the same chunk, one after the other, look it up once.
            if chunk != current or opened is None:
                opened, current = self._opened(chunk), chunk
                file = opened.files[part]
            target = view[at * row_bytes : (at + 1) * row_bytes]
            try:
                count = preadv(file.fd, (target,), row * row_bytes)
                if 0 < count < row_bytes:  # one call may give only a part
                    count += file.read_into(target[count:], row * row_bytes + count)
            except OSError as error:
                raise ChunkDamage(self.info.id, chunk, f"unreadable ({error.strerror or error})") from error
            if count != row_bytes:
                raise ChunkDamage(self.info.id, chunk, "truncated")
            self._rows_read += 1
            if check and not opened.checked[row]:
                if digest(target) != opened.digests[row]:
                    raise ChunkDamage(self.info.id, chunk, "changed")
                opened.checked[row] = 1

    def _scatter_large(self, rows: Rows, flat: Bytes, part: int) -> None:
        """As `_scatter`, several rows at once: each is read, or copied out of a map, and checked by one thread."""
        places = flat.reshape(len(rows), -1)
        chunks, within = (of.tolist() for of in np.divmod(rows, self.info.chunk_rows))
        mapped = self._maps.rows(chunks, within, part)
        for first in range(0, len(rows), _OPEN_FILES):  # the files of as many rows are open at once
            jobs = [
                _LargeRow(self.info.id, chunk, row, part, place, mapped.get(chunk), self._opened(chunk))
                for chunk, row, place in list(zip(chunks, within, places, strict=True))[first : first + _OPEN_FILES]
            ]
            self._rows_read += sum(self._threads.map(_LargeRow.bring, jobs))

    def _from_loaded(self, rows: Rows, arrays: list[Array]) -> None:
        """Copy rows out of whole chunks that are kept in memory."""
        chunks = rows // self.info.chunk_rows
        wanted = list(dict.fromkeys(chunks.tolist()))
        large = sum(self._source.row_bytes) * self.info.chunk_rows >= LARGE
        at_once = min(self._threads.count, self._loaded_limit) if large else 1
        for first in range(0, len(wanted), at_once):
            for chunk, stored in self._load(wanted[first : first + at_once]).items():
                places = np.flatnonzero(chunks == chunk)
                within = rows[places] - chunk * self.info.chunk_rows
                for array, loaded in zip(arrays, stored, strict=True):
                    array[places] = loaded[within]

    def _load(self, chunks: list[int]) -> dict[int, list[Array]]:
        """Whole chunks, of which no more than `_loaded_limit` are kept; each is read and decompressed by one thread."""
        ready: dict[int, list[Array]] = {}
        for chunk in chunks:
            if chunk in self._loaded:
                ready[chunk] = self._loaded[chunk]
                self._loaded.move_to_end(chunk)
            elif (mapped := self._maps.whole(chunk)) is not None:
                ready[chunk] = mapped
        missing = [chunk for chunk in chunks if chunk not in ready]
        # Those that were used longest ago go: a window's chunks are used together.
        while missing and len(self._loaded) + len(missing) > self._loaded_limit:
            self._loaded.popitem(last=False)
        read = dict(zip(missing, self._threads.map(self._source.load, missing), strict=True))
        self._loaded |= read
        return ready | read

    def _opened(self, chunk: int) -> OpenChunk:
        opened = self._open.get(chunk)
        if opened is None:
            # A process may have only so many files open, and a boundary more chunks than that.
            while len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            opened = self._open[chunk] = self._source.open(chunk)
        else:
            self._open.move_to_end(chunk)
        return opened

    def _advise(self, order: RowOrder, position: int, advised: int) -> int:
        """Ask the disk for the window after the one that holds `position`; returns how far was asked."""
        _, end = order.window_rows(position)
        if end <= advised:
            return advised
        rows, _ = order.window_rows(end)
        with self._lock:
            for chunk in np.unique(rows // self.info.chunk_rows).tolist():
                for file in self._opened(chunk).files:
                    read_ahead(file.fd)
        return end

    def close(self) -> None:
        """Close the files and let go of the lease. A second time does nothing."""
        with self._lock:
            self._closed = True
            for opened in self._open.values():
                opened.close()
            self._open.clear()
            self._loaded.clear()
            self._maps.close()
            self._threads.close()
            self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_ahead(fd: int) -> None:
    """A hint to the system that the whole file will be read soon."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
