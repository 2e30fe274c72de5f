"""A limit on a run's time: when to begin to stop, so that what is in hand is saved before it."""

from __future__ import annotations

import time

from stackwise.pipeline.runner.process import Event

MARGIN = 2.0
"""Seconds for what comes after the save: the worker's end, the manifest, the report."""

SAVE_RATE = 200e6
"""Bytes a second that a checkpoint is thought to be written at, until one is measured."""

HEADROOM = 1.5
"""How much longer a save may take than the slowest before it."""


class TimeLimit:
    """The end of a run's time, and how much of it the way to a saved state takes, as measured.

    That is the longest wait between two words of the worker at work (a step, a chunk, a batch; what it is at now
    takes at least as long again as it has taken), and a save: the slowest rate in bytes a second so far, applied to
    the state of the stage at work.

    Args:
        seconds: From now.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._rate: float | None = None
        self._bytes, self._unit = 0, 0.0
        self._heard, self._measures = time.monotonic(), False

    def begin(self, saves: int) -> None:
        """A job begins, whose checkpoints have so many bytes; 0: it saves as it goes."""
        self._bytes, self._unit = saves, 0.0
        self._heard, self._measures = time.monotonic(), False

    def observe(self, event: Event) -> None:
        """Learn from an event of the worker how long a step and a save take."""
        now = time.monotonic()
        match event["event"]:
            case "step" | "boundary" | "evaluating":
                if self._measures:
                    self._unit = max(self._unit, now - self._heard)
                self._heard, self._measures = now, True
                return
            case "checkpoint" if self._bytes:
                seconds = max(value for key, value in event.items() if key.endswith("seconds"))
                rate = self._bytes / max(seconds, 1e-3)
                self._rate = rate if self._rate is None else min(rate, self._rate)
            case "committed":
                self._bytes = 0  # what follows is the boundary, chunk by chunk
        self._heard, self._measures = now, False  # what lies between was no step

    @property
    def save_seconds(self) -> float:
        """How long a save may take."""
        return HEADROOM * self._bytes / (self._rate or SAVE_RATE)

    @property
    def left(self) -> float:
        """Seconds until it is time to stop."""
        now = time.monotonic()
        return self._end - now - MARGIN - max(self._unit, now - self._heard) - self.save_seconds

    @property
    def reserved(self) -> str:
        """What is done in the time that is left, in words."""
        return f"finishing the step in hand and saving, {self._end - time.monotonic():.0f} s before it"
