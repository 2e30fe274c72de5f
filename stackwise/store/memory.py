"""What a reader works in: buffers that are used again, maps of files, and threads that read a batch together.

Fresh memory costs as much to fault in as a batch costs to copy, so buffers are used again as soon as nothing refers
to the batch. A map of a file that is kept is up to three times as fast as a `read`; but a mapped file that is cut off
would kill the process, and page by page is a slow way to read a disk. So a map is touched only where all the pages
asked for lie in memory at that moment; anything else is read by `preadv`, which fails in words.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from stackwise.store import disk
from stackwise.store.chunks import Array, ChunkSource, OpenChunk

if TYPE_CHECKING:
    import torch


Item = TypeVar("Item")
Result = TypeVar("Result")

MOST = 8  # more wait for the same memory bus


class Threads:
    """A few threads, started when they are first wanted.

    Args:
        count: How many; None: one for each core that this process may use, `MOST` at most.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = min(MOST, _cores()) if count is None else count
        self._pool: ThreadPoolExecutor | None = None
        self._pid = 0

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """The results of `work`, in the order of the items; it returns when no thread works any more.

        Raises:
            Exception: What `work` raised for the first of the items that it failed for.
        """
        if self.count < 2 or len(items) < 2:
            return [work(item) for item in items]
        if self._pool is None or self._pid != os.getpid():  # a fork has the pool, but none of its threads
            self._pool, self._pid = ThreadPoolExecutor(self.count, "stackwise-read"), os.getpid()
        running = [self._pool.submit(work, item) for item in items]
        wait(running)  # all of them: they write into memory that the caller may give away when this raises
        return [one.result() for one in running]

    def close(self) -> None:
        """End the threads; a second time does nothing."""
        pool, self._pool = self._pool, None
        if pool is not None and self._pid == os.getpid():
            pool.shutdown()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Bytes = npt.NDArray[np.uint8]

_IDLE = 6
"""Idle buffers that are kept."""
_SMALL = 1 << 16
"""Bytes below which an allocation of its own is cheaper than keeping a buffer."""
_MOST_MAPS = 8192
"""Of the 65,530 maps that Linux lets a process have."""
_SHARE_OF_MEMORY = 8
_FAILED = ctypes.c_void_p(-1).value


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

    def _take(self, size: int) -> Bytes:
        if self._pid != os.getpid():  # a fork's copy of an idle buffer is its own, but starts afresh all the same
            self._idle, self._pid = [], os.getpid()
        base = None
        while self._idle:  # those of another size go: sizes change together
            length, candidate = self._idle.pop()
            if length == size:
                base = candidate
                break
        if base is None:
            area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                area.madvise(mmap.MADV_HUGEPAGE)
            base = np.frombuffer(area, np.uint8)
        view = base.view()
        weakref.finalize(view, _give_back, self._idle, size, base).atexit = False
        return view


def _give_back(idle: list[tuple[int, Any]], size: int, base: Any) -> None:
    if len(idle) < _IDLE:
        idle.append((size, base))


def map_file(fd: int, size: int) -> Bytes | None:
    """A file's bytes [size], mapped read-only until the last array over them dies; None where that cannot be.

    Python's own `mmap` would keep a second file descriptor for each map.
    """
    library = disk.libc()
    if library is None or size <= 0:
        return None
    address = library.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address in (None, _FAILED):
        return None
    area: Any = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(area, library.munmap, address, size).atexit = False
    mapped: Bytes = np.frombuffer(area, np.uint8)
    mapped.flags.writeable = False
    return mapped


def physical_memory() -> int:
    """Bytes of memory of this machine; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


class _Residency:
    """Asks whether mapped bytes, `most` at once, lie in the page cache; works in memory of its own, so one a thread."""

    def __init__(self, most: int = 0) -> None:
        self._pages = bytearray(most // mmap.PAGESIZE + 2)
        self._address = ctypes.addressof((ctypes.c_uint8 * len(self._pages)).from_buffer(self._pages))
        library = disk.libc()
        self._mincore = library.mincore if library is not None else None

    def holds(self, address: int, length: int) -> bool:
        """Whether all of a file's mapped bytes [address, address + length) lie in memory now.

        What lies beyond the end of the file does not. To be asked of one's own files alone: of others' the kernel
        says yes.
        """
        first = address - address % mmap.PAGESIZE
        count = (address + length - first + mmap.PAGESIZE - 1) // mmap.PAGESIZE
        if self._mincore is None or count > len(self._pages):
            return False
        # One byte a page, of which the lowest bit says it; the others are never set so far.
        return not self._mincore(first, address + length - first, self._address) and (
            self._pages.count(1, 0, count) == count
        )


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
        self._left = physical_memory() // _SHARE_OF_MEMORY if budget is None else budget
        self._maps: dict[tuple[int, int], tuple[Bytes, int] | None] = {}
        self._residency, self._most = _Residency(), 0

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
        by_chunk: dict[int, list[int]] = {}
        for chunk, row in zip(chunks, within, strict=True):
            if chunk in by_chunk:
                by_chunk[chunk].append(row)
            else:
                by_chunk[chunk] = [row]
        mapped = {}
        for chunk, rows in by_chunk.items():
            checked = self._source.checked.get(chunk)
            if checked is not None and all(map(checked.__getitem__, rows)):
                data = self._get(chunk, part, min(rows) * row_bytes, (max(rows) + 1) * row_bytes)
                if data is not None:
                    mapped[chunk] = data.reshape(-1, row_bytes)
        return mapped

    def whole(self, chunk: int) -> list[Array] | None:
        """The stored arrays of a chunk [rows, …], where all its rows were checked before and lie in memory now."""
        checked = self._source.checked.get(chunk)
        if checked is None or not all(checked):
            return None
        arrays = []
        for part, (spec, shape) in enumerate(zip(self._source.specs, self._source.row_shapes, strict=True)):
            data = self._get(chunk, part, 0, len(checked) * self._source.row_bytes[part])
            if data is None:
                return None
            arrays.append(data.view(spec.numpy).reshape(-1, *shape))
        return arrays

    def _get(self, chunk: int, part: int, start: int, stop: int) -> Bytes | None:
        """A file's bytes, whole, where it is mapped and its bytes [start, stop) lie in memory at this moment."""
        if (chunk, part) not in self._maps and self._left:
            self._maps[chunk, part] = self._map(self._opened(chunk).files[part])
        entry = self._maps.get((chunk, part))
        return entry[0] if entry is not None and self._residency.holds(entry[1] + start, stop - start) else None

    def _map(self, file: disk.OpenFile) -> tuple[Bytes, int] | None:
        """Map an open file, where it is this user's own, it can be, and there is room; the bytes and their address."""
        size = file.size
        if size > self._left or len(self._maps) >= _MOST_MAPS:
            return None
        status = os.fstat(file.fd)
        # Of another user's file the kernel does not say what is in memory.
        if status.st_uid != os.geteuid() or status.st_size != size:
            return None
        mapped = map_file(file.fd, size)
        if mapped is None:
            return None
        self._left -= size
        if size > self._most:
            self._residency, self._most = _Residency(size), size
        return mapped, mapped.ctypes.data

    def close(self) -> None:
        """Forget all maps."""
        self._maps.clear()
        self._left = 0
