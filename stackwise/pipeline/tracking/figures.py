"""Figures of a run's events, for trackers: which there are, and which a tracker run has already."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from stackwise.identity import content_id

Event = dict[str, Any]

_NO_FIGURES = ("event", "time", "begun", "stage", "step", "steps", "loss", "losses", "pid")
_BOOKKEEPING = ("step", "resumed", "training", "committed", "reused", "writing", "written", "boundary", "failed")


@dataclass(frozen=True, slots=True)
class Point:
    """One figure.

    Args:
        stage: The stage's depth; None: a figure of the run by depth.
        name: What it is, such as `loss`.
        step: The stage's optimizer step, counted through all its windows; of a figure of the run, the depth.
        value: Losses in nats, sizes in bytes, times in seconds, rates as they are.
        time: When it was told, in seconds since 1970.
    """

    stage: int | None
    name: str
    step: int
    value: float
    time: float


@dataclass
class Taken:
    """What a tracker run has.

    Args:
        number: Which tracker run of this directory it is.
        id: Its id.
        offset: Bytes of the log that were read.
        recipes: The recipe of each stage (by its place in the schedule, as text) whose figures it holds.
        places: Of each place in the schedule its stage's depth, and that stage's steps in the windows before.
        told: The last step of each series by recipe and kind, as the log counts it, from the start of its window; for
            figures of the run, what they were.
        whole: Whether it has what the log held when it began.
    """

    number: int = 1
    id: str | None = None
    offset: int = 0
    recipes: dict[str, str] = field(default_factory=dict)
    places: dict[str, list[int]] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    whole: bool = False

    def copied(self) -> Taken:
        """A copy to take further figures with."""
        return replace(self, recipes=dict(self.recipes), told=dict(self.told))

    def changed_by(self, event: Event) -> bool:
        """Whether a stage now has another recipe: its figures belong to another tracker run."""
        if event["event"] not in ("training", "reused"):
            return False
        before = self.recipes.get(str(event["stage"]))
        return before is not None and before != event["recipe"]

    def renewed(self, event: Event) -> Taken:
        """The next tracker run: the stages below the changed one are the same."""
        place = event["stage"]
        kept = {key: recipe for key, recipe in self.recipes.items() if int(key) < place}
        return Taken(self.number + 1, None, self.offset, kept | {str(place): event["recipe"]}, dict(self.places))

    def planned(self, event: Event) -> None:
        """Take up a plan: which stage and window each place of the schedule is."""
        self.places, steps = {}, dict[int, int]()
        for each in event["stages"]:
            depth = each.get("depth", each["stage"])
            self.places[str(each["stage"])] = [depth, steps.get(depth, 0)]
            steps[depth] = steps.get(depth, 0) + each.get("steps", 0)

    def take(self, event: Event) -> list[Point]:
        """The event's figures that are new here; they count as taken.

        A stage of several windows is one series, whose steps go on from window to window as its schedules do.
        """
        place = event.get("stage")
        at: list[Any] = self.places.get(str(place), [place, 0])
        depth, before = at
        return [
            point if point.stage is None else replace(point, stage=depth, step=before + point.step)
            for point in self._new(event)
        ]

    def _new(self, event: Event) -> list[Point]:
        """The figures that are new, by the stage's place and its step in the window."""
        kind, stage, at = event["event"], event.get("stage"), float(event.get("time", 0.0))
        if kind == "plan":
            self.planned(event)
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
            step, prefix = int(self.told.get(recipe, 0)), "boundary_"
            figures = {name: event[name] for name in ("bytes", "seconds")}
        elif kind not in _BOOKKEEPING and isinstance(event.get("step"), int):
            # Whatever else is told at a step, such as a checkpoint's time or a held-out loss.
            step, prefix, figures = event["step"], f"{kind}/", _figures(event)
        else:
            return []
        key = f"{recipe}:{kind}"
        if step <= self.told.get(key, -1):
            return []
        self.told[key] = step
        return [Point(stage, prefix + name, step, float(value), at) for name, value in figures.items()]

    def _go_back(self, event: Event, recipe: str) -> None:
        """The stage went back to an earlier step: the steps from there have other figures, which are new.

        A stage that was resumed below a rollback comes to it again, with the figures that are known.
        """
        known, rollback = self.told.get(f"{recipe}:rollbacks", []), [event["step"], event["to"]]
        if rollback in known and self.told.get(f"{recipe}:resumed"):
            return
        self.told |= {f"{recipe}:rollbacks": [*known, rollback], f"{recipe}:resumed": False}
        for key in (recipe, *(f"{recipe}:{kind}" for kind in ("held_out", "checkpoint", "best"))):
            if key in self.told:
                self.told[key] = min(self.told[key], event["to"])

    def _steps(self, event: Event, recipe: str, stage: int, at: float) -> list[Point]:
        last, losses, told = event["step"], event.get("losses", []), int(self.told.get(recipe, 0))
        first = last - len(losses) + 1
        found = [
            Point(stage, "loss", first + number, float(loss), at)
            for number, loss in enumerate(losses)
            if first + number > told and loss is not None
        ]
        if event["event"] == "step" and last > told:
            found += [Point(stage, name, last, float(value), at) for name, value in _figures(event).items()]
        if found:
            self.told[recipe] = max(told, last)
        if event["event"] == "resumed":
            self.told[f"{recipe}:resumed"] = True
        return found

    def _evaluation(self, event: Event, at: float) -> list[Point]:
        result = event.get("result") or {}
        digest = content_id("evaluation", json.dumps(result, sort_keys=True))
        if event.get("reused") or not result or self.told.get("evaluation") == digest:
            return []
        self.told["evaluation"] = digest
        found = []
        for depth, figures in enumerate(result.get("stages") or [result]):
            shown = {"bits_per_byte": figures.get("bits_per_byte")}
            for name in ("loss", "accuracy"):
                shown |= {f"{name}_at_{fraction}": value for fraction, value in (figures.get(name) or {}).items()}
            found += [
                Point(None, f"held_out/{name}", depth, float(value), at)
                for name, value in shown.items()
                if value is not None
            ]
        return found


def _figures(event: Event) -> dict[str, float]:
    """The numbers of an event beside those that say where it belongs."""
    return {
        name: value
        for name, value in event.items()
        if name not in _NO_FIGURES and isinstance(value, int | float) and not isinstance(value, bool)
    }
