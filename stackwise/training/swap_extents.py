"""Files of many pieces: the experts of a block lie in two of them, so that one fsync a step makes all of each durable.

    PART.state, PART.gradients    safetensors images, each from a page on; what lies where, a table says

Of a file only the pieces that are handed in are written, each where there is room: never over what the published table
counts on. So a kill or a power loss finds that table's pieces whole. A file has room for the pieces that are there and
for those of one step once more.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from torch import Tensor

from stackwise import durable, files
from stackwise.files import file_digest
from stackwise.training.lanes import Buffers
from stackwise.training.pinned import PAGE
from stackwise.training.tensor_files import TensorFile, nbytes_of, write_within

Tensors = dict[str, Tensor]
Key = tuple[str, str]  # of a file: a kind and a part; of what lies in it: a kind and a piece
Table = Mapping[str, Sequence[int | str]]


@dataclass(frozen=True)
class Extent:
    """Where something of a piece lies."""

    update: int  # the update that it is of
    begin: int  # bytes from the file's start, a multiple of `PAGE`
    nbytes: int
    digest: str = ""  # xxh3-128

    @property
    def end(self) -> int:
        """The page after it."""
        return self.begin + -(-self.nbytes // PAGE) * PAGE


class PieceFiles:
    """What is on the disk of the pieces of a stage's parts. Threads write and read different pieces at once.

    Args:
        directory: Theirs alone.
        root: A directory above it, below which there may be no links (see `files.open_regular`).
        owners: The part of each piece.
    """

    def __init__(self, directory: Path, root: Path, owners: Mapping[str, str]) -> None:
        self.directory, self._root, self._owners = directory, root, owners
        self._lock = threading.Lock()
        self._here: dict[Key, Extent] = {}
        self._published: dict[Key, Extent] = {}
        self._coming: dict[Key, Extent] = {}  # what is being written
        self._unsynced: set[Key] = set()  # files

    def at(self, kind: str, piece: str) -> int:
        """The update that the newest of a piece is of; 0: there is nothing."""
        extent = self._here.get((kind, piece))
        return extent.update if extent is not None else 0

    def write(
        self,
        kind: str,
        piece: str,
        update: int,
        tensors: Mapping[str, Tensor],
        threads: Executor | None = None,
        staging: Buffers | None = None,
    ) -> None:
        """Write a piece (see `write_tensors`); it is there from then on, and durable after `sync`.

        Raises:
            NoSpaceError: The disk is full; what was there of it still is.
        """
        key = kind, piece
        extent = self._reserve(key, update, nbytes_of(tensors))
        try:
            with durable.explain_full_disk(self._path(kind, piece)):
                fd = self._opened(kind, piece, 0 if staging is None else os.O_DIRECT)
                try:
                    written = write_within(fd, extent.begin, tensors, threads, staging)
                finally:
                    os.close(fd)
            with self._lock:
                self._here[key] = replace(extent, digest=written)
                self._unsynced.add(self._file(key))
        finally:
            with self._lock:
                del self._coming[key]

    def read(
        self,
        kind: str,
        piece: str,
        wanted: Callable[[str], bool],
        lend: Callable[[int], Tensor],
        threads: Executor | None = None,
        *,
        direct: bool = False,
    ) -> Tensors:
        """Some tensors of a piece that is there, by their names (see `TensorFile.read`)."""
        file = TensorFile(self._path(kind, piece), self._root, begin=self._here[kind, piece].begin)
        return file.read([name for name in file if wanted(name)], lend, threads, direct=direct)

    def remove(self, kind: str, piece: str, update: int) -> None:
        """Let go what is there of a piece, of this update."""
        with self._lock:
            if self.at(kind, piece) == update:
                self._here.pop((kind, piece), None)

    def sync(self, parts: Iterable[str] | None = None) -> None:
        """Make what was written durable, of some parts or of all. Raises NoSpaceError: the disk is full."""
        only = None if parts is None else set(parts)
        with self._lock:
            mine = {file for file in self._unsynced if only is None or file[1] in only}
            self._unsynced -= mine
        for kind, part in sorted(mine):
            path = self._path_of(kind, part)
            with durable.explain_full_disk(path):
                fd = files.open_regular(path, os.O_RDWR, root=self._root)
                try:
                    os.fdatasync(fd)
                finally:
                    os.close(fd)

    def table(self) -> dict[str, list[int | str]]:
        """What is there, as plain data: of each kind and piece the fields of its `Extent`."""
        with self._lock:
            return {f"{kind}/{piece}": [*astuple(extent)] for (kind, piece), extent in sorted(self._here.items())}

    def publish(self) -> None:
        """Know that the last table is published: nothing else is counted on any more."""
        with self._lock:
            self._published = dict(self._here)

    def take_up(self, table: Table) -> None:
        """Take up what a published table counts on.

        Raises:
            OSError, TypeError, ValueError: It is not there, or damaged.
        """
        here = {}
        for name, (update, begin, nbytes, digest) in table.items():
            kind, _, piece = name.partition("/")
            if piece not in self._owners or not all(type(one) is int and one >= 0 for one in (update, begin, nbytes)):
                raise ValueError(f"its record says of {name} what no piece can be")
            here[kind, piece] = extent = Extent(int(update), int(begin), int(nbytes), str(digest))
            path = self._path(kind, piece)
            if file_digest(path, self._root, begin=extent.begin, nbytes=extent.nbytes) != extent.digest:
                raise ValueError(f"{piece} in {path} is not what was written")
        self._here, self._published = here, dict(here)

    def reset(self) -> None:
        """Begin with nothing."""
        files.remove_tree(self.directory)
        if self._owners:
            self.directory.mkdir(parents=True)
        self._here, self._published, self._unsynced = {}, {}, set()

    def _reserve(self, key: Key, update: int, nbytes: int) -> Extent:
        """The first room for so many bytes."""
        file = self._file(key)
        with self._lock:
            known = (*self._here.items(), *self._published.items(), *self._coming.items())
            begin = 0
            for taken in sorted((extent for one, extent in known if self._file(one) == file), key=_begin):
                if Extent(update, begin, nbytes).end <= taken.begin:
                    break
                begin = max(begin, taken.end)
            self._coming[key] = Extent(update, begin, nbytes)
            return self._coming[key]

    def _file(self, key: Key) -> Key:
        return key[0], self._owners[key[1]]

    def _path(self, kind: str, piece: str) -> Path:
        return self._path_of(kind, self._owners[piece])

    def _path_of(self, kind: str, part: str) -> Path:
        return self.directory / f"{part}.{kind}"

    def _opened(self, kind: str, piece: str, flags: int) -> int:
        """A file to write into; where it is new, its name is durable."""
        path = self._path(kind, piece)
        with self._lock:
            new = not os.path.lexists(path)
            fd = files.open_regular(path, os.O_RDWR | os.O_CREAT | flags, durable.READABLE, root=self._root)
            if new:
                durable.fsync_directory(self.directory)
        return fd


def _begin(extent: Extent) -> int:
    return extent.begin
