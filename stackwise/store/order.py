"""The order in which a stage sees its rows, a pure function of a seed; and a thread that reads ahead in it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

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
            # Sorted and each once, whatever was given: the order follows from the set alone.
            chosen = np.unique(np.asarray(select, np.int64))
            if not len(chosen) or chosen[0] < 0 or chosen[-1] >= rows:
                raise UsageError(f"`select` names at least one row, from 0 to {rows - 1}")
            self._selected = chosen
            self.length = len(chosen)
            # By chunks of the whole rowset, so that rows that lie together on the disk stay together.
            _, self._starts, sizes = np.unique(chosen // chunk_rows, return_index=True, return_counts=True)
        self._sizes = sizes.astype(np.int64)
        self._lock = threading.Lock()
        self._epoch: tuple[int, Rows, Rows] = (-1, np.empty(0, np.int64), np.empty(0, np.int64))
        self._windows: dict[tuple[int, int], Rows] = {}

    def settings(self) -> dict[str, Any]:
        """What makes an order like it, beside the rows that it is of: `RowOrder(order.rows, **order.settings())`."""
        return {"seed": self.seed, "chunk_rows": self.chunk_rows, "window_chunks": self.window_chunks}

    @property
    def selected(self) -> Rows:
        """The rows that it is made of, sorted."""
        return np.arange(self.rows) if self._selected is None else self._selected

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
                part = rows[offset - first : offset - first + stop - position]
                parts.append(part)
                position += len(part)
        # A copy: the window is kept, and the caller may write into what it gets.
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
            rows = self._arranged(rows, epoch * self.length + first)
            # A batch may span windows, and the next is asked for ahead: the same few are asked for again and again.
            if len(self._windows) >= 4:
                del self._windows[next(iter(self._windows))]
            self._windows[key] = rows
        return window, first, rows

    def _arranged(self, rows: Rows, position: int) -> Rows:
        """The rows of a window that begins at `position`, shuffled, in the order in which they come."""
        return rows

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


class GroupedOrder:
    """An endless sequence of batches from groups of rows: number b is of group b modulo their number, in its order.

    Whoever takes every n-th batch, where n divides the number of groups, needs the rows of every n-th group alone.

    Args:
        orders: Of each group, over its rows numbered from 0.
        edges: Where the groups begin among all rows, and where the last one ends.
    """

    def __init__(self, orders: Sequence[RowOrder], edges: Sequence[int]) -> None:
        self.orders, self.edges, self.rows = orders, edges, edges[-1]

    def batch(self, number: int, size: int) -> Rows:
        """Rows int64 [size] of a batch."""
        turn, group = divmod(number, len(self.orders))
        return self.edges[group] + self.orders[group].batch(turn, size)


def _permutation(count: int, *parts: int | str) -> Rows:
    # Sorting raw random words, and not Generator.permutation, whose stream numpy may change between versions.
    words = identity.generator(*parts).bit_generator.random_raw(count)
    return np.argsort(np.atleast_1d(words), kind="stable").astype(np.int64)


T = TypeVar("T")
_END = object()


class Prefetcher(Generic[T]):
    """Iterates over `iterator` in a thread of its own, up to `depth` items ahead.

    An exception of the iterator is raised at the consumer, after the items before it. Close it (or use `with`)
    where the iteration is left early; the thread then ends at once, whatever it is waiting for.

    Args:
        iterator: Whatever yields items. It is closed at the end when it is a generator.
        depth: Items kept ready.
        most: From the first item, how many may be kept ready: where the consumer has to wait, the depth doubles up to
            that. None: it stays as it is.

    Attributes:
        waited: Seconds that the consumer waited for items.
    """

    def __init__(self, iterator: Iterator[T], depth: int = 2, *, most: Callable[[T], int] | None = None) -> None:
        self.waited = 0.0
        self._most, self._limit = most, 0  # `_limit`: what `most` said
        self._iterator = iterator
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=max(1, depth))
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._done = False
        self._began: float | None = None
        self._ended: float | None = None
        self._thread = threading.Thread(target=self._work, name="stackwise-prefetch", daemon=True)
        self._thread.start()

    @property
    def wait_fraction(self) -> float:
        """Share of the time since the first item was asked for that the consumer spent waiting, 0 to 1."""
        if self._began is None:
            return 0.0
        elapsed = (self._ended or time.perf_counter()) - self._began
        return min(1.0, self.waited / elapsed) if elapsed > 0 else 0.0

    def _work(self) -> None:
        try:
            for item in self._iterator:
                if self._most is not None and not self._limit:
                    self._limit = self._most(item)
                if not self._offer(item):
                    break
        except BaseException as error:
            self._failure = error
        finally:
            close = getattr(self._iterator, "close", None)
            if close is not None:
                try:
                    # Here: another thread cannot close a generator that is running.
                    close()
                except BaseException as error:
                    self._failure = self._failure or error
            self._offer(_END)

    def _offer(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                # Not for ever: the consumer may have left without taking anything more.
                self._queue.put(item, timeout=0.05)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._done:
            raise StopIteration
        asked_at = time.perf_counter()
        if self._began is None:
            self._began = asked_at
        elif self._queue.maxsize < self._limit and self._queue.empty():  # the first is always waited for
            with self._queue.mutex:
                self._queue.maxsize = min(2 * self._queue.maxsize, self._limit)
        item = self._queue.get()
        self.waited += time.perf_counter() - asked_at
        if item is _END:
            self._finish()
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            raise StopIteration
        return item  # type: ignore[no-any-return]

    def _finish(self) -> None:
        self._done = True
        self._ended = time.perf_counter()

    def close(self) -> None:
        """Stop the thread; items that are ready are dropped. A second time does nothing."""
        self._stop.set()
        self._done = True
        self._ended = self._ended or time.perf_counter()
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        # A generator that is closed by its own thread cannot wait for itself.
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
