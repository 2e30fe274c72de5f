"""What the swapped engine keeps outside memory: its state on disk, and tensors that live for one step.

    swap/commit.json                     steps and updates done, the last update's scale, held-out losses so far
    swap/losses                          the loss of each step, float64
    swap/updates                         of each update its step in the budget, its rate and its scale, float64
    swap/state/PART-<n>.safetensors      weights and moments after n updates
    swap/gradients/PART-<n>.safetensors  the gradients that make update n of the state after n-1

Where no figure of the whole gradient decides about the update, there are no gradients: states after the step in hand
are written beside those before it, and the record says which ones count. Else a part's state may be one update behind
the commit: the gradients then bring it up. A *piece* of a part (an expert) that rows did not reach is left as it is,
any number of updates behind: its gradient was zero in all of them but the first, which is on the disk where rows
reached it then. Every file is written under another name, synced and renamed; gradients stand before the commit that
counts on them, a state before the files that it replaces go. So a kill, wherever it falls, loses the step in hand and
nothing else.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from stackwise import durable, files
from stackwise.training.checkpoint import TensorFile, file_digest, reason, sealed, unsealed, write_tensors
from stackwise.training.lanes import Lane
from stackwise.training.swap_cache import PieceCache

STATE, GRADIENTS = "state", "gradients"
FORMAT = 2  # of the record and of what a state's tensors are called
THREADS = 3  # that write, that read or write pieces of files, that spill
_COMMIT, _LOSSES, _UPDATES = "commit.json", "losses", "updates"
Tensors = dict[str, Tensor]
T = TypeVar("T")


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
    norm: float | None = None  # the gradient norm that clips the next step, where a step's own does not
    held_out: Sequence[tuple[int, float]] = ()  # held-out losses, each with the steps done before it


class RedoLog:
    """The files of one stage. Writing happens behind, in threads, with at most one call's files waiting.

    Args:
        pieces: What of parts is updated only where rows reach it, each as a part of its own.
        lane: The way to the device, from which what is written comes; None: it is on the CPU.
        memory: Bytes of memory in which pieces stay beside their files.

    Attributes:
        at: The update that each part's state is after.
        begin: Gives the state that a part has before its first update; nothing of it where it is as it was made.
        cache: What of pieces is in memory.
        read_bytes: Bytes of pieces that came from files so far.
    """

    def __init__(
        self,
        directory: Path,
        parts: Sequence[str],
        pieces: Sequence[str] = (),
        lane: Lane | None = None,
        *,
        memory: int = 0,
    ) -> None:
        self.directory, self.parts, self.pieces = directory, tuple(parts), frozenset(pieces)
        self.lane = lane or Lane(torch.device("cpu"))
        self.cache, self.read_bytes = PieceCache(memory), 0
        self.committed = Commit()
        self.at = dict.fromkeys((*self.parts, *pieces), 0)
        self._ahead: set[str] = set()  # parts whose state after the step in hand is handed in
        self._reached: set[str] = set()  # pieces with gradients of the step in hand
        self._updates: list[Update] = []
        self.begin: Callable[[str], Mapping[str, Tensor]] = lambda part: {}
        self._pool = ThreadPoolExecutor(THREADS, "swap-writer")
        self._pieces_pool = ThreadPoolExecutor(THREADS, "swap-pieces")  # of large tensors, both ways
        self._writing: dict[str, Future[None]] = {}  # by part, the newest call's
        self._left: dict[str, threading.Event] = {}  # of the newest call, by part
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
        self._pieces_pool.shutdown()

    @property
    def reached(self) -> int:
        """Pieces with gradients of the step in hand."""
        return len(self._reached)

    def read(self, part: str, prefix: str) -> Tensors | None:
        """What of a part's state begins with a prefix, without it; None where the part is as it was made."""
        if self.at.get(part):
            state = self._read(STATE, part, self.at[part], lambda name: name.startswith(prefix))
            return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        begun = self.begin(part)
        return {key.removeprefix(prefix): begun[key].clone() for key in begun if key.startswith(prefix)} or None

    def beside(self, part: str, prefix: str) -> Tensors:
        """What of a part's state does not begin with a prefix."""
        if self.at.get(part):
            return self._read(STATE, part, self.at[part], lambda name: not name.startswith(prefix))
        begun = self.begin(part)
        return {key: begun[key].clone() for key in begun if not key.startswith(prefix)}

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

        def write(part: str, tensors: Tensors) -> None:
            self._write(STATE, part, tensors, step)
            self._remove(STATE, part, before[part])  # not before the new one is there
            self._remove(GRADIENTS, part, before[part] + 1)

        self._behind(write, states)

    def write_gradients(self, gradients: Mapping[str, Tensors]) -> None:
        """Write parts' gradients of the step in hand, behind."""
        step = self.committed.updates + 1
        self._reached |= self.pieces & set(gradients)

        self._behind(partial(self._write, GRADIENTS, step=step), gradients)

    def write_ahead(self, states: Mapping[str, Tensors]) -> None:
        """Write parts' states after the step in hand, behind; until it is published those before it are read."""
        self._ahead |= set(states)
        self._behind(partial(self._write, STATE, step=self.committed.updates + 1), states)

    def flush(self) -> None:
        """Wait until everything handed in is on the disk. Raises NoSpaceError: the disk is full."""
        for part in list(self._writing):
            self._writing[part].result()
            del self._writing[part]  # not before: the loader waits for it too

    def wait_for_copies(self) -> None:
        """Wait until everything handed in has left the device."""
        for left in self._left.values():
            left.wait()

    def commit(
        self,
        update: Update,
        loss: float,
        scaler: list[float] | None = None,
        *,
        taken: bool = True,
        norm: float | None = None,
    ) -> None:
        """Publish the step in hand, whose gradients are all handed in.

        Args:
            scaler: The state of the loss scale after it, where there is one.
            norm: What clips the next step, where its own norm does not.

        Raises:
            NoSpaceError: The disk is full; the step is not published.
        """
        self.flush()
        before = self.committed
        self._put(_LOSSES, before.step, (loss,))
        record = replace(before, step=before.step + 1, scaler=scaler, norm=norm)
        if taken:
            updates = before.updates + 1
            self._put(_UPDATES, before.updates, (update.last, update.rate, _number(update.clip)))
            reached = {**before.reached, **dict.fromkeys(sorted(self._reached), updates)}
            record = replace(record, updates=updates, reached=reached)
        self._publish(record)
        if taken:
            self._updates.append(update)
            for part in self._ahead:
                old, self.at[part] = self.at[part], record.updates
                self._remove(STATE, part, old)
        else:  # a piece that the next step does not reach would keep them
            for piece in self._reached:
                self._remove(GRADIENTS, piece, before.updates + 1)
            for part in self._ahead:
                self._remove(STATE, part, before.updates + 1)
        self._reached, self._ahead = set(), set()

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
        at, paths = {}, set[Path]()
        newest = self._newest(commit.updates)
        for part in self.at:
            # What it has gradients of; where its state is not after them, they bring it up.
            last = commit.reached.get(part, 0) if part in self.pieces else commit.updates
            at[part] = max(newest.get(part, 0), last - 1)
            if at[part] < last:
                paths.add(self._path(GRADIENTS, part, last))
            if at[part]:
                paths.add(self._path(STATE, part, at[part]))
        for path in paths:
            TensorFile(path, self.directory)  # its header says how long it must be
        self.committed, self.at, self._digests = commit, at, digests
        self.losses()
        rows = self._rows(_UPDATES, 3, commit.updates)
        self._updates = [Update(int(last), rate, None if math.isnan(clip) else clip) for last, rate, clip in rows]
        for kind in (STATE, GRADIENTS):
            for path in (self.directory / kind).iterdir():
                if path not in paths:
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
        self._updates, self._reached, self._ahead = [], set(), set()

    def _path(self, kind: str, part: str, step: int) -> Path:
        return self.directory / kind / f"{part}-{step:08d}.safetensors"

    def _write(self, kind: str, part: str, tensors: Tensors, step: int) -> None:
        path, digests, threads = self._path(kind, part, step), list[str](), self._pieces_pool
        durable.write_durably(path, lambda temporary: digests.append(write_tensors(temporary, tensors, threads)))
        self._digests[f"{kind}/{path.name}"] = digests[0]
        if part in self.pieces:
            self.cache.put(part, kind, step, tensors)

    def _remove(self, kind: str, part: str, step: int) -> None:
        path = self._path(kind, part, step)
        path.unlink(missing_ok=True)
        self._digests.pop(f"{kind}/{path.name}", None)
        self.cache.remove(part, kind, step)

    def _behind(self, write: Callable[[str, Tensors], None], tensors: Mapping[str, Tensors]) -> None:
        self.flush()
        mark, leaving = self.lane.mark(), dict(tensors)
        self._left = {part: threading.Event() for part in tensors}
        left = self._left

        def behind(part: str) -> None:
            try:
                landed = self.lane.down(leaving[part], mark)
            finally:
                del leaving[part]  # the device's memory is free from here on
                left[part].set()
            write(part, landed)

        self._writing = {part: self._pool.submit(behind, part) for part in tensors}

    def _read(self, kind: str, part: str, step: int, wanted: Callable[[str], bool] = lambda name: True) -> Tensors:
        if (writing := self._writing.get(part)) is not None:
            writing.result()
        if (kept := self.cache.get(part, kind, step)) is not None:
            return {name: tensor for name, tensor in kept.items() if wanted(name)}
        file = TensorFile(self._path(kind, part, step), self.directory)
        tensors = file.read([name for name in file if wanted(name)], self.lane.buffers.lend, self._pieces_pool)
        if part in self.pieces:
            self.read_bytes += sum(tensor.nbytes for tensor in tensors.values())
        return tensors


