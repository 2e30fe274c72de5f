"""Files of a store on the local disk: how they are written, published, read and removed.

A file is written in three steps: `stage` (under a temporary name), `settle` (brought to the disk), `install` (given
its own name, inside the transaction that publishes its record). They stand apart so that each can be made to fail in a
test.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stackwise import durable
from stackwise.files import open_regular, remove_tree

Buffer = Any
"""Anything with the buffer protocol."""
_PIECE = 4 << 20
"""Bytes after which the disk begins with what is written so far. Much smaller pieces make much slower writes."""
_ONE_CALL = 1 << 30
"""Bytes of one `read` or `write`: Linux takes 2 GiB at most."""
_SYNC_FILE_RANGE_WRITE = 2


class Staged:
    """A file under a temporary name, open until it is settled or discarded."""

    __slots__ = ("_fd", "path")

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self._fd = path, fd

    def settle(self) -> None:
        """Bring it to the disk; a second time does nothing."""
        if self._fd >= 0:
            try:
                os.fsync(self._fd)
            finally:
                self._close()

    def discard(self) -> None:
        """Remove it, where it was not installed."""
        self._close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)

    def _close(self) -> None:
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
    temporary = durable.temporary(path)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    staged, offset = Staged(temporary, fd), 0
    try:
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            for start in range(0, len(view), _PIECE):
                piece = view[start : start + _PIECE]
                write_all(fd, piece)
                if (library := libc()) is not None:  # the disk begins with it; this waits for nothing
                    library.sync_file_range(fd, offset, len(piece), _SYNC_FILE_RANGE_WRITE)
                offset += len(piece)
        if size is not None:
            os.ftruncate(fd, size)
    except BaseException:
        staged.discard()
        raise
    return staged


def write_all(fd: int, buffer: Buffer) -> None:
    """Write a whole buffer: one `write` may take only a part."""
    rest = memoryview(buffer).cast("B")
    while rest:
        rest = rest[os.write(fd, rest[:_ONE_CALL]) :]


def install(staged: Sequence[tuple[Staged, Path]]) -> None:
    """Give settled files their names, durably."""
    for file, path in staged:
        with contextlib.suppress(FileNotFoundError):  # installed before: a transaction may run twice
            os.replace(file.path, path)
    for directory in dict.fromkeys(path.parent for _, path in staged):
        durable.fsync_directory(directory)


def _make_directories(paths: Sequence[Path]) -> None:
    """Make directories that may exist, and make the entries of those that did not durable."""
    parents: dict[Path, None] = {}

    def make(path: Path) -> None:
        try:
            os.mkdir(path)
        except FileNotFoundError:
            make(path.parent)
            make(path)
        except FileExistsError:
            if not path.is_dir():
                raise
        else:
            parents[path.parent] = None

    for path in paths:
        make(path)
    for parent in parents:
        durable.fsync_directory(parent)


def tree_bytes(path: Path) -> int:
    """Bytes on disk (allocated blocks) of a file, or of all files under a directory, links not followed."""
    paths = [os.path.join(place, name) for place, _, names in os.walk(path) for name in names]
    total = 0
    for file in paths if path.is_dir() and not path.is_symlink() else [path]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # what vanishes meanwhile takes nothing
            there = os.lstat(file)
            # What was just written may have no blocks yet.
            total += there.st_blocks * 512 or there.st_size
    return total


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the disk that holds `path`."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


@functools.cache
def libc() -> Any | None:
    """The C library, with calls that Python's lacks; None where the system is not Linux or lacks one."""
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


class OpenFile:
    """A regular file open for reading, by `pread` alone, so that threads and forks may share it."""

    def __init__(self, path: Path) -> None:
        self.fd = open_regular(path)
        self.size = os.fstat(self.fd).st_size

    def read_into(self, buffer: Buffer, offset: int) -> int:
        """Fill `buffer` from `offset` on; returns the bytes read, fewer only at the end of the file."""
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view):
            count = os.preadv(self.fd, [view[done : done + _ONE_CALL]], offset + done)
            if not count:
                break
            done += count
        return done

    def close(self) -> None:
        """Close it; a second time does nothing."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


class BoundaryFiles:
    """The files of a store's boundaries, by key: their path under the directory `root`."""

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
        """Make the directories of files of these keys."""
        for boundary in {key.partition("/")[0] for key in keys}:
            self._path(f"{boundary}/x/x")
        _make_directories([self._path(key).parent for key in keys])

    def stage(self, key: str, buffers: Sequence[Buffer], size: int | None = None) -> Staged:
        """Write a file beside its place (see `stage`)."""
        return stage(self._path(key), buffers, size)

    def install(self, staged: Sequence[tuple[Staged, str]]) -> None:
        """Give settled files their keys; run inside a transaction, perhaps twice."""
        install([(file, self.root / key) for file, key in staged])

    def put(self, key: str, data: bytes) -> None:
        """Write a small file whole and durably."""
        staged = self.stage(key, [data])
        staged.settle()
        self.install([(staged, key)])

    def open(self, key: str) -> OpenFile:
        """Open a file for reading.

        Raises:
            FileNotFoundError: It does not exist.
            IrregularFile: Something else lies there.
        """
        return OpenFile(self._path(key))

    def read(self, key: str, limit: int) -> bytes:
        """A whole file.

        Raises:
            OSError: It cannot be read.
            ValueError: It has more than `limit` bytes.
        """
        file = self.open(key)
        try:
            if file.size > limit:
                raise ValueError(f"{key} is absurdly large")
            data = bytearray(file.size)
            if file.read_into(data, 0) != len(data):
                raise ValueError(f"{key} is cut off")
            return bytes(data)
        finally:
            file.close()

    def walk(self, prefix: str) -> Iterator[str]:
        """The key of every file under the directory `prefix`; links are listed and never followed."""
        if (self.root / prefix).is_symlink():
            return
        for place, _, names in os.walk(self.root / prefix):
            below = os.path.relpath(place, self.root)
            yield from (f"{below}/{name}" for name in sorted(names))

    def remove(self, prefix: str) -> int:
        """Remove the directory or file `prefix` and all under it; returns the bytes freed, about."""
        path = self.root / prefix
        freed = tree_bytes(path)
        remove_tree(path)
        if path.parent.is_dir():
            durable.fsync_directory(path.parent)
        return freed

    def names(self) -> list[str]:
        """The first parts of all keys: what bears, or might bear, a boundary's id."""
        return sorted(entry.name for entry in os.scandir(self.root))
