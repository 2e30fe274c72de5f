"""Checkpoints of a stage in training: one directory each, whole or not there, written beside training.

`step-00000120/` holds `state.safetensors` and `checkpoint.json`, which carries the digest of the first. It is
filled under a temporary name and renamed. The newest few are kept, so that a damaged one has a sound one behind it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from stackwise import durable, files
from stackwise.errors import StackWiseError
from stackwise.files import file_digest
from stackwise.host import host_memory
from stackwise.identity import digest
from stackwise.training.pinned import HostCopy
from stackwise.training.ranks import outlined
from stackwise.training.tensor_files import TensorFile, write_tensors
from stackwise.training.trainer import Record, Trainer


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the digest of its own content, for `unsealed`."""
    return {**record, "seal": _seal(record)}


def unsealed(value: Any, format_number: int) -> dict[str, Any]:
    """A record as it was sealed, without format and seal; one of before there were seals is taken as it is.

    Raises:
        ValueError: It is none, of another format, or was changed.
    """
    if not isinstance(value, dict) or value.get("format") != format_number:
        raise ValueError("it is of another version of StackWise")
    record = {key: entry for key, entry in value.items() if key != "seal"}
    if "seal" in value and value["seal"] != _seal(record):
        raise ValueError("its record was changed")
    del record["format"]
    return record


def _seal(record: Mapping[str, Any]) -> str:
    return digest(json.dumps(record, sort_keys=True).encode())


def reason(error: BaseException) -> str:
    """What was wrong with a file, in one line."""
    text = error.message if isinstance(error, StackWiseError) else str(error)
    return (text.splitlines() or [type(error).__name__])[0]


UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)
"""What a checkpoint raises that is not there, or damaged."""

