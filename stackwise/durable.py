"""Files that survive kill -9 and power loss, and locks that die with their holder.

One protocol everywhere: write to a fresh name in the same directory, fsync, rename, fsync the directory. A
reader sees the old file or the new one, never a half.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stackwise import files
from stackwise.errors import BusyError, NoSpaceError, StackWiseError

TEMPORARY = ".tmp-"
"""Prefix of names that are being written. Whatever bears it and has no living writer is garbage."""


def temporary(path: Path) -> Path:
    """A fresh name beside `path`, under which it is written."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{os.urandom(4).hex()}-{path.name}")


def unusable(path: Path) -> str | None:
    """Why a directory cannot be written, or made where it is missing; None where it can."""
    try:
        path.stat()
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return error.strerror
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if os.path.lexists(parent))
    if not there.is_dir():
        return f"{there} is not a directory" if there != path.absolute() else "it is not a directory"
    if not os.access(there, os.W_OK | os.X_OK):  # also false on a file system that is mounted read-only
        return f"{there} cannot be written"
    return None


def fsync_directory(path: Path) -> None:
    """Make a directory's entries (creations, renames, removals) durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a disk, or a user's share of it, that is full."""
FAILING = (errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN)
"""What it says of a disk that fails, that can only be read (as it is once it has failed), or that is gone."""


def _system_error(error: BaseException) -> int | None:
    """The number of what the system said; libraries written in Rust raise errors of their own, with the number."""
    if isinstance(error, OSError):
        return errno.ENOSPC if isinstance(error, NoSpaceError) else error.errno
    number = re.search(r"\(os error (\d+)\)", str(error))
    return None if number is None else int(number[1])


def is_full_disk(error: BaseException) -> bool:
    """Whether a full disk is what went wrong."""
    return _system_error(error) in FULL


def disk_fault(error: BaseException) -> StackWiseError | None:
    """What a full or failing disk is called, and what to do; None: something else went wrong."""
    number, name = _system_error(error), getattr(error, "filename", None)
    # The name that it is to have, not the one that it is written under.
    path = None if name is None else Path(re.sub(rf"{TEMPORARY}\d+-[0-9a-f]+-", "", os.fsdecode(name)))
    if number in FULL:
        return no_space(path)
    if number not in FAILING or (path is None and number in (errno.EACCES, errno.EPERM)):
        return None
    return StackWiseError(
        f"{path or 'the disk'}: {os.strerror(number)}",
        hint="see to the disk (`dmesg` says more where it fails) and to who may write there, then run the same "
        "command again",
    )


def no_space(path: Path | None) -> NoSpaceError:
    """What a full disk is called, and what to do.

    Args:
        path: What was to be written, where that is known.
    """
    return NoSpaceError(
        "no space left on the disk" + (f" that holds {path}" if path is not None else ""),
        hint="free some space (`stackwise cache du` shows what the store holds), then run the same command again",
    )


@contextlib.contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn what a full disk raises into `NoSpaceError`, which says where and what to do."""
    try:
        yield
    except Exception as error:
        if isinstance(error, NoSpaceError) or not is_full_disk(error):
            raise
        raise no_space(path) from error


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


READABLE = 0o666 & ~_umask()
"""Permissions of a published file, read once: asking means setting it for a moment, which other threads would see."""


def write_durably(path: Path, write: Callable[[Path], object]) -> None:
    """Publish one file: `write` fills a temporary path beside `path`, which then takes its place.

    Raises:
        NoSpaceError: The disk is full; `path` is as it was.
    """
    fresh = temporary(path)
    with explain_full_disk(path):
        try:
            write(fresh)
            fd = os.open(fresh, os.O_RDONLY)
            try:
                os.fchmod(fd, READABLE)  # libraries make files for their user alone
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(fresh, path)
        except BaseException:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise
        fsync_directory(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Publish `data` as `path`, durably and whole."""
    write_durably(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: Path, value: Any) -> None:
    """Publish plain data as indented JSON, durably and whole."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: The file cannot be read, or is no regular file.
        ValueError: It is not JSON.
    """
    return files.read_json(path)


class FileLock:
    """An exclusive or shared `flock` on a file, released by the kernel when its holder dies.

    The exclusive holder's pid and host stand in the file, so that whoever is refused can say who holds it.

    Args:
        path: The lock file; created when missing and never removed.
        what: What the lock protects, as the refusal calls it.
        shared: Take it beside other shared holders.
    """

    def __init__(self, path: Path, what: str, *, shared: bool = False) -> None:
        self.path, self.what, self.shared = path, what, shared
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    def acquire(self) -> Self:
        """Take the lock at once.

        Raises:
            BusyError: A live process holds it.
            IrregularFile: The lock file is a link or no regular file.
        """
        fd = files.open_regular(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 256, 0).decode(errors="replace").strip()
            os.close(fd)
            raise BusyError(
                f"{self.what} is held by {holder or 'another process'}",
                hint=f"wait for it to end, or stop it; the lock ({self.path}) frees itself when its holder ends",
            ) from None
        self._fd = fd
        if not self.shared:
            os.ftruncate(fd, 0)
            try:
                os.pwrite(fd, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
            except OSError as error:
                if not is_full_disk(error):  # without the name it is a lock all the same: freeing space takes it, too
                    self.release()
                    raise
        return self

    def release(self) -> None:
        """Let go; releasing a lock that is not held does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self if self.held else self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_locked(path: Path, *, shared: bool = False) -> bool:
    """Whether a live process holds the lock file `path` exclusively. Asking never creates the file.

    Args:
        path: The lock file; a link is none.
        shared: Count those who hold it beside others, too.
    """
    try:
        fd = files.open_regular(path)
    except OSError:
        return False
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if shared else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
