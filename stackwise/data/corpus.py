"""The first pass over a corpus: what it holds, and its identity, remembered file by file.

Nothing here keeps more than a few numbers for a file, so that a corpus may have any number of documents.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stackwise.data.documents import (
    DIGESTS,
    PATHS,
    TARGETS,
    Document,
    HeldOut,
    Limit,
    Reading,
    SkippedFile,
    TextDocument,
    size_of,
)
from stackwise.data.readers import PACKED
from stackwise.data.sources import Skipped, Source
from stackwise.errors import UsageError
from stackwise.files import IrregularFile, open_regular
from stackwise.identity import digest

Progress = Callable[[str, int, int | None], None]
"""Called as progress(phase, done, total or None)."""

_READING = 2
"""Version of the readers: raise it when a file is read into other documents than before."""

_REPORT_EVERY = 16 << 20


# What documents add up to.

_MODULUS = (1 << 127) - 1
_BASE = 0x5DEECE66D_2545F4914F6CDD1D_9E3779B9 % _MODULUS


@dataclass
class Contents:
    """Documents counted up one by one, or run by run.

    `sequence` is a polynomial hash of their digests in order: it does not depend on how they are spread over files,
    and needs no list of them. `lowest` and `highest` are the digests' bounds, `largest_id` the largest token id.
    `columns` counts the documents that bring each named column, `fractions` those where it holds fractions.
    """

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    sequence: int = 0
    lowest: int = DIGESTS
    highest: int = -1
    texts: int = 0
    largest_id: int = -1
    columns: Counter[str] = field(default_factory=Counter)
    fractions: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        # from JSON they come as plain dictionaries
        self.columns, self.fractions = Counter(self.columns), Counter(self.fractions)
        self.remarks = Counter(self.remarks)

    def add(self, document: Document) -> None:
        """Count one more document."""
        value = document.digest
        self.documents += 1
        self.sequence = (self.sequence * _BASE + value) % _MODULUS
        if value < self.lowest:
            self.lowest = value
        if value > self.highest:
            self.highest = value
        self.remarks.update(document.remarks)
        if isinstance(document, TextDocument):
            self.texts += 1
            self.text_bytes += document.n_bytes
            return
        self.tokens += len(document.tokens)
        self.largest_id = max(self.largest_id, int(document.tokens.max()))
        for name, values in document.columns.items():
            self.columns[name] += 1
            if values.dtype.kind == "f":
                self.fractions[name] += 1
            if name == TARGETS:  # they are ids too: the vocabulary must hold them
                self.largest_id = max(self.largest_id, int(values.max()))

    def extend(self, after: Contents) -> None:
        """Count a run of documents that follow."""
        self.sequence = (self.sequence * pow(_BASE, after.documents, _MODULUS) + after.sequence) % _MODULUS
        self.documents += after.documents
        self.text_bytes += after.text_bytes
        self.tokens += after.tokens
        self.lowest = min(self.lowest, after.lowest)
        self.highest = max(self.highest, after.highest)
        self.texts += after.texts
        self.largest_id = max(self.largest_id, after.largest_id)
        self.columns += after.columns
        self.fractions += after.fractions
        self.remarks += after.remarks

    @property
    def size(self) -> int:
        """Bytes of input; a token counts as four."""
        return self.text_bytes + 4 * self.tokens


# The first pass.


@dataclass(frozen=True)
class Part:
    """A source that is read, up to `limit` bytes, and what the first pass found in it."""

    source: Source
    limit: int | None
    contents: Contents

    def documents(self, reading: Reading) -> Iterator[Document]:
        """Its documents, read again."""
        seen = Contents()
        limit = None if self.limit is None else Limit(self.limit)
        try:
            for document in self.source.documents(reading, limit):
                seen.add(document)
                yield document
        except (SkippedFile, UnicodeDecodeError, OSError) as error:
            raise self._changed(str(error)) from None
        if seen != self.contents:
            raise self._changed("its content differs")

    def _changed(self, why: str) -> UsageError:
        return UsageError(f"{self.source.path}: changed while it was read ({why})", hint="run the same command again")


@dataclass(frozen=True)
class Task:
    """The parts of a task in order; of a corpus without tasks all that there is, without a name."""

    name: str
    parts: tuple[Part, ...]
    contents: Contents

    @property
    def setting(self) -> str:
        """What named its documents, for messages."""
        return task_setting(self.name)


def task_setting(name: str) -> str:
    """The setting that names the documents of a task."""
    return f"data.tasks: {name}" if name else PATHS


@dataclass(frozen=True)
class Corpus:
    """The tasks of a corpus in order: one after another, so that documents of each stand together."""

    tasks: tuple[Task, ...]
    contents: Contents
    reading: Reading
    skipped: Skipped

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of its tasks; none where it has no tasks."""
        return tuple(task.name for task in self.tasks if task.name)

    @property
    def has_text(self) -> bool:
        """Whether the documents are text; else they are rows of tokens."""
        return self.contents.texts > 0

    @property
    def columns(self) -> dict[str, str]:
        """The named columns that the rows bring, and how each is stored: a numpy type."""
        return {
            name: "<i4" if name == TARGETS else "<f4" if self.contents.fractions[name] else "<i8"
            for name in sorted(self.contents.columns)
        }

    def notes(self) -> list[str]:
        """What was brought and not used, a line a reason."""
        return [f"{reason} ({number:,})" for reason, number in sorted(self.contents.remarks.items())]

    def divided(self, held_out: Sequence[HeldOut]) -> Iterator[tuple[int, int, Document]]:
        """Every document's parts in order, read again, each with its task's number and its side (`HeldOut.divide`).

        Args:
            held_out: What is held out of each task.
        """
        for number, (task, chosen) in enumerate(zip(self.tasks, held_out, strict=True)):
            for part in task.parts:
                for document in part.documents(self.reading):
                    for side, piece in chosen.divide(document):
                        yield number, side, piece


