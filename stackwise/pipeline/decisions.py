"""What becomes of each stage, and why: one walk through the schedule, that all who ask share.

`decide` yields a decision a stage, from the bottom up. A run carries each one out before it asks for the next; a dry
run prints them; a sweep adds up those of its runs; costs and traffic are sums over them. Weights that do not exist yet
go by the recipe that will make them, so that what stands on them has a name as well.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stackwise.config import StackWiseConfig
from stackwise.errors import DamageError
from stackwise.identity import content_id
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.job import Source, Versions, add_versions, needed, produced, pruned, start
from stackwise.pipeline.plan import Plan
from stackwise.pipeline.reasons import History
from stackwise.pipeline.recipe import Recipe, boundary_bytes, recipe_id
from stackwise.pipeline.rows import HELD_OUT
from stackwise.pipeline.schedule import FRONT, Stage, stage_below
from stackwise.store import CommittedStage

REUSED = "committed: the recipe is the same"
AGAIN = "a later window's weights took the place of its own, and these are needed once more"
DAMAGED = "its committed files were damaged"
EARLIER = "an earlier run of the sweep trains it"


@dataclass
class Traffic:
    """Bytes of boundaries read and written, and FLOPs of forward passes through committed stages."""

    read: float = 0.0
    written: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.read + other.read, self.written + other.written, self.flops + other.flops)

    def plain(self) -> dict[str, int]:
        """As JSON-ready data."""
        return {name: round(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Decision:
    """What becomes of a stage.

    Args:
        id: The recipe's id; above a stage that is still to be trained it equals another run's where both would train
            the same, and is not the one that it will be committed by.
        recomputed: The committed stages between that and the stage: their output is made as it is asked for.
        lost: Recipes whose weights training it needs, and which are gone: a later window's took their place.
    """

    stage: Stage
    action: Literal["reuse", "train"]
    reason: str
    recipe: Recipe
    id: str
    settled: bool  # whether it will be committed by `id`: all below is committed
    committed: CommittedStage | None  # what it came to before, where the store has it
    again: bool  # whether it is trained although the store has its record: weights of it are gone and needed
    damage: str | None  # what is wrong with its committed files
    reads: Stage | None  # the stage whose boundary is read to train it (itself, or one below it); None: tokens
    recomputed: tuple[Stage, ...]
    versions: Versions  # the newest weights of each part before it
    lost: frozenset[str]
    steps: int
    bytes: int  # of its weights and optimizer state once they are committed, at most
    traffic: Traffic

    def plain(self) -> dict[str, Any]:
        """As JSON-ready data. `recipe` is null where the id follows from what a stage below comes to."""
        return {
            "stage": self.stage.place,
            "depth": self.stage.depth,
            "window": self.stage.window,
            "action": self.action,
            "reason": self.reason,
            "steps": self.steps,
            "recipe": self.id if self.settled else None,
        }


@dataclass(frozen=True)
class RunPreview:
    """What a run will do, before it does it."""

    decisions: list[Decision]
    again: frozenset[str]  # recipes of committed stages that are trained again

    @property
    def training(self) -> list[Decision]:
        """Those that train."""
        return [decision for decision in self.decisions if decision.action == "train"]


def preview(plan: Plan, history: History | None = None, *, replaced: Collection[str] = ()) -> RunPreview:
    """What becomes of each stage, where nothing has been carried out yet."""
    again: frozenset[str] = frozenset()
    while True:
        decisions = list(decide(plan, history, again=again, replaced=replaced))
        lost = frozenset[str]().union(*(decision.lost for decision in decisions))
        if lost <= again:  # all that is missing trains again already
            return RunPreview(decisions, again)
        again |= lost  # what makes these weights trains once more, and may itself need some that are gone


def decide(
    plan: Plan,
    history: History | None = None,
    *,
    again: Collection[str] = (),
    replaced: Collection[str] = (),
    check: bool = False,
) -> Iterator[Decision]:
    """The stages in turn, lowest first.

    Whoever carries a decision out does so before asking for the next one, which then stands on what was committed;
    else the next one stands on what will be.

    Args:
        again: Recipes that are trained although they are committed.
        replaced: Recipes that other runs will have committed by then, without the weights of which a later window's
            will have taken the place.
        check: Compare committed files with their digests.
    """
    history = history or History()
    versions: Versions = dict(plan.sources)  # weights from outside; each stage adds what it commits
    pending: dict[str, int] = {}  # recipes without weights yet: the lowest stage that makes them other than before
    meter = TrafficMeter(plan)
    for stage in plan.stages:
        recipe = plan.recipe(stage, versions)
        key = recipe_id(recipe)
        makers = (versions[name].recipe for name in needed(stage) if name in versions)
        below = min((pending[maker] for maker in makers if maker in pending), default=None)
        committed, damage = _committed(plan, key, check=check)
        repeated = key in again
        trains = repeated or (committed is None and key not in replaced)
        if not trains:
            reason = REUSED if committed is not None else EARLIER
        elif repeated:
            reason = AGAIN
        elif damage is not None:
            reason = DAMAGED
        elif below is not None:
            reason = history.reason_above(plan, stage, below)
        else:
            reason = history.reason(plan, stage, recipe)
        reads, recomputed = plan.base(stage)
        yield Decision(
            stage,
            "train" if trains else "reuse",
            reason,
            recipe,
            key,
            below is None,
            committed,
            repeated,
            damage,
            reads,
            recomputed,
            dict(versions),
            frozenset(lost_weights(plan, stage, versions)) if trains else frozenset(),  # reused, it needs no weights
            plan.steps(stage),
            Estimate(plan.config, plan.vocabulary.size, stage).files_bytes,
            meter.train(stage) if trains else Traffic(),
        )
        if trains or committed is None:
            committed = plan.committed(key)  # it may have been carried out
        if committed is not None:
            add_versions(versions, committed)
            new = {part: source for part, source in versions.items() if source.recipe == key}
        else:
            pending[key] = stage.depth if below is None else below
            digests = {part: content_id("to come", {"recipe": key, "part": part}) for part in produced(stage)}
            new = {part: Source(None, digest, key) for part, digest in digests.items()}
        if key in replaced and not repeated and plan.next_window(stage) is not None:
            # By then its record is there and its weights are not: a path without a file says so to `lost_weights`.
            nowhere = str(plan.store.path / "stages" / "replaced" / key)
            new = {part: Source(nowhere, source.digest, key) for part, source in new.items()}
        versions |= new


def _committed(plan: Plan, recipe: str, *, check: bool) -> tuple[CommittedStage | None, str | None]:
    """A committed stage, or what is wrong with it."""
    try:
        return plan.store.stage(recipe, check=check), None
    except DamageError as error:
        return None, error.message


def lost_weights(plan: Plan, stage: Stage, versions: Versions) -> set[str]:
    """Recipes of committed stages whose weights training this one needs, and which a later window's replaced."""
    if plan.config.windows == 1:
        return set()
    names = {start(stage, part) for part in stage.holds if part not in stage.fresh}
    names |= {start(stage, state) for state in stage.states_in}
    if stage.reads_boundary and plan.config.model.tie_embeddings:
        names.add(FRONT)
    rowsets = [stage.rowset]
    if plan.evaluates(stage) or plan.writes_held_out(stage):
        rowsets.append(HELD_OUT)
    for number in rowsets:
        at = stage
        while at.reads_boundary and plan.boundary(at, versions, number) is None:
            at = stage_below(plan.stages, at)  # it makes the boundary once more
            names.update(at.forward_parts)
    return pruned(versions[name] for name in names if name in versions)


