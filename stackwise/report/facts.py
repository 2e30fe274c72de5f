"""Everything that a report shows, gathered from a run's files, its log and its store. Imports no torch."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.errors import StackWiseError
from stackwise.pipeline.events import Event, read_log
from stackwise.pipeline.run import RunDirectory, status
from stackwise.shapes import Shape, anything, array, array_of, count, number, optional, record, text
from stackwise.store import ActivationStore, BoundaryInfo, CommittedStage

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
    """Loss by step of one stage under one recipe, and its speeds."""

    recipe: str | None
    losses: dict[int, float] = field(default_factory=dict)
    tokens_per_second: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)

    @property
    def points(self) -> list[tuple[float, float]]:
        """(step, loss), in order."""
        return [(float(step), self.losses[step]) for step in sorted(self.losses)]


@dataclass
class BoundaryFacts:
    """One boundary: there, being written, or dropped after use."""

    id: str
    depth: int
    bytes: int = 0
    state: str = "writing"
    codec: str = ""
    shape: tuple[int, ...] = ()


@dataclass
class History:
    """What the log holds."""

    curves: dict[int, Curve] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    boundaries: dict[str, BoundaryFacts] = field(default_factory=dict)
    fill: Event | None = None
    device: Event | None = None
    data: Event | None = None
    warnings: list[str] = field(default_factory=list)
    failure: str | None = None
    begun: float | None = None
    sittings: int = 0


def read_history(path: Path) -> History:
    """Read a log of events; lines that are broken, as a crash may leave one, are passed over."""
    history = History()
    phase: str | None = None
    before, leading = 0.0, False
    for event in _events(path):
        _take(history, event)
        kind, at = event["event"], event.get("time")
        if at is None or finite(at) is not None:
            continue
        history.begun = at if history.begun is None else history.begun
        if kind == "data":
            history.phases["preparation"] += float(event.get("seconds") or 0.0)
        if (kind in _LEADING or kind == "device") and not leading:
            # Another runner: the time since the last event of the one before is nobody's.
            history.sittings += 1
            phase = PHASES[4]
        elif phase is not None and kind not in _LEADING:
            history.phases[phase] += max(0.0, at - before)
            phase = None if kind in _CLOSING else _PHASE_OF.get(kind, phase)
        leading, before = kind in _LEADING, at
    return history


def _events(path: Path) -> Iterator[Event]:
    """The events of a log, each of the shape that is needed of it."""
    with contextlib.suppress(OSError):  # something else lies there, or it cannot be read: the report does without
        for event, _ in read_log(path):
            if _NAMED(event) is None and _SHAPES.get(event["event"], anything)(event) is None:
                yield event


def finite(value: Any) -> str | None:
    """A number that a chart can show: a log may have NaN and infinity."""
    return number(value) or (None if abs(value) < 1e15 else "is not finite")


_NAMED = record({"event": text})
_PLACE = {"stage": count, "boundary": text, "depth": count}
_SHAPES: dict[str, Shape] = {
    "device": record({"name": text}, {"precision": text}),
    "data": record({}, {"seconds": optional(finite)}),
    "training": record({"stage": count}, {"recipe": optional(text)}),
    "step": record({"stage": count, "step": count, "losses": array_of(optional(number)), "tokens_per_second": finite}),
    "held_out": record({"stage": count, "step": count, "nats": finite}),
    "diverged": record({"text": text}),
    "writing": record({"stage": count, "boundary": text}, _PLACE),
    "filling": record({"stage": count, "boundary": text}, _PLACE),
    "written": record({"stage": count, "boundary": text, "bytes": count}, _PLACE),
    "dropped": record({"stage": count, "boundary": text, "bytes": count}),
    "fill": record({}, {"before": text, "after": text, "spans": array_of(array(text, text))}),
    "warning": record({"text": text}),
    "failed": record({"text": text}),
}
"""What is needed of the events that are read here. One of another shape is passed over."""


def _take(history: History, event: Event) -> None:
    match event["event"]:
        case "device":
            history.device, history.failure = event, None  # a new sitting: what ended the one before is past
        case "data":
            history.data = event
        case "training":
            curve = history.curves.get(event["stage"])
            if curve is None or curve.recipe != event.get("recipe"):  # one that goes on keeps its curve
                history.curves[event["stage"]] = Curve(event.get("recipe"))
        case "step":
            _take_step(history.curves.setdefault(event["stage"], Curve(None)), event)
        case "held_out":
            history.curves.setdefault(event["stage"], Curve(None)).held_out[event["step"]] = event["nats"]
        case "diverged":
            history.warnings.append(str(event["text"]))
        case "writing" | "filling" | "written":
            # Its place in the schedule may be another than its depth.
            depth = int(event.get("depth", event["stage"] + 1))
            state = "complete" if event["event"] == "written" else "writing"
            history.boundaries[event["boundary"]] = BoundaryFacts(
                event["boundary"], depth, event.get("bytes", 0), state
            )
        case "dropped":
            before = history.boundaries.get(event["boundary"]) or BoundaryFacts(event["boundary"], event["stage"])
            history.boundaries[event["boundary"]] = replace(
                before, bytes=event["bytes"] or before.bytes, state="dropped"
            )
        case "fill":
            history.fill = event
        case "warning":
            history.warnings.append(str(event["text"]))
        case "failed":
            history.failure = str(event["text"])


def _take_step(curve: Curve, event: Event) -> None:
    losses = event["losses"]
    first = event["step"] - len(losses) + 1
    # Steps that were lost to a kill come again; the later event counts.
    for step, loss in enumerate(losses, first):
        if loss is not None and math.isfinite(loss):  # of a step that was skipped there is none
            curve.losses[step] = loss
    curve.tokens_per_second.append(event["tokens_per_second"])  # the median of them is the speed


@dataclass
class StageFacts:
    """One stage."""

    depth: int
    window: int
    blocks: tuple[int, int]
    state: str
    step: int
    steps: int
    loss: float | None
    reason: str | None
    wait_fraction: float | None
    peak_memory_bytes: int | None
    recipe: str | None
    trunk: str | None
    weights: str | None
    curve: list[tuple[float, float]] = field(default_factory=list)
    held_out: list[tuple[float, float]] = field(default_factory=list)
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    fusion: dict[str, Any] | None = None
    experts: dict[str, dict[str, Any]] = field(default_factory=dict)
    adaptation: list[float] = field(default_factory=list)  # nats on tasks held out: before inner steps, after each


@dataclass(frozen=True)
class Facts:
    """A run."""

    path: str
    state: str
    config: StackWiseConfig
    stages: list[StageFacts]
    boundaries: list[BoundaryFacts]
    evaluation: dict[str, Any] | None
    vocabulary: int | None
    history: History
    store_bytes: dict[str, int] | None
    tasks: dict[str, Any] | None = None  # what learning tasks came to (`pipeline.tasks.task_figures`)


_OF_STATUS = (
    *("depth", "window", "state", "loss", "reason"),
    *("wait_fraction", "peak_memory_bytes", "recipe", "trunk", "weights"),
)
"""What a stage of the report has as the run's status has it."""