def scan(
    sources: Mapping[str, list[Source]],
    skipped: Skipped,
    reading: Reading,
    *,
    max_bytes: int | None,
    memory: Memory,
    progress: Progress,
) -> Corpus:
    """Read every source once (or remember it) and add up what there is.

    Args:
        sources: The files of each task by its name; without tasks all of them under an empty one.
        skipped: What is left out, added to.
        reading: What makes a row.
        max_bytes: Of each task read at most so many; None: all.
        memory: What files were found to hold.
        progress: Called with "reading" and bytes.
    """
    sizes = {name: [_stat_size(source) for source in group] for name, group in sources.items()}
    total, done = sum(map(sum, sizes.values())), 0
    tasks, contents = [], Contents()
    for name, group in sources.items():
        left = max_bytes
        parts, of_task = [], Contents()
        for source, size in zip(group, sizes[name], strict=True):
            reporter = _Reporter(progress, done, min(done + size, total), total)
            in_source, was_cut = _scan_one(source, reading, left, memory, skipped, reporter)
            done += size
            if in_source.documents:
                parts.append(Part(source, left, in_source))
                of_task.extend(in_source)
            if left is not None and (was_cut or (left := left - in_source.size) <= 0):  # max_bytes is used up
                break
        tasks.append(Task(name, tuple(parts), of_task))
        contents.extend(of_task)
        _check_text(tasks[-1], len(group), skipped)
    progress("reading", total, total)
    corpus = Corpus(tuple(tasks), contents, reading, skipped)
    _check(corpus)
    return corpus


class _Reporter:
    """Reports the progress within one file: at once, then as bytes go by."""

    def __init__(self, progress: Progress, start: int, stop: int, total: int) -> None:
        self._progress, self._at, self._stop, self._total = progress, start, stop, total
        self._next = start + _REPORT_EVERY
        progress("reading", start, total)

    def __call__(self, size: int) -> None:
        self._at += size
        if self._at >= self._next:
            self._next = self._at + _REPORT_EVERY
            # what a compressed file holds is more than its size
            self._progress("reading", min(self._at, self._stop), self._total)


def _stat_size(source: Source) -> int:
    try:
        return source.path.stat().st_size
    except OSError:
        return 0


def _scan_one(
    source: Source, reading: Reading, left: int | None, memory: Memory, skipped: Skipped, report: _Reporter
) -> tuple[Contents, bool]:
    """A source's contents within `left` bytes, and whether it was cut to stay within."""
    try:
        status = source.path.stat()
        packed = source.path.suffix.lower() in PACKED  # then it may hold more than its size
        whole = left is None or (source.kind == "text" and not packed and status.st_size <= left)
        how = f"{_READING} {source.kind} {source.named} {reading} {None if whole else left}"
        value = memory.get(source.path, status, how)
        if value is None:
            value = _read(source, reading, left, report)
            memory.put(source.path, status, how, value)
    except OSError as error:
        if source.named:
            raise UsageError(f"{source.path}: cannot be read ({error.strerror or error})") from None
        value = {"skip": "unreadable"}
    if "skip" in value:
        skipped.add(source.path, value["skip"])
        return Contents(), False
    return Contents(**value["contents"]), value["cut"]


def _read(source: Source, reading: Reading, left: int | None, report: _Reporter) -> dict[str, Any]:
    contents, limit = Contents(), None if left is None else Limit(left)
    try:
        for document in source.documents(reading, limit, report):
            contents.add(document)
            if source.kind != "text":
                report(size_of(document))
    except SkippedFile as error:
        return {"skip": str(error)}
    cut = limit is not None and limit.reached
    return {"contents": dict(vars(contents)), "cut": cut} if contents.documents or cut else {"skip": "empty"}


def _check_text(task: Task, sources: int, skipped: Skipped) -> None:
    if not task.contents.documents:
        reasons = ", ".join(f"{count} {why}" for why, count in sorted(skipped.reasons.items()))
        raise UsageError(
            f"{task.setting}: no text in {sources} file{'s' if sources != 1 else ''}"
            + (f" ({reasons})" if reasons else ""),
            hint="name files or folders of UTF-8 text, jsonl, json, parquet or a Hugging Face data set",
        )


