"""Calls of the Linux kernel that Python's standard library does not have. Elsewhere each does nothing, and says so."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

PAGE = mmap.PAGESIZE
_FAILED = ctypes.c_void_p(-1).value
_SYNC_FILE_RANGE_WRITE = 2


@functools.cache
def _libc() -> Any | None:
    """The C library with the calls used here; None where the system is not Linux or lacks one."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None, use_errno=True)
        pointer, size, offset, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int
        library.mmap.argtypes, library.mmap.restype = [pointer, size, number, number, number, ctypes.c_long], pointer
        library.munmap.argtypes = [pointer, size]
        library.mincore.argtypes = [pointer, size, pointer]
        library.sync_file_range.argtypes = [number, offset, offset, ctypes.c_uint]
    except (OSError, AttributeError):
        return None
    return library


def map_file(fd: int, size: int) -> npt.NDArray[np.uint8] | None:
    """A file's bytes [size], mapped read-only until the last array over them dies; None where that cannot be.

    Python's own `mmap` would keep a second file descriptor for each map.
    """
    library = _libc()
    if library is None or size <= 0:
        return None
    address = library.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address in (None, _FAILED):
        return None
    area: Any = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(area, library.munmap, address, size).atexit = False
    mapped: npt.NDArray[np.uint8] = np.frombuffer(area, np.uint8)
    mapped.flags.writeable = False
    return mapped


class Residency:
    """Asks whether mapped bytes lie in the page cache; has memory of its own to work in, so one a thread.

    Args:
        most: Bytes that are asked for at once at most.
    """

    def __init__(self, most: int = 0) -> None:
        self._pages = bytearray(most // PAGE + 2)
        self._address = ctypes.addressof((ctypes.c_uint8 * len(self._pages)).from_buffer(self._pages))
        library = _libc()
        self._mincore = library.mincore if library is not None else None

    def holds(self, address: int, length: int) -> bool:
        """Whether all of a file's mapped bytes [address, address + length) lie in memory now.

        What lies beyond the end of the file does not. To be asked of one's own files alone: of others' the kernel
        says yes.
        """
        first = address - address % PAGE
        count = (address + length - first + PAGE - 1) // PAGE
        if self._mincore is None or count > len(self._pages):
            return False
        # One byte a page, of which the lowest bit says it; the others are never set so far.
        return not self._mincore(first, address + length - first, self._address) and (
            self._pages.count(1, 0, count) == count
        )


def start_writing(fd: int, offset: int, length: int) -> None:
    """Let the disk begin with what was written to this range; it waits for nothing, and promises nothing."""
    library = _libc()
    if library is not None:
        library.sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def physical_memory() -> int:
    """Bytes of memory of this machine; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
