"""A run before it has a plan: its directory is taken, its data prepared, every `auto` becomes a number."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stackwise.config import DataConfig, StackWiseConfig
from stackwise.config.fields import changed
from stackwise.config.yaml_files import dump
from stackwise.data import WAITING, PreparedData, is_prepared, prepare
from stackwise.durable import unusable, write_bytes
from stackwise.errors import BusyError, InterruptedRun, StackWiseError, UsageError
from stackwise.files import read_bytes
from stackwise.pipeline.events import Emit, Event, Pace
from stackwise.pipeline.initial import open_weights, settle_mask, tokenizer_limit
from stackwise.pipeline.plan import check_data
from stackwise.pipeline.run import PREPARING, RunDirectory
from stackwise.store import ActivationStore

RECORD_SECONDS = 1.0  # between two records in the manifest of how far one thing is
PROGRESS_SECONDS = 0.2  # between two events on how far the preparation of the data is
STARTING = {"phase": "starting", "done": 0, "total": None}


class Preparation:
    """Takes a run's directory, and keeps its manifest level with what is prepared or tried until there is a plan.

    A run without stages yet is then found, by `status` and by the same command again, and goes on after a kill. What
    an earlier run left in the manifest stays there, as does its configuration, until the plan takes their place. Where
    what is asked for cannot be, the directory is left as it was; so is one with stages after any failure.

    Args:
        stack: Holds the directory's lock beyond this.

    Raises:
        UsageError: The directory cannot be used.
        BusyError: A live runner works on it.
    """

    def __init__(self, run: RunDirectory, config: StackWiseConfig, stack: contextlib.ExitStack) -> None:
        self._run, self._config, self._stack = run, config, stack
        self._missing = [path for path in (run.path, *run.path.parents) if not path.exists()]
        self._contents: dict[Path, bytes | None] = {}
        self._before: dict[str, Any] = {}
        self._preparing: dict[str, Any] = STARTING
        self._written = 0.0
        self._over = False

    def __enter__(self) -> Self:
        run = self._run
        run.create()
        self._stack.enter_context(run.lock())
        for file in (run.config_file, run.manifest_file):
            self._contents[file] = read_bytes(file) if file.exists() else None
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
        if now["phase"] != self._preparing["phase"] or time.monotonic() - self._written > RECORD_SECONDS:
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
            # By its code: what a worker refuses (a device that is not there) is a worker's failure by its class.
            if error.exit_code in (UsageError.exit_code, BusyError.exit_code) or self._before.get("stages"):
                self._restore()
            else:
                self._write(self._preparing | {"failed": error.message})

    def _restore(self) -> None:
        if self._missing:
            shutil.rmtree(self._run.path, ignore_errors=True)
            for parent in self._missing[1:]:
                parent.rmdir()
            return
        for file, content in self._contents.items():
            if content is None:
                file.unlink(missing_ok=True)
            else:
                write_bytes(file, content)

    def _write(self, preparing: dict[str, Any]) -> None:
        self._preparing, self._written = preparing, time.monotonic()
        self._run.write_manifest(self._before | {PREPARING: preparing})


def check_store(path: Path) -> None:
    """Look whether a store can be there. Raises UsageError: it cannot."""
    if fault := unusable(path):
        raise UsageError(f"store.path {path} cannot be used: {fault}", hint="name another directory")


def open_store(path: Path) -> ActivationStore:
    """Open a store, or make one. Raises UsageError: it cannot be there."""
    try:
        return ActivationStore(path)
    except (PermissionError, FileNotFoundError, NotADirectoryError, FileExistsError) as error:
        raise UsageError(f"store.path {path} cannot be used: {error.strerror}", hint="name another directory") from None


def prepare_data(config: StackWiseConfig, emit: Emit, check: Callable[[], None]) -> PreparedData:
    """Prepare the data that a configuration names, or find it prepared; `check` may end that now and then."""
    begun, pace, before = time.perf_counter(), Pace(seconds=PROGRESS_SECONDS), ""

    def progress(phase: str, done: int, total: int | None) -> None:
        nonlocal before
        check()
        if phase.startswith(WAITING) and phase != before:
            emit("note", text=f"{phase}, which prepares the same data")
        if pace.due() or phase != before:
            before = phase
            emit("preparing", phase=phase, done=done, total=total)

    data, reused = prepare(
        config.data, model_vocab=tokenizer_limit(config), progress=progress, columns=config.objective.inputs
    )
    summary = data.summary()
    emit("data", reused=reused, seconds=time.perf_counter() - begun, **summary)
    left_out = {why: n for why, n in data.skipped.get("reasons", {}).items() if why not in ("hidden", "empty")}
    if left_out:
        reasons = ", ".join(f"{number} {why}" for why, number in left_out.items())
        emit("note", text=f"data.paths: files are left out: {reasons}")
    for line in data.notes:
        emit("note", text=f"data.paths: {line}")
    for note in unused_beside_prepared(config.data):
        emit("note", text=note)
    for line in open_weights(config).notes if config.init.weights is not None else ():
        emit("note", text=f"init.weights: {line}")
    if (mask := settle_mask(config, data.tokenizer)) is not None:
        emit("note", text=mask)
    check_data(config, data)
    for line in data.train.remarks(config.training.seq_len):
        emit("note", text=f"training.seq_len: {line}")
    return data


def unused_beside_prepared(data: DataConfig) -> list[str]:
    """The settings that a prepared data set has settled already."""
    if not any(is_prepared(Path(path)) for path in data.paths):
        return []
    settled = {"tokenizer", "vocab_size", "held_out", "max_bytes", "text_column", "follow_links", "chat_template"}
    keys = sorted(set(changed(data)) & settled)
    return [f"data.{', '.join(keys)}: unused, {data.paths[0]} is prepared already"] if keys else []
