"""Makes the operating system fail, or the process die, at the n-th call that a scenario makes on its store."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from stackwise.store.index import Index

KINDS = ("EIO", "ENOSPC", "short write", "kill before", "kill after")
CALLS = ("open", "write", "ftruncate", "fsync", "replace", "rename", "mkdir", "posix_fallocate", "commit")


class Injector:
    """Counts the calls of `CALLS` that concern `root`; at call `at` (from 1 on), `kind` happens.

    After an injected error the disk stays as it is: only that one call fails.
    """

    def __init__(self, root: Path, at: int = 0, kind: str = "") -> None:
        self.root, self.at, self.kind = str(root), at, kind
        self.count = 0
        self.names: list[str] = []
        self.fds: set[int] = set()

    @contextlib.contextmanager
    def installed(self) -> Iterator[Injector]:
        with contextlib.ExitStack() as stack:
            for name in CALLS[:-1]:
                stack.enter_context(mock.patch.object(os, name, self._wrapped(name, getattr(os, name))))
            real = Path.write_bytes
            stack.enter_context(
                mock.patch.object(Path, "write_bytes", lambda path, data: self._run("write", real, path, data))
            )
            update = Index.update
            stack.enter_context(
                mock.patch.object(Index, "update", lambda index, change: self._run("commit", update, index, change))
            )
            yield self

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            target = args[0]
            ours = target in self.fds if isinstance(target, int) else os.fspath(target).startswith(self.root)
            if not ours:
                return real(*args, **kwargs)
            result = self._run(name, real, *args, **kwargs)
            if name == "open":
                self.fds.add(result)
            return result

        return call

    def _run(self, name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        self.names.append(name)
        if self.count != self.at:
            return real(*args, **kwargs)
        if self.kind == "kill before":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "kill after":
            try:
                real(*args, **kwargs)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "short write" and name == "write":
            if isinstance(args[0], Path):
                real(args[0], args[1][: len(args[1]) // 2])
            else:
                real(args[0], bytes(memoryview(args[1]))[: len(args[1]) // 2])
        code = errno.ENOSPC if self.kind == "ENOSPC" else errno.EIO
        raise OSError(code, os.strerror(code))
