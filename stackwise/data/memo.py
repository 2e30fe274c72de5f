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

HELD = 1024
"""Files that are held before they are written down together."""

_SCHEMA = "CREATE TABLE IF NOT EXISTS files (key TEXT PRIMARY KEY, stamp TEXT NOT NULL, value TEXT NOT NULL)"


class Memo:
    """An open memory; `None` as its path is one that forgets.

    Args:
        path: The SQLite file; it may be missing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._new: list[tuple[str, str, str]] = []
        if path is None or not path.exists():
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
        if time.time_ns() - status.st_mtime_ns >= SETTLED_NS:
            self._new.append((_key(path, reading), _stamp(status), json.dumps(value)))
            if self._db is not None and len(self._new) >= HELD:
                self._flush()

    def _flush(self) -> None:
        # one short transaction: another process never waits for a file to be read
        if self._db is not None and self._new:
            with contextlib.suppress(sqlite3.Error), self._db:
                self._db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", self._new)
        self._new.clear()

    def close(self, *, create: bool = False) -> None:
        """Keep what was put; `create`: also where there was no memory yet."""
        if self._db is None and create and self._path is not None and self._new:
            with contextlib.suppress(sqlite3.Error, OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._db = _open(self._path)
        self._flush()
        if self._db is not None:
            self._db.close()
            self._db = None


@contextlib.contextmanager
def open_memo(path: Path | None) -> Iterator[Memo]:
    """A memory for the length of a block. Where the block fails, what was put is kept, but nothing is created."""
    memo = Memo(path)
    done = False
    try:
        yield memo
        done = True
    finally:
        memo.close(create=done)


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
