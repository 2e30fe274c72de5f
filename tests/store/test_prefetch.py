"""The background thread: order kept, errors passed on, time counted, closed at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from stackwise.store import Prefetcher


def test_items_come_in_order_and_errors_after_them() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("the disk")

    ahead = Prefetcher(items(), depth=3)
    assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="the disk"):
        next(ahead)
    with pytest.raises(StopIteration):
        next(ahead)


def test_it_stops_at_once_wherever_it_is() -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    ahead = Prefetcher(endless(), depth=2)
    assert next(ahead) == 1
    began = time.perf_counter()
    ahead.close()
    ahead.close()
    assert time.perf_counter() - began < 1
    assert closed.is_set()
    assert not any(thread.name == "stackwise-prefetch" for thread in threading.enumerate())
    with pytest.raises(StopIteration):
        next(ahead)


def test_waiting_is_measured() -> None:
    def slow() -> Iterator[int]:
        for item in range(5):
            time.sleep(0.05)
            yield item

    with Prefetcher(slow()) as ahead:
        for _ in ahead:
            pass
        assert 0.2 < ahead.waited < 2
        assert ahead.wait_fraction > 0.8
    with Prefetcher(iter(range(5))) as ahead:
        for _ in ahead:
            time.sleep(0.02)
        assert ahead.wait_fraction < 0.3


def test_it_stays_no_further_ahead_than_asked() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            made.append(item)
            yield item

    with Prefetcher(items(), depth=2) as ahead:
        next(ahead)
        time.sleep(0.2)
        assert len(made) <= 5


def test_more_lies_ready_where_the_consumer_had_to_wait() -> None:
    made, go = list[int](), threading.Event()

    def items() -> Iterator[int]:
        for number in range(100):
            if number >= 2:
                go.wait(20)
            made.append(number)
            yield number

    with Prefetcher(items(), depth=1, most=lambda _: 5) as ahead:
        threading.Timer(0.05, go.set).start()
        assert [next(ahead) for _ in range(20)] == list(range(20))
        until = time.perf_counter() + 5
        while len(made) < 24 and time.perf_counter() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(made) <= 20 + 5 + 1  # those that lie ready, and the one in hand