def forward_flops(config: StackWiseConfig, stage: Stage) -> float:
    """FLOPs of taking a row through a stage's blocks: two a parameter and token, and the attention's two products."""
    model, positions = config.model, config.row_positions
    blocks = range(stage.first, stage.last + 1)
    matrices = model.total(lambda block: block.active_parameters, blocks)
    return float(2 * matrices * positions + len(blocks) * 4 * positions * positions * model.heads_width)


class TrafficMeter:
    """Goes along with a walk through the schedule, and says what each stage that trains moves.

    The boundaries below the first of them that are to be stored count as there.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._present: set[tuple[int, int]] | None = None  # by the block above it, and its rowset
        self._total = Traffic()

    def train(self, stage: Stage) -> Traffic:
        """What training a stage moves, and writing the boundary above it where it does."""
        plan, self._total = self._plan, Traffic()
        if self._present is None:
            self._present = {(below.first, below.rowset) for below in plan.stages[: stage.place + 1]}
        if stage.reads_boundary:
            self._read_to_train(stage)
        above = plan.following(stage)
        if above is not None and plan.writes_above(stage):
            self._make(above, stage.rowset)
        return self._total

    def _read_to_train(self, stage: Stage) -> None:
        plan, number = self._plan, stage.rowset
        rows, seen = plan.rowset(number)[1], float(plan.rows_seen(stage))
        base, recomputed = plan.base(stage)
        self._make(base, number)
        if base is stage:
            self._read(base, seen)
        elif plan.fuses_passes(stage):
            self._pass(base, recomputed, rows)
            self._read(stage, max(0.0, seen - rows))
            self._write(stage, number)
        else:
            self._pass(base, recomputed, seen)

    def _make(self, stage: Stage | None, number: int) -> None:
        """Let the boundary that enters a stage be there."""
        assert self._present is not None
        if stage is None or (stage.first, number) in self._present:
            return
        below = stage_below(self._plan.stages, stage)
        base, recomputed = self._plan.base(below, train=False)
        self._make(base, number)
        self._pass(base, (*recomputed, below), self._plan.rowset(number)[1])
        self._write(stage, number)

    def _pass(self, base: Stage | None, stages: Sequence[Stage], rows: float) -> None:
        """Rows are read from a boundary (None: tokens) and go through stages."""
        self._read(base, rows)
        self._total.flops += rows * sum(forward_flops(self._plan.config, stage) for stage in stages)

    def _read(self, stage: Stage | None, rows: float) -> None:
        self._total.read += rows * boundary_bytes(self._plan.config, 1) if stage is not None else 0.0

    def _write(self, stage: Stage, number: int) -> None:
        assert self._present is not None
        self._total.written += boundary_bytes(self._plan.config, self._plan.rowset(number)[1])
        self._present.add((stage.first, number))


def moved_store(history: History, store: Path, decisions: Iterable[Decision]) -> str | None:
    """That committed stages are about to be trained again since their store is elsewhere; None: none is."""
    moved = history.moved(store)
    stages = [d.stage.label for d in decisions if d.action == "train" and history.was_committed(d.stage)]
    if moved is None or not stages:
        return None
    return (
        f"{moved}. Where that store is elsewhere now, name its place with store.path (-o store.path=DIR); else what "
        f"was committed is trained again: stage {', '.join(stages)}"
    )


def traffic_of(decisions: Iterable[Decision]) -> Traffic:
    """What all of them move together."""
    return sum((decision.traffic for decision in decisions), Traffic())


def separate_traffic(plan: Plan, decisions: Iterable[Decision]) -> Traffic:
    """What they would move with every boundary stored, each written by a pass of its own: the default."""
    default = copy.copy(plan)
    default.config = plan.config.model_copy(deep=True)
    default.config.store.every, default.config.store.fuse_passes = 1, False
    default.config.training.progressive.cache_activations = True
    meter = TrafficMeter(default)
    return sum((meter.train(decision.stage) for decision in decisions), Traffic())
