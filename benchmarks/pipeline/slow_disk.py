"""A stage that trains from a disk slower or faster than it reads, with its batches prepared ahead and without."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Result, Spread
from stackwise.config import StackWiseConfig


class _Waited:
    """Batches made when they are asked for, and the time that took."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.waited, self._batches = 0.0, batches

    def __iter__(self) -> _Waited:
        return self

    def __next__(self) -> Any:
        begun = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.waited += time.perf_counter() - begun


@contextlib.contextmanager
def throttled(bytes_per_second: float) -> Iterator[None]:
    """Let every `os.preadv` of this process take as long as a disk of that speed would."""
    real, lock, free_at = os.preadv, threading.Lock(), [0.0]

    def slow(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        count = real(fd, buffers, offset, flags)
        with lock:
            now = time.perf_counter()
            free_at[0] = max(free_at[0], now) + count / bytes_per_second
            until = free_at[0]
        if until > now:
            time.sleep(until - now)
        return count

    os.preadv = slow
    try:
        yield
    finally:
        os.preadv = real


def measure(preset: str, speeds: Sequence[float], rounds: int, steps: int, directory: str | None) -> list[Result]:
    """Train from a disk of `speeds` times the bandwidth that the stage needs, in interleaved rounds.

    Returns:
        For each speed: its bytes a second (what the stage needed just before, times the speed), and with and without
        batches prepared ahead the share of the time waited and the speed of training, of that from the page cache.
    """
    import torch

    from benchmarks.setting import Setting, resolved
    from benchmarks.workbench import fresh_model, settle_steps, train, workbench
    from stackwise.training.engine import ResidentEngine
    from stackwise.training.feed import ahead
    from stackwise.training.trainer import Trainer

    device = torch.device("cpu")
    config = resolved(StackWiseConfig.from_preset(preset), device)
    training = config.training
    settle = settle_steps(config)
    rows = (settle + steps) * training.accumulation * training.batch_size
    setting = Setting(config, config.partition[0][1] + 1, device, 1 << 30, most_rows=rows)
    bytes_a_step = training.batch_size * training.accumulation * setting.row_bytes

    def trainer() -> Trainer:
        settings = config.stage_training(1)
        engine = ResidentEngine(fresh_model(setting), settings, seed=(0, 1), device=device)
        return Trainer(engine, settings, steps=settle + steps + 1)

    with (
        tempfile.TemporaryDirectory(prefix="stackwise-bench-", dir=directory) as name,
        workbench(setting, Path(name)) as bench,
    ):

        def once(bandwidth: float | None, prefetch: bool) -> tuple[float, float]:
            """(seconds, share of them waited) of the timed steps, from a reader that reads each row once."""
            slow = throttled(bandwidth) if bandwidth else contextlib.nullcontext()
            with slow, bench.feed() as feed:
                batches = feed.shuffled(bench.order, training.batch_size, 0)
                if prefetch:
                    with ahead(batches, device) as source:
                        return _timed(source)
                return _timed(_Waited(batches))

        def _timed(source: Any) -> tuple[float, float]:
            one = trainer()
            train(one, source, settle)
            before = source.waited
            timed = train(one, source, steps)
            return timed.seconds, (source.waited - before) / timed.seconds

        once(None, True)  # kernels, memory
        needed: list[float] = []
        found: dict[tuple[float, bool], list[tuple[float, float]]] = {}
        for _ in range(rounds):
            base = once(None, True)[0]
            needed.append(steps * bytes_a_step / base)
            for speed in speeds:
                for prefetch in (True, False):
                    seconds, waited = once(speed * needed[-1], prefetch)
                    found.setdefault((speed, prefetch), []).append((base / seconds, waited))
    return [
        {
            "speed_of_need": speed,
            "bytes_per_second": Spread.of(speed * bandwidth for bandwidth in needed).plain(),
            **{
                key: {
                    "waited": Spread.of(w for _, w in found[speed, prefetch]).plain(),
                    "speed": Spread.of(s for s, _ in found[speed, prefetch]).plain(),
                }
                for key, prefetch in (("ahead", True), ("on demand", False))
            },
        }
        for speed in speeds
    ]