def collect(run: RunDirectory) -> Facts:
    """Gather what is known of a run.

    Raises:
        NotFound: There is no run there.
    """
    config, manifest, history = run.config(), run.manifest(), read_history(run.events_file)
    state = status(run)
    stages = [
        StageFacts(
            **{key: row[key] for key in _OF_STATUS},
            blocks=(row["blocks"][0], row["blocks"][1]),
            step=row["step"] or 0,
            steps=row["steps"] or 0,
            experts=row.get("experts", {}),
            adaptation=row.get("adaptation", []),
        )
        for row in state["stages"]
    ]
    committed: dict[str, CommittedStage | None] = {}
    present: list[BoundaryInfo] = []
    usage = None
    with contextlib.suppress(StackWiseError, OSError):  # a report can do without its store
        with ActivationStore(run.store_path(config), create=False) as store:
            listed = set(manifest.get("boundaries", []))  # a store may be shared with other runs
            present = [info for info in store.boundaries() if info.head in listed]
            usage = store.usage()
            for stage in stages:
                if stage.recipe is not None and stage.state == "done":
                    committed[stage.recipe] = store.stage(stage.recipe, check=False)
    for place, stage in enumerate(stages):
        _add_training(stage, committed.get(stage.recipe or ""), history.curves.get(place))
    return Facts(
        path=str(run.path),
        state=state["state"],
        config=config,
        stages=stages,
        boundaries=_boundaries(present, history, config),
        evaluation=_evaluation(run, manifest),
        vocabulary=(manifest.get("vocabulary") or {}).get("size"),
        history=history,
        store_bytes=usage,
        tasks=state.get("tasks"),
    )


