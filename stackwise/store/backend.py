"""Where the files of boundaries lie: a local directory here, an object store in `objects.py`.

The index, the leases and the committed stages are always local. Keys are relative, with slashes, as
`<boundary id>/activations/c/0/0/0`, and are made from checked ids alone.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from stackwise import durable
from stackwise.files import open_regular
from stackwise.store import files


class Handle(Protocol):
    """A file opened for reading. `fd` lets a local reader skip a call for every row."""

    size: int
    fd: int | None

    def read_into(self, buffer: Any, offset: int) -> int:
        """Fill `buffer` from `offset` on; returns the bytes read, fewer only at the end of the file."""

    def close(self) -> None:
        """Let go of it."""


class Backend(Protocol):
    """What the store asks of a place for its boundaries' files.

    A file is written in three steps: `stage` (under no name a reader knows), `settle` (durable), `install` (its name,
    durable, atomic). `install` runs inside the transaction that publishes the file's record, perhaps twice.
    """

    def prepare(self, keys: Sequence[str]) -> None:
        """Make what must exist before files of these keys can be written."""

    def stage(self, key: str, buffers: Sequence[Any], size: int | None = None) -> Any:
        """Write a file beside `key`, padded with zeros to `size`; returns what the next steps take."""

    def settle(self, staged: Sequence[Any]) -> None:
        """Make staged files durable."""

    def install(self, staged: Sequence[tuple[Any, str]]) -> None:
        """Give each settled file its key, replacing what bears it; durable on return."""

    def discard(self, staged: Any) -> None:
        """Remove a staged file that will not be installed."""

    def put(self, key: str, data: bytes) -> None:
        """Write a small file whole and durably."""

    def open(self, key: str) -> Handle:
        """Open a file for reading.

        Raises:
            FileNotFoundError: It does not exist.
        """

    def walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(key, size) of every file under the directory `prefix` ("" for all)."""

    def remove(self, prefix: str) -> int:
        """Remove the directory or file `prefix` and all under it; returns the bytes freed, about."""

    def names(self) -> list[str]:
        """The first parts of all keys: what bears, or might bear, a boundary's id."""

    def advise(self, handle: Handle) -> None:
        """A hint that the whole file will be read soon."""

    def uri(self, prefix: str) -> str:
        """Where a person or another program finds the directory `prefix`."""


class LocalFile:
    """A local file open for reading; `pread` alone, so that threads and forks may share it."""

    def __init__(self, path: Path) -> None:
        self.fd: int | None = open_regular(path)
        self.size = os.fstat(self.fd).st_size

    def read_into(self, buffer: Any, offset: int) -> int:
        """See `Handle`."""
        assert self.fd is not None
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view):
            count = os.preadv(self.fd, [view[done : done + (1 << 30)]], offset + done)
            if not count:
                break
            done += count
        return done

    def close(self) -> None:
        """See `Handle`."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class LocalBackend:
    """Files under a local directory, published by fsync, rename, and fsync of the directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _path(self, key: str) -> Path:
        """The path of a key.

        Raises:
            OSError: A link on the way leads elsewhere: nothing outside is read or written.
        """
        path = self.root / key
        if os.path.realpath(path.parent) != os.path.join(os.path.realpath(self.root), os.path.dirname(key)).rstrip("/"):
            raise OSError(errno.ELOOP, "a link stands in the way", str(path))
        return path

    def prepare(self, keys: Sequence[str]) -> None:
        """See `Backend`."""
        for boundary in {key.partition("/")[0] for key in keys}:
            self._path(f"{boundary}/x/x")
        files.make_directories([self._path(key).parent for key in keys])

    def stage(self, key: str, buffers: Sequence[Any], size: int | None = None) -> files.Staged:
        """See `Backend`."""
        return files.stage(self._path(key), buffers, size)

    def settle(self, staged: Sequence[files.Staged]) -> None:
        """See `Backend`."""
        for file in staged:
            file.settle()

    def install(self, staged: Sequence[tuple[files.Staged, str]]) -> None:
        """See `Backend`."""
        files.install([(file, self.root / key) for file, key in staged])

    def discard(self, staged: files.Staged) -> None:
        """See `Backend`."""
        files.discard(staged)

    def put(self, key: str, data: bytes) -> None:
        """See `Backend`."""
        path = self._path(key)
        staged = files.stage(path, [data])
        staged.settle()
        files.install([(staged, path)])

    def open(self, key: str) -> LocalFile:
        """See `Backend`."""
        return LocalFile(self._path(key))

    def walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        """See `Backend`. Links are listed with size 0 and never followed."""
        if prefix and (self.root / prefix).is_symlink():
            return
        try:
            entries = sorted(os.scandir(self.root / prefix), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            name = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from self.walk(name)
            elif entry.is_file(follow_symlinks=False):
                yield name, entry.stat(follow_symlinks=False).st_size
            else:
                yield name, 0

    def remove(self, prefix: str) -> int:
        """See `Backend`."""
        path = self.root / prefix
        freed = files.remove_tree(path)
        if path.parent.is_dir():
            durable.fsync_directory(path.parent)
        return freed

    def names(self) -> list[str]:
        """See `Backend`."""
        return sorted(entry.name for entry in os.scandir(self.root))

    def advise(self, handle: Handle) -> None:
        """See `Backend`."""
        if handle.fd is not None and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle.fd, 0, 0, os.POSIX_FADV_WILLNEED)

    def uri(self, prefix: str) -> str:
        """See `Backend`."""
        return str(self.root / prefix)
