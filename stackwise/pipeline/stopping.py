"""Ctrl-C and SIGTERM, which end work after saving: what is done on them, while it goes on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

STOPPING = "finishing the step in hand and saving (again to stop at once)"


@contextlib.contextmanager
def stop_signals(stop: Callable[[int], None]) -> Iterator[None]:
    """Call `stop` on each of these signals, with how many came so far; outside the main thread there are none."""
    came = 0

    def handle(number: int, frame: object) -> None:
        nonlocal came
        came += 1
        stop(came)

    mine = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if mine else ()
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
