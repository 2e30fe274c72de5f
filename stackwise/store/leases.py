"""Leases: who reads or writes a boundary holds its lock shared, who removes it needs it alone.

The kernel frees a dead holder's. A lock file may be removed by whoever holds it alone, so a lease checks that
the file it locked is still the one that bears the name.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from stackwise.errors import BusyError, DamageError


class Lease:
    """A `flock` on `path`, shared or alone; released by `release`, by `with`, or by the holder's death.

    Args:
        path: The lock file; made when missing.
        what: What it protects, as the refusal calls it.
        alone: Exclusive instead of shared.

    Raises:
        BusyError: Another holder is in the way.
    """

    def __init__(self, path: Path, what: str, *, alone: bool = False) -> None:
        self.path = path
        mode = (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.EISDIR):
                    raise DamageError(f"{path} is no lock file", hint="remove it; it is made anew") from error
                raise
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
        self._fd: int | None = fd

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


def _is_still(fd: int, path: Path) -> bool:
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    ours = os.fstat(fd)
    return (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)


def in_use(path: Path) -> bool:
    """Whether anyone holds the lock file `path`, shared or alone. Asking never creates it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
