"""Which pieces of a stage (experts) its rows go to, counted before it trains; an order that brings like rows together.

The counts are of the stage as it begins. Its own routers move while it trains, so the counts predict, and do not bind.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stackwise.store import RowOrder
from stackwise.store.order import Rows
from stackwise.training.feed import Order

Reached = npt.NDArray[np.bool_]
PREDICTED_ROWS = 1 << 14
"""Rows, about, whose routes are read to predict what a step reaches."""


class RouteCounts(nn.Module):
    """Choices of each piece by a row, in place of the last hidden states: from [B, S, D] to float32 [B, 1, R].

    Blocks note them as rows go through, batch by batch, whether they are in memory together or in turn.

    Args:
        pieces: Of each block that has pieces, how many: R together, the lowest block first.
    """

    def __init__(self, pieces: Mapping[int, int]) -> None:
        super().__init__()
        self._pieces = dict(sorted(pieces.items()))
        self._waiting: dict[int, deque[Tensor]] = defaultdict(deque)

    def note(self, block: int, choices_BC: Tensor) -> None:
        """Take note of where a block sends the rows that go through: a module calls it as `routed` (`BlockPart`)."""
        if block not in self._pieces:
            return
        counts_BE = torch.zeros(len(choices_BC), self._pieces[block], device=choices_BC.device)
        ones_BC = torch.ones(choices_BC.shape, device=choices_BC.device)
        self._waiting[block].append(counts_BE.scatter_add_(1, choices_BC, ones_BC))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """The counts of the rows that went through."""
        return torch.cat([self._waiting[block].popleft().to(x_BSD.device) for block in self._pieces], 1)[:, None]


@dataclass(frozen=True)
class Routes:
    """The pieces that rows go to, by row."""

    reached: Callable[[Rows], Reached]  # from row numbers [n] to which of R pieces each reaches, [n, R]
    pieces: int  # R

    def of_steps(self, order: Order, first: int, steps: int, step_rows: int) -> list[int]:
        """Pieces that the rows of each of some steps of an order reach together, from step `first` on."""
        steps = max(1, min(steps, PREDICTED_ROWS // step_rows))
        return [int(self.reached(order.batch(first + step, step_rows)).any(0).sum()) for step in range(steps)]


class RouteOrder(RowOrder):
    """Epochs of all rows, in which those of a step reach few pieces together.

    Within each window of rows that are shuffled together, steps are filled one after the other: with the first row
    that is left, then each time with the one that adds the fewest pieces to those reached; of several the first. A pure
    function of the seed and of the routes.

    Args:
        plain: The order by chance, whose windows these are.
        routes: Where its rows go to.
        step_rows: Rows in a step.
    """

    def __init__(self, plain: RowOrder, routes: Routes, step_rows: int) -> None:
        super().__init__(
            plain.rows,
            seed=plain.seed,
            chunk_rows=plain.chunk_rows,
            window_chunks=plain.window_chunks,
            select=plain.selected,
        )
        self._routes, self._step_rows = routes, step_rows

    def _arranged(self, rows: Rows, position: int) -> Rows:
        # A step that begins in the window before has its last rows here.
        return rows[grouped(self._routes.reached(rows), self._step_rows, -position % self._step_rows)]


def grouped(reached_NR: Reached, size: int, first: int = 0) -> Rows:
    """An order of rows in which groups of `size` reach few pieces together, int64 [N].

    Args:
        reached_NR: The pieces that each row reaches.
        first: Size of the first group; 0: as the others.
    """
    rows, left = len(reached_NR), np.ones(len(reached_NR), bool)
    order, room = np.empty(rows, np.int64), first or size
    more_N = reached_NR.sum(1)  # the pieces that a row would add
    for place in range(rows):
        if room == 0 or place == 0:
            room, lacking_R = room or size, np.ones(reached_NR.shape[1], bool)
            more_N = reached_NR.sum(1)
            row = int(left.argmax())
        else:
            row = int(np.where(left, more_N, reached_NR.shape[1] + 1).argmin())
        order[place], left[row], room = row, False, room - 1
        added_R = reached_NR[row] & lacking_R
        if added_R.any():
            more_N = more_N - reached_NR[:, added_R].sum(1)
            lacking_R &= ~added_R
    return order