_ROUND = {
    "chosen": array(count, count),
    "nats": finite,
    "probes": array_of(record({"blocks": array(count, count), "nats": finite, "gain": finite})),
}
_RECORD = record(
    {"losses": array_of(optional(number))},
    {
        "held_out": array_of(array(count, finite)),
        "fusion": optional(record({}, {"rounds": array_of(record(_ROUND))})),
        "tokens": optional(count),
        "seconds": optional(finite),
    },
)
"""What is needed of a committed stage's record."""


def _add_training(stage: StageFacts, committed: CommittedStage | None, curve: Curve | None) -> None:
    """Losses and speed: from what was committed, which is whole; else from the log, as far as it goes."""
    if committed is not None and (kept := committed.record) and _RECORD(kept) is None:
        losses = enumerate(kept["losses"], 1)
        stage.curve = [(float(step), loss) for step, loss in losses if loss is not None and math.isfinite(loss)]
        stage.held_out = [(float(step), loss) for step, loss in kept.get("held_out", [])]
        stage.fusion = kept.get("fusion")
        stage.tokens, stage.seconds = kept.get("tokens"), kept.get("seconds")
        if stage.tokens and stage.seconds:  # over the whole stage, not a median of moments
            stage.tokens_per_second = stage.tokens / stage.seconds
    elif curve is not None and curve.recipe in (None, stage.recipe):
        stage.curve = curve.points
        stage.held_out = [(float(step), curve.held_out[step]) for step in sorted(curve.held_out)]
        if curve.tokens_per_second:
            stage.tokens_per_second = statistics.median(curve.tokens_per_second)


def _boundaries(present: list[BoundaryInfo], history: History, config: StackWiseConfig) -> list[BoundaryFacts]:
    """The boundaries that are there; and at depths where none is, the last of those that the log alone knows."""
    whole = dict[str, list[BoundaryInfo]]()
    for info in present:  # rows in groups are one boundary
        whole.setdefault(info.head, []).append(info)
    there = [
        BoundaryFacts(
            head,
            infos[0].depth,
            sum(info.disk_bytes for info in infos),
            next((info.state for info in infos if info.id == head), "writing"),
            infos[0].codec,
            (sum(info.rows for info in infos), *infos[0].shape[1:]),
        )
        for head, infos in whole.items()
    ]
    ids, depths = {facts.id for facts in there}, {facts.depth for facts in there}
    gone = {
        facts.depth: replace(facts, state="dropped", codec=config.store.codec or "bf16")
        for facts in history.boundaries.values()
        if facts.id not in ids and facts.depth not in depths and facts.state != "writing"
    }
    return sorted([*there, *gone.values()], key=lambda facts: facts.depth)


def _evaluation(run: RunDirectory, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The newest evaluation of the run."""
    recorded = manifest.get("evaluation")
    try:
        value = recorded["result"] if recorded is not None else run.evaluation()
    except (OSError, ValueError):  # a report can do without it
        return None
    return None if value is None else dict(_without_infinity(value))


def _without_infinity(value: Any) -> Any:
    """Figures that no chart can show are missing ones."""
    if isinstance(value, dict):
        return {key: _without_infinity(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_infinity(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
