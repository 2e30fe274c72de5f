"""Room on the disk: the reserve that lets a full disk be cleaned, and what goes when there is too much."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from stackwise.errors import BusyError, NoSpaceError, NotFound, UsageError
from stackwise.files import open_regular
from stackwise.identity import Hex
from stackwise.store import files
from stackwise.store.records import BoundaryInfo

RESERVE_BYTES = 8 << 20
Keep = int | Literal["all", "none"]
T = TypeVar("T")


class Reserve:
    """A file of real blocks that is given up when even removing needs room, and taken again after."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def take(self) -> bool:
        """Make sure of it, where the disk has room to spare; whether it is there."""
        try:
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(self.path)
                if not stat.S_ISREG(status.st_mode):
                    os.unlink(self.path)  # a link, a FIFO: the reserve is nobody's but the store's
                elif status.st_blocks > 0:
                    return True
            size = min(RESERVE_BYTES, files.free_bytes(self.path.parent) // 16)
            fd = open_regular(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(fd, 0, max(size, 1))
                else:
                    os.write(fd, bytes(size))
            finally:
                os.close(fd)
        except OSError:
            self.release()
            return False
        return True

    def release(self) -> None:
        """Give it up."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)

    def run(self, action: Callable[[], T]) -> T:
        """Run what frees space; where the disk is too full even for that, give the reserve up and run it again.

        Raises:
            NoSpaceError: The disk is full to the last block even so.
        """
        try:
            return action()
        except NoSpaceError:
            if not self.path.exists():
                raise
        self.release()
        return action()


def to_drop(boundaries: Sequence[BoundaryInfo], keep: Keep, protect: Collection[Hex]) -> list[BoundaryInfo]:
    """Which of `boundaries`, oldest first, go when the last `keep` stay beside the protected ones.

    Raises:
        UsageError: `keep` is neither a number from 0 on, nor `all`, nor `none`.
    """
    if keep == "all":
        return []
    count: object = 0 if keep == "none" else keep
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise UsageError(f"keep is a number from 0 on, `all` or `none`, not {keep!r}")
    candidates = [info for info in boundaries if info.id not in protect]
    return candidates[: len(candidates) - count] if count else candidates


def eviction_order(boundaries: Sequence[BoundaryInfo]) -> list[BoundaryInfo]:
    """Cheapest to recompute per byte first; of equals the oldest. One of unknown cost counts as its depth."""
    return sorted(boundaries, key=lambda info: (info.cost / max(1, info.stored_bytes), info.created, info.id))


def evict(
    boundaries: Sequence[BoundaryInfo],
    drop: Callable[[Hex], int],
    *,
    max_bytes: int,
    protect: Collection[Hex] = (),
) -> dict[str, Any]:
    """Drop boundaries, cheapest to recompute per byte first, until those left take at most `max_bytes`.

    One that is being read or written stays. Returns `{"evicted": [ids], "freed", "bytes", "fits"}`.
    """
    left = sum(info.stored_bytes for info in boundaries)
    evicted, freed = [], 0
    for info in eviction_order([info for info in boundaries if info.id not in protect]):
        if left <= max_bytes:
            break
        try:
            freed += drop(info.id)
        except (BusyError, NotFound):
            continue
        evicted.append(info.id)
        left -= info.stored_bytes
    return {"evicted": evicted, "freed": freed, "bytes": left, "fits": left <= max_bytes}
