"""Tasks to adapt to: which one each microbatch is of, and what its rows are.

A task is a pure function of the seed and its number, and so is which task a microbatch has: nothing is remembered.
"""

from __future__ import annotations

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
from stackwise.errors import UsageError
from stackwise.identity import generator

if TYPE_CHECKING:
    from stackwise.training.feed import Feed

EPISODES = 4
"""Times that a task held out is adapted to at most, each time from other rows."""
KEPT = 256  # tables of tasks in memory


@dataclass(frozen=True)
class PermutedTasks:
    """Tasks in each of which other tokens stand for each other.

    Args:
        meta: How many there are, and how much of the vocabulary each permutes.
        seed: What they follow from.
        rows: In a microbatch: support and query.
        used_U: The ids that tasks permute, sorted: those that occur in the data, and no separator.
        vocab_size: Ids in all.
    """

    meta: Meta
    seed: int
    rows: int
    used_U: NDArray[np.int64]
    vocab_size: int
    _tables: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def task(self, microbatch: int) -> int:
        """The training task of a microbatch, counted from the stage's first: each comes once before one comes again."""
        turn, place = divmod(microbatch, self.meta.permutations)
        return int(_turn(self.seed, turn, self.meta.permutations)[place])

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

    def of_microbatch(self, batch: Batch, microbatch: int) -> Batch:
        """The rows of a microbatch as its task has them."""
        return self._as(batch, self.task(microbatch))

    def held_out(self, feed: Feed, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Rows of tasks that training never has, in microbatches: several of each task, with no sample twice.

        Args:
            feed: The held-out rows.
            rank: Which of the ranks asks; each gets every so-many-th one.

        Raises:
            UsageError: There are fewer samples than rows.
        """
        ids_R = np.ascontiguousarray(feed.rowset.sample_ids).view("V16").ravel()
        number, samples, rows = 0, len(np.unique(ids_R)), self.rows
        if samples < rows:
            raise UsageError(
                f"training.meta: {samples} held-out samples are fewer than the {rows} rows of a task",
                hint="raise evaluation.samples or data.held_out, or lower training.batch_size and meta.support",
            )
        for task in range(self.meta.permutations, self.meta.permutations + self.meta.held_out):
            order_R = generator(self.seed, "held-out rows", task).permutation(len(ids_R))
            _, first = np.unique(ids_R[order_R], return_index=True)  # of a sample under several masks one
            chosen = order_R[np.sort(first)]
            for episode in range(min(EPISODES, samples // rows)):
                if number % ranks == rank:
                    rows_B = chosen[episode * rows : (episode + 1) * rows]
                    yield self._as(feed.batch(rows_B), task)
                number += 1

    def _as(self, batch: Batch, task: int) -> Batch:
        tokens_BS = self.table(task)[batch[TOKENS].long()].to(batch[TOKENS].dtype)
        return replace(batch, tensors={**batch.tensors, TOKENS: tokens_BS})


@lru_cache(maxsize=4)
def _turn(seed: int, turn: int, tasks: int) -> NDArray[np.int64]:
    return generator(seed, "tasks", turn).permutation(tasks)
