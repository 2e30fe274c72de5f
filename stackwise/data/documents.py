"""Documents: what a source is read into, text or ready tokens, each with a digest of its content."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from stackwise.data.text import BLOCK_BYTES, cut, file_blocks, is_utf8, line_end, repair
from stackwise.errors import UsageError

IGNORED = -100
"""A target that no loss counts."""

TOKENS, TARGETS = "input_ids", "targets"
"""Columns of rows that bring tokens instead of text."""

_INT32 = np.iinfo(np.int32)


COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".tgz")
PACKED = "compressed: unpack it first"
"""Why a file of such a name is left out."""


class SkippedFile(Exception):
    """A file that holds no text; its message is the reason."""


@dataclass(frozen=True, slots=True)
class TextDocument:
    """Text. `pieces` reads it (again), piece by piece; `n_bytes` is its length in UTF-8."""

    digest: int
    n_bytes: int
    pieces: Callable[[], Iterator[str]]


@dataclass(frozen=True, slots=True)
class TokenDocument:
    """A row of ready tokens (int64 [n]) and, for a custom objective, their targets (int64 [n]; -100: ignored)."""

    digest: int
    tokens: np.ndarray[Any, np.dtype[np.int64]]
    targets: np.ndarray[Any, np.dtype[np.int64]] | None


Document = TextDocument | TokenDocument


def size_of(document: Document) -> int:
    """Bytes of input that a document stands for; a token counts as four."""
    return document.n_bytes if isinstance(document, TextDocument) else 4 * len(document.tokens)


def text_document(data: bytes) -> TextDocument:
    """The document whose UTF-8 text is `data`."""
    return TextDocument(xxhash.xxh3_128_intdigest(data), len(data), partial(cut, (data,)))


def text_file(
    path: Path, limit: int | None = None, tell: Callable[[int], None] | None = None
) -> Iterator[TextDocument]:
    """A text file: one document, or none where it is empty (or cut to nothing by `limit` bytes).

    Raises:
        SkippedFile: It is binary, or not UTF-8.
        OSError: It cannot be read.
    """
    if path.suffix.lower() in COMPRESSED:
        raise SkippedFile(PACKED)
    blocks = file_blocks(path, limit)
    head = next(blocks, b"")
    if b"\0" in head[:8192]:
        raise SkippedFile("binary")
    following = next(blocks, None)
    try:
        if following is None:
            head.decode()
            if head:
                yield text_document(head)
            return
        state, n_bytes = xxhash.xxh3_128(), 0
        for block in is_utf8(_chain(head, following, blocks)):
            state.update(block)
            n_bytes += len(block)
            if tell is not None:
                tell(len(block))
    except UnicodeDecodeError:
        raise SkippedFile("not UTF-8 text") from None
    yield TextDocument(state.intdigest(), n_bytes, lambda: cut(file_blocks(path, limit)))


def _chain(*parts: bytes | Iterable[bytes]) -> Iterator[bytes]:
    for part in parts:
        if isinstance(part, bytes):
            yield part
        else:
            yield from part


def jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of a JSON-lines file, each with where it stands (file and line). Blank lines are passed over.

    Raises:
        UsageError: A line is not JSON, not UTF-8, or not an object.
        OSError: The file cannot be read.
    """
    with path.open("rb", buffering=BLOCK_BYTES) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError:
                raise UsageError(f"{where}: not UTF-8 text") from None
            except ValueError as error:
                raise UsageError(f"{where}: not JSON ({error})") from None
            except RecursionError:
                raise UsageError(f"{where}: JSON nested too deeply") from None
            if not isinstance(row, dict):
                raise UsageError(
                    f"{where}: {_kind(row)}, not an object", hint='a line is an object such as {"text": "…"}'
                )
            yield where, row


def row_documents(rows: Iterable[tuple[str, Mapping[str, Any]]], column: str) -> Iterator[Document]:
    """Rows into documents: the text of `column`, or tokens where a row brings `input_ids` instead.

    Rows whose text is null or empty are passed over.

    Raises:
        UsageError: A row has neither column, or they hold something else.
    """
    for where, row in rows:
        if column in row:
            value = row[column]
            if value is not None and not isinstance(value, str):
                raise UsageError(f"{where}: column {column!r} holds {_kind(value)}, not text")
            if value:
                yield text_document(repair(value).encode())
        elif TOKENS in row:
            if (document := _token_document(where, row)) is not None:
                yield document
        else:
            raise missing_column(where, column, row)


def missing_column(where: str, column: str, columns: Iterable[str]) -> UsageError:
    """The fault of a row or table that has no such column."""
    names = ", ".join(sorted(columns)) or "none"
    return UsageError(
        f"{where}: no column {column!r}; its columns are: {names}",
        hint="name the column that holds the text with data.text_column",
    )


def _token_document(where: str, row: Mapping[str, Any]) -> TokenDocument | None:
    tokens = _integers(where, TOKENS, row[TOKENS])
    if tokens.size and tokens.min() < 0:
        raise UsageError(f"{where}: column {TOKENS!r} holds a negative id ({tokens.min()})")
    targets = None
    state = xxhash.xxh3_128(b"tokens\0")
    state.update(tokens.astype("<u4").tobytes())
    if row.get(TARGETS) is not None:
        targets = _integers(where, TARGETS, row[TARGETS])
        if len(targets) != len(tokens):
            raise UsageError(f"{where}: {len(tokens)} {TOKENS} but {len(targets)} {TARGETS}; they go in pairs")
        if bool(((targets < 0) & (targets != IGNORED)).any()):
            raise UsageError(f"{where}: column {TARGETS!r} holds a negative id; only {IGNORED} (ignored) may be")
        state.update(b"\0targets\0")
        state.update(targets.astype("<i4").tobytes())
    return TokenDocument(state.intdigest(), tokens, targets) if tokens.size else None


def _integers(where: str, column: str, value: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    try:
        array = np.asarray(value if value is not None else [])
    except ValueError:  # ragged
        array = np.empty((0, 0))
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError(f"{where}: column {column!r} holds {_kind(value)}, not a list of integers")
    if array.min() < _INT32.min or array.max() > _INT32.max:
        raise UsageError(f"{where}: column {column!r} holds a number beyond 32 bits")
    return array.astype(np.int64)


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        bytes: "binary data",
        type(None): "null",
    }
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


class Limit:
    """At most so many bytes of documents; what crosses is cut at a line end, and nothing follows it.

    Args:
        size: Bytes that may be read.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.reached = False

    def apply(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents within the limit; `reached` says afterwards whether something was left out."""
        left = self.size
        for document in documents:
            if (size := size_of(document)) > left:
                self.reached = True
                if isinstance(document, TextDocument):
                    data = "".join(document.pieces()).encode()
                    if data := data[: line_end(data, left)]:
                        yield text_document(data)
                return
            left -= size
            yield document
