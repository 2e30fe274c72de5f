"""What a run leaves of itself: the log of its events, and its manifest (`run.json`)."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Self

from stackwise.durable import explain_full_disk, write_json
from stackwise.files import open_regular
from stackwise.identity import content_id
from stackwise.pipeline.events import EVENTS, Emit, Event, Observer
from stackwise.pipeline.reasons import FIRST, History
from stackwise.pipeline.run import RunDirectory, pending, recent_loss
from stackwise.pipeline.schedule import Stage
from stackwise.shapes import finite
from stackwise.store import BoundaryInfo, CommittedStage

if TYPE_CHECKING:
    from stackwise.pipeline.plan import Plan
    from stackwise.pipeline.runner.workers import WorkerPool


class Observers:
    """Passes every event to all who observe, in order."""

    def __init__(self, observers: list[Observer]) -> None:
        self._observers = observers
        self._repeated: list[Event] = []

    def add(self, observer: Observer) -> None:
        """Let one more observe; it gets what it missed of the run's beginning."""
        for event in self._repeated:
            observer(event)
        self._observers.append(observer)

    def __call__(self, event: Event) -> None:
        """Pass it on."""
        event = {"time": round(time.time(), 3), **event}
        if EVENTS[event["event"]].repeated:
            self._repeated.append(event)
        for observer in self._observers:
            observer(event)


