"""The second pass: documents become tokens in a split's files, in bounded memory, every core at work."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from stackwise.data.corpus import Corpus, Progress
from stackwise.data.documents import IGNORED, LABELS, TARGETS, Array, Document, HeldOut, TextDocument, TokenDocument
from stackwise.data.split import SUMMED_BYTES, SUMS, sealed
from stackwise.data.tokenizer import Tokenizer
from stackwise.durable import write_bytes
from stackwise.errors import UsageError

SIDES = ("train", "held_out")
"""The splits, and their folders' names."""

BATCH_BYTES = 2 << 20
"""Text that is tokenized at once: enough to keep every core busy, little enough to forget."""

BATCH_PIECES = 4096
UNKNOWN_SHARE = 0.5
"""Of the tokens of a text: with more unknown ones it is the wrong tokenizer, and there is nothing to learn."""
_AHEAD = 2
"""Batches in the making: while one's tokens come over from the library, it works at the next."""


class NotExactError(Exception):
    """The byte table does not add up to a text's bytes: this tokenizer's tokens must be measured where they stand."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A piece of a document's text, or a row of tokens. `ends`: the document's bytes in its last piece, else -1."""

    task: int
    side: int
    content: str | TokenDocument
    size: int
    ends: int


_Encoded = list[dict[str, Array]]