def _number(value: float | None) -> float:
    return math.nan if value is None else value


class Spill:
    """Holds tensors that live for one step: in memory up to `budget` bytes, beyond it in files that nothing syncs.

    A crash loses them, and the next one empties the directory. Threads write and read: what is handed in leaves the
    device while that computes, and what is asked for ahead (`bring`) is there when it is needed.
    """

    def __init__(self, directory: Path, budget: int, lane: Lane | None = None) -> None:
        self.directory, self.budget, self.lane = directory, budget, lane or Lane(torch.device("cpu"))
        self.bytes_in_memory = 0
        self.bytes_on_disk = 0
        self._memory: dict[Hashable, Tensor | Future[Tensor]] = {}
        self._files: dict[Hashable, tuple[Path, torch.dtype, torch.Size, Future[None]]] = {}
        self._sizes: dict[Hashable, int] = {}  # of what is in memory
        self._brought: dict[Hashable, Future[Tensor]] = {}
        self._leaving: deque[Future[Any]] = deque()  # what is still handed over, the oldest first
        self._made = 0
        self._pool = ThreadPoolExecutor(THREADS, "swap-spill")
        self.clear()

    def clear(self) -> None:
        """Drop everything."""
        for key in [*self._memory, *self._files]:
            self.drop(key)
        self._leaving.clear()
        files.remove_tree(self.directory)

    def close(self) -> None:
        """Drop everything, and let the threads go."""
        self.clear()
        self._pool.shutdown()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._memory or key in self._files

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Hold a tensor in place of what was under the key; it must not be written to any more.

        Raises:
            NoSpaceError: The disk is full (at a later call too).
        """
        self.drop(key)
        tensor, on_host = tensor.detach(), tensor.device.type == "cpu"
        mark = self.lane.mark()
        if self.bytes_in_memory + tensor.nbytes <= self.budget:
            self._sizes[key] = tensor.nbytes
            self.bytes_in_memory += tensor.nbytes
            if on_host:  # a view would keep all of what it is a view of
                self._memory[key] = tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
            else:
                self._memory[key] = self._left(self._pool.submit(self._down, tensor, mark))
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / str(self._made)
        self._made += 1
        written = self._left(self._pool.submit(self._write, path, tensor, mark))
        self._files[key] = path, tensor.dtype, tensor.shape, written
        self.bytes_on_disk += tensor.nbytes

    def bring(self, key: Hashable) -> None:
        """Begin to bring what is under a key to the device, if anything is: `get` will ask for it soon."""
        if key in self and key not in self._brought and not self._is_there(key):
            self._brought[key] = self._pool.submit(self._sent, key)

    def get(self, key: Hashable) -> Tensor:
        """The tensor under a key, on the device. It must not be written to."""
        if self._is_there(key):
            return self.held(key)
        brought = self._brought.pop(key, None)
        tensor = self._sent(key) if brought is None else brought.result()
        self.lane.use([tensor])
        return tensor

    def take(self, key: Hashable) -> Tensor:
        """The tensor under a key, which is then dropped."""
        tensor = self.get(key)
        self.drop(key)
        return tensor

    def drop(self, key: Hashable) -> None:
        """Forget what is under a key, if anything is."""
        if (brought := self._brought.pop(key, None)) is not None:
            wait([brought])
        if self._memory.pop(key, None) is not None:
            self.bytes_in_memory -= self._sizes.pop(key)
        if (entry := self._files.pop(key, None)) is not None:
            path, dtype, shape, written = entry
            wait([written])
            self.bytes_on_disk -= shape.numel() * dtype.itemsize
            path.unlink(missing_ok=True)

    def _is_there(self, key: Hashable) -> bool:
        return key in self._memory and self.lane.device.type == "cpu"

    def _left(self, leaving: Future[T]) -> Future[T]:
        """Let no more than a few tensors be on their way; what went wrong with one is raised here."""
        self._leaving.append(leaving)
        while len(self._leaving) > 2 * THREADS or (self._leaving and self._leaving[0].done()):
            self._leaving.popleft().result()
        return leaving

    def _down(self, tensor: Tensor, mark: Any) -> Tensor:
        return self.lane.down({"": tensor}, mark)[""]

    def _write(self, path: Path, tensor: Tensor, mark: Any) -> None:
        data = self._down(tensor, mark)
        with durable.explain_full_disk(path), path.open("wb", buffering=0) as file:
            left = memoryview(data.reshape(-1).view(torch.uint8).numpy().data)
            while left:
                left = left[file.write(left) :]

    def held(self, key: Hashable) -> Tensor:
        """What is under a key, in the host's memory."""
        if (held := self._memory.get(key)) is not None:
            return held if isinstance(held, Tensor) else held.result()
        path, dtype, shape, written = self._files[key]
        written.result()
        data = self.lane.buffers.lend(shape.numel() * dtype.itemsize)
        with path.open("rb", buffering=0) as file:
            left = memoryview(data.numpy().data)
            while left:
                if not (count := file.readinto(left)):
                    raise ValueError(f"{path} is cut off")
                left = left[count:]
        return data.view(dtype).view(shape)

    def _sent(self, key: Hashable) -> Tensor:
        held = self.held(key)
        with self.lane.sending():
            return held.to(self.lane.device, non_blocking=True)
