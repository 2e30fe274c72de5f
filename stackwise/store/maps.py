"""Chunks kept in address space: rows that were checked before are copied from where the page cache has them.

A `read` looks up every page of a file anew; a map that is kept has them at hand, which is up to three times as fast
where the cache holds small pages. A mapped file that is cut off, or has a sector that cannot be read, would kill the
process instead of being named, and page by page is a slow way to read from a disk. So a map is touched only where all
the pages asked for lie in memory at that moment; anything else is read by `preadv`, which fails in words.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stackwise.store import kernel

if TYPE_CHECKING:
    from stackwise.store.backend import Handle
    from stackwise.store.chunks import ChunkSource, OpenChunk

Array = npt.NDArray[Any]
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
        self._left = kernel.physical_memory() // _SHARE_OF_MEMORY if budget is None else budget
        self._maps: dict[tuple[int, int], tuple[Bytes, int] | None] = {}
        self._residency, self._most = kernel.Residency(), 0

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
        mapped = kernel.map_file(handle.fd, size)
        if mapped is None:
            return None
        self._left -= size
        if size > self._most:
            self._residency, self._most = kernel.Residency(size), size
        return mapped, mapped.ctypes.data

    def close(self) -> None:
        """Forget all maps."""
        self._maps.clear()
        self._left = 0
