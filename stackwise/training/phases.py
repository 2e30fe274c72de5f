"""How long the phases of a step take (forward, backward, optimizer), and how far the step in hand is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator

import torch

from stackwise.batch import Batch

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"


class PhaseClock:
    """Adds up the seconds of phases, on the device where that is asynchronous.

    On a GPU events mark where a phase begins and ends in the stream, so that nothing is waited for before the sums are
    read. A head whose loss leaves its gradients behind (`cross_entropy.py`) counts as forward.

    A step's passes are those of its microbatches through the stage; where its parts take turns, through each group of
    them, up and down. Another thread may look at them. On a GPU they are counted as they are queued.
    """

    passes, done = 0, 0  # of the step in hand: how many it has, and how many were made

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = dict.fromkeys((FORWARD, BACKWARD, OPTIMIZER), 0.0)
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what is done inside for a phase."""
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self._marks.append((phase, begin, end))
            return
        begun = self._now()
        yield
        self._seconds[phase] += self._now() - begun

    def begin_step(self, passes: int) -> None:
        """A step begins, of so many passes."""
        self.passes, self.done = passes, 0

    def counted(self, microbatches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
        """Microbatches with their numbers, each with a pass that is made when the next one is asked for."""
        for numbered in enumerate(microbatches):
            yield numbered
            self.done += 1

    def take(self) -> dict[str, float]:
        """The seconds of each phase since the last call; waits for the device."""
        if self._marks:
            self._marks[-1][2].synchronize()
        for phase, begin, end in self._marks:
            self._seconds[phase] += begin.elapsed_time(end) / 1000
        seconds, self._marks = self._seconds, []
        self._seconds = dict.fromkeys(seconds, 0.0)
        return seconds

    def _now(self) -> float:
        if self._device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()
