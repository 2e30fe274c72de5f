"""Checkpoints of a stage in training: one directory each, whole or not there.

`step-00000120/` holds `state.safetensors` and `checkpoint.json`, which carries the digest of the first. It is
filled under a temporary name and renamed; the two newest are kept, so that a damaged one has a sound one behind
it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stackwise import durable
from stackwise.identity import digest
from stackwise.training.trainer import Record, Trainer

KEPT = 2
FORMAT = 2
"""Of what a checkpoint's tensors are called."""
_STATE, _META = "state.safetensors", "checkpoint.json"


def file_digest(path: Path) -> str:
    """xxh3-128 of a file, read through the page cache."""
    if path.stat().st_size == 0:
        return digest(b"")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return digest(memoryview(view))


class Tensors(Mapping[str, Tensor]):
    """The tensors of an open safetensors file, each read when it is asked for: one at a time is in memory."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise KeyError(name) from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def save(directory: Path, trainer: Trainer) -> Path:
    """Save a trainer's state under `directory`; afterwards the oldest beyond two are removed.

    Raises:
        NoSpaceError: The disk is full; the checkpoints before are untouched.
    """
    directory.mkdir(parents=True, exist_ok=True)
    name = f"step-{trainer.step:08d}"
    temporary = directory / f"{durable.TEMPORARY}{secrets.token_hex(4)}-{name}"
    with durable.explain_full_disk(directory):
        try:
            temporary.mkdir()
            state = {key: tensor.contiguous().cpu() for key, tensor in trainer.engine.state().items()}
            durable.write_durably(temporary / _STATE, lambda path: save_file(state, path))
            meta = {
                "format": FORMAT,
                "step": trainer.step,
                "digest": file_digest(temporary / _STATE),
                "record": asdict(trainer.record),
            }
            durable.write_bytes(temporary / _META, json.dumps(meta).encode())
            final = directory / name
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
            durable.fsync_directory(directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    for old in _complete(directory)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def restore_latest(directory: Path, trainer: Trainer, warn: Callable[[str], None]) -> bool:
    """Restore the newest sound checkpoint; one that is damaged is named, and the one before it is used.

    Returns:
        Whether there was one.
    """
    for path in reversed(_complete(directory)):
        with contextlib.suppress(OSError):
            for stale in path.parent.glob(f"{durable.TEMPORARY}*"):
                shutil.rmtree(stale, ignore_errors=True)
        try:
            meta: dict[str, Any] = durable.read_json(path / _META)
            if meta.get("format") != FORMAT:
                raise ValueError("it is of another version of StackWise")
            if file_digest(path / _STATE) != meta["digest"]:
                raise ValueError("its digest differs")
            record, step = Record(**meta["record"]), int(meta["step"])
            with safe_open(path / _STATE, "pt") as file:
                _check_shapes(file, trainer.engine.state())
                trainer.restore(Tensors(file), step, record)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            warn(f"checkpoint {path} is damaged ({error}); the one before it is used")
            continue
        return True
    return False


def remove(directory: Path) -> None:
    """Remove every checkpoint of a stage that is committed."""
    shutil.rmtree(directory, ignore_errors=True)


def _check_shapes(file: Any, state: Mapping[str, Tensor]) -> None:
    """Whether a checkpoint is of this stage, asked before any of it is taken up."""
    there = set(file.keys())
    if any(n not in there or file.get_slice(n).get_shape() != list(tensor.shape) for n, tensor in state.items()):
        raise ValueError("it is of another shape")


def _complete(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if (path / _META).exists())
