"""From paths to the files to read, in a fixed order, and what was left out and why."""

from __future__ import annotations

import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from stackwise.data import arrow
from stackwise.data.documents import Document, Limit, jsonl_rows, row_documents, text_file
from stackwise.data.prepared import is_prepared
from stackwise.errors import NotFound, UsageError

NAMED = 100
"""Skipped files that are named one by one; the rest is counted."""

_STDLIB_WITHOUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "__pycache__"}
)


@dataclass(frozen=True, slots=True)
class Source:
    """A file to read. `named`: the user named it, so that it must be readable."""

    path: Path
    kind: str
    named: bool

    def documents(
        self, column: str, limit: Limit | None = None, tell: Callable[[int], None] | None = None
    ) -> Iterator[Document]:
        """Its documents in order, within a limit. `tell` hears how many bytes of a long text file went by.

        Raises:
            SkippedFile: It holds no text.
            UsageError: It is faulty.
            OSError: It cannot be read.
        """
        if self.kind == "text":
            if limit is None:
                return text_file(self.path, None, tell)
            limit.reached = self.path.stat().st_size > limit.size
            return text_file(self.path, limit.size, tell)
        documents = row_documents(_ROWS[self.kind](self.path, column), column)
        return documents if limit is None else limit.apply(documents)


_ROWS: dict[str, Callable[[Path, str], Iterator[tuple[str, Mapping[str, Any]]]]] = {
    "jsonl": lambda path, _: jsonl_rows(path),
    "parquet": arrow.parquet_rows,
    "arrow": arrow.arrow_rows,
}
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}


@dataclass
class Skipped:
    """What was left out: how many for each reason, and the first of them by name."""

    reasons: Counter[str] = field(default_factory=Counter)
    files: list[dict[str, str]] = field(default_factory=list)

    def add(self, path: Path, why: str, *, name: bool = True) -> None:
        """Count a file (or folder) that is left out; hidden ones are not worth naming."""
        self.reasons[why] += 1
        if name and len(self.files) < NAMED:
            self.files.append({"path": os.fsencode(path).decode(errors="replace"), "why": why})

    def to_dict(self) -> dict[str, object]:
        """Plain data: `count`, `reasons`, `files`."""
        return {"count": self.reasons.total(), "reasons": dict(sorted(self.reasons.items())), "files": self.files}


def find_sources(paths: Sequence[str]) -> tuple[list[Source], Skipped]:
    """The files behind `paths`: folders recursively and sorted, data set folders by their description.

    Empty `paths`: the Python standard library of the running interpreter.

    Raises:
        NotFound: A path does not exist.
        UsageError: A path is neither file nor folder, or its folder cannot be read; there is no standard library.
    """
    skipped = Skipped()
    if not paths:
        if library := list(_standard_library()):
            return library, skipped
        raise UsageError("the Python standard library is here without sources", hint="name text with data.paths")
    found: dict[str, Source] = {}
    for name in paths:
        path = Path(name).expanduser()
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"data.paths: {path} does not exist") from None
        except OSError as error:
            raise UsageError(f"data.paths: {path} cannot be read ({error.strerror})") from None
        if stat.S_ISDIR(mode):
            sources = list(_folder(path, skipped, set(), named=True))
        elif stat.S_ISREG(mode):
            sources = [Source(path, _KINDS.get(path.suffix.lower(), "text"), named=True)]
        else:
            raise UsageError(f"data.paths: {path} is neither a file nor a folder")
        for source in sources:
            if found.setdefault(os.path.abspath(source.path), source) is not source:
                skipped.add(source.path, "named twice")
    return list(found.values()), skipped


def _folder(folder: Path, skipped: Skipped, above: set[tuple[int, int]], *, named: bool = False) -> Iterator[Source]:
    """Files below a folder, sorted; links are followed, but never into a folder that they are in."""
    if arrow.is_dataset(folder):
        files, unused = arrow.dataset_files(folder)
        for split in unused:
            skipped.add(folder / split, "not the train split of its data set")
        yield from (Source(file, "arrow", named=True) for file in files)
        return
    if not named and is_prepared(folder):
        skipped.add(folder, "a prepared data set")
        return
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        skipped.add(folder, "a link to a folder above it")
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        if named:
            raise UsageError(f"data.paths: {folder} cannot be read ({error.strerror})") from None
        skipped.add(folder, "unreadable")
        return
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith("."):
            skipped.add(path, "hidden", name=False)
            continue
        try:
            folder_there, file_there = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            folder_there = file_there = False
        if folder_there:
            yield from _folder(path, skipped, above | {here})
        elif file_there:
            yield Source(path, _KINDS.get(path.suffix.lower(), "text"), named=False)
        else:
            skipped.add(path, "a broken link" if entry.is_symlink() else "not a file")


def _standard_library() -> Iterator[Source]:
    """Sources of the standard library, the same for every installation of one interpreter version."""
    root = Path(sysconfig.get_path("stdlib"))
    for folder, names, files in os.walk(root):
        names[:] = sorted(set(names) - _STDLIB_WITHOUT)
        if Path(folder) == root:
            names[:] = [name for name in names if not name.startswith("config-")]
        yield from map(
            partial(Source, kind="text", named=False),
            # _sysconfigdata records how this one build was configured
            (Path(folder, f) for f in sorted(files) if f.endswith(".py") and not f.startswith("_sysconfigdata")),
        )
