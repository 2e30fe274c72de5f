"""Documents: texts or rows of ready tokens, what they add up to, and which of them are held out.

Long text is never held whole: it is cut into pieces that can be tokenized one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, Self

import numpy as np
import xxhash

from stackwise.errors import UsageError

IGNORED = -100
"""A target that no loss counts."""

PATHS = "data.paths"
"""The setting that names what is read, where nothing else is said."""

TARGETS = "targets"
"""The column that says what each position is to say, for the objective `custom`."""

TOKENS, MASK, LABELS = "input_ids", "attention_mask", "labels"
"""Columns of rows that bring tokens instead of text."""

SCORED, PAIR, PROMPT = "completion_mask", "pair_mask", "prompt_mask"
"""Columns of conversations: 1 where a token is scored; of pairs 0 and 1 in the chosen side, 2 and 3 in the rejected; 1
where a row is a prompt that is to be answered."""

CHAT_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected", "margin")
"""Columns of rows that bring conversations, or pairs of answers."""

ABSENT: Any = object()
UNREAD: Any = object()
"""Stands for a column of lists that a table has, where it was not read."""

_INT32 = np.iinfo(np.int32)

PIECE_BYTES = 128 << 10
"""About the most text that is tokenized at once; longer documents go piece by piece."""

_BLANKS = b" \t\r\n\v\f"

Array = np.ndarray[Any, Any]
Int64s = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class TextDocument:
    """Text. `pieces` reads it (again), piece by piece; `n_bytes` is its length in UTF-8."""

    digest: int
    n_bytes: int
    pieces: Callable[[], Iterator[str]]
    remarks: Mapping[str, int] = field(default_factory=dict)
    """What its row brought that is not used: a reason, and how often."""


@dataclass(frozen=True, slots=True)
class TokenDocument:
    """A row of ready tokens (int64 [n]), and named columns of one value a token (int64 or float32 [n])."""

    digest: int
    tokens: Int64s
    columns: Mapping[str, Array]
    remarks: Mapping[str, int] = field(default_factory=dict)


Document = TextDocument | TokenDocument


def text_document(data: bytes, remarks: Mapping[str, int] = MappingProxyType({})) -> TextDocument:
    """The document whose UTF-8 text is `data`."""
    return TextDocument(xxhash.xxh3_128_intdigest(data), len(data), partial(cut, (data,)), remarks)


def token_document(tokens: Int64s, columns: Mapping[str, Array], remarks: Mapping[str, int]) -> TokenDocument:
    """The document of a row of tokens and its columns."""
    state = xxhash.xxh3_128(b"tokens\0")  # never the digest of a text with these bytes
    state.update(tokens.astype("<u4").tobytes())
    for name in sorted(columns):
        state.update(b"\0" + name.encode() + b"\0")
        kept = "<i4" if name == TARGETS else "<f4" if columns[name].dtype.kind == "f" else "<i8"
        state.update(columns[name].astype(kept).tobytes())
    return TokenDocument(state.intdigest(), tokens, columns, remarks)


def size_of(document: Document) -> int:
    """Bytes of input that a document stands for; a token counts as four."""
    return document.n_bytes if isinstance(document, TextDocument) else 4 * len(document.tokens)


# Cutting text.


def cut(blocks: Iterable[bytes], size: int = PIECE_BYTES) -> Iterator[str]:
    """Cut UTF-8 text into pieces of at most `size` bytes; joined they are the text again.

    The cut depends on the text alone, not on how it came in blocks. It falls on a line end between two lines that
    touch it with something else than blanks, where there is one: there the usual pre-tokenizers begin a new word
    anyway, so the tokens are those of the uncut text.
    """
    held = bytearray()
    for block in blocks:
        held += block
        while len(held) > size:
            at = _place(held, size)
            yield held[:at].decode()
            del held[:at]
    if held:
        yield held.decode()


def _place(data: bytearray, size: int) -> int:
    """Where to cut `data`, which is longer than `size`: in (0, size]."""
    low, at = size // 2, size
    while (at := data.rfind(b"\n", low, at)) > 0:
        if data[at - 1] not in _BLANKS and data[at + 1] not in _BLANKS:
            return at + 1
    for mark, keep in ((b"\n", 1), (b" ", 0)):  # no such place: any line end, then a blank, then between characters
        if (at := data.rfind(mark, low, size)) > 0:
            return at + keep
    return boundary(data, size)


def boundary(data: bytes | bytearray, at: int) -> int:
    """The last start of a character at or before `at`."""
    while 0 < at < len(data) and data[at] & 0xC0 == 0x80:
        at -= 1
    return at


def line_end(data: bytes, at: int) -> int:
    """A place to divide `data` near `at`: after the last line end before it, else between two characters."""
    before = data.rfind(b"\n", 0, at)
    return before + 1 if before >= 0 else boundary(data, at)


def repair(text: str) -> str:
    """Text that UTF-8 can hold: halves of surrogate pairs, which JSON's escapes can carry, joined or replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


