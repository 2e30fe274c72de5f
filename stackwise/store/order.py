"""The order in which a stage sees its rows: a pure function of a seed, so that a position is one integer."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from stackwise import identity
from stackwise.errors import UsageError

Rows = npt.NDArray[np.int64]


class RowOrder:
    """An endless sequence of rows made of epochs, each a permutation of all of them.

    An epoch permutes chunks of `chunk_rows` rows, then shuffles the rows inside windows of `window_chunks` chunks,
    so that a reader touches few files at a time. It does not depend on how a boundary is chunked on disk.

    Args:
        rows: Rows of the rowset.
        seed: What the order is a function of, such as (seed, "order", stage).
        chunk_rows: Rows that stay together through the first permutation.
        window_chunks: Chunks whose rows are shuffled together.
        select: Rows int64 [n] to restrict the sequence to (sorted, each once); all by default.

    Raises:
        UsageError: An argument is out of range, or no row is left.
    """

    def __init__(
        self,
        rows: int,
        *,
        seed: tuple[int | str, ...],
        chunk_rows: int,
        window_chunks: int = 8,
        select: npt.NDArray[np.int64] | None = None,
    ) -> None:
        if rows < 1 or chunk_rows < 1 or window_chunks < 1:
            raise UsageError("an order needs at least one row, one row a chunk and one chunk a window")
        self.rows, self.seed, self.chunk_rows, self.window_chunks = rows, tuple(seed), chunk_rows, window_chunks
        if select is None:
            self._selected: Rows | None = None
            self.length = rows
            full, rest = divmod(rows, chunk_rows)
            sizes = np.full(full + (rest > 0), chunk_rows, np.int64)
            if rest:
                sizes[-1] = rest
            self._starts = np.arange(len(sizes), dtype=np.int64) * chunk_rows
        else:
            chosen = np.unique(np.asarray(select, np.int64))
            if not len(chosen) or chosen[0] < 0 or chosen[-1] >= rows:
                raise UsageError(f"`select` names at least one row, from 0 to {rows - 1}")
            self._selected = chosen
            self.length = len(chosen)
            _, self._starts, sizes = np.unique(chosen // chunk_rows, return_index=True, return_counts=True)
        self._sizes = sizes.astype(np.int64)
        self._lock = threading.Lock()
        self._epoch: tuple[int, Rows, Rows] = (-1, np.empty(0, np.int64), np.empty(0, np.int64))
        self._windows: dict[tuple[int, int], Rows] = {}

    def batch(self, number: int, size: int) -> Rows:
        """Rows int64 [size]: positions [number * size, (number + 1) * size) of the endless sequence."""
        if number < 0 or size < 1:
            raise UsageError("a batch has a number from 0 on and at least one row")
        return self.at(number * size, (number + 1) * size)

    def at(self, start: int, stop: int) -> Rows:
        """Rows int64 [stop - start] at these positions of the endless sequence; they may span epochs."""
        parts = []
        position = start
        with self._lock:
            while position < stop:
                epoch, offset = divmod(position, self.length)
                _window, first, rows = self._window_at(epoch, offset)
                taken = rows[offset - first : offset - first + stop - position]
                parts.append(taken)
                position += len(taken)
        return parts[0].copy() if len(parts) == 1 else np.concatenate(parts)

    def window_rows(self, position: int) -> tuple[Rows, int]:
        """The rows of the window that holds `position`, and the position after its last row."""
        with self._lock:
            epoch, offset = divmod(position, self.length)
            _, first, rows = self._window_at(epoch, offset)
        return rows, epoch * self.length + first + len(rows)

    def _window_at(self, epoch: int, offset: int) -> tuple[int, int, Rows]:
        """(window, its first position in the epoch, its rows in order)."""
        chunks, ends = self._epoch_of(epoch)
        window = int(np.searchsorted(ends, offset, side="right"))
        first = int(ends[window - 1]) if window else 0
        key = (epoch, window)
        rows = self._windows.get(key)
        if rows is None:
            members = chunks[window * self.window_chunks : (window + 1) * self.window_chunks]
            spans = [np.arange(self._starts[c], self._starts[c] + self._sizes[c]) for c in members]
            rows = np.concatenate(spans)
            if self._selected is not None:
                rows = self._selected[rows]
            rows = rows[_permutation(len(rows), *self.seed, "rows", epoch, window)]
            if len(self._windows) >= 4:
                del self._windows[next(iter(self._windows))]
            self._windows[key] = rows
        return window, first, rows

    def _epoch_of(self, epoch: int) -> tuple[Rows, Rows]:
        """Chunks in the epoch's order, and the position after the last row of each of its windows."""
        if self._epoch[0] != epoch:
            chunks = _permutation(len(self._sizes), *self.seed, "chunks", epoch)
            ends = np.cumsum(self._sizes[chunks])
            last = np.minimum(
                np.arange(self.window_chunks, len(chunks) + self.window_chunks, self.window_chunks) - 1, len(chunks) - 1
            )
            self._epoch = (epoch, chunks, ends[last])
        return self._epoch[1], self._epoch[2]


def _permutation(count: int, *parts: int | str) -> Rows:
    # Sorting raw random words, and not Generator.permutation, whose stream numpy may change between versions.
    words = identity.generator(*parts).bit_generator.random_raw(count)
    return np.argsort(np.atleast_1d(words), kind="stable").astype(np.int64)
