"""From paths to the files to read, in a fixed order, and what was left out and why."""

from __future__ import annotations

import contextlib
import glob
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from stackwise import files
from stackwise.data.documents import PATHS, Document, Limit, Reading, SkippedFile, row_documents
from stackwise.data.markup import html_file, notebook_file
from stackwise.data.prepared import is_prepared
from stackwise.data.readers import PACKED, arrow_rows, exceeds, json_rows, jsonl_rows, parquet_rows, text_file
from stackwise.errors import NotFound, UsageError

NAMED = 100
"""Skipped files that are named one by one; the rest is counted."""

_STDLIB_WITHOUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "__pycache__"}
)

_ROWS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
_MARKED = {".html": "html", ".htm": "html", ".xhtml": "html", ".ipynb": "notebook"}
"""Text that is taken out of what is around it."""
_MARKUP = (".rtf", ".svg", ".ps", ".eps")
_TABLES = (".csv", ".tsv")
_ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".xz", ".lz4")
_UNFINISHED = ("~", ".bak", ".orig", ".rej", ".swp", ".swo", ".tmp", ".part", ".crdownload", ".incomplete")
_ABOUT = frozenset(
    {"readme", "license", "licence", "copying", "notice", "citation", "changelog", "contributing", "dataset_card"}
)
"""Names, without their suffix, of files that describe a data set and are no part of it."""

_TOOLS = frozenset({"node_modules", "__pycache__", "CVS"})
"""Folders that programs fill; those that begin with a dot are left out anyway."""

_DATASET, _DICT = "state.json", "dataset_dict.json"


@dataclass(frozen=True, slots=True)
class Source:
    """A file to read. `named`: the user named it, so that it must be readable."""

    path: Path
    kind: str
    named: bool

    def documents(
        self, reading: Reading, limit: Limit | None = None, report: Callable[[int], None] | None = None
    ) -> Iterator[Document]:
        """Its documents in order, within a limit. `report` hears how many bytes of a long text file went by."""
        if self.kind.startswith("not "):
            raise SkippedFile(self.kind.removeprefix("not "))
        if self.kind == "text":
            if limit is not None:
                limit.reached = exceeds(self.path, limit.size)
            return text_file(self.path, None if limit is None else limit.size, report, reading)
        if self.kind in _MARKED.values():
            text = (notebook_file if self.kind == "notebook" else html_file)(self.path)
            return text if limit is None else limit.apply(text)
        if self.kind in ("jsonl", "json"):
            rows = jsonl_rows(self.path) if self.kind == "jsonl" else json_rows(self.path)
        else:
            rows = (parquet_rows if self.kind == "parquet" else arrow_rows)(self.path, reading)
        # a folder's .json may be anything; one that was named is meant as rows
        documents = row_documents(rows, reading, only_rows=self.kind == "json" and not self.named)
        return documents if limit is None else limit.apply(documents)


