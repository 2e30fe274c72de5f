"""The few file operations that publishing a chunk is made of.

They stand apart so that each can be made to fail, one by one, in a test. A staged file is written under a temporary
name; `settle` brings it to the disk; `install` gives it its own name, inside the transaction that publishes its record.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stackwise import durable
from stackwise.store import kernel

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
                kernel.start_writing(fd, offset, len(piece))
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
