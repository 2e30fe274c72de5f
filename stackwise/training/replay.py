"""Replay: rows of earlier tasks among those of a new one, a fixed share of every step."""

from __future__ import annotations

import numpy as np

from stackwise.store import RowOrder
from stackwise.store.order import Rows


class ReplayOrder(RowOrder):
    """Steps of rows of two orders: the new rows in epochs of their own, after them in each step the replayed ones.

    Args:
        plain: The order of all the rows, whose seed and groups of rows both take over.
        replayed: Rows at the end of the rowset that are replayed.
        share: Of a step's rows so many are replayed, at least one, and at least one is new.
        step_rows: Rows in a step.
    """

    def __init__(self, plain: RowOrder, replayed: int, share: float, step_rows: int) -> None:
        super().__init__(plain.rows, seed=plain.seed, chunk_rows=plain.chunk_rows, window_chunks=plain.window_chunks)

        def of(name: str, first: int, last: int) -> RowOrder:
            seed, rows = (*plain.seed, name), np.arange(first, last)
            groups = plain.chunk_rows, plain.window_chunks
            return RowOrder(plain.rows, seed=seed, chunk_rows=groups[0], window_chunks=groups[1], select=rows)

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