def kind_of(path: Path, *, named: bool) -> str:
    """How a file is read, by its name: "text", "html", "notebook", a kind of rows, or "not " and the reason.

    Args:
        path: The file.
        named: The user named it: then a backup is read, as what it is a backup of.
    """
    name = path.name.lower()
    while ending := next((ending for ending in _UNFINISHED if name.endswith(ending) and name != ending), None):
        if not named:
            return "not a backup, or not finished"
        name = name.removesuffix(ending)
    if name.startswith("#") and name.endswith("#") and not named:
        return "not a backup, or not finished"
    if name.endswith(_ARCHIVES):
        return "not compressed: unpack it first"
    inner, packing = os.path.splitext(name)
    suffix = os.path.splitext(inner)[1] if packing in PACKED else packing
    if suffix in _ARCHIVES or (packing in PACKED and _ROWS.get(suffix) in ("parquet", "arrow")):
        return "not compressed: unpack it first"
    if suffix in _TABLES:
        return "not a table: save it as jsonl or parquet, a row a document"  # a table has no one column of text
    if suffix in _MARKUP:
        return "not plain text: save its text as .txt"
    return _ROWS.get(suffix) or _MARKED.get(suffix, "text")


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

    def extend(self, more: Skipped) -> None:
        """Count what was left out elsewhere."""
        self.reasons += more.reasons
        self.files += more.files[: NAMED - len(self.files)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `count`, `reasons`, `files`."""
        return {"count": self.reasons.total(), "reasons": dict(sorted(self.reasons.items())), "files": self.files}


def find_sources(
    paths: Sequence[str], reading: Reading, *, follow_links: bool = False, setting: str = PATHS
) -> tuple[list[Source], Skipped]:
    """The files behind `paths`: folders recursively and sorted, data set folders by their description.

    A path may be a pattern (`texts/*.txt`, `**` for any folders between), unless a file of that very name exists.

    Args:
        paths: What to read; none: the Python standard library of the running interpreter.
        reading: What makes a row.
        follow_links: Follow links that lead out of a folder, too. A path that is itself a link is always followed.
        setting: What named the paths, for messages.
    """
    if not paths:
        if library := list(_standard_library()):
            return library, Skipped()
        raise UsageError("the Python standard library is here without sources", hint="name text with data.paths")
    finder = _Finder(reading, follow_links, setting)
    for name in paths:
        path = files.expanded(name)
        if glob.has_magic(name) and not os.path.lexists(path):  # a file may have brackets in its name
            finder.pattern(path)
        else:
            finder.path(path)
    if not finder.sources and not finder.skipped.reasons:
        raise UsageError(
            f"{setting}: there is no file in {', '.join(map(str, paths))}",
            hint="put UTF-8 text, jsonl, json or parquet there, or name another folder",
        )
    return list(finder.sources.values()), finder.skipped


class _Finder:
    """Files in the order of the paths, each once, however often it is reached."""

    def __init__(self, reading: Reading, follow_links: bool, setting: str) -> None:
        self.skipped = Skipped()
        self.sources: dict[str, Source] = {}
        """By real path."""
        self._reading, self._follow, self._setting = reading, follow_links, setting
        self._folders: set[tuple[int, int]] = set()

    def path(self, path: Path) -> None:
        """A path that the user named."""
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"{self._setting}: {path} does not exist") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"{self._setting}: {path} cannot be read ({_why(error)})") from None
        if stat.S_ISDIR(mode):
            self._root(path)
        elif stat.S_ISREG(mode):
            self._add(Source(path, kind_of(path, named=True), named=True))
        else:
            raise UsageError(f"{self._setting}: {path} is neither a file nor a folder")

    def pattern(self, pattern: Path) -> None:
        """What fits a pattern, sorted; by it a file is chosen as by its folder, not named."""
        hits = sorted(glob.glob(str(pattern), recursive=True))
        if not hits:
            raise NotFound(f"{self._setting}: nothing fits {pattern}")
        parts = pattern.parts
        fixed = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
        for hit in map(Path, hits):
            self._entry(hit, os.path.realpath(fixed))

    def _root(self, folder: Path) -> None:
        before = set(self.sources)
        self._folder(folder, os.path.realpath(folder), named=True)
        within = [(key, source) for key, source in self.sources.items() if key not in before]
        about = [entry for entry in within if entry[1].path.name.lower().partition(".")[0] in _ABOUT]
        # beside rows they describe the data set; beside texts they are texts
        if about and any(self._holds_rows(source) for _, source in within):
            for key, source in about:
                if source.kind == "text":
                    del self.sources[key]
                    self.skipped.add(source.path, "about the data set")

    def _holds_rows(self, source: Source) -> bool:
        if source.kind != "json":
            return source.kind in _ROWS.values()
        with contextlib.suppress(SkippedFile, UsageError, OSError):
            return next(source.documents(self._reading), None) is not None
        return False

    def _add(self, source: Source) -> None:
        key = os.path.realpath(source.path)  # two links to one file are one document
        if self.sources.setdefault(key, source) is not source:
            self.skipped.add(source.path, "named twice")

    def _folder(self, folder: Path, root: str, *, named: bool = False) -> None:
        """Files below a folder, sorted. Links within `root` lead to what is read once anyway."""
        if is_dataset(folder):
            used, unused = dataset_files(folder)
            for split in unused:
                self.skipped.add(folder / split, "not the train split of its data set")
            for file in used:
                if self._may_follow(file, root):
                    self._add(Source(file, "arrow", named=True))
            return
        if not named and is_prepared(folder):
            self.skipped.add(folder, "a prepared data set")  # its tokens are no text
            return
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if named:
                raise UsageError(f"{self._setting}: {folder} cannot be read ({_why(error)})") from None
            self.skipped.add(folder, "unreadable")
            return
        if (here := (status.st_dev, status.st_ino)) in self._folders:  # links within a folder may go round in circles
            self.skipped.add(folder, "named twice")
            return
        self._folders.add(here)
        for entry in entries:
            if entry.name.startswith("."):
                self.skipped.add(folder / entry.name, "hidden", name=False)
            else:
                self._entry(folder / entry.name, root)

    def _entry(self, path: Path, root: str) -> None:
        if not self._may_follow(path, root):
            return
        if os.path.isdir(path):
            if path.name in _TOOLS:  # code of others, not the user's text
                self.skipped.add(path, "a folder of tools")
            else:
                self._folder(path, root)
        elif os.path.isfile(path):
            self._add(Source(path, kind_of(path, named=False), named=False))
        else:
            self.skipped.add(path, "a broken link" if path.is_symlink() else "not a file")

    def _may_follow(self, path: Path, root: str) -> bool:
        if self._follow:
            return True
        real = os.path.realpath(path)
        if real == root or real.startswith(root.rstrip("/") + "/") or not os.path.exists(path):
            return True
        self.skipped.add(path, "a link out of its folder (see data.follow_links)")
        return False


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a Hugging Face data set, or a dictionary of them, as `save_to_disk` writes it."""
    # os.path: a folder that may not be looked into is none
    return os.path.isfile(folder / _DICT) or (os.path.isfile(folder / _DATASET) and any(folder.glob("*.arrow")))


def dataset_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The Arrow files of a data set in order, and the names of the splits that are left out.

    Of a dictionary with a `train` split only that is read: the others are there to be kept from training.
    """
    if not (folder / _DICT).is_file():
        return _arrow_files(folder), []
    splits = _describe(folder / _DICT).get("splits")
    if not isinstance(splits, list) or not splits or not all(_plain(name) for name in splits):
        raise UsageError(f"{folder / _DICT}: names no splits")
    used = ["train"] if "train" in splits else splits  # test splits stay out of training
    return [file for name in used for file in _arrow_files(folder / name)], [x for x in splits if x not in used]


def _arrow_files(folder: Path) -> list[Path]:
    state = _describe(folder / _DATASET)
    if state.get("_indices_data_files"):
        raise UsageError(f"{folder}: saved with an indices mapping", hint="save it again after flatten_indices()")
    entries = state.get("_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in _list(entries)]
    if not names or not all(_plain(name) for name in names):
        raise UsageError(f"{folder / _DATASET}: names no data files")
    for name in names:
        if not (folder / str(name)).is_file():
            raise NotFound(f"{folder / str(name)}: missing, though {_DATASET} names it")
    return [folder / str(name) for name in names]


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _plain(name: object) -> bool:
    """Whether a name from a file is one component of a path and nothing more."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _describe(path: Path) -> dict[str, Any]:
    try:
        value = files.read_json(Path(os.path.realpath(path)))
    except FileNotFoundError:
        raise NotFound(f"{path}: missing; {path.parent} is not a whole data set folder") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({_why(error)})") from None
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: not a JSON object")
    return value


def _standard_library() -> Iterator[Source]:
    """Sources of the standard library, the same for every installation of one interpreter version."""
    root = Path(sysconfig.get_path("stdlib"))
    for folder, names, entries in os.walk(root):
        names[:] = sorted(set(names) - _STDLIB_WITHOUT)
        if Path(folder) == root:
            names[:] = [name for name in names if not name.startswith("config-")]
        yield from map(
            partial(Source, kind="text", named=False),
            # _sysconfigdata records how this one build was configured
            (Path(folder, f) for f in sorted(entries) if f.endswith(".py") and not f.startswith("_sysconfigdata")),
        )
