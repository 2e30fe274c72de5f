"""The user's cache directory: prepared sets, trained tokenizers, what files were found to hold, locks."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from stackwise.data.scan import Progress
from stackwise.durable import TEMPORARY, FileLock, is_locked
from stackwise.errors import BusyError, UsageError
from stackwise.identity import Hex, digest

_POLL_SECONDS = 0.2


class Cache:
    """The cache directory. Nothing is made in it before something is kept.

    Args:
        setting: `data.cache_dir`; None: `$XDG_CACHE_HOME/stackwise`, else `~/.cache/stackwise`.
        optional: One that cannot be written is done without.

    Raises:
        UsageError: It cannot be written, and is not optional.
    """

    def __init__(self, setting: str | None, *, optional: bool) -> None:
        base = Path(setting) if setting else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "stackwise"
        root = base.expanduser().absolute()
        there = next(path for path in (root, *root.parents) if path.exists())
        self._root: Path | None = root
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            if not optional:
                raise UsageError(
                    f"the cache directory {root} cannot be written",
                    hint="set data.cache_dir (or XDG_CACHE_HOME) to a folder that can",
                )
            self._root = None

    @property
    def memo(self) -> Path | None:
        """Where is remembered what files hold."""
        return None if self._root is None else self._root / "files.sqlite"

    def prepared(self, key: Hex) -> Path:
        """Where the set of that key is, or goes (not for an optional cache)."""
        assert self._root is not None
        return self._root / "prepared" / key

    def tokenizer(self, key: Hex) -> Path | None:
        """Where the tokenizer of that key is, or goes; its folder is made."""
        return None if self._root is None else _made(self._root / "tokenizers") / f"{key}.json"

    @contextlib.contextmanager
    def building(self, directory: Path, progress: Progress) -> Iterator[None]:
        """Hold what is to become `directory`; whoever comes second waits (and is told "waiting").

        What a killed process left half made beside it is removed.
        """
        if self._root is None:
            yield
            return
        lock = FileLock(self._lock_file(directory), f"the preparation of {directory}")
        waited = 0
        while not lock.held:
            try:
                lock.acquire()
            except BusyError:
                progress("waiting", waited, None)
                time.sleep(_POLL_SECONDS)
                waited += 1
        with lock:
            self._sweep(directory)
            yield

    def _lock_file(self, directory: Path) -> Path:
        assert self._root is not None
        return _made(self._root / "locks") / digest(os.fsencode(directory))

    def _sweep(self, mine: Path) -> None:
        for stale in list(mine.parent.glob(f"{TEMPORARY}*-????????")):
            whose = mine.parent / stale.name.removeprefix(TEMPORARY)[:-9]
            # listed first, asked second: a live builder held its lock before its folder was there to be listed
            if whose == mine or (mine.parent.name == "prepared" and not is_locked(self._lock_file(whose))):
                shutil.rmtree(stale, ignore_errors=True)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
