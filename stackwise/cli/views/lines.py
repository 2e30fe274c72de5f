"""A run as plain lines, for logs and for terminals that cannot be drawn on."""

from __future__ import annotations

import sys
import time
from typing import Any

from stackwise.cli.views.state import RunView
from stackwise.cli.views.wording import step_line, wording
from stackwise.report import words

Event = dict[str, Any]
SECONDS = 5.0
"""Between two lines of progress."""


class Lines:
    """Prints a line for each change of state, and of a stage's steps the first, the last, and some between.

    Args:
        view: Kept up to date with what is told.
        every: Steps between two lines, at least; so many that a few seconds lie between them.
    """

    def __init__(self, view: RunView, every: int) -> None:
        self._view, self._every = view, every
        self._shown: dict[int, int] = {}
        self._spoke = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Take up an event."""
        self._view.observe(event)
        place = event.get("stage")
        kind = event["event"]
        if kind == "step":
            before, step = self._shown.get(event["stage"]), event["step"]
            late = time.monotonic() - self._spoke >= SECONDS
            due = before is None or (late and step // self._every > before // self._every)
            if due or step == event["steps"]:
                self._shown[event["stage"]] = step
                self._say(step_line(event, self._view.stages[event["stage"]].seconds_left), event["stage"])
        elif kind in ("preparing", "boundary", "evaluating"):
            self._say_progress(kind, event)
        else:
            if kind == "training":
                self._shown.pop(event["stage"], None)
            if (text := wording(event)) is not None:
                for line in text.splitlines():
                    self._say(line, place if kind != "dropped" else None)

    def _say_progress(self, kind: str, event: Event) -> None:
        now = time.monotonic()
        if now - self._spoke < SECONDS or not event.get("total"):
            return
        share = words.percent(event["done"] / event["total"])
        if kind == "boundary":
            depth = self._view.stages[event["stage"]].depth
            self._say(f"boundary {depth + 1}: {share}", event["stage"])
        else:
            self._say(f"{event.get('phase', 'evaluating')}: {share}", None)

    def _say(self, text: str, place: int | None) -> None:
        self._spoke = time.monotonic()
        where = f"stage {self._view.label(place)}: " if isinstance(place, int) else ""
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} {where}{text}\n")
        sys.stdout.flush()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        pass
