"""Leases: who reads or writes a boundary holds its lock shared, who removes it needs it alone.

The kernel frees a dead holder's. A lock file may be removed by whoever holds it alone, so a lease checks that
the file it locked is still the one that bears the name. Where a store can only be read, a lease is taken on the lock
file that is there; where there is none, nothing protects the reader, and on a disk that is read-only nothing need.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from stackwise.errors import BusyError, UsageError
from stackwise.files import open_regular

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
"""What the system says where a file or a disk can only be read."""


class Lease:
    """A `flock` on `path`, shared or alone; released by `release`, by `with`, or by the holder's death.

    Args:
        path: The lock file; made when missing.
        what: What it protects, as the refusal calls it.
        alone: Exclusive instead of shared.

    Raises:
        BusyError: Another holder is in the way.
        UsageError: `alone`, in a store that this user may only read.
    """

    def __init__(self, path: Path, what: str, *, alone: bool = False) -> None:
        self.path = path
        self._fd: int | None = None
        mode = (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB
        while True:
            opened = open_lock(path)
            if opened is None or (alone and not opened[1]):
                if opened is not None:
                    os.close(opened[0])
                if alone:
                    raise UsageError(f"{what} cannot be changed: its store can only be read here")
                return
            fd = opened[0]
            try:
                fcntl.flock(fd, mode)
                if _is_still(fd, path):
                    break
                os.close(fd)
            except BlockingIOError:
                os.close(fd)
                who = "read or written" if alone else "removed"
                raise BusyError(
                    f"{what} is being {who} by another process, or by another reader or writer of this one",
                    hint="wait for it to end; its lock frees itself when its holder ends",
                ) from None
            except BaseException:
                os.close(fd)
                raise
        self._fd = fd

    def remove(self) -> None:
        """Remove the lock file (a holder alone may) and let go."""
        if self._fd is not None:
            self.path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Let go; a second time does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def open_lock(path: Path) -> tuple[int, bool] | None:
    """A lock file's descriptor, and whether the store can be written; None where it is missing and cannot be made.

    Raises:
        IrregularFile: It is a link, a directory, a FIFO.
    """
    try:
        return open_regular(path, os.O_RDWR | os.O_CREAT, 0o644), True
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
    try:
        return open_regular(path), False
    except FileNotFoundError:
        return None


def hold_alone(fd: int) -> bool:
    """Turn a shared lock into an exclusive one if nobody else holds it; whether that was so.

    A conversion that fails loses the lock it had (flock(2)), so the shared one is taken anew.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(fd, fcntl.LOCK_SH)
        return False
    return True


def _is_still(fd: int, path: Path) -> bool:
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    ours = os.fstat(fd)
    return (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)