KEPT = 2
FORMAT = 2  # of what a checkpoint's tensors are called
_STATE, _META = "state.safetensors", "checkpoint.json"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on the disk."""

    step: int
    stopped: float  # seconds that training paused for it
    seconds: float  # seconds that writing it took, the standstill among them


class Checkpoints:
    """Saves a trainer's state: copied in a moment, then written by a thread while training goes on.

    At most one is on its way; the next one waits for it. Where memory is too short for the copy, training waits for
    the disk instead. The copy's memory (what a checkpoint takes) is kept for the next one.
    """

    def __init__(self, directory: Path, keep: int = KEPT, warn: Callable[[str], object] = lambda _: None) -> None:
        self.directory, self._keep, self._warn = directory, keep, warn
        self._copy: HostCopy | None = None
        self._thread: threading.Thread | None = None
        self._done: list[Saved] = []
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._join()
        if self._copy is not None:
            self._copy.close()
            self._copy = None
        if kind is None:
            self._raise()

    @property
    def busy(self) -> bool:
        """Whether one is on its way."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, trainer: Trainer, protect: Collection[int] = ()) -> None:
        """Save the trainer's state as it is now.

        Args:
            protect: Steps whose checkpoints stay beside the newest ones.

        Raises:
            NoSpaceError: The disk was full for the one before; those that are complete are untouched.
        """
        begun = time.perf_counter()
        self.finish()
        state, step = trainer.engine.state(), trainer.step
        record = json.dumps(asdict(trainer.record))
        beside = self._taken(state, trainer.engine.device)
        if beside:
            state = self._copied(state, trainer.engine.device)
        stopped = time.perf_counter() - begun

        def write() -> None:
            try:
                _write(self.directory, state, step, record)
                _remove_old(self.directory, self._keep, protect)
                seconds = time.perf_counter() - begun
                self._done.append(Saved(step, stopped if beside else seconds, seconds))
            except BaseException as error:
                self._error = error

        if beside:
            self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            write()
            self._raise()

    def prepare(self, trainer: Trainer) -> None:
        """Take the copy's memory from the system beside training, so that the first checkpoint is as short as any.

        Best after the first step, when the optimizer's state is there. Where memory is short it is left alone.
        """
        state, device = trainer.engine.state(), trainer.engine.device
        if self._copy is None and not self.busy:
            take = partial(self._taken, state, device)
            self._thread = threading.Thread(target=take, name="checkpoint-memory", daemon=True)
            self._thread.start()

    def written(self) -> list[Saved]:
        """Those that have reached the disk since the last call."""
        self._raise()
        done, self._done = self._done, []
        return done

    def finish(self) -> None:
        """Wait for the one on its way. Raises NoSpaceError: the disk is full."""
        self._join()
        self._raise()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _taken(self, state: Mapping[str, Tensor], device: torch.device) -> bool:
        """Whether there is memory of our own for the state; it is taken where there is room."""
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in outlined(state).items()}
        if self._copy is not None and self._copy.shapes == shapes:
            return True
        if self._copy is not None:
            self._copy.close()
            self._copy = None
        size = sum(tensor.numel() * tensor.element_size() for tensor in outlined(state).values())
        if size < 0.8 * host_memory().room:
            with contextlib.suppress(MemoryError, RuntimeError):  # then training waits for the disk
                self._copy = HostCopy(shapes, pin=device.type == "cuda", warn=self._warn)
        return self._copy is not None

    def _copied(self, state: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The state in memory of our own (pinned for a GPU, so that it comes at the bus's full speed)."""
        assert self._copy is not None
        copies = {name: self._copy[name].copy_(tensor, non_blocking=True) for name, tensor in state.items()}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return copies


Take = Callable[[Mapping[str, Tensor], int, Record], None]
"""Takes up what a checkpoint holds: the engine's state, the step and the trainer's record."""


def restore_latest(directory: Path, trainer: Trainer, warn: Callable[[str], None], take: Take | None = None) -> bool:
    """Restore the newest sound checkpoint; one that is damaged is named, and the one before it is used.

    Args:
        take: Takes it up; None: the trainer does.

    Returns:
        Whether there was one.
    """
    if directory.is_symlink():
        warn(f"{directory} is a symbolic link: no checkpoint in it is used")
        files.remove_tree(directory)
    for stale in directory.glob(f"{durable.TEMPORARY}*"):
        files.remove_tree(stale)
    paths = _complete(directory)
    for place, path in reversed(list(enumerate(paths))):
        try:
            _restore(path, trainer, take)
        except UNREADABLE as error:
            following = f"{paths[place - 1].name} is used" if place else "the stage begins again"
            warn(f"checkpoint {path} is damaged ({reason(error)}); {following}")
            continue
        return True
    return False


def restore_step(directory: Path, trainer: Trainer, step: int, take: Take | None = None) -> None:
    """Restore the checkpoint of one step (`take`: see `restore_latest`).

    Raises:
        OSError, ValueError, KeyError, TypeError, RuntimeError: It is not there, or damaged.
    """
    _restore(_path(directory, step), trainer, take)


def remove(directory: Path, after: int | None = None) -> None:
    """Remove every checkpoint of a stage, or those of later steps than `after`."""
    if after is None:
        files.remove_tree(directory)
        return
    for path in _complete(directory):
        if path > _path(directory, after):
            files.remove_tree(path)


def _write(directory: Path, state: Mapping[str, Tensor], step: int, record: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    final = _path(directory, step)
    temporary = directory / f"{durable.TEMPORARY}{secrets.token_hex(4)}-{final.name}"
    with durable.explain_full_disk(directory):
        try:
            temporary.mkdir()
            meta = {"format": FORMAT, "step": step, "digest": write_tensors(temporary / _STATE, state)}
            meta["record"] = json.loads(record)
            durable.write_bytes(temporary / _META, json.dumps(sealed(meta)).encode())
            files.remove_tree(final)
            os.rename(temporary, final)
            durable.fsync_directory(directory)
        except BaseException:
            files.remove_tree(temporary)
            raise


def _remove_old(directory: Path, keep: int, protect: Collection[int]) -> None:
    stay = {_path(directory, step) for step in protect}
    for old in _complete(directory)[:-keep]:
        if old not in stay:
            files.remove_tree(old)


def _restore(path: Path, trainer: Trainer, take: Take | None) -> None:
    meta = unsealed(files.read_json(path / _META, root=path.parent), FORMAT)
    if file_digest(path / _STATE, path.parent) != meta["digest"]:
        raise ValueError("its digest differs")
    record, step = Record(**meta["record"]), int(meta["step"])
    if path.name != _path(path.parent, step).name:
        raise ValueError("it is of another step than its name says")
    tensors = TensorFile(path / _STATE, path.parent)
    # Asked before any of it is taken up. The optimizer's state is not there before the first step.
    for name, tensor in trainer.engine.outline().items():
        if name not in tensors or tensors.shape(name) != list(tensor.shape) or tensors.dtype(name) != tensor.dtype:
            raise ValueError(f"its {name} is of another shape")
    (take or trainer.restore)(tensors, step, record)


def _complete(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if os.path.lexists(path / _META))


def _path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"
