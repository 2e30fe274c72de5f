"""The swapped engine's state on disk: weights and moments a part, the last step's gradients as its redo log.

    swap/commit.json                     steps and updates done; the last update's learning rate and clip scale
    swap/losses                          the loss of each step, float64
    swap/evaluations.json                held-out losses so far
    swap/state/PART-<n>.safetensors      weights and moments after n updates
    swap/gradients/PART-<n>.safetensors  the gradients that make update n of the state after n-1

A part's state may be one update behind the commit: the gradients then bring it up. Every file is written under
another name, synced and renamed; gradients stand before the commit that counts on them, a state before the files
that it replaces go. So a kill, wherever it falls, loses the step in hand and nothing else.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stackwise import durable

STATE, GRADIENTS = "state", "gradients"
FORMAT = 1
"""Of the record and of what a state's tensors are called."""
_COMMIT, _LOSSES, _EVALUATIONS = "commit.json", "losses", "evaluations.json"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Commit:
    """The record that publishes a step.

    Args:
        step: Steps done.
        updates: Those of them that moved the weights.
        last: The number of the last of those in the stage's budget, from 0.
        rate: Its learning rate.
        clip: What its gradients are multiplied by; None: they stand as they are.
        scaler: The state of the loss scale, where there is one.
    """

    step: int = 0
    updates: int = 0
    last: int = -1
    rate: float = 0.0
    clip: float | None = None
    scaler: list[float] | None = None


