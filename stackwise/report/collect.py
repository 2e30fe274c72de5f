"""Everything that a report shows, gathered from a run's files and its store. Imports no torch."""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import dataclass, field
from typing import Any

from stackwise import durable
from stackwise.config import StackWiseConfig
from stackwise.config.loading import dump
from stackwise.errors import StackWiseError
from stackwise.pipeline.run import RunDirectory, status
from stackwise.report.history import Curve, History, read_history
from stackwise.store import ActivationStore, BoundaryInfo, CommittedStage


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
    learning_rate: float | None = None
    fusion: dict[str, Any] | None = None


@dataclass(frozen=True)
class BoundaryFacts:
    """One boundary: there, being written, or dropped after use."""

    id: str
    depth: int
    bytes: int
    state: str
    codec: str
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Facts:
    """A run."""

    name: str
    path: str
    state: str
    config: StackWiseConfig
    yaml: str
    stages: list[StageFacts]
    boundaries: list[BoundaryFacts]
    evaluation: dict[str, Any] | None
    vocabulary: int | None
    history: History
    store_bytes: dict[str, int] | None


def collect(run: RunDirectory) -> Facts:
    """Gather what is known of a run.

    Raises:
        NotFound: There is no run there.
    """
    config, manifest, history = run.config(), run.manifest(), read_history(run.events_file)
    state = status(run)
    stages = [
        StageFacts(
            **{key: row[key] for key in ("depth", "window", "state", "loss", "reason", "recipe", "trunk", "weights")},
            blocks=(row["blocks"][0], row["blocks"][1]),
            step=row["step"] or 0,
            steps=row["steps"] or 0,
            wait_fraction=row["wait_fraction"],
            peak_memory_bytes=row["peak_memory_bytes"],
            learning_rate=config.stage_training(row["depth"]).learning_rate if row["depth"] < config.n_stages else None,
        )
        for row in state["stages"]
    ]
    committed: dict[str, CommittedStage] = {}
    present: list[BoundaryInfo] = []
    usage = None
    with contextlib.suppress(StackWiseError, OSError):  # a report can do without its store
        with ActivationStore(run.store_path(config), create=False) as store:
            own = set(manifest.get("boundaries", []))
            present = [info for info in store.boundaries() if info.id in own]
            usage = store.usage()
            for stage in stages:
                if stage.recipe is not None and stage.state == "done":
                    found = store.stage(stage.recipe, check=False)
                    if found is not None:
                        committed[stage.recipe] = found
    for place, stage in enumerate(stages):
        _add_training(stage, committed.get(stage.recipe or ""), history.curves.get(place))
    return Facts(
        name=config.name,
        path=str(run.path),
        state=state["state"],
        config=config,
        yaml=dump(config),
        stages=stages,
        boundaries=_boundaries(present, history, config),
        evaluation=_evaluation(run, manifest),
        vocabulary=(manifest.get("vocabulary") or {}).get("size"),
        history=history,
        store_bytes=usage,
    )


def _add_training(stage: StageFacts, committed: CommittedStage | None, curve: Curve | None) -> None:
    """Losses and speed: from what was committed, which is whole; else from the log, as far as it goes."""
    if committed is not None:
        record = committed.record
        losses = enumerate(record.get("losses", []), 1)
        stage.curve = [(float(step), loss) for step, loss in losses if loss is not None]
        stage.held_out = [(float(step), loss) for step, loss in record.get("held_out", [])]
        stage.fusion = record.get("fusion")
        stage.tokens, stage.seconds = record.get("tokens"), record.get("seconds")
        if stage.tokens and stage.seconds:
            stage.tokens_per_second = stage.tokens / stage.seconds
    elif curve is not None and curve.recipe in (None, stage.recipe):
        stage.curve = curve.points
        stage.held_out = [(float(step), curve.held_out[step]) for step in sorted(curve.held_out)]
        if curve.tokens_per_second:
            stage.tokens_per_second = statistics.median(curve.tokens_per_second)


def _boundaries(present: list[BoundaryInfo], history: History, config: StackWiseConfig) -> list[BoundaryFacts]:
    """The boundaries that are there, then those that the log alone knows."""
    found = {
        info.id: BoundaryFacts(info.id, info.depth, info.disk_bytes, info.state, info.codec, info.shape)
        for info in present
    }
    codec = config.store.codec or "bf16"
    for key, written in history.boundaries.items():
        if key not in found and (written.finished or written.dropped):
            found[key] = BoundaryFacts(key, written.depth, written.bytes, "dropped", codec)
    # One that was written anew at the same depth takes the place of a dropped one.
    kept = {facts.depth for facts in found.values() if facts.state != "dropped"}
    shown: dict[tuple[int, str], BoundaryFacts] = {}
    for facts in found.values():
        if facts.state != "dropped":
            shown[facts.depth, facts.id] = facts
        elif facts.depth not in kept:
            shown[facts.depth, ""] = facts
    return sorted(shown.values(), key=lambda facts: facts.depth)


def _evaluation(run: RunDirectory, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The newest evaluation of the run."""
    known = manifest.get("evaluation")
    if isinstance(known, dict) and isinstance(known.get("result"), dict):
        return dict(known["result"])
    try:
        value = durable.read_json(run.evaluation_file)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and "loss" in value else None
