"""What a run went through, stage by stage: losses by step, held-out figures, speed, how its experts were used.

Two sources: the run's log, which knows it as it goes, and the record that a stage is committed with, which has every
step's terms whatever happened to the runner. The record wins.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.search.record import logged
from stackwise.store import ActivationStore

CROSS_ENTROPY = "cross_entropy"  # the term's name in `objectives/objective.py`, which imports torch


@dataclass
class Course:
    """One stage's way, by its steps from 1; losses in nats.

    Args:
        losses: Of training, the auxiliary ones of the blocks included; None: the step was refused.
        plain: The same without the auxiliary ones.
        held_out: Events of evaluations.
        reports: Step events, those of neighbouring reports in one.
    """

    recipe: str | None = None
    losses: dict[int, float | None] = field(default_factory=dict)
    plain: dict[int, float | None] = field(default_factory=dict)
    held_out: dict[int, dict[str, Any]] = field(default_factory=dict)
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0  # of training, once it is committed

    def observe(self, event: dict[str, Any]) -> None:
        """Take up an event of the log; a step that was taken again after a kill replaces what it was before."""
        step: int = event.get("step", 0)
        match event["event"]:
            case "step":
                plain = event.get("terms", {}).get(CROSS_ENTROPY)
                for number, loss in enumerate(event["losses"], step - len(event["losses"]) + 1):
                    self.losses[number], self.plain[number] = loss, loss if plain is None else plain
                self.reports[step] = event
            case "held_out":
                self.held_out[step] = event

    def commit(self, record: dict[str, Any]) -> None:
        """Take up the record of a committed stage."""
        self.seconds = record["seconds"]
        self.losses = dict(enumerate(record["losses"], 1))
        self.plain = dict(enumerate(record.get("terms", {}).get(CROSS_ENTROPY, record["losses"]), 1))
        plain = dict(record.get("held_out_terms", {}).get(CROSS_ENTROPY, ()))
        apart = CROSS_ENTROPY in record.get("terms", {})  # blocks have losses of their own
        logged, self.held_out = self.held_out, {}
        for step, nats in record["held_out"]:
            known = {"terms": {CROSS_ENTROPY: plain.get(step)}} if apart else {}
            self.held_out[step] = known | logged.get(step, {}) | {"step": step, "nats": nats}


def courses(run: RunDirectory) -> list[Course]:
    """The courses of a run's stages, lowest first; of those that have not begun none."""
    by_stage: dict[int, Course] = {}
    for event in logged(run):
        if not isinstance(number := event.get("stage"), int):
            continue
        if event["event"] == "training" and event["recipe"] != by_stage.get(number, Course()).recipe:
            by_stage[number] = Course(event["recipe"])  # what was logged of another one is over
        by_stage.setdefault(number, Course()).observe(event)
    manifest = run.manifest()
    recipes = {n: stage["recipe"] for n, stage in enumerate(manifest["stages"]) if stage["recipe"] is not None}
    if recipes:
        with ActivationStore(run.store_path(run.config()), create=False) as store:
            for number, recipe in recipes.items():
                if (committed := store.stage(recipe, check=False)) is not None:
                    by_stage.setdefault(number, Course(recipe)).commit(committed.record)
    return [by_stage[number] for number in sorted(by_stage)]


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is known; None: nothing is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
