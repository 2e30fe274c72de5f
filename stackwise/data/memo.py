"""What files were found to hold, remembered so that an unchanged corpus is not read again.

A file is recognised by path, size, modification time and inode. The memory is a convenience: where it is missing,
locked or damaged, files are read.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SETTLED_NS = 2_000_000_000
"""A file changed less than this ago may change again within the resolution of its time: it is not remembered."""

_SCHEMA = "CREATE TABLE IF NOT EXISTS files (key TEXT PRIMARY KEY, stamp TEXT NOT NULL, value TEXT NOT NULL)"


class Memo:
    """An open memory; `None` as its path is one that forgets.

    Args:
        path: The SQLite file; made where it is missing.
    """

    def __init__(self, path: Path | None) -> None:
        self._db: sqlite3.Connection | None = None
        if path is None:
            return
        try:
            self._db = _open(path)
        except (sqlite3.DatabaseError, OSError):
            with contextlib.suppress(sqlite3.Error, OSError):
                path.unlink(missing_ok=True)
                self._db = _open(path)

    def get(self, path: Path, status: os.stat_result, reading: str) -> Any | None:
        """What was remembered of a file read in a certain way (`reading`), or None."""
        if self._db is None:
            return None
        try:
            row = self._db.execute("SELECT stamp, value FROM files WHERE key = ?", (_key(path, reading),)).fetchone()
        except sqlite3.Error:
            return None
        return json.loads(row[1]) if row and row[0] == _stamp(status) else None

    def put(self, path: Path, status: os.stat_result, reading: str, value: Any) -> None:
        """Remember a file; `status` is from before it was read."""
        if self._db is None or time.time_ns() - status.st_mtime_ns < SETTLED_NS:
            return
        with contextlib.suppress(sqlite3.Error):
            self._db.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?)",
                (_key(path, reading), _stamp(status), json.dumps(value)),
            )

    def close(self) -> None:
        """Keep what was put."""
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.commit()
            self._db.close()
            self._db = None


@contextlib.contextmanager
def open_memo(path: Path | None) -> Iterator[Memo]:
    """A memory for the length of a block; what was put is kept even where the block fails."""
    memo = Memo(path)
    try:
        yield memo
    finally:
        memo.close()


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=5.0)
    try:
        db.execute(_SCHEMA)
    except sqlite3.Error:
        db.close()
        raise
    return db


def _key(path: Path, reading: str) -> str:
    return f"{os.path.abspath(path)}\0{reading}".encode(errors="surrogateescape").hex()


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino} {status.st_dev}"
