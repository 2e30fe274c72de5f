"""What the swapped engine keeps on the disk: the state of its stage.

    swap/commit.json                     steps and updates done, the last update's scale, held-out losses so far
    swap/losses                          the loss of each step, float64
    swap/updates                         of each update its step in the budget, its rate and its scale, float64
    swap/state/PART-<n>.safetensors      weights and moments after n updates
    swap/gradients/PART-<n>.safetensors  the gradients that make update n of the state after n-1
    swap/pieces/PART.state, .gradients   the same of the pieces of a part (experts of a block), see `swap_extents`
    swap/rank-R-of-N/                    of several ranks: such states and gradients, rank R's share of each tensor

Where no figure of the whole gradient decides about the update, there are no gradients: states after the step in hand
are written beside those before it, and the record says which ones count. Else a part's state may be one update behind
the commit: the gradients then bring it up. A *piece* of a part (an expert) that rows did not reach is left as it is,
any number of updates behind: its gradient was zero in all of them but the first, which is on the disk where rows
reached it then. Every file of a part is written under another name, synced and renamed; gradients stand before the
commit that counts on them, a state before the files that it replaces go. Pieces lie in files together, which are synced
before a record says what lies where in them; what the record before it says is left alone until then. So a kill,
wherever it falls, loses the step in hand and nothing else. Of several ranks the main one writes the record, when every
rank has said that its files are there, and no rank removes a file before it knows that the record is.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stackwise import durable, files
from stackwise.files import file_digest
from stackwise.training.checkpoint import reason, sealed, unsealed
from stackwise.training.lanes import Buffers, Lane
from stackwise.training.ranks import Ranks, SingleProcess
from stackwise.training.swap_cache import PieceCache
from stackwise.training.swap_extents import PieceFiles, Table
from stackwise.training.tensor_files import TensorFile, aligned_first, passes_cache, write_tensors

STATE, GRADIENTS, PIECES = "state", "gradients", "pieces"
FORMAT = 2  # of the record and of what a state's tensors are called
THREADS = 3  # that write, that read or write pieces of files
_COMMIT, _LOSSES, _UPDATES = "commit.json", "losses", "updates"
UNSOUND = (OSError, ValueError, KeyError, TypeError)
"""What reading files raises that are not there, or not whole."""
Tensors = dict[str, Tensor]
Find = Callable[[dict[str, Any]], str | None]


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
    pieces: Table = field(default_factory=dict)  # where they lie
    scaler: list[float] | None = None  # the state of the loss scale, where there is one
    norm: float | None = None  # the gradient norm that clips the next step, where a step's own does not
    held_out: Sequence[tuple[int, float]] = ()  # held-out losses, each with the steps done before it


class RedoLog:
    """The files of one stage. Writing happens behind, in threads, with at most one call's files waiting.

    Args:
        pieces: What of parts is updated only where rows reach it, each as a part of its own: of each its part.
        lane: The way to the device, from which what is written comes; None: it is on the CPU.
        memory: Bytes of memory in which pieces stay beside their files.
        ranks: Those that train the stage, each with its share in files of its own.
        own: Where this rank's files are; None: beside the record.

    Attributes:
        at: The update that each part's state is after.
        begin: Gives the state that a part has before its first update; nothing of it where it is as it was made.
        cache: What of pieces is in memory.
        read_bytes: Bytes of pieces that came from files so far.
        staging: Lends the memory from which files go past the page cache; None: they go through it.
    """

    def __init__(
        self,
        directory: Path,
        parts: Sequence[str],
        pieces: Mapping[str, str] | None = None,
        lane: Lane | None = None,
        *,
        memory: int = 0,
        ranks: Ranks | None = None,
        own: Path | None = None,
    ) -> None:
        self.directory, self.parts, self.pieces = directory, tuple(parts), frozenset(pieces or ())
        self.ranks, self.own = ranks or SingleProcess(), own or directory
        self._piece_files = PieceFiles(self.own / PIECES, self.own, pieces or {})
        self.lane = lane or Lane(torch.device("cpu"))
        self.cache, self.read_bytes = PieceCache(memory), 0
        self.staging: Buffers | None = None
        self.committed = Commit()
        self.at = dict.fromkeys((*self.parts, *self.pieces), 0)
        self._ahead: set[str] = set()  # parts whose state after the step in hand is handed in
        self._reached: set[str] = set()  # pieces with gradients of the step in hand
        self._updates: list[Update] = []
        self.begin: Callable[[str], Mapping[str, Tensor]] = lambda part: {}
        self._pool = ThreadPoolExecutor(THREADS, "swap-writer")
        self._pieces_pool = ThreadPoolExecutor(THREADS, "swap-pieces")  # of large tensors, both ways
        self._writing: dict[str, Future[None]] = {}  # by part, the newest call's
        self._left: dict[str, threading.Event] = {}  # of those on their way from the device, by part
        self._digests: dict[str, str] = {}  # of the files that are there, by their paths below `directory`

    def open(self, warn: Callable[[str], None], find: Find | None = None) -> bool:
        """Take up what is there; what is not whole is named, and training starts anew. All ranks call it.

        Args:
            find: Finds the files of another number of ranks, of what was published; says what is wrong with them.

        Returns:
            Whether there is anything.
        """
        published, why = self.ranks.shared(self._published() if self.ranks.main else None)
        if published is not None:
            alike = published["ranks"] == self.ranks.size
            try:
                commit, self._updates = read_commit(published)
                if alike:
                    self.take_up(commit, published["files"][self.ranks.rank])
                else:
                    self.committed = commit
                    why = find(published) if find else f"{self.directory} is of other ranks"
            except UNSOUND as error:
                why = unsound(self.directory, error)
        why = next((one for one in self.ranks.gathered(why) if one), None)
        if why is not None and self.ranks.main:
            warn(f"{why}: the stage begins again")
        if published is None or why is not None:
            self.reset()
            return False
        return True

    def _published(self) -> tuple[dict[str, Any] | None, str | None]:
        """What the record says, with its tables, in plain data; else what is wrong with it, if it is there."""
        if not os.path.lexists(self.directory / _COMMIT):  # there was no step yet
            return None, None
        try:
            record = unsealed(durable.read_json(self.directory / _COMMIT), FORMAT)
            others = record.pop("others", [])
            record["files"] = [record.get("files", {}), *others]
            record["ranks"] = len(record["files"])
            record["rows"] = self._rows(_UPDATES, 3, record["updates"])
            self._rows(_LOSSES, 1, record["step"])
        except UNSOUND as error:
            return None, unsound(self.directory, error)
        return record, None

    def pass_cache(self) -> None:
        """Write and read files past the page cache from now on, where the file system can; they are as any others."""
        self.staging = Buffers() if passes_cache(self.own / STATE) else None

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
        if following > self.committed.updates:
            return None
        there = part not in self.pieces or self._piece_files.at(GRADIENTS, part) == following
        return self._read(GRADIENTS, part, following) if there else None

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
        self._wait(list(self._writing))
        self._piece_files.sync()

    def sync_pieces(self, part: str) -> None:
        """Let what was handed in of a part's pieces be made durable, behind."""
        before = [self._writing[one] for one in self._writing if one in self.pieces]

        def behind() -> None:
            for writing in before:  # those whose turn came earlier, so they wait for nobody who waits for this
                writing.result()
            self._piece_files.sync([part])

        self._writing[f"{part} {PIECES}"] = self._pool.submit(behind)

    def _wait(self, parts: Iterable[str]) -> None:
        for part in parts:
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
            record = replace(record, updates=updates)
        else:  # a piece that the next step does not reach would keep them
            for piece in self._reached:
                self._remove(GRADIENTS, piece, before.updates + 1)
        self._publish(record)
        if taken:
            self._updates.append(update)
            for part in self._ahead:
                old, self.at[part] = self.at[part], record.updates
                self._remove(STATE, part, old)
        else:
            for part in self._ahead:
                self._remove(STATE, part, before.updates + 1)
        self._reached, self._ahead = set(), set()

    def note_evaluation(self, loss: float) -> None:
        """Keep the held-out loss after the steps done."""
        self.flush()  # the writer must not note digests meanwhile
        step = self.committed.step
        kept = [entry for entry in self.committed.held_out if entry[0] != step]
        self._publish(replace(self.committed, held_out=[*kept, (step, loss)]))

    def follow(self, updates: Sequence[Update]) -> None:
        """Know the updates that were made."""
        self._updates = list(updates)

    def republish(self) -> None:
        """Let the last record count for the files that are there now."""
        self._publish(self.committed)

    def _publish(self, record: Commit) -> None:
        """Let a record count, once every rank is here; it counts when this returns."""
        record = replace(record, pieces=self._piece_files.table())
        files_of, *others = self.ranks.gathered(self._digests)
        if self.ranks.main:
            published = {"format": FORMAT, **asdict(record), "files": files_of}
            durable.write_json(self.directory / _COMMIT, sealed(published | ({"others": others} if others else {})))
        self.ranks.wait()
        self._piece_files.publish()
        self.committed = record

    def _put(self, name: str, place: int, values: Sequence[float]) -> None:
        """Write a row of a table of float64, which is then on the disk."""
        if not self.ranks.main:
            return
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
        rows = self.ranks.shared(self._rows(_LOSSES, 1, self.committed.step) if self.ranks.main else None)
        return [None if math.isnan(loss) else loss for (loss,) in rows]

    def take_up(self, commit: Commit, digests: Mapping[str, str]) -> None:
        """Take up the files that a record counts on. Raises what is in `UNSOUND`: they are not there, or not whole."""
        at, paths = {}, set[Path]()
        self._piece_files.take_up(commit.pieces)
        newest = self._newest(commit.updates)
        for part in self.at:
            if part in self.pieces:
                at[part] = self._piece_files.at(STATE, part)
                continue
            # Where its state is not after the last update, gradients bring it up.
            at[part] = max(newest.get(part, 0), commit.updates - 1)
            if at[part] < commit.updates:
                paths.add(self._path(GRADIENTS, part, commit.updates))
            if at[part]:
                paths.add(self._path(STATE, part, at[part]))
        for path in paths:
            TensorFile(path, self.own)  # its header says how long it must be
        self.committed, self.at, self._digests = commit, at, dict(digests)
        for kind in (STATE, GRADIENTS):
            for path in (self.own / kind).iterdir():
                if path not in paths:
                    path.unlink()
                # What was written after the last step was published has no digest in its record.
                elif digests.get(f"{kind}/{path.name}", "") not in ("", file_digest(path, self.own)):
                    raise ValueError(f"{path} is not what was written")

    def _newest(self, updates: int) -> dict[str, int]:
        """The newest state of each part that is there, of those that are committed."""
        newest: dict[str, int] = {}
        for path in (self.own / STATE).iterdir():
            part, _, number = path.stem.rpartition("-")
            if number.isdecimal() and int(number) <= updates:
                newest[part] = max(newest.get(part, 0), int(number))
        return newest

    def reset(self) -> None:
        """Begin with nothing."""
        if self.ranks.main:
            files.remove_tree(self.directory)
            self.directory.mkdir(parents=True)
        self.ranks.wait()
        self.begin_files()
        self.committed, self.at, self._digests = Commit(), dict.fromkeys(self.at, 0), {}
        self._updates, self._reached, self._ahead = [], set(), set()

    def begin_files(self) -> None:
        """Make room for this rank's files; there are none."""
        for kind in (STATE, GRADIENTS):
            files.remove_tree(self.own / kind)
            (self.own / kind).mkdir(parents=True)
        self._piece_files.reset()

    def _path(self, kind: str, part: str, step: int) -> Path:
        return self.own / kind / f"{part}-{step:08d}.safetensors"

    def _write(self, kind: str, part: str, tensors: Tensors, step: int) -> None:
        if part in self.pieces:
            self._piece_files.write(kind, part, step, aligned_first(tensors), self._pieces_pool, self.staging)
            self.cache.put(part, kind, step, tensors)
            return
        path, digests = self._path(kind, part, step), list[str]()
        ordered, how = aligned_first(tensors), (self._pieces_pool, self.staging)

        def write(temporary: Path) -> None:
            digests.append(write_tensors(temporary, ordered, *how, sync=False))

        durable.write_durably(path, write)  # which syncs it
        self._digests[f"{kind}/{path.name}"] = digests[0]

    def _remove(self, kind: str, part: str, step: int) -> None:
        if part in self.pieces:
            self._piece_files.remove(kind, part, step)
            self.cache.remove(part, kind, step)
            return
        path = self._path(kind, part, step)
        path.unlink(missing_ok=True)
        self._digests.pop(f"{kind}/{path.name}", None)

    def _behind(self, write: Callable[[str, Tensors], None], tensors: Mapping[str, Tensors]) -> None:
        small = self.pieces.issuperset(tensors)  # they do not wait until larger files are durable
        self._wait([part for part in self._writing if not small or part in self.pieces])
        mark, leaving, left = self.lane.mark(), dict(tensors), {part: threading.Event() for part in tensors}
        self._left = {part: event for part, event in self._left.items() if not event.is_set()} | left

        def behind(part: str) -> None:
            try:
                landed = self.lane.down(leaving[part], mark)
            finally:
                del leaving[part]  # the device's memory is free from here on
                left[part].set()
            write(part, landed)

        self._writing |= {part: self._pool.submit(behind, part) for part in tensors}

    def _read(self, kind: str, part: str, step: int, wanted: Callable[[str], bool] = lambda name: True) -> Tensors:
        if (writing := self._writing.get(part)) is not None:
            writing.result()
        if (kept := self.cache.get(part, kind, step)) is not None:
            return {name: tensor for name, tensor in kept.items() if wanted(name)}
        how: dict[str, Any] = {"threads": self._pieces_pool, "direct": self.staging is not None}
        if part in self.pieces:
            tensors = self._piece_files.read(kind, part, wanted, self.lane.buffers.lend, **how)
            self.read_bytes += sum(tensor.nbytes for tensor in tensors.values())
            return tensors
        file = TensorFile(self._path(kind, part, step), self.own)
        return file.read([name for name in file if wanted(name)], self.lane.buffers.lend, **how)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def read_commit(published: Mapping[str, Any]) -> tuple[Commit, list[Update]]:
    """A record and its updates of what was published. Raises TypeError, ValueError: it is none."""
    if published.get("reached"):
        raise ValueError("its experts lie in files of their own, as an earlier version of StackWise has them")
    besides = "files", "ranks", "rows", "reached"
    commit = Commit(**{key: value for key, value in published.items() if key not in besides})
    updates = [Update(int(last), rate, None if math.isnan(clip) else clip) for last, rate, clip in published["rows"]]
    held_out = [(int(step), float(loss)) for step, loss in commit.held_out]
    return replace(commit, held_out=held_out), updates


def unsound(directory: Path, error: Exception) -> str:
    """What is wrong with files, in a line."""
    if isinstance(error, FileNotFoundError):
        return f"{error.filename or error} is missing"
    return f"{directory} is damaged ({reason(error)})"
