"""What the swapped engine keeps outside memory: its state on disk, and tensors that live for one step.

    swap/commit.json                     steps and updates done, the last update's scale, held-out losses so far
    swap/losses                          the loss of each step, float64
    swap/updates                         of each update its step in the budget, its rate and its scale, float64
    swap/state/PART-<n>.safetensors      weights and moments after n updates
    swap/gradients/PART-<n>.safetensors  the gradients that make update n of the state after n-1

A part's state may be one update behind the commit: the gradients then bring it up. A *piece* of a part (an expert) that
rows did not reach is left as it is, any number of updates behind: its gradient was zero in all of them but the first,
which is on the disk where rows reached it then. Every file is written under another name, synced and renamed; gradients
stand before the commit that counts on them, a state before the files that it replaces go. So a kill, wherever it falls,
loses the step in hand and nothing else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stackwise import durable, files
from stackwise.training.checkpoint import TensorFile, file_digest, reason, sealed, unsealed, write_tensors

STATE, GRADIENTS = "state", "gradients"
FORMAT = 2  # of the record and of what a state's tensors are called
_COMMIT, _LOSSES, _UPDATES = "commit.json", "losses", "updates"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """What moves the weights, beside the gradients."""

    last: int = -1  # the number of its step in the stage's budget, from 0
    rate: float = 0.0  # its learning rate
    clip: float | None = None  # what its gradients are multiplied by; None: they stand as they are


@dataclass(frozen=True)
class Commit:
    """The record that publishes a step."""

    step: int = 0  # steps done
    updates: int = 0  # those of them that moved the weights
    reached: Mapping[str, int] = field(default_factory=dict)  # of a piece, the last update that it has gradients of
    scaler: list[float] | None = None  # the state of the loss scale, where there is one
    held_out: Sequence[tuple[int, float]] = ()  # held-out losses, each with the steps done before it


class RedoLog:
    """The files of one stage. Writing happens behind, in one thread, with at most one call's files waiting.

    Args:
        pieces: What of parts is updated only where rows reach it, each as a part of its own.

    Attributes:
        at: The update that each part's state is after.
        begin: Gives the state that a part has before its first update; nothing of it where it is as it was made.
    """

    def __init__(self, directory: Path, parts: Sequence[str], pieces: Sequence[str] = ()) -> None:
        self.directory, self.parts, self.pieces = directory, tuple(parts), frozenset(pieces)
        self.committed = Commit()
        self.at = dict.fromkeys((*self.parts, *pieces), 0)
        self._reached: set[str] = set()  # pieces with gradients of the step in hand
        self._updates: list[Update] = []
        self.begin: Callable[[str], Mapping[str, Tensor]] = lambda part: {}
        self._pool = ThreadPoolExecutor(1, "swap-writer")
        self._writing: tuple[Future[None], frozenset[str]] | None = None
        self._digests: dict[str, str] = {}  # of the files that are there, by their paths below `directory`

    def open(self, warn: Callable[[str], None]) -> None:
        """Take up what is there; what is not whole is named, and training starts anew."""
        try:
            self._take_up()
        except FileNotFoundError as error:
            if os.path.lexists(self.directory / _COMMIT):  # else there was no step yet
                warn(f"{error.filename or error} is missing: the stage begins again")
            self._reset()
        except (OSError, ValueError, KeyError, TypeError) as error:
            warn(f"{self.directory} is damaged ({reason(error)}): the stage begins again")
            self._reset()

    def close(self) -> None:
        """Wait for the writer, and let it go."""
        self._pool.shutdown()

    def read(self, part: str, prefix: str) -> Tensors | None:
        """What of a part's state begins with a prefix, without it; None where the part is as it was made."""
        if self.at.get(part):
            return self._read(STATE, part, self.at[part], prefix)
        begun = self.begin(part)
        return {key.removeprefix(prefix): begun[key].clone() for key in begun if key.startswith(prefix)} or None

    def missing(self, part: str) -> list[Update]:
        """The updates that a part's state still lacks, in their order."""
        return self._updates[self.at.get(part, len(self._updates)) :]

    def gradients(self, part: str) -> Tensors | None:
        """The gradients of the first update that a part's state lacks, by name; None: it lacks none, or they are zero.

        Those of the updates after that one, which only a piece can lack, are zero.
        """
        following = self.at.get(part, self.committed.updates) + 1
        there = self.committed.reached.get(part, 0) if part in self.pieces else self.committed.updates
        return self._read(GRADIENTS, part, following) if following <= there else None

    def write_states(self, states: Mapping[str, Tensors]) -> None:
        """Write parts' states after the last update, behind; what they replace is then removed.

        Raises:
            NoSpaceError: The disk is full (at a later call, or by `flush`); `write_gradients` the same.
        """
        step = self.committed.updates
        before = {part: self.at[part] for part in states}
        self.at |= dict.fromkeys(states, step)

        def write() -> None:
            for part, tensors in states.items():
                self._write(STATE, part, step, tensors)
                self._remove(STATE, part, before[part])  # not before the new one is there
                self._remove(GRADIENTS, part, before[part] + 1)

        self._behind(write, states)

    def write_gradients(self, gradients: Mapping[str, Tensors]) -> None:
        """Write parts' gradients of the step in hand, behind."""
        step = self.committed.updates + 1
        self._reached |= self.pieces & set(gradients)

        def write() -> None:
            for part, tensors in gradients.items():
                self._write(GRADIENTS, part, step, tensors)

        self._behind(write, gradients)

    def flush(self) -> None:
        """Wait until everything handed in is on the disk. Raises NoSpaceError: the disk is full."""
        if self._writing is not None:
            self._writing[0].result()
            self._writing = None  # not before: the loader waits for it too

    def commit(self, update: Update, loss: float, scaler: list[float] | None = None, *, taken: bool = True) -> None:
        """Publish the step in hand, whose gradients are all handed in.

        Args:
            scaler: The state of the loss scale after it, where there is one.

        Raises:
            NoSpaceError: The disk is full; the step is not published.
        """
        self.flush()
        before = self.committed
        self._put(_LOSSES, before.step, (loss,))
        record = replace(before, step=before.step + 1, scaler=scaler)
        if taken:
            updates = before.updates + 1
            self._put(_UPDATES, before.updates, (update.last, update.rate, _number(update.clip)))
            reached = {**before.reached, **dict.fromkeys(sorted(self._reached), updates)}
            record = replace(record, updates=updates, reached=reached)
        self._publish(record)
        if taken:
            self._updates.append(update)
        else:  # a piece that the next step does not reach would keep them
            for piece in self._reached:
                self._remove(GRADIENTS, piece, before.updates + 1)
        self._reached = set()

    def note_evaluation(self, loss: float) -> None:
        """Keep the held-out loss after the steps done."""
        self.flush()  # the writer must not note digests meanwhile
        step = self.committed.step
        kept = [entry for entry in self.committed.held_out if entry[0] != step]
        self._publish(replace(self.committed, held_out=[*kept, (step, loss)]))

    def _publish(self, record: Commit) -> None:
        published = {"format": FORMAT, **asdict(record), "files": self._digests}
        durable.write_json(self.directory / _COMMIT, sealed(published))
        self.committed = record

    def _put(self, name: str, place: int, values: Sequence[float]) -> None:
        """Write a row of a table of float64, which is then on the disk."""
        path, row = self.directory / name, np.array(values, np.float64).tobytes()
        with durable.explain_full_disk(path):
            fd = files.open_regular(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.pwrite(fd, row, len(row) * place)
                os.fsync(fd)
            finally:
                os.close(fd)

    def _rows(self, name: str, width: int, count: int) -> list[list[float]]:
        """The first rows of such a table. Raises ValueError: there are fewer."""
        if not count:
            return []
        # A step that was not published may have left its row behind the others.
        data = files.read_bytes(self.directory / name)[: 8 * width * count]
        rows: list[list[float]] = np.frombuffer(data, dtype=np.float64).reshape(-1, width).tolist()
        if len(rows) != count:
            raise ValueError(f"{name} are missing")
        return rows

    def losses(self) -> list[float | None]:
        """The loss of every step done, in nats; None where it was refused."""
        return [None if math.isnan(loss) else loss for (loss,) in self._rows(_LOSSES, 1, self.committed.step)]

    def _take_up(self) -> None:
        record = unsealed(durable.read_json(self.directory / _COMMIT), FORMAT)
        digests: dict[str, str] = record.pop("files", {})
        commit = Commit(**record)
        commit = replace(commit, held_out=[(int(step), float(loss)) for step, loss in commit.held_out])
        at, wanted = {}, set[Path]()
        newest = self._newest(commit.updates)
        for part in self.at:
            # What it has gradients of; where its state is not after them, they bring it up.
            last = commit.reached.get(part, 0) if part in self.pieces else commit.updates
            at[part] = max(newest.get(part, 0), last - 1)
            if at[part] < last:
                wanted.add(self._path(GRADIENTS, part, last))
            if at[part]:
                wanted.add(self._path(STATE, part, at[part]))
        for path in wanted:
            TensorFile(path, self.directory)  # its header says how long it must be
        self.committed, self.at, self._digests = commit, at, digests
        self.losses()
        rows = self._rows(_UPDATES, 3, commit.updates)
        self._updates = [Update(int(last), rate, None if math.isnan(clip) else clip) for last, rate, clip in rows]
        for kind in (STATE, GRADIENTS):
            for path in (self.directory / kind).iterdir():
                if path not in wanted:
                    path.unlink()
                # What was written after the last step was published has no digest in its record.
                elif digests.get(f"{kind}/{path.name}", "") not in ("", file_digest(path, self.directory)):
                    raise ValueError(f"{path} is not what was written")

    def _newest(self, updates: int) -> dict[str, int]:
        """The newest state of each part that is there, of those that are committed."""
        newest: dict[str, int] = {}
        for path in (self.directory / STATE).iterdir():
            part, _, number = path.stem.rpartition("-")
            if number.isdecimal() and int(number) <= updates:
                newest[part] = max(newest.get(part, 0), int(number))
        return newest

    def _reset(self) -> None:
        files.remove_tree(self.directory)
        for kind in (STATE, GRADIENTS):
            (self.directory / kind).mkdir(parents=True)
        self.committed, self.at, self._digests = Commit(), dict.fromkeys(self.at, 0), {}
        self._updates, self._reached = [], set()

    def _path(self, kind: str, part: str, step: int) -> Path:
        return self.directory / kind / f"{part}-{step:08d}.safetensors"

    def _write(self, kind: str, part: str, step: int, tensors: Tensors) -> None:
        path, digests = self._path(kind, part, step), list[str]()
        durable.write_durably(path, lambda temporary: digests.append(write_tensors(temporary, tensors)))
        self._digests[f"{kind}/{path.name}"] = digests[0]

    def _remove(self, kind: str, part: str, step: int) -> None:
        path = self._path(kind, part, step)
        path.unlink(missing_ok=True)
        self._digests.pop(f"{kind}/{path.name}", None)

    def _behind(self, write: Callable[[], None], parts: Iterable[str]) -> None:
        self.flush()
        self._writing = self._pool.submit(write), frozenset(parts)

    def _read(self, kind: str, part: str, step: int, prefix: str = "") -> Tensors:
        if (writing := self._writing) is not None and part in writing[1]:
            writing[0].result()
        file = TensorFile(self._path(kind, part, step), self.directory)
        return {name.removeprefix(prefix): file[name] for name in file if name.startswith(prefix)}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


class Spill:
    """Holds tensors that live for one step: in memory up to `budget` bytes, beyond it in files that nothing syncs.

    A crash loses them, and the next one empties the directory.
    """

    def __init__(self, directory: Path, budget: int) -> None:
        self.directory, self.budget = directory, budget
        self.bytes_in_memory = 0
        self.bytes_on_disk = 0
        self._memory: dict[Hashable, Tensor] = {}
        self._files: dict[Hashable, tuple[Path, torch.dtype, torch.Size]] = {}
        self._made = 0
        self.clear()

    def clear(self) -> None:
        """Drop everything."""
        self._memory.clear()
        self._files.clear()
        self.bytes_in_memory = self.bytes_on_disk = 0
        files.remove_tree(self.directory)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._memory or key in self._files

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Hold a tensor in place of what was under the key; raises NoSpaceError where the disk is full."""
        self.drop(key)
        tensor = tensor.detach().cpu()
        if self.bytes_in_memory + tensor.nbytes <= self.budget:
            # A view would keep all of what it is a view of.
            self._memory[key] = tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
            self.bytes_in_memory += tensor.nbytes
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / str(self._made)
        self._made += 1
        with durable.explain_full_disk(path), path.open("wb", buffering=0) as file:
            left = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            while left:
                left = left[file.write(left) :]
        self._files[key] = path, tensor.dtype, tensor.shape
        self.bytes_on_disk += tensor.nbytes

    def get(self, key: Hashable) -> Tensor:
        """The tensor under a key, on the CPU. It must not be written to."""
        if key in self._memory:
            return self._memory[key]
        path, dtype, shape = self._files[key]
        return torch.from_numpy(np.fromfile(path, dtype=np.uint8)).view(dtype).reshape(shape)

    def take(self, key: Hashable) -> Tensor:
        """The tensor under a key, which is then dropped."""
        tensor = self.get(key)
        self.drop(key)
        return tensor

    def drop(self, key: Hashable) -> None:
        """Forget what is under a key, if anything is."""
        if (tensor := self._memory.pop(key, None)) is not None:
            self.bytes_in_memory -= tensor.nbytes
        if (entry := self._files.pop(key, None)) is not None:
            path, dtype, shape = entry
            self.bytes_on_disk -= shape.numel() * dtype.itemsize
            path.unlink(missing_ok=True)
