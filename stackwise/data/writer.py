"""The second pass: documents become token files, a split each, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from stackwise.data.documents import IGNORED, TextDocument
from stackwise.data.held_out import HeldOut
from stackwise.data.scan import Corpus, Progress
from stackwise.data.tokenizer import Tokenizer
from stackwise.errors import UsageError

BATCH_BYTES = 2 << 20
"""Text that is tokenized at once: enough to keep every core busy, little enough to forget."""

BATCH_TEXTS = 4096
FLUSH_TOKENS = 1 << 20

SIDES = ("train", "held_out")
"""The splits, and their folders' names."""

Array = np.ndarray[Any, Any]


class NotExactError(Exception):
    """The byte table does not add up to a text's bytes: this tokenizer's tokens must be measured where they stand."""


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
        self._last = -1
        self._unclaimed = 0

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
            separator = np.array([self._tokenizer.separator_id], np.uint32)
            fill = {"bytes": 0, "targets": IGNORED}
            self.add(separator, **{k: np.array([fill[k]]) for k in self._columns if k in fill})
        self._held["documents"].append(np.array([self._start], np.int64))
        self._start = self.n_tokens
        self.n_documents += 1
        self.n_bytes += n_bytes

    def _flush(self) -> None:
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


def write_splits(
    directory: Path, corpus: Corpus, held_out: HeldOut, tokenizer: Tokenizer, *, measure: bool, progress: Progress
) -> list[dict[str, Any]]:
    """Tokenize a corpus into `directory/train` and `directory/held_out`.

    Args:
        directory: An existing folder without those two.
        corpus: The documents.
        held_out: Which are held out.
        tokenizer: Makes the tokens.
        measure: Store the bytes of every token, instead of relying on the tokenizer's byte table.
        progress: Told "tokenizing" with bytes.

    Returns:
        The descriptions of the two splits.

    Raises:
        NotExactError: Without `measure`, the byte table does not add up.
        UsageError: A file changed meanwhile, an id does not fit the vocabulary, the mask token occurs, or a side
            stays empty.
    """
    extra = {"targets"} if corpus.has_targets else {"bytes"} if measure and corpus.has_text else set[str]()
    writers = [SplitWriter(directory / name, tokenizer, frozenset(extra)) for name in SIDES]
    try:
        done = 0
        for batch in _batches(corpus, held_out):
            _encode(batch, writers, tokenizer, measure)
            done += sum(size for *_, size in batch)
            progress("tokenizing", done, corpus.contents.size)
        if not all(writer.n_documents for writer in writers):
            raise UsageError("data.paths: too little text to hold some of it out", hint="add more text")
        return [writer.finish() for writer in writers]
    finally:
        for writer in writers:
            writer.abandon()


_Text = tuple[int, str, int, int]
_Item = tuple[int, Any, int, int]
"""Side, a piece of text (or the columns of a row), bytes of the document where this ends it (else -1), size."""


def _batches(corpus: Corpus, held_out: HeldOut) -> Iterator[list[_Item]]:
    batch: list[_Item] = []
    size = 0
    for document in corpus.documents():
        for side, part in held_out.divide(document):
            for item in _items(side, part):
                batch.append(item)
                size += item[3]
                if size >= BATCH_BYTES or len(batch) >= BATCH_TEXTS:
                    yield batch
                    batch, size = [], 0
    if batch:
        yield batch


def _items(side: int, part: Any) -> Iterator[_Item]:
    if not isinstance(part, TextDocument):
        columns = {"tokens": part.tokens} | ({} if part.targets is None else {"targets": part.targets})
        yield side, columns, 0, 4 * len(part.tokens)
        return
    left = part.n_bytes
    for piece in part.pieces():
        size = len(piece) if piece.isascii() else len(piece.encode())
        left -= size
        yield side, piece, -1 if left else part.n_bytes, size


def _encode(batch: list[_Item], writers: list[SplitWriter], tokenizer: Tokenizer, measure: bool) -> None:
    if isinstance(batch[0][1], dict):
        for side, columns, n_bytes, _ in batch:
            writers[side].add(**columns)
            writers[side].end_document(n_bytes)
        return
    texts = [text for _, text, _, _ in batch]
    if measure:
        encoded = [{"tokens": ids, "bytes": sizes} for ids, sizes in tokenizer.encode_with_bytes(texts)]
    else:
        encoded = [{"tokens": ids} for ids in tokenizer.encode_batch(texts)]
        table = tokenizer.bytes_per_token()
        if table is None or sum(int(table[c["tokens"]].sum()) for c in encoded) != sum(size for *_, size in batch):
            raise NotExactError
    for (side, _, n_bytes, size), columns in zip(batch, encoded, strict=True):
        writers[side].add(**columns)
        if measure and not len(columns["tokens"]):
            writers[side].leave(size)
        if n_bytes >= 0:
            writers[side].end_document(n_bytes)