def write_splits(
    directory: Path,
    corpus: Corpus,
    held_out: Sequence[HeldOut],
    tokenizer: Tokenizer,
    *,
    measure: bool,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Tokenize a corpus into `directory/train` and `directory/held_out`.

    Args:
        directory: An existing folder without those two.
        corpus: The documents.
        held_out: Which are held out of each task.
        tokenizer: Makes the tokens.
        measure: Store the bytes of every token, instead of relying on the tokenizer's byte table.
        progress: Told "tokenizing" with bytes.

    Returns:
        The descriptions of the two splits.
    """
    more = {"bytes": "<u4"} if measure and corpus.has_text else corpus.columns
    writers = [SplitWriter(directory / side, tokenizer, more, corpus.task_names) for side in SIDES]
    done = 0
    try:
        progress("tokenizing", 0, corpus.contents.size)
        # results come in order, so files are the same on any machine
        for batch, encoded in _in_parallel(_batches(corpus, held_out), tokenizer, measure):
            for piece, columns in zip(batch, encoded, strict=True):
                writer = writers[piece.side]
                writer.add(columns)
                if "bytes" in columns and not len(columns["tokens"]):
                    writer.leave(piece.size)
                if piece.ends >= 0:
                    writer.end_document(piece.ends, piece.task)
                done += piece.size
            progress("tokenizing", done, corpus.contents.size)
        kept_writers = writers if held_out[0].share < 1 else writers[1:]
        for number, task in enumerate(corpus.tasks):
            if not all(number in writer.tasks_written for writer in kept_writers):
                # a side without documents cannot be trained or scored
                raise UsageError(f"{task.setting}: too little text to hold some of it out", hint="add more text")
        splits = [writer.finish() for writer in writers]
        if corpus.has_text:
            _check_known(tokenizer, writers[0].counts + writers[1].counts)
        return splits
    finally:
        for writer in writers:
            writer.abandon()


def _check_known(tokenizer: Tokenizer, counts: Array) -> None:
    """Separators aside, as a tokenizer that makes one unknown token of a document has as many of them."""
    unknown = tokenizer.unknown_id
    total = int(counts.sum() - counts[tokenizer.separator_id])
    if unknown is None or counts[unknown] <= UNKNOWN_SHARE * total:  # a few unknown characters are usual
        return
    raise UsageError(
        f"data.tokenizer: {tokenizer.name} does not know this text: {counts[unknown] / total:.0%} of its tokens are "
        f"{tokenizer.decode([unknown])} (id {unknown}), its token for the unknown",
        hint="use a tokenizer made for such text, or set data.tokenizer to bpe or bytes",
    )


def _batches(corpus: Corpus, held_out: Sequence[HeldOut]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for task, side, part in corpus.divided(held_out):
        for piece in _pieces(task, side, part):
            batch.append(piece)
            size += piece.size
            if size >= BATCH_BYTES or len(batch) >= BATCH_PIECES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _pieces(task: int, side: int, part: Document) -> Iterator[_Piece]:
    if not isinstance(part, TextDocument):
        yield _Piece(task, side, part, 4 * len(part.tokens), 0)
        return
    left = part.n_bytes
    for text in part.pieces():
        size = len(text) if text.isascii() else len(text.encode())
        left -= size
        yield _Piece(task, side, text, size, -1 if left else part.n_bytes)


def _in_parallel(
    batches: Iterable[list[_Piece]], tokenizer: Tokenizer, measure: bool
) -> Iterator[tuple[list[_Piece], _Encoded]]:
    """Every batch with its tokens, in order; the next ones are in the making meanwhile."""
    waiting: deque[tuple[list[_Piece], Future[_Encoded]]] = deque()
    with ThreadPoolExecutor(_AHEAD) as pool:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, batch, tokenizer, measure)))
            if len(waiting) > _AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
        for rest, future in waiting:
            yield rest, future.result()


def _encode(batch: list[_Piece], tokenizer: Tokenizer, measure: bool) -> _Encoded:
    rows = [piece.content for piece in batch if isinstance(piece.content, TokenDocument)]
    if rows:
        return [{"tokens": row.tokens, **row.columns} for row in rows]
    texts = [piece.content for piece in batch if isinstance(piece.content, str)]
    if measure:
        return [{"tokens": ids, "bytes": sizes} for ids, sizes in tokenizer.encode_with_bytes(texts)]
    encoded = tokenizer.encode_batch(texts)
    table = tokenizer.bytes_per_token()
    if table is None or int(table[np.concatenate(encoded)].sum()) != sum(piece.size for piece in batch):
        raise NotExactError
    return [{"tokens": ids} for ids in encoded]


# A split's files, appended to as tokens come.

FLUSH_TOKENS = 1 << 20
"""Tokens that are held before they are written together."""


class _Column:
    """One array appended to a file, hashed on the way."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self._file: IO[bytes] = path.open("wb")
        self._hash = xxhash.xxh3_128()
        self._block = bytearray()
        self._sums: list[int] = []
        self.length = 0

    def append(self, array: Array) -> None:
        data = np.ascontiguousarray(array, self.dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.length += len(array)
        self._block += data
        while len(self._block) >= SUMMED_BYTES:
            self._sums.append(xxhash.xxh3_64_intdigest(self._block[:SUMMED_BYTES]))
            del self._block[:SUMMED_BYTES]

    @property
    def sums(self) -> bytes:
        """Sums of its blocks, once it is whole."""
        rest = [xxhash.xxh3_64_intdigest(self._block)] if self._block else []
        return np.array([*self._sums, *rest], "<u8").tobytes()

    def close(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())  # before meta.json says that the set is whole
        self._file.close()
        return {"dtype": self.dtype.str, "length": self.length, "digest": self._hash.hexdigest()}

    def abandon(self) -> None:
        self._file.close()


class SplitWriter:
    """Writes a split's columns: `tokens`, `documents` (starts), `counts`, and `bytes` or what rows bring.

    Where there are tasks also `tasks`, the number of each document's.

    Args:
        directory: Where the files go; made.
        tokenizer: Gives the separator and the size of the vocabulary.
        more: Further columns, with their types.
        tasks: Names of tasks; none: there are none.
    """

    def __init__(
        self, directory: Path, tokenizer: Tokenizer, more: Mapping[str, str], tasks: tuple[str, ...] = ()
    ) -> None:
        directory.mkdir()
        self.directory = directory
        self._tokenizer = tokenizer
        wide = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        self._tasks = tasks
        by_document = {"documents": "<i8"} | ({"tasks": "<i8"} if tasks else {})
        types = {"tokens": wide, **by_document, **more}
        self._columns = {name: _Column(directory / f"{name}.bin", types[name]) for name in sorted(types)}
        self._held: dict[str, list[Array]] = {name: [] for name in types}
        self._held_tokens = 0
        self._counts = np.zeros(tokenizer.vocab_size, np.int64)
        self.n_tokens = self.n_documents = self.n_bytes = 0
        self._start = 0
        self._starts: list[int] = []
        self._of_tasks: list[int] = []
        self.tasks_written: set[int] = set()
        """Numbers of the tasks that have documents here."""
        self._last = -1
        self._unclaimed = 0
        # at a separator nothing is scored: no target, no weight
        fill = {"tokens": tokenizer.separator_id, TARGETS: IGNORED, LABELS: IGNORED}
        self._end = {name: np.array([fill.get(name, 0)], types[name]) for name in types if name not in by_document}

    def add(self, columns: Mapping[str, Array]) -> None:
        """Append a run of the document in hand: its tokens, and a value for each in every other column."""
        tokens = columns["tokens"]
        if not len(tokens):
            return
        # before, not after: the end of a document may still add to its last token's bytes
        if self._held_tokens >= FLUSH_TOKENS:
            self._flush()
        if self._unclaimed and "bytes" in columns:
            columns["bytes"][0] += self._unclaimed
            self._unclaimed = 0
        for name, values in columns.items():
            self._held[name].append(values)
        self.n_tokens += len(tokens)
        self._held_tokens += len(tokens)
        self._last = int(tokens[-1])

    def leave(self, n_bytes: int) -> None:
        """Text of the document in hand that made no token: the next one stands for it too, at its end the last."""
        self._unclaimed += n_bytes

    def end_document(self, n_bytes: int, task: int = 0) -> None:
        """End the document in hand with a separator, unless it brought one; without tokens it leaves no trace.

        Args:
            n_bytes: Of its text.
            task: The number of its task.
        """
        left, self._unclaimed = self._unclaimed, 0
        if self.n_tokens == self._start:
            return
        if left:  # it belongs to the last token of its document
            self._held["bytes"][-1][-1] += left
        if self._last != self._tokenizer.separator_id:
            self.add(self._end)
        self._starts.append(self._start)
        self._of_tasks.append(task)
        self.tasks_written.add(task)
        self._start = self.n_tokens
        self.n_documents += 1
        self.n_bytes += n_bytes

    def _flush(self) -> None:
        self._held["documents"].append(np.array(self._starts, np.int64))
        if self._tasks:
            self._held["tasks"].append(np.array(self._of_tasks, np.int64))
        self._starts.clear()
        self._of_tasks.clear()
        for name, arrays in self._held.items():
            if arrays:
                whole = np.concatenate(arrays)
                if name == "tokens":
                    self._counts += np.bincount(whole, minlength=len(self._counts))
                self._columns[name].append(whole)
                arrays.clear()
        self._held_tokens = 0

    def finish(self) -> dict[str, Any]:
        """Close the files, durably, and describe them as plain data."""
        self._flush()
        self._check_mask()
        counts = _Column(self.directory / "counts.bin", "<i8")
        counts.append(self._counts)
        columns = {name: column.close() for name, column in (*self._columns.items(), ("counts", counts))}
        sums = b"".join(column.sums for _, column in sorted(self._columns.items()))
        write_bytes(self.directory / SUMS, sealed(sums, columns))
        about = {"documents": self.n_documents, "tokens": self.n_tokens, "bytes": self._bytes(), "columns": columns}
        return about | ({"tasks": list(self._tasks)} if self._tasks else {})

    @property
    def counts(self) -> Array:
        """How often each id was written (int64 [vocab_size]); whole after `finish`."""
        return self._counts

    def _check_mask(self) -> None:
        hits = int(self._counts[self._tokenizer.mask_id])
        # rows with targets may well show masks: they bring their own objective
        if hits and TARGETS not in self._columns:
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