class RedoLog:
    """The files of one stage. Writing happens behind, in one thread, with at most one call's files waiting.

    Args:
        directory: Theirs alone.
        parts: The parts that train.

    Attributes:
        begin: Gives the state that a part has before its first update; nothing of it where it is as it was made.
    """

    def __init__(self, directory: Path, parts: Sequence[str]) -> None:
        self.directory, self.parts = directory, tuple(parts)
        self.committed = Commit()
        self.at = dict.fromkeys(self.parts, 0)
        self.begin: Callable[[str], Mapping[str, Tensor]] = lambda part: {}
        self._pool = ThreadPoolExecutor(1, "swap-writer")
        self._writing: tuple[Future[None], frozenset[str]] | None = None

    def open(self, warn: Callable[[str], None]) -> None:
        """Take up what is there; what is not whole is named, and training starts anew."""
        try:
            self._take_up()
        except FileNotFoundError as error:
            if (self.directory / _COMMIT).exists():
                warn(f"{error.filename or error} is missing: the stage starts anew")
            self._reset()
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            warn(f"{self.directory} is damaged ({error}): the stage starts anew")
            self._reset()

    def close(self) -> None:
        """Wait for the writer, and let it go."""
        self._pool.shutdown()

    def read(self, part: str, prefix: str) -> Tensors | None:
        """What of a part's state begins with a prefix, without it; None where the part is as it was made.

        Raises:
            OSError: The file cannot be read.
        """
        if self.at.get(part):
            return self._read(STATE, part, self.at[part], prefix)
        begun = self.begin(part)
        return {key.removeprefix(prefix): begun[key].clone() for key in begun if key.startswith(prefix)} or None

    def gradients(self, part: str) -> Tensors | None:
        """The gradients of the update that a part's state still lacks, by name; None where it lacks none."""
        updates = self.committed.updates
        return self._read(GRADIENTS, part, updates) if self.at.get(part, updates) < updates else None

    def write_states(self, states: Mapping[str, Tensors]) -> None:
        """Write parts' states after the last update, behind; what they replace is then removed.

        Raises:
            NoSpaceError: The disk is full (told at a later call, or by `flush`).
        """
        step = self.committed.updates
        before = {part: self.at[part] for part in states}
        self.at |= dict.fromkeys(states, step)

        def write() -> None:
            for part, tensors in states.items():
                self._write(STATE, part, step, tensors)
                self._path(STATE, part, before[part]).unlink(missing_ok=True)
                self._path(GRADIENTS, part, step).unlink(missing_ok=True)

        self._behind(write, states)

    def write_gradients(self, gradients: Mapping[str, Tensors]) -> None:
        """Write parts' gradients of the step in hand, behind.

        Raises:
            NoSpaceError: The disk is full (told at a later call, or by `flush`).
        """
        step = self.committed.updates + 1

        def write() -> None:
            for part, tensors in gradients.items():
                self._write(GRADIENTS, part, step, tensors)

        self._behind(write, gradients)

    def flush(self) -> None:
        """Wait until everything handed in is on the disk.

        Raises:
            NoSpaceError: The disk is full.
        """
        if self._writing is not None:
            self._writing[0].result()
            self._writing = None  # not before: the loader waits for it too

    def commit(
        self,
        rate: float,
        clip: float | None,
        loss: float,
        *,
        number: int,
        taken: bool = True,
        scaler: list[float] | None = None,
    ) -> None:
        """Publish the step in hand, whose gradients are all handed in.

        Args:
            number: Its number in the stage's budget, from 0.
            rate: Its learning rate.
            clip: What its gradients are to be multiplied by.
            loss: Its loss; no number where it was refused.
            taken: Whether it moves the weights.
            scaler: The state of the loss scale.

        Raises:
            NoSpaceError: The disk is full; the step is not published.
        """
        self.flush()
        before = self.committed
        path = self.directory / _LOSSES
        with durable.explain_full_disk(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.pwrite(fd, np.float64(loss).tobytes(), 8 * before.step)
                os.fsync(fd)
            finally:
                os.close(fd)
        record = replace(before, step=before.step + 1, scaler=scaler)
        if taken:
            record = replace(record, updates=before.updates + 1, last=number, rate=rate, clip=clip)
        durable.write_json(self.directory / _COMMIT, {"format": FORMAT, **asdict(record)})
        self.committed = record

    def losses(self) -> list[float | None]:
        """The loss of every step done, in nats; None where it was refused."""
        step = self.committed.step
        found = np.fromfile(self.directory / _LOSSES, dtype=np.float64, count=step).tolist() if step else []
        return [None if math.isnan(loss) else loss for loss in found]

    def note_evaluation(self, loss: float) -> None:
        """Keep the held-out loss after the steps done."""
        known = [entry for entry in self.evaluations() if entry[0] != self.committed.step]
        durable.write_json(self.directory / _EVALUATIONS, [*known, (self.committed.step, loss)])

    def evaluations(self) -> list[tuple[int, float]]:
        """Held-out losses, each with the steps done before it."""
        path = self.directory / _EVALUATIONS
        found = durable.read_json(path) if path.exists() else []
        return [(int(step), float(loss)) for step, loss in found if step <= self.committed.step]

    def _take_up(self) -> None:
        value: dict[str, Any] = durable.read_json(self.directory / _COMMIT)
        if value.pop("format") != FORMAT:
            raise ValueError("another format")
        commit = Commit(**value)
        at = {}
        for part in self.parts:
            if self._path(STATE, part, commit.updates).exists():
                at[part] = commit.updates
            else:
                at[part] = commit.updates - 1
                self._check(self._path(GRADIENTS, part, commit.updates))
            if at[part]:
                self._check(self._path(STATE, part, at[part]))
        self.committed, self.at = commit, at
        if len(self.losses()) != commit.step:
            raise ValueError("losses are missing")
        wanted = {self._path(STATE, part, update) for part, update in at.items()}
        wanted |= {
            self._path(GRADIENTS, part, commit.updates) for part, update in at.items() if update < commit.updates
        }
        for kind in (STATE, GRADIENTS):
            for path in (self.directory / kind).iterdir():
                if path not in wanted:
                    path.unlink()

    def _reset(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        for kind in (STATE, GRADIENTS):
            (self.directory / kind).mkdir(parents=True)
        self.committed, self.at = Commit(), dict.fromkeys(self.parts, 0)

    def _path(self, kind: str, part: str, step: int) -> Path:
        return self.directory / kind / f"{part}-{step:08d}.safetensors"

    @staticmethod
    def _check(path: Path) -> None:
        """Open a file: its header says how long it must be."""
        with safe_open(path, "pt"):
            pass

    def _write(self, kind: str, part: str, step: int, tensors: Tensors) -> None:
        durable.write_durably(self._path(kind, part, step), lambda path: save_file(tensors, path))

    def _behind(self, write: Callable[[], None], parts: Iterable[str]) -> None:
        self.flush()
        self._writing = self._pool.submit(write), frozenset(parts)

    def _read(self, kind: str, part: str, step: int, prefix: str = "") -> Tensors:
        if (writing := self._writing) is not None and part in writing[1]:
            writing[0].result()
        with safe_open(self._path(kind, part, step), "pt") as file:
            # Cloned: what safetensors gives is a view of the file, which would be read when it is used.
            return {
                name.removeprefix(prefix): file.get_tensor(name).clone()
                for name in file.keys()  # noqa: SIM118
                if name.startswith(prefix)
            }
