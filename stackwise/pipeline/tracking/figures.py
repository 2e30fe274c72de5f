"""The figures that trackers are sent, from the events of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from stackwise.identity import content_id
from stackwise.pipeline.events import EVENTS, Event
from stackwise.pipeline.run import SCORES
from stackwise.pipeline.tracking.trackers import Point
from stackwise.shapes import array, array_of, count, integer, mapping, number, optional, record, text
from stackwise.text import printable

_ROLLBACKS = array_of(array(count, count))


def _sent_value(value: Any) -> str | None:
    return None if isinstance(value, str | bool) else integer(value) and _ROLLBACKS(value)


SHAPE = {
    "number": count,
    "id": optional(text),
    "offset": count,
    "recipes": mapping(text),
    "sent": mapping(_sent_value),
    "whole": lambda value: None if isinstance(value, bool) else "is neither true nor false",
}
"""The shape of `Taken` in its file."""

_AT = {"time": number, "stage": optional(count), "step": count}
_STEPS = record({"stage": count, "step": count}, {"time": number, "losses": array_of(optional(number))})
_OF_STAGE = record({"stage": count, "recipe": text})
_LINES = {
    "plan": record({"stages": array_of(record({"stage": count}, {"depth": count, "steps": optional(count)}))}),
    "training": _OF_STAGE,
    "reused": _OF_STAGE,
    "step": _STEPS,
    "resumed": _STEPS,
    "diverged": record({"stage": count, "step": count}, {**_AT, "to": count}),
    "evaluation": record({}, {"time": number, "result": optional(SCORES)}),
}
"""Lines of the log that figures follow from; one that is not like this is passed over."""


@dataclass
class Taken:
    """What a tracker run has.

    Args:
        number: Which tracker run of this directory it is: each time that a stage gets another recipe, a new one begins.
        recipes: The recipe of each stage (by its place in the schedule, as text) whose figures it holds.
        sent: The last step of each series by recipe and kind, as the log counts it, from the start of its window; for
            figures of the run, what they were.
        places: Of each place in the schedule its stage's depth, and that stage's steps in the windows before; not kept,
            as the log says it.
    """

    number: int = 1
    id: str | None = None
    offset: int = 0  # bytes of the log that were read
    recipes: dict[str, str] = field(default_factory=dict)
    sent: dict[str, Any] = field(default_factory=dict)
    whole: bool = False  # whether it has what the log held when it began
    places: dict[int, tuple[int, int]] = field(default_factory=dict)

    def copied(self) -> Taken:
        """A copy to take further figures with: what fails to be sent is not taken."""
        return replace(self, recipes=dict(self.recipes), sent=dict(self.sent))

    def plan(self, event: Event) -> None:
        """Take up a plan: which stage and window each place of the schedule is."""
        self.places, steps = {}, dict[int, int]()
        for stage in event["stages"]:
            depth = stage.get("depth", stage["stage"])
            self.places[stage["stage"]] = depth, steps.get(depth, 0)
            steps[depth] = steps.get(depth, 0) + (stage.get("steps") or 0)

    def take(self, event: Event) -> list[Point]:
        """The event's figures that are new here; they count as sent.

        A stage of several windows is one series, whose steps go on from window to window as its schedules do.
        """
        if event["event"] == "plan":
            self.plan(event)
        points, stage = self._new(event), event.get("stage")
        depth, before = self.places.get(stage, (stage, 0)) if isinstance(stage, int) else (None, 0)
        return points if depth is None else [replace(p, stage=depth, step=before + p.step) for p in points]

    def _new(self, event: Event) -> list[Point]:
        """The figures that are new, by the stage's place and its step in the window."""
        kind, stage, at = event["event"], event.get("stage"), float(event.get("time", 0.0))
        if kind == "evaluation":
            return self._evaluation(event, at)
        if not isinstance(stage, int):
            return []
        if kind in ("training", "reused"):
            self.recipes[str(stage)] = event["recipe"]
            return []
        recipe = self.recipes.get(str(stage), "")
        if kind in ("step", "resumed"):
            return self._steps(event, recipe, stage, at)
        if kind == "diverged" and isinstance(event.get("to"), int):
            self._go_back(event, recipe)
        if kind == "written":
            step, prefix = int(self.sent.get(recipe, 0)), "boundary_"
        elif isinstance(event.get("step"), int):  # a checkpoint's time, a held-out loss, …
            step, prefix = event["step"], f"{kind}/"
        else:
            return []
        key = f"{recipe}:{kind}"
        if step <= self.sent.get(key, -1):  # a run that was killed repeats what came after its last checkpoint
            return []
        self.sent[key] = step
        return [Point(stage, prefix + name, step, value, at) for name, value in _figures(event).items()]

    def _go_back(self, event: Event, recipe: str) -> None:
        """The stage went back to an earlier step: the steps from there have other figures, which are new."""
        before, rollback = self.sent.get(f"{recipe}:rollbacks", []), [event["step"], event["to"]]
        # A stage that was resumed below a rollback comes to it again, with the same figures.
        if rollback in before and self.sent.get(f"{recipe}:resumed"):
            return
        self.sent |= {f"{recipe}:rollbacks": [*before, rollback], f"{recipe}:resumed": False}
        for key in (recipe, *(f"{recipe}:{kind}" for kind in ("held_out", "checkpoint", "best"))):
            if key in self.sent:
                self.sent[key] = min(self.sent[key], event["to"])

    def _steps(self, event: Event, recipe: str, stage: int, at: float) -> list[Point]:
        last, losses, sent = event["step"], event.get("losses", []), int(self.sent.get(recipe, 0))
        new = [
            Point(stage, "loss", step, float(loss), at)
            for step, loss in enumerate(losses, last - len(losses) + 1)
            if step > sent and loss is not None  # a refused step has no loss
        ]
        if event["event"] == "step" and last > sent:
            new += [Point(stage, name, last, value, at) for name, value in _figures(event).items()]
        if new:
            self.sent[recipe] = max(sent, last)
        if event["event"] == "resumed":
            self.sent[f"{recipe}:resumed"] = True
        return new

    def _evaluation(self, event: Event, at: float) -> list[Point]:
        result = event.get("result") or {}
        digest = content_id("evaluation", json.dumps(result, sort_keys=True))
        if event.get("reused") or not result or self.sent.get("evaluation") == digest:
            return []
        self.sent["evaluation"] = digest
        points = []
        for depth, figures in enumerate(result.get("stages") or [result]):
            shown = {"bits_per_byte": figures.get("bits_per_byte")}
            for name in ("loss", "accuracy", "f1", "bleu"):
                values = figures.get(name) or {}
                shown |= {f"{name}_at_{printable(share)}": value for share, value in values.items()}
            shown |= (result.get("figures") or {}) if depth == 0 else {}
            points += [
                Point(None, f"held_out/{name}", depth, float(value), at)
                for name, value in shown.items()
                if value is not None
            ]
        return points


def _figures(event: Event) -> dict[str, float]:
    """The numbers of an event that are figures."""
    values = {name: event.get(name) for name in EVENTS[event["event"]].figures}
    experts, terms = event.get("experts"), event.get("terms")
    for block, figures in experts.items() if isinstance(experts, dict) else ():
        values |= {f"experts_{block}/{name}": value for name, value in dict(figures).items()}
    pieces = event.get("pieces")
    values |= {f"pieces/{name}": value for name, value in pieces.items()} if isinstance(pieces, dict) else {}
    values |= {f"term/{name}": value for name, value in terms.items()} if isinstance(terms, dict) else {}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def is_event(event: Event) -> bool:
    """Whether an event of the log is one that figures can be taken from."""
    return event["event"] in EVENTS and _LINES.get(event["event"], record({}, _AT))(event) is None
