"""A split's files, appended to as tokens come."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from stackwise.data.documents import IGNORED
from stackwise.data.tokenizer import Tokenizer
from stackwise.errors import UsageError

FLUSH_TOKENS = 1 << 20
"""Tokens that are held before they are written together."""

Array = np.ndarray[Any, Any]


class _Column:
    """One array appended to a file, hashed on the way."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self._file: BinaryIO = path.open("wb")
        self._hash = xxhash.xxh3_128()
        self.length = 0

    def append(self, array: Array) -> None:
        data = np.ascontiguousarray(array, self.dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.length += len(array)

    def close(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"dtype": self.dtype.str, "length": self.length, "digest": self._hash.hexdigest()}

    def abandon(self) -> None:
        self._file.close()


class SplitWriter:
    """Writes a split's columns: `tokens`, `documents` (starts), `counts`, and `bytes` or `targets` where there are any.

    Args:
        directory: Where the files go; made.
        tokenizer: Gives the separator and the size of the vocabulary.
        extra: Further columns: "bytes", "targets".
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, extra: frozenset[str]) -> None:
        directory.mkdir()
        self.directory = directory
        self._tokenizer = tokenizer
        wide = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        types = {"tokens": wide, "documents": "<i8", "bytes": "<u4", "targets": "<i4"}
        used = {"tokens", "documents"} | extra
        self._columns = {name: _Column(directory / f"{name}.bin", types[name]) for name in sorted(used)}
        self._held: dict[str, list[Array]] = {name: [] for name in used}
        self._held_tokens = 0
        self._counts = np.zeros(tokenizer.vocab_size, np.int64)
        self.n_tokens = self.n_documents = self.n_bytes = 0
        self._start = 0
        self._starts: list[int] = []
        self._last = -1
        self._unclaimed = 0
        fill = {"tokens": tokenizer.separator_id, "bytes": 0, "targets": IGNORED}
        self._end = {name: np.array([fill[name]]) for name in sorted(used) if name in fill}

    def add(self, tokens: Array, **extra: Array) -> None:
        """Append a run of the document in hand."""
        if not len(tokens):
            return
        # before, not after: the end of a document may still add to its last token's bytes
        if self._held_tokens >= FLUSH_TOKENS:
            self._flush()
        if self._unclaimed and "bytes" in extra:
            extra["bytes"][0] += self._unclaimed
            self._unclaimed = 0
        self._held["tokens"].append(tokens)
        for name, values in extra.items():
            self._held[name].append(values)
        self.n_tokens += len(tokens)
        self._held_tokens += len(tokens)
        self._last = int(tokens[-1])

    def leave(self, n_bytes: int) -> None:
        """Text of the document in hand that made no token: the next one stands for it too, at its end the last."""
        self._unclaimed += n_bytes

    def end_document(self, n_bytes: int) -> None:
        """End the document in hand with a separator, unless it brought one; without tokens it leaves no trace."""
        left, self._unclaimed = self._unclaimed, 0
        if self.n_tokens == self._start:
            return
        if left:
            self._held["bytes"][-1][-1] += left
        if self._last != self._tokenizer.separator_id:
            self.add(**self._end)
        self._starts.append(self._start)
        self._start = self.n_tokens
        self.n_documents += 1
        self.n_bytes += n_bytes

    def _flush(self) -> None:
        self._held["documents"].append(np.array(self._starts, np.int64))
        self._starts.clear()
        for name, arrays in self._held.items():
            if arrays:
                whole = np.concatenate(arrays)
                if name == "tokens":
                    self._counts += np.bincount(whole, minlength=len(self._counts))
                self._columns[name].append(whole)
                arrays.clear()
        self._held_tokens = 0

    def finish(self) -> dict[str, Any]:
        """Close the files, durably, and describe them as plain data.

        Raises:
            UsageError: The mask token stands in the data.
        """
        self._flush()
        self._check_mask()
        counts = _Column(self.directory / "counts.bin", "<i8")
        counts.append(self._counts)
        columns = {name: column.close() for name, column in (*self._columns.items(), ("counts", counts))}
        return {"documents": self.n_documents, "tokens": self.n_tokens, "bytes": self._bytes(), "columns": columns}

    @property
    def counts(self) -> Array:
        """How often each id was written (int64 [vocab_size]); whole after `finish`."""
        return self._counts

    def _check_mask(self) -> None:
        hits = int(self._counts[self._tokenizer.mask_id])
        # rows with targets may well show masks: they bring their own objective
        if hits and "targets" not in self._columns:
            raise UsageError(
                f"the mask token (id {self._tokenizer.mask_id}) occurs {hits} times in the data",
                hint="use a tokenizer whose mask token the data does not contain",
            )

    def _bytes(self) -> int:
        """Bytes of source text; of rows of tokens, what the tokens stand for where that is known."""
        table = None if self.n_bytes else self._tokenizer.bytes_per_token()
        return self.n_bytes if table is None else int(table @ self._counts)

    def abandon(self) -> None:
        """Close the files as they are."""
        for column in self._columns.values():
            column.abandon()
