"""The first pass over a corpus: what it holds, its identity, and which documents are held out.

Nothing here keeps more than a few numbers for a file, so that a corpus may have any number of documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from stackwise.data.documents import Document, Limit, SkippedFile, TextDocument, TokenDocument
from stackwise.data.memo import Memo
from stackwise.data.sources import Skipped, Source
from stackwise.errors import UsageError

Progress = Callable[[str, int, int | None], None]
"""Called as progress(phase, done, total or None)."""

_READING = 1
"""Version of the readers: raise it when a file is read into other documents than before."""

_MODULUS = (1 << 127) - 1
_BASE = 0x5DEECE66D_2545F4914F6CDD1D_9E3779B9 % _MODULUS | 1
_ALL = 1 << 128


@dataclass(frozen=True)
class Contents:
    """What a run of documents holds. `a + b` is the contents of a's documents followed by b's.

    `sequence` is a polynomial hash of the documents' digests in order: it does not depend on how they were spread
    over files, and needs no list of them.
    """

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    sequence: int = 0
    lowest: int = _ALL
    highest: int = -1
    texts: int = 0
    targeted: int = 0
    largest_id: int = -1

    @classmethod
    def of(cls, document: Document) -> Self:
        """The contents of one document."""
        d = document.digest
        if isinstance(document, TextDocument):
            return cls(1, document.n_bytes, 0, d % _MODULUS, d, d, texts=1)
        ids = [document.tokens] if document.targets is None else [document.tokens, document.targets]
        largest = max(int(array.max()) for array in ids)
        targeted = int(document.targets is not None)
        return cls(1, 0, len(document.tokens), d % _MODULUS, d, d, targeted=targeted, largest_id=largest)

    def __add__(self, after: Contents) -> Contents:
        return Contents(
            self.documents + after.documents,
            self.text_bytes + after.text_bytes,
            self.tokens + after.tokens,
            (self.sequence * pow(_BASE, after.documents, _MODULUS) + after.sequence) % _MODULUS,
            min(self.lowest, after.lowest),
            max(self.highest, after.highest),
            self.texts + after.texts,
            self.targeted + after.targeted,
            max(self.largest_id, after.largest_id),
        )

    @property
    def size(self) -> int:
        """Bytes of input; a token counts as four."""
        return self.text_bytes + 4 * self.tokens


@dataclass(frozen=True)
class Part:
    """A source that is read, up to `limit` bytes, and what the first pass found in it."""

    source: Source
    limit: int | None
    contents: Contents


@dataclass(frozen=True)
class Corpus:
    """The parts of a corpus in order."""

    parts: tuple[Part, ...]
    contents: Contents
    column: str
    skipped: Skipped = field(compare=False)

    @property
    def has_text(self) -> bool:
        """Whether the documents are text; else they are rows of tokens."""
        return self.contents.texts > 0

    @property
    def has_targets(self) -> bool:
        """Whether the rows bring targets."""
        return self.contents.targeted > 0

    def documents(self) -> Iterator[Document]:
        """Every document in order, read again.

        Raises:
            UsageError: A file is not what it was in the first pass.
        """
        for part in self.parts:
            seen = Contents()
            try:
                limit = None if part.limit is None else Limit(part.limit)
                for document in part.source.documents(self.column, limit):
                    seen += Contents.of(document)
                    yield document
            except (SkippedFile, OSError) as error:
                raise _changed(part.source, str(error)) from None
            if seen != part.contents:
                raise _changed(part.source, "its content differs")


def _changed(source: Source, why: str) -> UsageError:
    return UsageError(f"{source.path}: changed while it was read ({why})", hint="run the same command again")


def scan(
    sources: list[Source], skipped: Skipped, column: str, max_bytes: int | None, memo: Memo, progress: Progress
) -> Corpus:
    """Read every source once (or remember it) and add up what there is.

    Raises:
        UsageError: A source is faulty, nothing is left to train on, or texts and rows of tokens are mixed.
    """
    total = sum(_stat_size(source) for source in sources)
    parts, contents, left, done = [], Contents(), max_bytes, 0
    for source in sources:
        progress("reading", done, total)
        found, cut = _scan_one(source, column, left, memo, skipped)
        done += _stat_size(source)
        if found.documents:
            parts.append(Part(source, left, found))
            contents += found
        if left is not None and (cut or (left := left - found.size) <= 0):
            break
    progress("reading", total, total)
    corpus = Corpus(tuple(parts), contents, column, skipped)
    _check(corpus, len(sources))
    return corpus


def _stat_size(source: Source) -> int:
    try:
        return source.path.stat().st_size
    except OSError:
        return 0


def _scan_one(source: Source, column: str, left: int | None, memo: Memo, skipped: Skipped) -> tuple[Contents, bool]:
    """A source's contents within `left` bytes, and whether it was cut to stay within."""
    try:
        status = source.path.stat()
        whole = left is None or (source.kind == "text" and status.st_size <= left)
        reading = f"{_READING} {source.kind} {'' if source.kind == 'text' else column} {None if whole else left}"
        value = memo.get(source.path, status, reading)
        if value is None:
            value = _read(source, column, left)
            memo.put(source.path, status, reading, value)
    except PermissionError as error:
        if source.named:
            raise UsageError(f"{source.path}: cannot be read ({error.strerror})") from None
        value = {"skip": "unreadable"}
    except OSError as error:
        raise UsageError(f"{source.path}: cannot be read ({error.strerror or error})") from None
    if "skip" in value:
        skipped.add(source.path, value["skip"])
        return Contents(), False
    return Contents(**value["contents"]), value["cut"]


def _read(source: Source, column: str, left: int | None) -> dict[str, Any]:
    contents, limit = Contents(), None if left is None else Limit(left)
    try:
        for document in source.documents(column, limit):
            contents += Contents.of(document)
    except SkippedFile as error:
        return {"skip": str(error)}
    cut = limit is not None and limit.reached
    return {"contents": asdict(contents), "cut": cut} if contents.documents or cut else {"skip": "empty"}


def _check(corpus: Corpus, sources: int) -> None:
    found = corpus.contents
    if not found.documents:
        reasons = ", ".join(f"{count} {why}" for why, count in sorted(corpus.skipped.reasons.items()))
        raise UsageError(
            f"data.paths: no text in {sources} file{'s' if sources != 1 else ''}" + (f" ({reasons})" * bool(reasons)),
            hint="name files or folders of UTF-8 text, jsonl, parquet or a Hugging Face data set",
        )
    if 0 < found.texts < found.documents:
        raise UsageError("data.paths: some rows bring text and some input_ids; a corpus is one or the other")
    if 0 < found.targeted < found.documents:
        raise UsageError("data.paths: some rows bring targets and some do not; all or none may")


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
        chosen = cls(share, int(share * _ALL), contents.documents == 1)
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
    at, before = round(document.n_bytes * (1 - share)), 0
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
    while at > 0 and at < len(data) and data[at] & 0xC0 == 0x80:
        at -= 1
    return at


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
