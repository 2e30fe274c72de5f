"""Files of a store on the local disk: how they are written, published, read, mapped and removed.

A file is written in three steps: `stage` (under a temporary name), `settle` (brought to the disk), `install` (given
its own name, inside the transaction that publishes its record). They stand apart so that each can be made to fail in a
test. The calls of the Linux kernel that Python's standard library lacks are here too; elsewhere they do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import secrets
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from stackwise import durable
from stackwise.files import open_regular

Buffer = Any
"""Anything with the buffer protocol."""
_PIECE = 4 << 20
"""Bytes after which the disk begins with what is written so far. Much smaller pieces make much slower writes."""


class Staged:
    """A file under a temporary name, open until it is settled or discarded.

    Attributes:
        path: Where it lies.
    """

    __slots__ = ("_fd", "path")

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self._fd = path, fd

    def settle(self) -> None:
        """Bring it to the disk; a second time does nothing.

        Raises:
            OSError: What the disk says.
        """
        if self._fd >= 0:
            try:
                os.fsync(self._fd)
            finally:
                self.close()

    def close(self) -> None:
        """Let go of the file, which stays."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def stage(path: Path, buffers: Sequence[Buffer], size: int | None = None) -> Staged:
    """Write a file beside `path` under a temporary name; it is on the disk once it is settled.

    Args:
        path: Where it will be installed.
        buffers: Its bytes, in order.
        size: Pad it with zeros (a hole, no blocks) to this many bytes.

    Raises:
        OSError: What the disk says; the temporary file is gone again.
    """
    temporary = path.with_name(f"{durable.TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    staged, offset = Staged(temporary, fd), 0
    try:
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            for start in range(0, len(view), _PIECE):
                piece = view[start : start + _PIECE]
                write_all(fd, piece)
                start_writing(fd, offset, len(piece))
                offset += len(piece)
        if size is not None:
            os.ftruncate(fd, size)
    except BaseException:
        discard(staged)
        raise
    return staged


def write_all(fd: int, buffer: Buffer) -> None:
    """Write a whole buffer: one `write` may take only a part (2 GiB at most on Linux)."""
    rest = memoryview(buffer).cast("B")
    while rest:
        rest = rest[os.write(fd, rest[: 1 << 30]) :]


def install(staged: Sequence[tuple[Staged, Path]]) -> None:
    """Give settled files their names, durably. Where one already has it, make only sure of the directory."""
    for file, path in staged:
        with contextlib.suppress(FileNotFoundError):
            os.replace(file.path, path)
    for directory in dict.fromkeys(path.parent for _, path in staged):
        durable.fsync_directory(directory)


def discard(staged: Staged | Path) -> None:
    """Remove a file that may be there."""
    if isinstance(staged, Staged):
        staged.close()
        staged = staged.path
    with contextlib.suppress(OSError):
        os.unlink(staged)


def make_directories(paths: Sequence[Path]) -> None:
    """Make directories that may exist, and make the entries of those that did not durable."""
    parents: dict[Path, None] = {}
    for path in paths:
        _make(path, parents)
    for parent in parents:
        durable.fsync_directory(parent)


def _make(path: Path, parents: dict[Path, None]) -> None:
    try:
        os.mkdir(path)
    except FileNotFoundError:
        _make(path.parent, parents)
        _make(path, parents)
        return
    except FileExistsError:
        if not path.is_dir():
            raise
        return
    parents[path.parent] = None


def remove_tree(path: Path) -> int:
    """Remove a directory and all in it, never following a link; returns the bytes that it took.

    What vanishes meanwhile is no error.
    """
    freed = 0
    if path.is_symlink():
        discard(path)
        return 0
    try:
        entries = list(os.scandir(path))
    except (FileNotFoundError, NotADirectoryError):
        discard(path)
        return 0
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            freed += remove_tree(Path(entry.path))
        else:
            with contextlib.suppress(FileNotFoundError):
                freed += entry.stat(follow_symlinks=False).st_blocks * 512
            discard(Path(entry.path))
    with contextlib.suppress(OSError):
        os.rmdir(path)
    return freed


def tree_bytes(path: Path) -> int:
    """Bytes on disk (allocated blocks) of a file, or of all files under a directory, links not followed."""
    total = 0
    try:
        if path.is_symlink() or not path.is_dir():
            return path.stat(follow_symlinks=False).st_blocks * 512
        for entry in os.scandir(path):
            if entry.is_dir(follow_symlinks=False):
                total += tree_bytes(Path(entry.path))
            else:
                total += entry.stat(follow_symlinks=False).st_blocks * 512
    except (FileNotFoundError, NotADirectoryError):
        pass
    return total


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the disk that holds `path`."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


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


class Handle(Protocol):
    """A file opened for reading. `fd` lets a local reader skip a call for every row."""

    size: int
    fd: int | None

    def read_into(self, buffer: Any, offset: int) -> int:
        """Fill `buffer` from `offset` on; returns the bytes read, fewer only at the end of the file."""

    def close(self) -> None:
        """Let go of it."""


class Backend(Protocol):
    """What the store asks of a place for its boundaries' files.

    A file is written in three steps: `stage` (under no name a reader knows), `settle` (durable), `install` (its name,
    durable, atomic). `install` runs inside the transaction that publishes the file's record, perhaps twice.
    """

    def prepare(self, keys: Sequence[str]) -> None:
        """Make what must exist before files of these keys can be written."""

    def stage(self, key: str, buffers: Sequence[Any], size: int | None = None) -> Any:
        """Write a file beside `key`, padded with zeros to `size`; returns what the next steps take."""

    def settle(self, staged: Sequence[Any]) -> None:
        """Make staged files durable."""

    def install(self, staged: Sequence[tuple[Any, str]]) -> None:
        """Give each settled file its key, replacing what bears it; durable on return."""

    def discard(self, staged: Any) -> None:
        """Remove a staged file that will not be installed."""

    def put(self, key: str, data: bytes) -> None:
        """Write a small file whole and durably."""

    def open(self, key: str) -> Handle:
        """Open a file for reading.

        Raises:
            FileNotFoundError: It does not exist.
        """

    def walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(key, size) of every file under the directory `prefix` ("" for all)."""

    def remove(self, prefix: str) -> int:
        """Remove the directory or file `prefix` and all under it; returns the bytes freed, about."""

    def names(self) -> list[str]:
        """The first parts of all keys: what bears, or might bear, a boundary's id."""

    def advise(self, handle: Handle) -> None:
        """A hint that the whole file will be read soon."""

    def uri(self, prefix: str) -> str:
        """Where a person or another program finds the directory `prefix`."""


class LocalFile:
    """A local file open for reading; `pread` alone, so that threads and forks may share it."""

    def __init__(self, path: Path) -> None:
        self.fd: int | None = open_regular(path)
        self.size = os.fstat(self.fd).st_size

    def read_into(self, buffer: Any, offset: int) -> int:
        """See `Handle`."""
        assert self.fd is not None
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view):
            count = os.preadv(self.fd, [view[done : done + (1 << 30)]], offset + done)
            if not count:
                break
            done += count
        return done

    def close(self) -> None:
        """See `Handle`."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class LocalBackend:
    """Files under a local directory, published by fsync, rename, and fsync of the directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _path(self, key: str) -> Path:
        """The path of a key.

        Raises:
            OSError: A link on the way leads elsewhere: nothing outside is read or written.
        """
        path = self.root / key
        if os.path.realpath(path.parent) != os.path.join(os.path.realpath(self.root), os.path.dirname(key)).rstrip("/"):
            raise OSError(errno.ELOOP, "a link stands in the way", str(path))
        return path

    def prepare(self, keys: Sequence[str]) -> None:
        """See `Backend`."""
        for boundary in {key.partition("/")[0] for key in keys}:
            self._path(f"{boundary}/x/x")
        make_directories([self._path(key).parent for key in keys])

    def stage(self, key: str, buffers: Sequence[Any], size: int | None = None) -> Staged:
        """See `Backend`."""
        return stage(self._path(key), buffers, size)

    def settle(self, staged: Sequence[Staged]) -> None:
        """See `Backend`."""
        for file in staged:
            file.settle()

    def install(self, staged: Sequence[tuple[Staged, str]]) -> None:
        """See `Backend`."""
        install([(file, self.root / key) for file, key in staged])

    def discard(self, staged: Staged) -> None:
        """See `Backend`."""
        discard(staged)

    def put(self, key: str, data: bytes) -> None:
        """See `Backend`."""
        path = self._path(key)
        staged = stage(path, [data])
        staged.settle()
        install([(staged, path)])

    def open(self, key: str) -> LocalFile:
        """See `Backend`."""
        return LocalFile(self._path(key))

    def walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        """See `Backend`. Links are listed with size 0 and never followed."""
        if prefix and (self.root / prefix).is_symlink():
            return
        try:
            entries = sorted(os.scandir(self.root / prefix), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            name = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from self.walk(name)
            elif entry.is_file(follow_symlinks=False):
                yield name, entry.stat(follow_symlinks=False).st_size
            else:
                yield name, 0

    def remove(self, prefix: str) -> int:
        """See `Backend`."""
        path = self.root / prefix
        freed = remove_tree(path)
        if path.parent.is_dir():
            durable.fsync_directory(path.parent)
        return freed

    def names(self) -> list[str]:
        """See `Backend`."""
        return sorted(entry.name for entry in os.scandir(self.root))

    def advise(self, handle: Handle) -> None:
        """See `Backend`."""
        if handle.fd is not None and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle.fd, 0, 0, os.POSIX_FADV_WILLNEED)

    def uri(self, prefix: str) -> str:
        """See `Backend`."""
        return str(self.root / prefix)
