"""The few file operations that publishing a chunk is made of.

They stand apart so that each can be made to fail, one by one, in a test. A staged file is whole and on disk but
under a temporary name; `install` gives it its own name, inside the transaction that publishes its record.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stackwise import durable

Buffer = Any
"""Anything with the buffer protocol."""


def stage(path: Path, buffers: Sequence[Buffer], size: int | None = None) -> Path:
    """Write a file beside `path` under a temporary name and fsync it.

    Args:
        path: Where it will be installed.
        buffers: Its bytes, in order.
        size: Pad it with zeros (a hole, no blocks) to this many bytes.

    Raises:
        OSError: What the disk says; the temporary file is gone again.
    """
    temporary = path.with_name(f"{durable.TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for buffer in buffers:
            write_all(fd, buffer)
        if size is not None:
            os.ftruncate(fd, size)
        os.fsync(fd)
    except BaseException:
        discard(temporary)
        raise
    finally:
        os.close(fd)
    return temporary


def write_all(fd: int, buffer: Buffer) -> None:
    """Write a whole buffer: one `write` may take only a part (2 GiB at most on Linux)."""
    rest = memoryview(buffer).cast("B")
    while rest:
        rest = rest[os.write(fd, rest[: 1 << 30]) :]


def install(staged: Sequence[tuple[Path, Path]]) -> None:
    """Give staged files their names, durably. Where one already has it, make only sure of the directory."""
    for temporary, path in staged:
        with contextlib.suppress(FileNotFoundError):
            os.replace(temporary, path)
    for directory in dict.fromkeys(path.parent for _, path in staged):
        durable.fsync_directory(directory)


def discard(path: Path) -> None:
    """Remove a file that may be there."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def make_directories(paths: Sequence[Path]) -> None:
    """Make directories that may exist, and make them and their parents' entries durable."""
    parents: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            parents[path.parent] = None
            parents[path.parent.parent] = None
    for parent in parents:
        durable.fsync_directory(parent)


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
