"""Threads that read together: what of a batch is large is brought by several of them at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST = 8  # more wait for the same memory bus


class Threads:
    """A few threads, started when they are first wanted.

    Args:
        count: How many; None: one for each core that this process may use, `MOST` at most.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = min(MOST, _cores()) if count is None else count
        self._pool: ThreadPoolExecutor | None = None
        self._pid = 0

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """The results of `work`, in the order of the items; it returns when no thread works any more.

        Raises:
            Exception: What `work` raised for the first of the items that it failed for.
        """
        if self.count < 2 or len(items) < 2:
            return [work(item) for item in items]
        if self._pool is None or self._pid != os.getpid():  # a fork has the pool, but none of its threads
            self._pool, self._pid = ThreadPoolExecutor(self.count, "stackwise-read"), os.getpid()
        running = [self._pool.submit(work, item) for item in items]
        wait(running)  # all of them: they write into memory that the caller may give away when this raises
        return [one.result() for one in running]

    def close(self) -> None:
        """End the threads; a second time does nothing."""
        pool, self._pool = self._pool, None
        if pool is not None and self._pid == os.getpid():
            pool.shutdown()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
