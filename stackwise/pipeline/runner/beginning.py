"""A run before it has a plan: its directory is taken, and the manifest says what is got ready."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stackwise.config import StackWiseConfig
from stackwise.config.loading import dump
from stackwise.durable import write_bytes
from stackwise.errors import InterruptedRun, StackWiseError, UsageError
from stackwise.pipeline.run import PREPARING, RunDirectory
from stackwise.pipeline.runner.events import Event

SECONDS = 1.0
"""Between two records of how far one thing is."""
STARTING = {"phase": "starting", "done": 0, "total": None}


class Beginning:
    """Takes a run's directory, and keeps its manifest level with what is prepared or tried until there is a plan.

    A run without stages yet is then found, by `status` and by the same command again, and goes on after a kill. What
    an earlier run left in the manifest stays there, as does its configuration, until the plan takes their place. Where
    what is asked for cannot be, the directory is left as it was found; so is one with stages after any failure.

    Args:
        run: The run's directory.
        config: The configuration, before any `auto` is settled.
        stack: Holds the directory's lock beyond this.

    Raises:
        UsageError: The directory cannot be used.
        BusyError: A live runner works on it.
    """

    def __init__(self, run: RunDirectory, config: StackWiseConfig, stack: contextlib.ExitStack) -> None:
        self._run, self._config, self._stack = run, config, stack
        self._missing = [path for path in (run.path, *run.path.parents) if not path.exists()]
        self._found: dict[Path, bytes | None] = {}
        self._before: dict[str, Any] = {}
        self._preparing: dict[str, Any] = STARTING
        self._written = 0.0
        self._over = False

    def __enter__(self) -> Self:
        run = self._run
        run.create()
        self._stack.enter_context(run.lock())
        for file in (run.config_file, run.manifest_file):
            self._found[file] = file.read_bytes() if file.exists() else None
        try:
            self._before = run.manifest() if run.manifest_file.exists() else {"stages": []}
            if not self._before["stages"]:
                write_bytes(run.config_file, dump(self._config).encode())
            self._write(STARTING)
        except BaseException as error:
            self._end(error)
            raise
        return self

    def observe(self, event: Event) -> None:
        """Take up an event."""
        kind = event["event"]
        if self._over or kind not in ("preparing", "data", "settled"):
            return
        now = {key: event[key] for key in STARTING} if kind == "preparing" else STARTING
        if now["phase"] != self._preparing["phase"] or time.monotonic() - self._written > SECONDS:
            self._write(now)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        if error is not None:
            self._end(error)

    def _end(self, error: BaseException) -> None:
        """What is left behind where no plan was made."""
        if not isinstance(error, StackWiseError) or isinstance(error, InterruptedRun):
            return  # as after a kill: the same command goes on
        with contextlib.suppress(OSError):  # a full disk: what ended the run is what is to be said
            if isinstance(error, UsageError) or self._before.get("stages"):
                self._restore()
            else:
                self._write(self._preparing | {"failed": error.message})

    def _restore(self) -> None:
        if self._missing:
            shutil.rmtree(self._run.path, ignore_errors=True)
            for parent in self._missing[1:]:
                parent.rmdir()
            return
        for file, content in self._found.items():
            if content is None:
                file.unlink(missing_ok=True)
            else:
                write_bytes(file, content)

    def _write(self, preparing: dict[str, Any]) -> None:
        self._preparing, self._written = preparing, time.monotonic()
        self._run.write_manifest(self._before | {PREPARING: preparing})