class EventLog:
    """Appends events to a file, one JSON object a line.

    Steps that follow each other within a second share a line, so that the log of a run of months stays small; no
    step's loss is left out.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._path = run.events_file
        with explain_full_disk(self._path):
            fd = open_regular(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, root=run.path)
        size = os.fstat(fd).st_size
        # A line that a kill or a full disk cut off does not take the next one with it.
        self._begin = "\n" if size and os.pread(fd, 1, size - 1) != b"\n" else ""
        self._file: IO[str] = os.fdopen(fd, "a", encoding="utf-8", buffering=1)
        self._steps: Event | None = None
        self._since = 0.0

    def __call__(self, event: Event) -> None:
        """Append it; progress that only a screen needs is left out."""
        if EVENTS[event["event"]].shown_by == "progress" and "done" in event:
            return
        if event["event"] != "step":
            self.flush()
            self._write(event)
            return
        if self._steps is None:
            self._since = time.monotonic()  # the other clock may be set back
            self._steps = event
        else:
            self._steps = {**event, "losses": [*self._steps["losses"], *event["losses"]]}
        if time.monotonic() - self._since >= 1.0:
            self.flush()

    def flush(self) -> None:
        """Write what is held back."""
        if self._steps is not None:
            self._write(self._steps)
            self._steps = None

    def _write(self, event: Event) -> None:
        with explain_full_disk(self._path):
            self._file.write(f"{self._begin}{json.dumps(event)}\n")
        self._begin = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            with explain_full_disk(self._path):
                try:
                    self.flush()
                finally:
                    self._file.close()
        except OSError:
            if exception[0] is None:  # else what ended the run says it already
                raise


ALONE: dict[str, Any] = {"ranks": [], "slowest": 0}
"""What is said of the ranks of a stage that one process trains."""


class Manifest:
    """Keeps `run.json` level with what happens.

    Args:
        before: The manifest of an earlier run in the same directory.
        auto: What settings that were `auto` came to, by key, to be found here by a later run.
    """

    def __init__(
        self, run: RunDirectory, plan: Plan, before: dict[str, Any], auto: dict[str, Any] | None = None
    ) -> None:
        self._run, self._plan, self._auto = run, plan, auto or {}
        self._before = {(stage["depth"], stage["window"]): stage for stage in before.get("stages", [])}
        self._known_evaluation = before.get("evaluation")
        self.boundaries: list[str] = list(before.get("boundaries", []))
        """The boundaries that this run wrote and that are still there."""
        self._written = 0.0
        self._group: dict[str, Any] = before.get("group") or dict(ALONE)  # a run that trains nothing keeps what it says
        self._stages = [self._pending(stage) for stage in plan.stages]

    def observe(self, event: Event) -> None:
        """Take up an event."""
        place = event.get("stage")
        if not isinstance(place, int) or place >= len(self._stages):
            return
        stage = self._stages[place]
        match event["event"]:
            case "training":
                stage |= {"state": "running", "step": 0, "steps": event["steps"], "reason": event["reason"]}
                stage |= {"recipe": event["recipe"], "trunk": event["trunk"], "weights": None}
                stage |= {"held_out": None, "divergences": 0}
                self._group = dict(ALONE)
                for name in ("experts", "routes", "pieces", "adaptation", "tasks"):
                    stage.pop(name, None)
                self.save()
            case "routes":
                stage["routes"] = {key: event[key] for key in ("first", "reached", "of", "by_chance", "bytes")}
            case "ranks":
                self._group = {key: event[key] for key in ("ranks", "slowest")}
            case "resumed":
                stage |= {"step": event["step"], "reason": f"resumed at step {event['step']} of {event['steps']}"}
            case "step":
                stage |= {key: event[key] for key in ("step", "steps", "loss", "wait_fraction")}
                stage["peak_memory_bytes"] = event["memory"]
                _take_experts(stage, event)
                if "pieces" in event:
                    stage["pieces"] = event["pieces"]
                if time.monotonic() - self._written > 1:
                    self.save()
            case "writing" | "filling":
                if event["boundary"] not in self.boundaries:
                    self.boundaries.append(event["boundary"])
            case "reused":
                stage["reason"] = event["reason"]
            case "held_out":
                stage["held_out"] = {key: event[key] for key in ("step", "nats", "best")}
                if "adaptation" in event:
                    stage["adaptation"] = event["adaptation"]
                _take_experts(stage, event)
            case "diverged":
                stage["divergences"] += 1
            case "failed":
                stage["state"] = "failed"
                stage["reason"] = event["text"]

    def committed(self, stage: Stage, committed: CommittedStage) -> None:
        """A stage is done."""
        record, entry = committed.record, self._stages[stage.place]
        held_out = record.get("held_out") or None  # evaluations inside the stage
        entry |= {
            "state": "done",
            "step": record["steps"],
            "steps": record["steps"],
            "loss": recent_loss(record["losses"]),
            "trunk": record["trunk"],
            "weights": content_id("weights", record["parts"]),
            "recipe": committed.recipe,
            "wait_fraction": record["wait_fraction"],
            "peak_memory_bytes": record["peak_memory_bytes"],
            "held_out": held_out
            and {"step": held_out[-1][0], "nats": held_out[-1][1], "best": min(nats for _, nats in held_out)},
            "divergences": len(record.get("divergences", [])),
            "tasks": record.get("tasks"),
            "unfrozen": [turn["chosen"] for turn in (record.get("fusion") or {}).get("rounds", []) if turn["kept"]],
        }
        if adaptation := record.get("adaptation"):
            entry["adaptation"] = adaptation[-1][1]
        if entry["reason"] in FIRST:  # why it had to train, which is true no more
            entry["reason"] = "trained by this run"
        self.save()

    def note_boundaries(self, present: list[BoundaryInfo]) -> None:
        """Forget boundaries that are gone."""
        ids = {info.id for info in present}
        self.boundaries = [boundary for boundary in self.boundaries if boundary in ids]

    def recipes(self) -> list[str]:
        """The recipes of the stages done, and of the one in training."""
        return [stage["recipe"] for stage in self._stages if stage["recipe"] is not None]

    def evaluation(self, key: str) -> dict[str, Any] | None:
        """The evaluation of the same weights (`result`) and the passage filled in (`fill`), where there is one."""
        known = self._known_evaluation
        if known is None or known["key"] != key or not self._run.evaluation_file.exists():
            return None
        return dict(known)

    def save_evaluation(self, key: str, result: dict[str, Any], fill: dict[str, Any] | None) -> None:
        """Keep an evaluation with the passage that was filled in, and what it is of."""
        self._known_evaluation = {"key": key, "result": result, "fill": fill}
        write_json(self._run.evaluation_file, finite(result))
        self.save()

    def save(self) -> None:
        """Publish the manifest."""
        self._written = time.monotonic()
        vocabulary = self._plan.vocabulary
        self._run.write_manifest(
            {
                "name": self._plan.config.name,
                "data": {"id": self._plan.data.id, "directory": str(self._plan.data.directory)},
                "vocabulary": {"size": vocabulary.size, "mask": vocabulary.mask},
                "store": str(self._plan.store.path),
                "rowsets": self._plan.known_rowsets,
                "auto": self._auto,
                "group": self._group,
                "stages": self._stages,
                "boundaries": self.boundaries,
                "evaluation": self._known_evaluation,
            }
        )

    def _pending(self, stage: Stage) -> dict[str, Any]:
        before = self._before.get((stage.depth, stage.window), {})
        return pending(stage, self._plan.steps(stage)) | {
            "held_out": None,
            "divergences": 0,
            # What it was last trained by, so that a later run can say what changed.
            "last": before.get("recipe") or before.get("last"),
        }


def _take_experts(stage: dict[str, Any], event: Event) -> None:
    """How a stage's experts are used now; each one's share as the last evaluation had it."""
    for block, figures in (event.get("experts") or {}).items():
        stage.setdefault("experts", {}).setdefault(block, {}).update(figures)


@dataclass(frozen=True)
class RunContext:
    """What carrying out a plan needs."""

    run: RunDirectory
    plan: Plan
    history: History
    manifest: Manifest
    pool: WorkerPool
    emit: Emit
