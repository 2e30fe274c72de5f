"""Opening files that may come from elsewhere: regular files alone, no links, no waiting, bounded.

A store, a run directory or a cache can be a copy that somebody else made. What lies in it is opened here and nowhere
else: a symbolic link, a FIFO, a device or a directory where a file should be is refused at once, and nothing is read
without a bound.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import stat
from pathlib import Path
from typing import IO, Any

import xxhash

from stackwise.errors import DamageError

METADATA_BYTES = 64 << 20
"""Most bytes that a file of metadata (JSON, YAML, a mark) may have."""
PIECE_BYTES = 8 << 20  # that are hashed at once: meanwhile other threads have the interpreter


class IrregularFile(DamageError, OSError):
    """Something else than a regular file lies where one should be, or it is larger than anything that belongs there."""


def open_regular(path: Path, flags: int = os.O_RDONLY, mode: int = 0o666, *, root: Path | None = None) -> int:
    """A descriptor of a regular file; close it.

    Args:
        path: The file.
        flags: As of `os.open`; with `os.O_CREAT` a missing file is made.
        mode: Permissions of a file that is made.
        root: A directory above `path`, below which no component may be a link; None: the file itself may not be one.

    Raises:
        IrregularFile: It is a link, a FIFO, a device, a directory; or, opened to write, it has hard links.
        OSError: It is missing, or may not be opened.
    """
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # without O_NONBLOCK a FIFO waits for its other end
    parent: int | None = None
    try:
        if root is not None:
            parent = _open_directory(path.parent, root)
        fd = os.open(path.name if parent is not None else path, flags, mode, dir_fd=parent)
    except OSError as error:
        if isinstance(error, IrregularFile):
            raise
        if error.errno == errno.ELOOP:
            raise irregular(path, "a symbolic link") from None
        if error.errno in (errno.ENXIO, errno.EISDIR):
            raise irregular(path, "a directory" if error.errno == errno.EISDIR else "a FIFO or a socket") from None
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        if parent is not None:
            os.close(parent)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise irregular(path, _kind(status.st_mode))
        if flags & (os.O_WRONLY | os.O_RDWR) and status.st_nlink > 1:
            raise irregular(path, f"a file with {status.st_nlink} names (hard links), which would change with it")
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_directory(path: Path, root: Path) -> int:
    """A descriptor of a directory, none of whose components below `root` is a link."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for name in path.relative_to(root).parts:
        try:
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=fd)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise irregular(path, "no directory, or reached through a symbolic link") from None
            raise
        finally:
            os.close(fd)
        fd = below
    return fd


def irregular(path: Path, what: str) -> IrregularFile:
    """The error that names what lies at `path` instead of a file of its own."""
    return IrregularFile(f"{path} is {what}", hint="remove it, and run the same command again")


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a directory", stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket"}
    return next((name for test, name in kinds.items() if test(mode)), "a device")


def open_to_write(path: Path, *, append: bool = False, root: Path | None = None) -> IO[bytes]:
    """A file object that writes a regular file, made where it is missing: from its start anew, or at its end."""
    how = os.O_APPEND if append else os.O_TRUNC
    return os.fdopen(open_regular(path, os.O_WRONLY | os.O_CREAT | how, root=root), "ab" if append else "wb")


def file_digest(path: Path, root: Path | None = None, *, begin: int = 0, nbytes: int | None = None) -> str:
    """xxh3-128 of a regular file, or of some of its bytes, read in pieces.

    Args:
        path: The file.
        root: See `open_regular`.
        begin: The first byte.
        nbytes: How many; None: all to the end.

    Raises:
        IrregularFile: It is a link, a FIFO, a device, a directory.
        OSError: It is missing, or cannot be read.
    """
    hashed, left = xxhash.xxh3_128(), math.inf if nbytes is None else nbytes
    with open(open_regular(path, root=root), "rb", buffering=0) as file:
        # No more memory than there is to read: most files are small.
        size = int(min(PIECE_BYTES, left, max(1, os.fstat(file.fileno()).st_size)))
        piece = memoryview(bytearray(size))
        file.seek(begin)
        while left and (count := file.readinto(piece[: int(min(size, left))])):
            hashed.update(piece[:count])
            left -= count
    return hashed.hexdigest()


def read_bytes(path: Path, *, limit: int = METADATA_BYTES, root: Path | None = None) -> bytes:
    """The content of a regular file.

    Args:
        path: The file.
        limit: Most bytes that it may have.
        root: See `open_regular`.

    Raises:
        IrregularFile: It is no regular file, or larger than `limit`.
        OSError: It is missing, or cannot be read.
    """
    fd = open_regular(path, root=root)
    with os.fdopen(fd, "rb") as file:
        # One `read(limit + 1)` would take memory for the limit, not for what is there.
        size = min(os.fstat(fd).st_size, limit)
        data = file.read(size + 1)
        while size < len(data) <= limit:  # it has grown
            size = len(data)
            data += file.read(min(size, limit + 1 - size))
    if len(data) > limit:
        raise irregular(path, f"larger than the {limit} bytes that it may have")
    return data


def read_text(path: Path, *, limit: int = METADATA_BYTES, root: Path | None = None) -> str:
    """The content of a regular file in UTF-8 (see `read_bytes`).

    Raises:
        UnicodeDecodeError: It is not UTF-8; this is a ValueError.
    """
    return read_bytes(path, limit=limit, root=root).decode()


def read_json(path: Path, *, limit: int = METADATA_BYTES, root: Path | None = None) -> Any:
    """The content of a regular file of JSON (see `read_bytes`).

    Raises:
        ValueError: It is not JSON, or nested without end.
    """
    return parse_json(read_bytes(path, limit=limit, root=root))


def parse_json(data: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: It is not JSON, or nested without end.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def expanded(path: str | Path) -> Path:
    """A path that a user wrote, its `~` expanded; one of an unknown user stays as it is, and is then missing."""
    return Path(os.path.expanduser(path))


def user_cache() -> Path:
    """Where StackWise keeps what it can make again: `$XDG_CACHE_HOME/stackwise`, else `~/.cache/stackwise`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "stackwise"


def make_directory(path: Path) -> None:
    """Make a directory where it is missing, its parents too.

    Raises:
        IrregularFile: A link, or anything but a directory, lies there.
    """
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise irregular(path, "a symbolic link")


def remove_tree(path: Path) -> None:
    """Remove what lies at a directory's place, as far as that can be; of a link the link alone."""
    if path.is_symlink() or not path.is_dir():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
