"""Which documents are held out from training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from stackwise.data.contents import DIGESTS, Contents
from stackwise.data.documents import Document, TextDocument, TokenDocument
from stackwise.data.text import boundary
from stackwise.errors import UsageError


@dataclass(frozen=True)
class HeldOut:
    """Which documents are held out: those whose digest is below `below`; of a single document, its end.

    So a document's side depends on its own content alone. Where that would leave a side empty, which only few
    documents can, the one with the lowest (or highest) digest makes the side.
    """

    share: float
    below: int
    single: bool

    @classmethod
    def choose(cls, contents: Contents, share: float) -> Self:
        """Choose for a corpus.

        Raises:
            UsageError: All documents are the same text, so that no side can be held out from the other.
        """
        chosen = cls(share, int(share * DIGESTS), contents.documents == 1)
        if chosen.single:
            return chosen
        if contents.lowest == contents.highest:
            raise UsageError(
                f"data.paths: all {contents.documents} documents are the same; none can be held out from training"
            )
        if contents.lowest >= chosen.below:
            return replace(chosen, below=contents.lowest + 1)
        if contents.highest < chosen.below:
            return replace(chosen, below=contents.highest)
        return chosen

    @classmethod
    def everything(cls) -> Self:
        """Every document is held out."""
        return cls(1.0, DIGESTS, single=False)

    def divide(self, document: Document) -> list[tuple[int, Document]]:
        """A document's parts with their sides: 0 trains, 1 is held out.

        Raises:
            UsageError: The only document is too short to be divided.
        """
        if not self.single:
            return [(int(document.digest < self.below), document)]
        parts = _divide_tokens(document, self.share) if isinstance(document, TokenDocument) else None
        parts = parts or _divide_text(document, self.share)  # type: ignore[arg-type]
        return [(0, parts[0]), (1, parts[1])]


def _divide_tokens(document: TokenDocument, share: float) -> tuple[Document, Document]:
    n = len(document.tokens)
    if n < 2:
        raise _too_short()
    at = min(max(1, round(n * (1 - share))), n - 1)
    targets = (None, None) if document.targets is None else (document.targets[:at], document.targets[at:])
    return (
        TokenDocument(document.digest, document.tokens[:at], targets[0]),
        TokenDocument(document.digest, document.tokens[at:], targets[1]),
    )


def _divide_text(document: TextDocument, share: float) -> tuple[Document, Document]:
    """Divide at a line end near the share, reading at most up to there."""
    at, before = min(max(1, round(document.n_bytes * (1 - share))), document.n_bytes - 1), 0
    for piece in document.pieces():
        size = len(piece.encode())
        if before + size >= at:
            break
        before += size
    cut = _place(piece.encode(), at - before)
    if not 0 < before + cut < document.n_bytes:
        raise _too_short()

    def head() -> Iterator[str]:
        return _slice(document, 0, before + cut)

    def tail() -> Iterator[str]:
        return _slice(document, before + cut, document.n_bytes)

    return (
        TextDocument(document.digest, before + cut, head),
        TextDocument(document.digest, document.n_bytes - before - cut, tail),
    )


def _place(data: bytes, at: int) -> int:
    """The line end nearest below `at`, else the next one, else a place between two characters."""
    for found in (data.rfind(b"\n", 0, at), data.find(b"\n", at, len(data) - 1)):
        if found > 0:
            return found + 1
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


def _too_short() -> UsageError:
    return UsageError("data.paths: the only document is too short to hold a part of it out", hint="add more text")
