"""Reading a boundary: any rows in any order, straight into their places in a batch.

Fresh memory costs as much to fault in as a batch costs to copy, so buffers are used again as soon as nothing refers
to the batch. A map of a file that is kept is up to three times as fast as a `read`; but a mapped file that is cut off
would kill the process, and page by page is a slow way to read a disk. So a map is touched only where all the pages
asked for lie in memory at that moment; anything else is read by `preadv`, which fails in words.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import xxhash

from stackwise.errors import UsageError
from stackwise.store import disk
from stackwise.store.chunks import Array, ChunkDamage, ChunkSource, OpenChunk
from stackwise.store.disk import LocalBackend
from stackwise.store.index import Index
from stackwise.store.layout import Lease
from stackwise.store.order import Prefetcher, RowOrder, Rows
from stackwise.store.records import BoundaryInfo

if TYPE_CHECKING:
    import torch

    from stackwise.store.chunks import ChunkSource, OpenChunk
    from stackwise.store.disk import Handle


_IDLE = 6
_SMALL = 1 << 16


class BufferPool:
    """Buffers of whatever sizes are asked for; a few idle ones of the latest size are kept."""

    def __init__(self) -> None:
        self._idle: list[tuple[int, Any]] = []
        self._pid = os.getpid()

    def tensor(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """An uninitialised CPU tensor of a torch dtype ("bfloat16")."""
        import torch

        target: torch.dtype = getattr(torch, dtype)
        size = int(np.prod(shape)) * target.itemsize
        if size < _SMALL:
            return torch.empty(shape, dtype=target)
        view = self._take(size)  # this very object: a slice of it would keep only the buffer, not the view, alive
        return torch.from_numpy(view).view(target).view(shape)

    def _take(self, size: int) -> npt.NDArray[np.uint8]:
        if self._pid != os.getpid():  # a fork's copy of an idle buffer is its own, but starts afresh all the same
            self._idle, self._pid = [], os.getpid()
        base = None
        while self._idle:
            length, candidate = self._idle.pop()
            if length == size:
                base = candidate
                break
        if base is None:
            base = _allocate(size)
        view = base.view()
        weakref.finalize(view, _give_back, self._idle, size, base).atexit = False
        return view


def _give_back(idle: list[tuple[int, Any]], size: int, base: Any) -> None:
    if len(idle) < _IDLE:
        idle.append((size, base))


def _allocate(size: int) -> npt.NDArray[np.uint8]:
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(area, np.uint8)


def bits_of(x: torch.Tensor) -> npt.NDArray[Any]:
    """A contiguous CPU tensor's memory as a numpy array of the same shape (bfloat16 as uint16)."""
    import torch

    return x.view(torch.uint16).numpy() if x.dtype is torch.bfloat16 else x.numpy()


Bytes = npt.NDArray[np.uint8]

_MOST_MAPS = 8192
"""Of the 65,530 maps that Linux lets a process have."""
_SHARE_OF_MEMORY = 8


class ChunkMaps:
    """Maps of a boundary's uncompressed files, made once and kept. Not safe to use from several threads at once.

    The pages are the system's, which takes them back when it needs them; tools count them as this process's resident
    memory all the same, so no more than an eighth of the machine's memory is mapped. What is beyond is read.

    Args:
        source: The boundary's chunks.
        opened: Opens a chunk, or has it open.
        budget: Bytes to map at most; by default an eighth of the machine's memory.
    """

    def __init__(self, source: ChunkSource, opened: Callable[[int], OpenChunk], budget: int | None = None) -> None:
        self._source, self._opened = source, opened
        self._left = disk.physical_memory() // _SHARE_OF_MEMORY if budget is None else budget
        self._maps: dict[tuple[int, int], tuple[Bytes, int] | None] = {}
        self._residency, self._most = disk.Residency(), 0

    def rows(self, chunks: list[int], within: list[int], part: int) -> dict[int, Bytes]:
        """Of the rows asked for, the chunks that were checked and lie in memory at this moment.

        Args:
            chunks: The chunk of each row.
            within: Its place in the chunk.
            part: Which of the codec's arrays.

        Returns:
            By chunk: its bytes uint8 [rows, row_bytes], of which the rows asked for may be taken.
        """
        row_bytes = self._source.row_bytes[part]
        wanted: dict[int, list[int]] = {}
        for chunk, row in zip(chunks, within, strict=True):
            if chunk in wanted:
                wanted[chunk].append(row)
            else:
                wanted[chunk] = [row]
        found = {}
        for chunk, rows in wanted.items():
            checked = self._source.checked(chunk)
            if checked is not None and all(map(checked.__getitem__, rows)):
                mapped = self._get(chunk, part, min(rows) * row_bytes, (max(rows) + 1) * row_bytes)
                if mapped is not None:
                    found[chunk] = mapped.reshape(-1, row_bytes)
        return found

    def whole(self, chunk: int) -> list[Array] | None:
        """The stored arrays of a chunk [rows, …], where all its rows were checked before and lie in memory now."""
        checked, info = self._source.checked(chunk), self._source.info
        if checked is None or not all(checked):
            return None
        found = []
        for part, (spec, row_bytes) in enumerate(zip(info.codec_object.arrays, self._source.row_bytes, strict=True)):
            mapped = self._get(chunk, part, 0, len(checked) * row_bytes)
            if mapped is None:
                return None
            found.append(mapped.view(spec.numpy).reshape(-1, *spec.row_shape(info.seq_len, info.d_model)))
        return found

    def _get(self, chunk: int, part: int, start: int, stop: int) -> Bytes | None:
        """A file's bytes, whole, where it is mapped and its bytes [start, stop) lie in memory at this moment."""
        if (chunk, part) not in self._maps and self._left:
            self._maps[chunk, part] = self._map(self._opened(chunk).handles[part])
        found = self._maps.get((chunk, part))
        return found[0] if found is not None and self._residency.holds(found[1] + start, stop - start) else None

    def _map(self, handle: Handle) -> tuple[Bytes, int] | None:
        """Map an open file, where it is this user's own, it can be, and there is room."""
        size = handle.size
        if handle.fd is None or size > self._left or len(self._maps) >= _MOST_MAPS:
            return None
        status = os.fstat(handle.fd)
        # Of another user's file the kernel does not say what is in memory.
        if status.st_uid != os.geteuid() or status.st_size != size:
            return None
        mapped = disk.map_file(handle.fd, size)
        if mapped is None:
            return None
        self._left -= size
        if size > self._most:
            self._residency, self._most = disk.Residency(size), size
        return mapped, mapped.ctypes.data

    def close(self) -> None:
        """Forget all maps."""
        self._maps.clear()
        self._left = 0


