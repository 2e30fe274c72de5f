"""What a transaction on the index can do: its tables, from bytes to bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Transaction = Any


class Reading:
    """One state of the tables. Keys and values are bytes."""

    def __init__(self, transaction: Transaction, tables: dict[str, Any]) -> None:
        self._transaction, self._tables = transaction, tables

    def get(self, table: str, key: bytes) -> bytes | None:
        """The value of `key`, or None."""
        value: bytes | None = self._transaction.get(key, db=self._tables[table])
        return value

    def get_many(self, table: str, keys: list[bytes]) -> list[bytes | None]:
        """The values of `keys`, in order."""
        get, database = self._transaction.get, self._tables[table]
        return [get(key, None, database) for key in keys]

    def scan(self, table: str, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """The records whose key begins with `prefix`, in order of their keys."""
        with self._transaction.cursor(db=self._tables[table]) as cursor:
            if not (cursor.set_range(prefix) if prefix else cursor.first()):
                return
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                yield key, value

    def keys(self, table: str, prefix: bytes = b"") -> list[bytes]:
        """The keys that begin with `prefix`, in order; their values are not touched."""
        found = []
        with self._transaction.cursor(db=self._tables[table]) as cursor:
            if cursor.set_range(prefix) if prefix else cursor.first():
                for key in cursor.iternext(keys=True, values=False):
                    if not key.startswith(prefix):
                        break
                    found.append(key)
        return found

    def count(self, table: str) -> int:
        """Number of records."""
        return int(self._transaction.stat(self._tables[table])["entries"])


class Writing(Reading):
    """The tables inside a write transaction."""

    def put(self, table: str, key: bytes, value: bytes) -> None:
        """Set `key`."""
        self._transaction.put(key, value, db=self._tables[table])

    def delete(self, table: str, key: bytes) -> bool:
        """Remove `key`; whether it was there."""
        return bool(self._transaction.delete(key, db=self._tables[table]))

    def delete_prefix(self, table: str, prefix: bytes) -> int:
        """Remove every key that begins with `prefix`; returns how many."""
        removed = 0
        with self._transaction.cursor(db=self._tables[table]) as cursor:
            while cursor.set_range(prefix) and cursor.key().startswith(prefix):
                cursor.delete()
                removed += 1
        return removed
