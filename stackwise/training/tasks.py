"""Tasks to adapt to: which one each microbatch is of, and what its rows are.

A task is a pure function of the seed and its number, and so is which task a microbatch has: nothing is remembered.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stackwise.batch import TOKENS, Batch
from stackwise.config.meta import Meta
from stackwise.identity import generator
from stackwise.store import RowOrder
from stackwise.store.order import Rows

if TYPE_CHECKING:
    from stackwise.training.feed import Feed

EPISODES = 4
"""Times that a task held out is adapted to at most, each time from other rows."""
KEPT = 256  # tables of tasks in memory


@dataclass(frozen=True)
class Tasks(abc.ABC):
    """The tasks of a stage: training ones count from 0, those held out follow.

    Args:
        meta: How they are learned.
        seed: What they are drawn by.
        rows: In a microbatch: support and query.
    """

    meta: Meta
    seed: int
    rows: int

    @property
    @abc.abstractmethod
    def training(self) -> int:
        """How many are trained on."""

    @property
    @abc.abstractmethod
    def held(self) -> int:
        """How many are held out."""

    @abc.abstractmethod
    def order(self, plain: RowOrder) -> RowOrder:
        """The order in which rows are taken, where `plain` is that without tasks."""

    @abc.abstractmethod
    def rows_of(self, task: int, feed: Feed) -> Rows:
        """The rows of a feed that a task may have."""

    @abc.abstractmethod
    def show(self, batch: Batch, task: int) -> Batch:
        """Rows as a task has them."""

    def at(self, microbatch: int) -> tuple[int, int]:
        """The training task of a microbatch, counted from the stage's first, and how often it was before.

        Each comes once before one comes again.
        """
        turn, place = divmod(microbatch, self.training)
        return int(_turn(self.seed, turn, self.training)[place]), turn

    def of_microbatch(self, batch: Batch, microbatch: int) -> Batch:
        """The rows of a microbatch as its task has them."""
        return self.show(batch, self.at(microbatch)[0])

    def held_out(self, feed: Feed, share: int = 0, shares: int = 1) -> Iterator[Batch]:
        """Rows of tasks that training never has, in microbatches: several of each task, with no sample twice.

        Args:
            feed: The held-out rows.
            share: Which of the shares is asked for: each has every so-many-th microbatch.
        """
        number, ids_R = 0, np.ascontiguousarray(feed.rowset.sample_ids).view("V16").ravel()
        for task in range(self.training, self.training + self.held):
            order = generator(self.seed, "held-out rows", task).permutation(self.rows_of(task, feed))
            _, first = np.unique(ids_R[order], return_index=True)  # of a sample under several masks one
            chosen = order[np.sort(first)]
            for episode in range(min(EPISODES, len(chosen) // self.rows)):
                if number % shares == share:
                    yield self.show(feed.batch(chosen[episode * self.rows : (episode + 1) * self.rows]), task)
                number += 1


@dataclass(frozen=True)
class PermutedTasks(Tasks):
    """Tasks in each of which other tokens stand for each other.

    Args:
        used_U: The ids that tasks permute, sorted: those that occur in the data, and no separator.
        vocab_size: Ids in all.
    """

    used_U: NDArray[np.int64]
    vocab_size: int
    _tables: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def training(self) -> int:
        return self.meta.permutations

    @property
    def held(self) -> int:
        return self.meta.tasks_held_out(by_data=False)

    def order(self, plain: RowOrder) -> RowOrder:
        """See `Tasks.order`: every task may have any row."""
        return plain

    def rows_of(self, task: int, feed: Feed) -> Rows:
        return np.arange(feed.rowset.rows)

    def show(self, batch: Batch, task: int) -> Batch:
        """See `Tasks.show`: other tokens."""
        tokens_BS = self.table(task)[batch[TOKENS].long()].to(batch[TOKENS].dtype)
        return replace(batch, tensors={**batch.tensors, TOKENS: tokens_BS})

    def table(self, task: int) -> Tensor:
        """What stands for each id in a task, int64 [V]."""
        known = self._tables.get(task)
        if known is None:
            draw = generator(self.seed, "task", task)
            chosen = max(2, round(self.meta.permuted * len(self.used_U)))
            among = np.sort(draw.permutation(self.used_U)[:chosen])
            table = np.arange(self.vocab_size)
            table[among] = draw.permutation(among)
            while len(self._tables) >= KEPT:
                self._tables.pop(next(iter(self._tables)))
            known = self._tables[task] = torch.from_numpy(table)
        return known


@dataclass(frozen=True)
class DataTasks(Tasks):
    """Tasks that are data sets (`data.tasks`): the last ones are held out.

    Args:
        task_R: For each row of the feed its task.
        count: Tasks in all.
    """

    task_R: NDArray[np.int64]
    count: int

    @property
    def training(self) -> int:
        return self.count - self.held

    @property
    def held(self) -> int:
        return self.meta.tasks_held_out(by_data=True)

    def order(self, plain: RowOrder) -> RowOrder:
        """See `Tasks.order`: a microbatch's rows are of one task."""
        return TaskOrder(plain, self)

    def rows_of(self, task: int, feed: Feed) -> Rows:
        return np.flatnonzero(self.task_R == task)

    def show(self, batch: Batch, task: int) -> Batch:
        """See `Tasks.show`: as they are."""
        return batch


class TaskOrder(RowOrder):
    """Rows of one task after another: a task's rows all come once before one comes again, but for an incomplete rest.

    Args:
        plain: The order without tasks.
        tasks: Which rows are whose; each training task has a microbatch of them at least.
    """

    def __init__(self, plain: RowOrder, tasks: DataTasks) -> None:
        super().__init__(
            plain.rows,
            seed=plain.seed,
            chunk_rows=plain.chunk_rows,
            window_chunks=plain.window_chunks,
            select=np.flatnonzero(tasks.task_R < tasks.training),
        )
        self._tasks = tasks
        self._rows_of = [np.flatnonzero(tasks.task_R == task) for task in range(tasks.training)]
        self._passes: dict[int, tuple[int, Rows]] = {}  # of each task the newest pass over its rows

    def at(self, start: int, stop: int) -> Rows:
        """Rows int64 [stop - start] at these positions."""
        size, parts = self._tasks.rows, list[Rows]()
        while start < stop:
            microbatch, offset = divmod(start, size)
            parts.append(self._microbatch(microbatch)[offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def window_rows(self, position: int) -> tuple[Rows, int]:
        """The rows of the microbatch that holds `position`, and the position after its last row."""
        microbatch = position // self._tasks.rows
        return self._microbatch(microbatch), (microbatch + 1) * self._tasks.rows

    def _microbatch(self, number: int) -> Rows:
        (task, before), size = self._tasks.at(number), self._tasks.rows
        rows = self._rows_of[task]
        turn, place = divmod(before, len(rows) // size)
        known = self._passes.get(task)
        if known is None or known[0] != turn:
            known = self._passes[task] = turn, generator(*self.seed, "task", task, turn).permutation(rows)
        return known[1][place * size : (place + 1) * size]


@lru_cache(maxsize=4)
def _turn(seed: int, turn: int, tasks: int) -> NDArray[np.int64]:
    return generator(seed, "tasks", turn).permutation(tasks)
