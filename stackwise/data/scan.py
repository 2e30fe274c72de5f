"""The first pass over a corpus: what it holds, and its identity.

Nothing here keeps more than a few numbers for a file, so that a corpus may have any number of documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from stackwise.data.contents import Contents
from stackwise.data.documents import Document, Limit, SkippedFile, size_of
from stackwise.data.memo import Memo
from stackwise.data.sources import Skipped, Source
from stackwise.errors import UsageError

Progress = Callable[[str, int, int | None], None]
"""Called as progress(phase, done, total or None)."""

_READING = 1
"""Version of the readers: raise it when a file is read into other documents than before."""

_TELL_EVERY = 16 << 20


@dataclass(frozen=True)
class Part:
    """A source that is read, up to `limit` bytes, and what the first pass found in it."""

    source: Source
    limit: int | None
    contents: Contents

    def documents(self, column: str) -> Iterator[Document]:
        """Its documents, read again.

        Raises:
            UsageError: It is not what it was in the first pass.
        """
        seen = Contents()
        limit = None if self.limit is None else Limit(self.limit)
        try:
            for document in self.source.documents(column, limit):
                seen.add(document)
                yield document
        except (SkippedFile, UnicodeDecodeError, OSError) as error:
            raise self._changed(str(error)) from None
        if seen != self.contents:
            raise self._changed("its content differs")

    def _changed(self, why: str) -> UsageError:
        return UsageError(f"{self.source.path}: changed while it was read ({why})", hint="run the same command again")


@dataclass(frozen=True)
class Corpus:
    """The parts of a corpus in order."""

    parts: tuple[Part, ...]
    contents: Contents
    column: str
    skipped: Skipped

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
            yield from part.documents(self.column)


def scan(
    sources: list[Source], skipped: Skipped, column: str, max_bytes: int | None, memo: Memo, progress: Progress
) -> Corpus:
    """Read every source once (or remember it) and add up what there is.

    Raises:
        UsageError: A source is faulty, nothing is left to train on, or texts and rows of tokens are mixed.
    """
    sizes = [_stat_size(source) for source in sources]
    total, done, left = sum(sizes), 0, max_bytes
    parts, contents = [], Contents()
    for source, size in zip(sources, sizes, strict=True):
        tell = _Teller(progress, done, min(done + size, total), total)
        found, cut = _scan_one(source, column, left, memo, skipped, tell)
        done += size
        if found.documents:
            parts.append(Part(source, left, found))
            contents.extend(found)
        if left is not None and (cut or (left := left - found.size) <= 0):
            break
    progress("reading", total, total)
    corpus = Corpus(tuple(parts), contents, column, skipped)
    _check(corpus, len(sources))
    return corpus


class _Teller:
    """Tells the progress within one file: at once, then as bytes go by."""

    def __init__(self, progress: Progress, start: int, stop: int, total: int) -> None:
        self._progress, self._at, self._stop, self._total = progress, start, stop, total
        self._next = start + _TELL_EVERY
        progress("reading", start, total)

    def __call__(self, size: int) -> None:
        self._at += size
        if self._at >= self._next:
            self._next = self._at + _TELL_EVERY
            # what a compressed file holds is more than its size
            self._progress("reading", min(self._at, self._stop), self._total)


def _stat_size(source: Source) -> int:
    try:
        return source.path.stat().st_size
    except OSError:
        return 0


def _scan_one(
    source: Source, column: str, left: int | None, memo: Memo, skipped: Skipped, tell: _Teller
) -> tuple[Contents, bool]:
    """A source's contents within `left` bytes, and whether it was cut to stay within."""
    try:
        status = source.path.stat()
        whole = left is None or (source.kind == "text" and status.st_size <= left)
        reading = f"{_READING} {source.kind} {'' if source.kind == 'text' else column} {None if whole else left}"
        value = memo.get(source.path, status, reading)
        if value is None:
            value = _read(source, column, left, tell)
            memo.put(source.path, status, reading, value)
    except OSError as error:
        if source.named:
            raise UsageError(f"{source.path}: cannot be read ({error.strerror or error})") from None
        value = {"skip": "unreadable"}
    if "skip" in value:
        skipped.add(source.path, value["skip"])
        return Contents(), False
    return Contents(**value["contents"]), value["cut"]


def _read(source: Source, column: str, left: int | None, tell: _Teller) -> dict[str, Any]:
    contents, limit = Contents(), None if left is None else Limit(left)
    try:
        for document in source.documents(column, limit, tell):
            contents.add(document)
            if source.kind != "text":
                tell(size_of(document))
    except SkippedFile as error:
        return {"skip": str(error)}
    cut = limit is not None and limit.reached
    return {"contents": asdict(contents), "cut": cut} if contents.documents or cut else {"skip": "empty"}


def _check(corpus: Corpus, sources: int) -> None:
    found = corpus.contents
    if not found.documents:
        reasons = ", ".join(f"{count} {why}" for why, count in sorted(corpus.skipped.reasons.items()))
        raise UsageError(
            f"data.paths: no text in {sources} file{'s' if sources != 1 else ''}"
            + (f" ({reasons})" if reasons else ""),
            hint="name files or folders of UTF-8 text, jsonl, parquet or a Hugging Face data set",
        )
    if 0 < found.texts < found.documents:
        raise UsageError("data.paths: some rows bring text and some input_ids; a corpus is one or the other")
    if 0 < found.targeted < found.documents:
        raise UsageError("data.paths: some rows bring targets and some do not; all or none may")