Batch = tuple[Rows, "torch.Tensor"]

_OPEN_FILES = 192
_DIRECT_ROW_BYTES = 1 << 14
"""Streaming smaller rows, one call a row costs more than copying them out of whole chunks."""
_CACHED_BYTES = 512 << 20
_SLOW = 2e9
"""Bytes a second below which the disk, not memory, is being read, and asking ahead pays."""


class BoundaryReader:
    """Reads one boundary; made by `ActivationStore.reader`. Safe to use from several threads.

    It holds a lease, so the boundary is not dropped or evicted while it is open. A row's digest is checked when
    this reader first reads it.

    Attributes:
        info: The boundary.
    """

    def __init__(self, index: Index, backend: LocalBackend, info: BoundaryInfo, lease: Lease) -> None:
        self.info = info
        self._backend, self._lease = backend, lease
        self._source = ChunkSource(index, backend, info)
        self._codec = info.codec_object
        self._pool = BufferPool()
        self._open: OrderedDict[int, OpenChunk] = OrderedDict()
        self._loaded: OrderedDict[int, list[Array]] = OrderedDict()
        self._loaded_limit = 4
        self._rows_read = 0
        self._maps = ChunkMaps(self._source, self._opened, None if self._codec.compression == "none" else 0)
        self._lock = threading.RLock()
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

    def stream(self, order: RowOrder, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """Endless batches in the given order.

        Args:
            order: Which rows, and in which order.
            batch_size: Rows of a batch, B.
            start: Number of the first batch: the whole state of a reader.

        Yields:
            (rows int64 [B], activations [B, seq_len, d_model]); both are the consumer's to keep.
        """
        if order.rows != self.info.rows:
            raise UsageError(f"the order is over {order.rows} rows, the boundary has {self.info.rows}")
        whole = self.expect(order)
        number, advised, slow = start, -1, False
        while True:
            rows = order.batch(number, batch_size)
            if slow:
                advised = self._advise(order, (number + 1) * batch_size, advised)
            before, began = self._rows_read, time.perf_counter()
            x = self._gather(rows, None, whole=whole)
            # Of a batch that lay in memory the disk knows nothing: asking ahead would only cost.
            cold = 2 * (self._rows_read - before) > len(rows) and not whole
            slow = cold and x.nbytes / max(time.perf_counter() - began, 1e-9) < _SLOW
            yield rows, x
            del x
            number += 1

    def expect(self, order: RowOrder) -> bool:
        """Get ready for reads in this order; whether whole chunks are then kept in memory, and how many, follows."""
        small = min(self._source.row_bytes[0], sum(self._source.row_bytes)) < _DIRECT_ROW_BYTES
        whole = self._codec.compression != "none" or small
        if whole:
            self._loaded_limit = self._window_chunks(order)
        return whole

    def batches(
        self,
        order: RowOrder,
        batch_size: int,
        start: int = 0,
        prefetch: int = 2,
    ) -> Prefetcher[Batch]:
        """`stream` behind a background thread that stays `prefetch` batches ahead; close it when done.

        Args:
            order: Which rows, and in which order.
            batch_size: Rows of a batch, B.
            start: Number of the first batch.
            prefetch: Batches kept ready.
        """
        return Prefetcher(self.stream(order, batch_size, start), depth=prefetch)

    def _window_chunks(self, order: RowOrder) -> int:
        """Chunks on disk that two windows of the order touch, as far as memory allows."""
        each = -(-order.chunk_rows // self.info.chunk_rows) + 1
        wanted = 2 * order.window_chunks * each + 2
        chunk_bytes = sum(self._source.row_bytes) * self.info.chunk_rows
        return max(2, min(wanted, _CACHED_BYTES // max(1, chunk_bytes), self.info.chunks))

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

        shape = (len(rows), self.info.seq_len, self.info.d_model)
        dtype = self._codec.decoded
        if out is None:
            out = self._pool.tensor(shape, dtype)
        elif (
            tuple(out.shape) != shape
            or out.dtype is not getattr(torch, dtype)
            or out.device.type != "cpu"
            or not out.is_contiguous()
        ):
            raise UsageError(f"`out` is to be a contiguous CPU tensor {list(shape)} of {dtype}")
        if not len(rows):
            return out
        with self._lock:
            if self._closed:
                raise UsageError(f"the reader of boundary {self.info.id} is closed")
            if self._codec.direct:
                self._fill(rows, [bits_of(out)], whole)
                return out
            stored = [
                np.empty((len(rows), *spec.row_shape(self.info.seq_len, self.info.d_model)), spec.numpy)
                for spec in self._codec.arrays
            ]
            self._fill(rows, stored, whole)
        self._codec.decode(stored, out)
        return out

    def _fill(self, rows: Rows, arrays: list[Array], whole: bool) -> None:
        if whole:
            self._from_loaded(rows, arrays)
        else:
            for array, row_bytes, at in zip(arrays, self._source.row_bytes, range(len(arrays)), strict=True):
                self._scatter(rows, array.reshape(-1).view(np.uint8), row_bytes, at)
            if len(arrays) > 1:
                self._check_scaled(rows, arrays)

    def _scatter(self, rows: Rows, flat: npt.NDArray[np.uint8], row_bytes: int, part: int) -> None:
        """Bring each row of one array straight into its place, and check it where it is checked by itself."""
        check = len(self._codec.arrays) == 1  # else with the rows of all arrays, after
        preadv, digest = os.preadv, xxhash.xxh3_64_intdigest
        view, places = flat.data, flat.reshape(len(rows), row_bytes)
        numbers = rows // self.info.chunk_rows
        chunks, within = numbers.tolist(), (rows - numbers * self.info.chunk_rows).tolist()
        mapped = self._maps.rows(chunks, within, part)
        current, opened, fd = -1, None, None
        for at, (chunk, row) in enumerate(zip(chunks, within, strict=True)):
            if chunk in mapped:
                places[at] = mapped[chunk][row]
                continue
            if chunk != current or opened is None:
                opened, current = self._opened(chunk), chunk
                fd = opened.handles[part].fd
            target = view[at * row_bytes : (at + 1) * row_bytes]
            try:
                if fd is None:
                    count = opened.handles[part].read_into(target, row * row_bytes)
                else:
                    count = preadv(fd, (target,), row * row_bytes)
                    if 0 < count < row_bytes:
                        count += opened.handles[part].read_into(target[count:], row * row_bytes + count)
            except OSError as error:
                raise ChunkDamage(self.info.id, chunk, f"unreadable ({error.strerror or error})") from error
            if count != row_bytes:
                raise ChunkDamage(self.info.id, chunk, "truncated")
            self._rows_read += 1
            if check and not opened.checked[row]:
                if digest(target) != opened.digests[row]:
                    raise ChunkDamage(self.info.id, chunk, "changed")
                opened.checked[row] = 1

    def _check_scaled(self, rows: Rows, arrays: list[Array]) -> None:
        for at, row in enumerate(rows.tolist()):
            chunk, within = divmod(row, self.info.chunk_rows)
            opened = self._opened(chunk)
            if not opened.checked[within]:
                self._source.check_rows(opened, chunk, within, [array[at : at + 1] for array in arrays])

    def _from_loaded(self, rows: Rows, arrays: list[Array]) -> None:
        """Copy rows out of whole chunks that are kept in memory."""
        chunks = rows // self.info.chunk_rows
        for chunk in dict.fromkeys(chunks.tolist()):
            places = np.flatnonzero(chunks == chunk)
            within = rows[places] - chunk * self.info.chunk_rows
            for array, loaded in zip(arrays, self._load(chunk), strict=True):
                array[places] = loaded[within]

    def _load(self, chunk: int) -> list[Array]:
        loaded = self._loaded.get(chunk)
        if loaded is None and (mapped := self._maps.whole(chunk)) is not None:
            return mapped
        if loaded is None:
            while len(self._loaded) >= self._loaded_limit:
                self._loaded.popitem(last=False)
            loaded = self._loaded[chunk] = self._source.load(chunk)
        else:
            self._loaded.move_to_end(chunk)
        return loaded

    def _opened(self, chunk: int) -> OpenChunk:
        opened = self._open.get(chunk)
        if opened is None:
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
                for handle in self._opened(chunk).handles:
                    self._backend.advise(handle)
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
            self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
