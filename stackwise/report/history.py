"""A run's log of events, read once: loss by step, time by phase, what was written and dropped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Event = dict[str, Any]

PHASES = ("preparation", "training", "writing boundaries", "evaluation", "starting and handing off")
_PHASE_OF = {
    "training": "training",
    "resumed": "training",
    "committed": PHASES[4],
    "writing": PHASES[2],
    "recomputing": PHASES[2],
    "written": PHASES[4],
    "evaluating": PHASES[3],
}
_LEADING = ("start", "note", "data", "preparing")
"""Events before the runner holds the run."""
_CLOSING = ("done", "interrupted", "failed")


@dataclass
class Curve:
    """Loss by step of one stage under one recipe, and the last figures told."""

    recipe: str | None
    losses: dict[int, float] = field(default_factory=dict)
    tokens_per_second: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)

    @property
    def points(self) -> list[tuple[float, float]]:
        """(step, loss), in order."""
        return [(float(step), self.losses[step]) for step in sorted(self.losses)]


@dataclass
class Written:
    """A boundary that a run wrote."""

    depth: int
    bytes: int = 0
    finished: bool = False
    dropped: bool = False


@dataclass
class History:
    """What the log tells."""

    curves: dict[int, Curve] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    boundaries: dict[str, Written] = field(default_factory=dict)
    fill: Event | None = None
    device: Event | None = None
    data: Event | None = None
    warnings: list[str] = field(default_factory=list)
    failure: str | None = None
    begun: float | None = None
    ended: float | None = None
    sittings: int = 0


class _Clock:
    """Adds the time between events to the phase that goes on; the time between two runners belongs to none."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._phase: str | None = None
        self._before: float = 0.0
        self._leading = False

    def tell(self, event: Event, at: float) -> None:
        kind = event["event"]
        history = self._history
        if kind == "data":
            history.phases["preparation"] += float(event.get("seconds") or 0.0)
        opens = kind in _LEADING or kind == "device"
        if opens and not self._leading:
            history.sittings += 1
            self._phase = PHASES[4]
        elif self._phase is not None and kind not in _LEADING:
            history.phases[self._phase] += max(0.0, at - self._before)
            self._phase = None if kind in _CLOSING else _PHASE_OF.get(kind, self._phase)
        self._leading = kind in _LEADING
        self._before = at


def read_history(path: Path) -> History:
    """Read a log of events; lines that are broken, as a crash may leave one, are passed over."""
    history = History()
    clock = _Clock(history)
    for event in _events(path):
        at = event.get("time")
        if isinstance(at, int | float):
            history.begun = at if history.begun is None else history.begun
            history.ended = at
            clock.tell(event, at)
        _take(history, event)
    return history


def _events(path: Path) -> Iterator[Event]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if isinstance(event, dict) and isinstance(event.get("event"), str):
                    yield event
    except FileNotFoundError:
        return


def _take(history: History, event: Event) -> None:
    match event["event"]:
        case "device":
            history.device, history.failure = event, None
        case "data":
            history.data = event
        case "training":
            known = history.curves.get(event["stage"])
            if known is None or known.recipe != event.get("recipe"):
                history.curves[event["stage"]] = Curve(event.get("recipe"))
        case "step":
            _take_step(history.curves.setdefault(event["stage"], Curve(None)), event)
        case "held_out":
            history.curves.setdefault(event["stage"], Curve(None)).held_out[event["step"]] = event["nats"]
        case "diverged":
            history.warnings.append(str(event["text"]))
        case "writing" | "filling":
            history.boundaries[event["boundary"]] = Written(_depth(event))
        case "written":
            written = history.boundaries.setdefault(event["boundary"], Written(_depth(event)))
            written.bytes, written.finished = event["bytes"], True
        case "dropped":
            dropped = history.boundaries.setdefault(event["boundary"], Written(event["stage"]))
            dropped.bytes, dropped.dropped = event["bytes"] or dropped.bytes, True
        case "fill":
            history.fill = event
        case "warning":
            history.warnings.append(str(event["text"]))
        case "failed":
            history.failure = str(event["text"])


def _depth(event: Event) -> int:
    """The depth of a boundary that is written: its place in the schedule may be another."""
    return int(event.get("depth", event["stage"] + 1))


def _take_step(curve: Curve, event: Event) -> None:
    losses = event["losses"]
    first = event["step"] - len(losses) + 1
    # Steps that were lost to a kill come again; the later telling counts.
    for number, loss in enumerate(losses):
        if loss is not None:  # of a step that was refused there is none
            curve.losses[first + number] = loss
    curve.tokens_per_second.append(event["tokens_per_second"])