def _check(corpus: Corpus) -> None:
    contents = corpus.contents
    if 0 < contents.texts < contents.documents:  # one tokenizer cannot be asked of both
        raise UsageError("data.paths: some rows bring text and some input_ids; a corpus is one or the other")
    for name in dict.fromkeys((*corpus.reading.columns, *contents.columns)):
        bring = contents.columns[name]
        if bring == 0 and corpus.reading.chat is not None:
            raise UsageError(
                f"data.paths: no conversations, and no row of input_ids brings {name}, which the objective needs",
                hint="name jsonl, json or parquet of messages, prompt and completion, or prompt, chosen and rejected",
            )
        if bring == 0:
            raise UsageError(
                f"data.columns: no row brings {name!r}", hint="columns are of rows of input_ids, one value a token"
            )
        if bring < contents.documents:
            raise UsageError(f"data.paths: some rows bring {name} and some do not; all or none may")


# What files were found to hold, remembered so that an unchanged corpus is not read again.

SETTLED_NS = 2_000_000_000
"""A file changed less than this ago may change again within the resolution of its time: it is not remembered."""

HELD = 1024
"""Files that are held before they are written down together."""

_OTHERS = ("locked", "readonly", "unable to open")
"""In SQLite's words: nothing is damaged, but it is not ours to use now."""

_SCHEMA = "CREATE TABLE IF NOT EXISTS files (key TEXT PRIMARY KEY, stamp TEXT NOT NULL, value TEXT NOT NULL)"


class Memory:
    """What files were found to hold. A file is recognised by path, size, modification time and inode.

    It is a convenience: where it is missing or locked, files are read; where it is damaged, it is made anew.

    Args:
        path: The SQLite file, which may be missing; None: forget everything.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._new: list[tuple[str, str, str]] = []
        if path is not None and os.path.lexists(path):
            try:
                os.close(open_regular(path))  # SQLite would follow a link, and wait for a FIFO
                self._db = _open(path)
            except (IrregularFile, sqlite3.DatabaseError) as error:
                if isinstance(error, sqlite3.OperationalError) and any(word in str(error) for word in _OTHERS):
                    self._path = None
                else:
                    self._renew()
            except OSError:
                self._path = None  # not ours to read

    def _renew(self) -> None:
        """Begin anew in place of what is damaged; where that cannot be, without a memory."""
        if self._db is not None:
            self._db.close()
            self._db = None
        with contextlib.suppress(sqlite3.Error, OSError):
            if self._path is not None:
                self._path.unlink(missing_ok=True)
                self._db = _open(self._path)

    def get(self, path: Path, status: os.stat_result, how: str) -> Any | None:
        """What was remembered of a file read in a certain way, or None."""
        if self._db is None:
            return None
        key, stamp = _key(path, how), _stamp(status)
        try:
            row = self._db.execute("SELECT stamp, value FROM files WHERE key = ?", (key,)).fetchone()
            if row is None or row[0] != stamp:
                return None
            seal, _, value = row[1].partition(" ")
            # a changed byte in a number would be believed, and the corpus taken for changed, for ever
            return json.loads(value) if seal == _seal(key, stamp, value) else None
        except sqlite3.OperationalError:  # locked: it is another's turn
            return None
        except (sqlite3.Error, ValueError, AttributeError, TypeError):
            self._renew()
            return None

    def put(self, path: Path, status: os.stat_result, how: str, value: Any) -> None:
        """Remember a file; `status` is from before it was read."""
        if time.time_ns() - status.st_mtime_ns >= SETTLED_NS:
            key, stamp, text = _key(path, how), _stamp(status), json.dumps(value)
            self._new.append((key, stamp, f"{_seal(key, stamp, text)} {text}"))
            if self._db is not None and len(self._new) >= HELD:
                self._flush()

    def _flush(self) -> None:
        # one short transaction: another process never waits for a file to be read
        for again in (False, True):
            try:
                if self._db is not None and self._new:
                    with self._db:
                        self._db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", self._new)
                break
            except sqlite3.OperationalError:
                break
            except sqlite3.Error:
                if again:
                    break
                self._renew()
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
def open_memory(path: Path | None) -> Iterator[Memory]:
    """A memory for the length of a block. Where the block fails, what was put is kept, but nothing is created."""
    memory = Memory(path)
    done = False
    try:
        yield memory
        done = True
    finally:
        memory.close(create=done)


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=5.0)
    try:
        db.execute(_SCHEMA)
        db.execute("SELECT key, stamp, value FROM files LIMIT 1").fetchone()  # another table of that name is none
    except sqlite3.OperationalError as error:
        db.close()
        if "no such column" in str(error):
            raise sqlite3.DatabaseError("another table") from None
        raise
    except sqlite3.Error:
        db.close()
        raise
    return db


def _key(path: Path, how: str) -> str:
    return f"{os.path.abspath(path)}\0{how}".encode(errors="surrogateescape").hex()


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino} {status.st_dev}"


def _seal(key: str, stamp: str, value: str) -> str:
    return digest(f"{key}\0{stamp}\0{value}".encode(errors="surrogatepass"))
