"""A background thread that keeps an iterator ahead of its consumer, and measures how long the consumer waits."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")
_END = object()


class Prefetcher(Generic[T]):
    """Iterates over `iterator` in a thread of its own, up to `depth` items ahead.

    An exception of the iterator is raised at the consumer, after the items before it. Close it (or use `with`)
    where the iteration is left early; the thread then ends at once, whatever it is waiting for.

    Args:
        iterator: Whatever yields items. It is closed at the end when it is a generator.
        depth: Items kept ready.

    Attributes:
        waited: Seconds that the consumer waited for items.
    """

    def __init__(self, iterator: Iterator[T], depth: int = 2) -> None:
        self.waited = 0.0
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
                if not self._offer(item):
                    break
        except BaseException as error:
            self._failure = error
        finally:
            close = getattr(self._iterator, "close", None)
            if close is not None:
                try:
                    close()
                except BaseException as error:
                    self._failure = self._failure or error
            self._offer(_END)

    def _offer(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
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
        asked = time.perf_counter()
        if self._began is None:
            self._began = asked
        item = self._queue.get()
        self.waited += time.perf_counter() - asked
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
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