# Rows into documents.

Rows = Iterator[tuple[str, Mapping[str, Any]]]
"""Rows as mappings, each with where it stands."""


class SkippedFile(Exception):
    """A file that holds no text; its message is the reason."""


class Conversations(Protocol):
    """Makes documents of conversations (`stackwise.data.chat.Chat`)."""

    def document(self, where: str, row: Mapping[str, Any]) -> Document | None:
        """The document of a row; None: nothing in it can be scored."""


@dataclass(frozen=True)
class Reading:
    """How rows become documents.

    Args:
        column: Holds the text; dots lead into objects (`doc.text`).
        columns: Named columns of one value a token that are kept beside `targets`.
        chat: What makes documents of conversations, where these are wanted.
    """

    column: str = "text"
    columns: tuple[str, ...] = ()
    chat: Conversations | None = None


def as_row(where: str, value: Any) -> Mapping[str, Any]:
    """A value of JSON as a row."""
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {_kind(value)}, not an object", hint='a row is an object such as {"text": "…"}')
    return value


def lookup(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, by its name or by a way through objects (`doc.text`)."""
    if column in row:
        return row[column]  # a column may have a dot in its name
    value: Any = row
    for name in column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return ABSENT
        value = value[name]
    return value


def row_documents(rows: Rows, reading: Reading, *, only_rows: bool = False) -> Iterator[Document]:
    """Rows into documents: the text of a column, or tokens where a row brings `input_ids` instead.

    Rows whose text is null or empty are passed over.

    Args:
        rows: The rows.
        reading: Which columns they are made of.
        only_rows: The file may hold something else than rows, which its first row tells.
    """
    first = True
    while True:
        try:
            where, row = next(rows)
        except StopIteration:
            return
        except UsageError:
            if only_rows and first:
                raise SkippedFile("JSON that holds no rows") from None
            raise
        value = lookup(row, reading.column)
        if reading.chat is not None and TOKENS not in row:
            if only_rows and first and not any(name in row for name in CHAT_COLUMNS):
                raise SkippedFile("JSON that holds no rows")
            if (document := reading.chat.document(where, row)) is not None:
                yield document
        elif value is not ABSENT:
            if value is not None and not isinstance(value, str):
                raise UsageError(f"{where}: column {reading.column!r} holds {_kind(value)}, not text")
            if value:  # null and empty text is no document
                remarks = {f"rows bring {TOKENS} beside {reading.column}: the text is used": 1} if TOKENS in row else {}
                yield text_document(repair(value).encode(), remarks)
        elif TOKENS in row:
            if (document := _token_document(where, row, reading)) is not None:
                yield document
        elif only_rows and first:
            raise SkippedFile("JSON that holds no rows")
        else:
            raise missing_column(where, reading.column, row)
        first = False


def missing_column(where: str, column: str, columns: Iterable[str]) -> UsageError:
    """The fault of a row or table that has no such column."""
    names = ", ".join(sorted(map(str, columns))) or "none"
    return UsageError(
        f"{where}: no column {column!r}; its columns are: {names[:500]}",
        hint="name the column that holds the text with data.text_column",
    )


def _token_document(where: str, row: Mapping[str, Any], reading: Reading) -> Document | None:
    tokens = _numbers(where, TOKENS, row[TOKENS])
    if tokens.size and (tokens.min() < 0 or tokens.max() > _INT32.max):
        fault = "a negative id" if tokens.min() < 0 else "a number beyond 32 bits"
        raise UsageError(f"{where}: column {TOKENS!r} holds {fault} ({tokens.min()} … {tokens.max()})")
    columns = {name: _column(where, name, row[name], len(tokens)) for name in _kept(row, reading)}
    remarks: dict[str, int] = {}
    keep = np.ones(len(tokens), bool)  # False: padding
    if row.get(MASK) is not None:
        mask = _column(where, MASK, row[MASK], len(tokens))
        if not np.isin(mask, (0, 1)).all():
            raise UsageError(f"{where}: column {MASK!r} holds something else than 0 and 1")
        keep = mask != 0  # what a model was not meant to see, none trains on here
    if row.get(LABELS) is not None and LABELS not in columns:
        keep &= _labelled(where, row, tokens, keep, remarks)
    if not keep.all():
        remarks[f"positions of padding are left out ({MASK} 0, or {LABELS} -100 at the end of a row)"] = int(
            (~keep).sum()
        )
        tokens, columns = tokens[keep], {name: values[keep] for name, values in columns.items()}
    for name, value in row.items():
        used = name in columns or name in (TOKENS, MASK, LABELS)
        if not used and (value is UNREAD or (isinstance(value, list) and len(value) == len(keep))):
            remarks[f"rows bring {name}, which is not used (see data.columns)"] = 1
    return token_document(tokens, columns, remarks) if tokens.size else None


def _kept(row: Mapping[str, Any], reading: Reading) -> list[str]:
    return [name for name in {TARGETS: None} | dict.fromkeys(reading.columns) if row.get(name) is not None]


def _labelled(
    where: str, row: Mapping[str, Any], tokens: Int64s, keep: Array, remarks: dict[str, int]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which positions remain by the row's `labels`, which repeat its tokens or else say what is not done here.

    Trainers elsewhere score labels alone, and skip -100; here every token is scored. So labels that say something else
    are refused, but for padding at a row's end: one repeated id that no label scores.
    """
    value, everything = row[LABELS], np.ones(len(tokens), bool)
    if not isinstance(value, list) or len(value) != len(tokens) or TARGETS in row:
        remarks[f"rows bring {LABELS}, which is not used"] = 1
        return everything
    labels = _column(where, LABELS, value, len(tokens))
    scored = np.flatnonzero(labels != IGNORED)
    end = int(scored[-1]) + 1 if scored.size else 0  # whatever follows the last scored position may be padding
    if row.get(MASK) is None and scored.size and end < len(tokens) and (tokens[end:] == tokens[-1]).all():
        everything[end:] = False
    if (labels != tokens)[keep & everything].any():
        raise UsageError(
            f"{where}: {LABELS} say something else than {TOKENS} (or {IGNORED}, not scored), but every token trains",
            hint=f"leave {LABELS} out to train on all tokens, or name them {TARGETS} for objective custom; "
            f"data.columns: [{LABELS}] keeps them for an objective of your own",
        )
    return everything


def _column(where: str, name: str, value: Any, length: int) -> Array:
    """A column of one value a token: int64, or float32 where any is a fraction; `targets` are ids or -100."""
    values = _numbers(where, name, value, fractions=name not in (TARGETS, MASK, LABELS))
    if len(values) != length:
        raise UsageError(f"{where}: {length} {TOKENS} but {len(values)} {name}; they go in pairs")
    if name == TARGETS and values.size:
        if values.min() < _INT32.min or values.max() > _INT32.max:
            raise UsageError(f"{where}: column {name!r} holds a number beyond 32 bits")
        if ((values < 0) & (values != IGNORED)).any():
            raise UsageError(f"{where}: column {name!r} holds a negative id; only {IGNORED} (ignored) may be")
    return values


def _numbers(where: str, name: str, value: Any, *, fractions: bool = False) -> Array:
    if value is None:
        return np.empty(0, np.int64)
    kinds = set(map(type, value)) if isinstance(value, list | tuple) else {type(value)}
    plain = {int} if name in (TOKENS, TARGETS, LABELS) else {int, bool}  # true is no token
    if not isinstance(value, list | tuple) or not kinds <= (plain | {float} if fractions else plain):
        expected = "a list of numbers" if fractions else "a list of integers"
        raise UsageError(f"{where}: column {name!r} holds {_kind(value)}, not {expected}")
    try:
        if float not in kinds:
            return np.array(value, np.int64)
        with np.errstate(over="ignore"):  # beyond float32 becomes infinite, and is refused below
            values = np.array(value, np.float64).astype(np.float32)
    except OverflowError:
        raise UsageError(f"{where}: column {name!r} holds a number beyond {'64' if fractions else '32'} bits") from None
    if not np.isfinite(values).all():
        raise UsageError(f"{where}: column {name!r} holds a number that is not finite, or beyond 32-bit floats")
    return values


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


# Running through documents.


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
                        yield text_document(data, document.remarks)
                return
            left -= size
            yield document


# Which documents are held out.

DIGESTS = 1 << 128
"""Documents' digests are below it."""


@dataclass(frozen=True)
class HeldOut:
    """Which documents are held out: those whose digest is below `below`; of a single document, its end.

    So a document's side depends on its own content alone, and equal documents are on one side. Where that would leave
    a side empty, which only few documents can, the one with the lowest (or highest) digest makes the side.
    """

    share: float
    below: int
    single: bool
    setting: str = PATHS
    """What named the documents, for messages."""

    @classmethod
    def choose(cls, n: int, lowest: int, highest: int, share: float, setting: str = PATHS) -> Self:
        """Choose for a corpus.

        Args:
            n: Documents.
            lowest: The lowest of their digests.
            highest: The highest.
            share: Of them, to be held out.
            setting: What named them.
        """
        chosen = cls(share, int(share * DIGESTS), n == 1, setting)
        if chosen.single:
            return chosen
        if lowest == highest:
            raise UsageError(f"{setting}: all {n} documents are the same; none can be held out from training")
        if lowest >= chosen.below:  # by chance none is: the lowest one is taken
            return replace(chosen, below=lowest + 1)
        if highest < chosen.below:  # by chance all are: the highest one trains
            return replace(chosen, below=highest)
        return chosen

    @classmethod
    def everything(cls) -> Self:
        """Every document is held out."""
        return cls(1.0, DIGESTS, single=False)

    def divide(self, document: Document) -> list[tuple[int, Document]]:
        """A document's parts with their sides: 0 trains, 1 is held out."""
        if not self.single:
            return [(int(document.digest < self.below), document)]
        divide: Any = _divide_tokens if isinstance(document, TokenDocument) else _divide_text
        if (parts := divide(document, self.share)) is None:
            raise UsageError(
                f"{self.setting}: the only document is too short to hold a part of it out", hint="add more text"
            )
        return list(enumerate(parts))


def _divide_tokens(document: TokenDocument, share: float) -> tuple[Document, Document] | None:
    n = len(document.tokens)
    if n < 2:  # one token cannot be on both sides
        return None
    at = min(max(1, round(n * (1 - share))), n - 1)

    def part(where: slice) -> TokenDocument:
        columns = {name: values[where] for name, values in document.columns.items()}
        return TokenDocument(document.digest, document.tokens[where], columns)

    return part(slice(None, at)), part(slice(at, None))


def _divide_text(document: TextDocument, share: float) -> tuple[Document, Document] | None:
    """Divide at a line end near the share, reading at most up to there; None: it is too short."""
    at, before = min(max(1, round(document.n_bytes * (1 - share))), document.n_bytes - 1), 0
    for piece in document.pieces():
        size = len(piece.encode())
        if before + size >= at:
            break
        before += size
    end = before + _line_near(piece.encode(), at - before)
    if not 0 < end < document.n_bytes:
        return None
    return (
        TextDocument(document.digest, end, lambda: _slice(document, 0, end)),
        TextDocument(document.digest, document.n_bytes - end, lambda: _slice(document, end, document.n_bytes)),
    )


def _line_near(data: bytes, at: int) -> int:
    """The line end nearest below `at`, else the next one, else a place between two characters."""
    for place in (data.rfind(b"\n", 0, at), data.find(b"\n", at, len(data) - 1)):
        if place > 0:
            return place + 1
    if (before := boundary(data, at)) > 0:
        return before
    return next((after for after in range(at + 1, len(data)) if data[after] & 0xC0 != 0x80), len(data))


def _slice(document: TextDocument, start: int, stop: int) -> Iterator[str]:
    """The pieces of bytes start … stop of a document's text (both between characters)."""
    at = 0
    for piece in document.pieces():
        data = piece.encode()
        low, high = max(start - at, 0), min(stop - at, len(data))
        if low < high:
            yield data[low:high].decode()
        at += len(data)
        if at >= stop:
            return
