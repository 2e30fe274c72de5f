"""Orders of rows: easy ones first, earlier tasks' among new ones, those that go to the same experts together.

A curriculum takes of the others more as competence grows (Platanios et al., arXiv 1903.09848).

Which experts rows go to is counted before a stage trains. Its own routers move while it trains, so the counts predict,
and do not bind.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stackwise import identity
from stackwise.batch import TOKENS, Batch
from stackwise.config.training import Curriculum
from stackwise.objectives.objective import Outputs, RuntimeObjective
from stackwise.store import RowOrder
from stackwise.store.order import Rows
from stackwise.training.anchor import row_loss
from stackwise.training.feed import Feed, Order

DIFFICULTY = "difficulty"
"""The input of a batch that says how hard its rows are, [B, 1, 1], where a model or the stage itself says so."""
SLICE = 1 << 12  # rows whose tokens are in memory at once


def difficulties(feed: Feed, rows_N: np.ndarray, by: str, separator: int) -> np.ndarray:
    """How hard rows are, float64 [N].

    Args:
        feed: Their tokens; of `model` and `loss` their losses, under `DIFFICULTY`.
        by: rarity: the mean over a row of -log p(token), p the token's share of these rows (equation 2 of the paper,
            by token); compression: bytes that DEFLATE makes of a row's ids, all rows being equally long; length: the
            mean tokens of a document within the row (the paper's sentence length, section 2.1); model, loss: the
            loss that was recorded of a row.
        separator: The id between documents.
    """
    slices = [rows_N[first : first + SLICE] for first in range(0, len(rows_N), SLICE)]

    def tokens(rows: np.ndarray) -> np.ndarray:
        return np.asarray(feed.sources[TOKENS].read(rows).numpy())

    if by in ("model", "loss"):
        recorded = [feed.sources[DIFFICULTY].read(rows).flatten() for rows in slices]
        return torch.cat(recorded).double().numpy()
    if by == "compression":
        return np.array(
            [len(zlib.compress(row.astype("<u4").tobytes(), 9)) for rows in slices for row in tokens(rows)], np.float64
        )
    if by == "length":
        return np.concatenate([_lengths(tokens(rows) != separator) for rows in slices])
    counts = np.zeros(0, np.int64)
    for rows in slices:
        more = np.bincount(tokens(rows).ravel(), minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    surprise = np.log(counts.sum()) - np.log(np.maximum(counts, 1))
    return np.concatenate([surprise[tokens(rows)].mean(axis=1) for rows in slices])


def _lengths(text_NS: np.ndarray) -> np.ndarray:
    """Mean tokens of a document in each row, float64 [N], by where text is; 0 where none is."""
    begins_NS = text_NS.copy()
    begins_NS[:, 1:] &= ~text_NS[:, :-1]
    return np.asarray(text_NS.sum(axis=1) / np.maximum(begins_NS.sum(axis=1), 1))


class RowLosses(nn.Module):
    """The loss of each row by itself, in nats a scored position, in place of logits: from [B, S, D] to [B, 1, 1].

    Args:
        head: The head.
        objective: What is scored.
    """

    def __init__(self, head: nn.Module, objective: RuntimeObjective) -> None:
        super().__init__()
        self.head, self._objective = head, objective
        self._batch: Batch | None = None

    def prepare(self, batch: Batch) -> None:
        """Take note of the rows that come next."""
        self._batch = batch

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Row by row: the logits of one are in memory."""
        assert self._batch is not None, "a stage prepares its modules before each pass"
        parts = [(x_BSD[row : row + 1], self._batch.part(row, row + 1)) for row in range(len(x_BSD))]
        losses = [row_loss(self._objective.loss(Outputs(x_1SD, self.head), batch)) for x_1SD, batch in parts]
        return torch.stack(losses).reshape(-1, 1, 1)


class CurriculumOrder(RowOrder):
    """Rows drawn from the easiest ones; once competence is whole, epochs as without a curriculum.

    At step t < T a step's rows are drawn uniformly from the easiest share c(t) of all rows, with
    c(t) = min(1, (t (1 - c0^p) / T + c0^p)^(1/p)), p = 1 (linear) or 2 (sqrt).

    Args:
        plain: The order without a curriculum, of the rows that the difficulties are of.
        difficulty_N: One for each of its rows, in ascending order of rows.
        curriculum: The settings.
        step_rows: Rows in a step.
        steps: The budget; `curriculum.until` is a share of it.
        begun: Steps that the windows before have taken of it; the order is of those that follow.
    """

    def __init__(
        self,
        plain: RowOrder,
        difficulty_N: np.ndarray,
        curriculum: Curriculum,
        *,
        step_rows: int,
        steps: int,
        begun: int = 0,
    ) -> None:
        super().__init__(plain.rows, **plain.settings(), select=plain.selected)
        # Stable: among equally hard rows the number decides.
        self._easiest_N = self.selected[np.argsort(difficulty_N, kind="stable")]
        self._curriculum, self._step_rows = curriculum, step_rows
        self._growing, self._begun = round(steps * curriculum.until), begun  # T
        self._border = max(0, self._growing - begun) * step_rows
        """The position from which on all rows are drawn."""

    def competence(self, step: int) -> float:
        """The share of rows, easiest first, that a step draws from."""
        if (steps := step + self._begun) >= self._growing:
            return 1.0
        first, done = self._curriculum.start, steps / self._growing
        if self._curriculum.competence == "linear":
            return min(1.0, done * (1 - first) + first)
        return min(1.0, math.sqrt(done * (1 - first**2) + first**2))

    def at(self, start: int, stop: int) -> Rows:
        """Rows int64 [stop - start] at these positions."""
        parts: list[Rows] = []
        while start < min(stop, self._border):
            step, offset = divmod(start, self._step_rows)
            parts.append(self._drawn(step)[offset : offset + stop - start])
            start += len(parts[-1])
        if start < stop:
            parts.append(super().at(start - self._border, stop - self._border))
        return np.concatenate(parts)

    def window_rows(self, position: int) -> tuple[Rows, int]:
        """The rows of the step that holds `position` (later, of the window), and the position after its last row."""
        if position < self._border:
            step = position // self._step_rows
            return self._drawn(step), (step + 1) * self._step_rows
        rows, end = super().window_rows(position - self._border)
        return rows, end + self._border

    def _drawn(self, step: int) -> Rows:
        among = max(1, math.ceil(self.competence(step) * self.length))
        words = identity.generator(*self.seed, "curriculum", step).bit_generator.random_raw(self._step_rows)
        return self._easiest_N[(np.atleast_1d(words) % np.uint64(among)).astype(np.int64)]


class ReplayOrder(RowOrder):
    """Replay: steps of rows of two orders, new rows in epochs of their own, after them in each step the replayed ones.

    Args:
        plain: The order of all the rows, whose seed and groups of rows both take over.
        replayed: Rows at the end of the rowset that are replayed.
        share: Of a step's rows so many are replayed, at least one, and at least one is new.
        step_rows: Rows in a step.
    """

    def __init__(self, plain: RowOrder, replayed: int, share: float, step_rows: int) -> None:
        super().__init__(plain.rows, **plain.settings())

        def of(name: str, first: int, last: int) -> RowOrder:
            settings = plain.settings() | {"seed": (*plain.seed, name)}
            return RowOrder(plain.rows, **settings, select=np.arange(first, last))

        new = plain.rows - replayed
        self._new, self._earlier = of("new", 0, new), of("replay", new, plain.rows)
        self._step_rows = step_rows
        self._replayed = min(max(1, round(share * step_rows)), step_rows - 1)

    def at(self, start: int, stop: int) -> Rows:
        """Rows int64 [stop - start] at these positions."""
        parts: list[Rows] = []
        while start < stop:
            step, offset = divmod(start, self._step_rows)
            parts.append(self._step(step)[offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def window_rows(self, position: int) -> tuple[Rows, int]:
        """The rows of the step that holds `position`, and the position after its last row."""
        step = position // self._step_rows
        return self._step(step), (step + 1) * self._step_rows

    def _step(self, step: int) -> Rows:
        new = self._step_rows - self._replayed
        return np.concatenate([self._new.batch(step, new), self._earlier.batch(step, self._replayed)])


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
        super().__init__(plain.rows, **plain.settings(), select=plain.selected)
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
