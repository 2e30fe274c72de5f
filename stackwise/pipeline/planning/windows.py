"""Windows of the corpus: how many a budget of bytes asks for, what they take, what a later one makes superfluous."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from stackwise.config import AUTO, StackWiseConfig
from stackwise.data import PreparedData
from stackwise.errors import NoSpaceError
from stackwise.identity import content_id
from stackwise.pipeline.fit import RECORD_BYTES, committed_bytes, in_bytes, state_bytes
from stackwise.pipeline.job import Versions, pruned, start
from stackwise.pipeline.planning.plan import Plan
from stackwise.pipeline.planning.vocabulary import check_data
from stackwise.pipeline.recipe import boundary_bytes, stage_steps, whole_boundary
from stackwise.pipeline.rows import HELD_OUT, choose_samples, drawn_rows
from stackwise.pipeline.schedule import FRONT, Stage, schedule, stage_below
from stackwise.store import CommittedStage

KEY = "training.windows"


def settle_windows(config: StackWiseConfig, data: PreparedData, known: dict[str, Any]) -> list[str]:
    """Find `training.windows: auto`: the fewest whose boundaries fit into `store.max_bytes` beside committed stages.

    Args:
        config: The configuration, batches settled.
        data: The prepared data.
        known: What `auto` came to before, by key; what is found is added. It is kept as long as it fits: a budget that
            grows is no reason to train anew.

    Returns:
        Lines for people.

    Raises:
        NoSpaceError: Not even the smallest windows fit.
    """
    if config.training.windows != AUTO or not config.has_windows:
        return []
    vocab_size = check_data(config, data).size
    drawn = drawn_rows(config, data.train, 0)
    limit = config.store.max_bytes
    assert limit is not None, "checked with the configuration"
    samples = math.ceil(drawn / config.training.masks_per_sample)
    windowed = {stage.depth for stage in schedule(config) if stage.reads_boundary or stage.depth < config.n_sections}
    most = min(samples, *(stage_steps(config, depth, drawn) for depth in windowed))
    beside = _held_out_bytes(config, data)

    def takes(windows: int) -> int:
        committed = committed_bytes(config, vocab_size, drawn, windows=windows)
        return _window_bytes(config, drawn, windows) + beside + committed

    conditions = content_id("windows", {"rows": drawn, "boundary": boundary_bytes(config, drawn), "most": most})
    before = known.get(KEY, {})
    found = int(before["windows"]) if before.get("conditions") == conditions else 0
    how = ", as found before"
    if not found or takes(found) > limit:
        found, how = next((windows for windows in range(1, most + 1) if takes(windows) <= limit), 0), ""
    if not found:
        least = min(range(1, most + 1), key=takes)
        raise NoSpaceError(
            f"{KEY}: auto: no windows fit into store.max_bytes {in_bytes(limit)}: with {least} of them, boundaries and "
            f"committed stages take {in_bytes(takes(least))}",
            hint=f"raise store.max_bytes to {takes(least)} or more",
        )
    config.training.windows = found
    known[KEY] = {"conditions": conditions, "windows": found}
    return [f"{KEY}: auto is {found}{how}; at most {in_bytes(takes(found))} in the store"]


def boundaries_bytes(plan: Plan) -> int:
    """Bytes that the boundaries of a plan in windows take at most."""
    config, drawn = plan.config, plan.drawn(plan.stages[0])
    return _window_bytes(config, drawn, config.windows) + _held_out_bytes(config, plan.data)


def _window_bytes(config: StackWiseConfig, drawn: int, windows: int) -> int:
    per_sample = config.training.masks_per_sample
    rows = math.ceil(math.ceil(drawn / per_sample) / windows) * per_sample
    return _alive(config) * whole_boundary(config, rows)


def _held_out_bytes(config: StackWiseConfig, data: PreparedData) -> int:
    if not any(config.stage_training(depth).eval_every for depth in range(config.n_stages)):
        return 0
    return _alive(config) * whole_boundary(config, len(choose_samples(config, data.held_out, HELD_OUT)))


def _alive(config: StackWiseConfig) -> int:
    """Boundaries of one rowset that live at once: at a handoff two, and those that `store.keep` asks for by number."""
    stages = {stage.depth: stage for stage in schedule(config)}.values()
    read = sum(stage.reads_boundary and stage.depth % config.boundary_every == 0 for stage in stages)
    keep = config.store.keep
    return min(read, 2 + (keep if isinstance(keep, int) else 0))


def boundary_budget(plan: Plan, stage: Stage) -> int | None:
    """Bytes that boundaries may take while a stage trains; None: any number.

    With windows, `store.max_bytes` counts committed stages too: those that are there, and those to come.
    """
    config, limit = plan.config, plan.config.store.max_bytes
    if limit is None or config.windows == 1:
        return limit
    size = plan.vocabulary.size
    present = int(plan.store.usage()["stages"]) + state_bytes(config, size, stage, gradients=False) + RECORD_BYTES
    return max(0, limit - max(present, committed_bytes(config, size, plan.drawn(stage))))


def gone(plan: Plan, stage: Stage, versions: Versions, unsettled: Collection[str] = ()) -> set[str]:
    """The recipes of committed stages whose weights have given way to a later window's, and which training one needs.

    Args:
        plan: The plan.
        stage: The stage to train.
        versions: What is committed before it.
        unsettled: Names among these that stand for weights that will be made anew.
    """
    if plan.config.windows == 1:
        return set()
    names = {start(stage, part) for part in stage.holds if part not in stage.fresh} | {*stage.states_in}
    if stage.reads_boundary and plan.config.model.tie_embeddings:
        names.add(FRONT)
    rowsets = [stage.rowset]
    if plan.evaluates(stage) or plan.writes_held_out(stage):
        rowsets.append(HELD_OUT)
    for number in rowsets:
        at = stage
        while at.reads_boundary and ({*at.trunk} & {*unsettled} or plan.boundary(at, versions, number) is None):
            at = stage_below(plan.stages, at)
            names.update(at.forward_parts)
    return pruned(versions[name] for name in names if name in versions and name not in unsettled)


class Superseded:
    """Frees the weights and states of stages that a later window's have taken the place of; their records stay.

    Args:
        plan: The plan.
        run: The run, as it is registered with the store: what other runs refer to stays.
    """

    def __init__(self, plan: Plan, run: str) -> None:
        self._plan, self._run = plan, run
        self._files: dict[str, dict[str, Path]] = {}
        self.idle: dict[str, list[str]] = {}
        """Parts by recipe that no later stage of this run starts from."""

    def committed(self, stage: Stage, committed: CommittedStage, versions: Versions) -> None:
        """A stage is committed, or was: what no later one starts from has given way.

        Args:
            stage: The stage.
            committed: What it came to.
            versions: What is the newest by now.
        """
        if has_next_window(self._plan.stages, stage):
            self._files[committed.recipe] = {part: committed.path(part) for part in committed.parts}
        needed = {source.path for source in versions.values()}
        self.idle = {
            recipe: parts
            for recipe, files in self._files.items()
            if (parts := [part for part, path in files.items() if str(path) not in needed])
        }

    def prune(self) -> dict[str, int]:
        """Remove the files of what has given way, where no other run may still ask for them.

        Returns:
            By recipe, the bytes that were freed.
        """
        others = [refs for key, refs in self._plan.store.runs().items() if key != self._run] if self.idle else []

        def free(recipe: str, part: str) -> bool:
            # One that a kill left, though its record says that it is gone, goes now.
            asked_for = (
                part not in refs.get("idle", {}).get(recipe, ()) for refs in others if recipe in refs["recipes"]
            )
            return self._files[recipe][part].exists() and not any(asked_for)

        gives = {recipe: [part for part in parts if free(recipe, part)] for recipe, parts in self.idle.items()}
        return {recipe: self._plan.store.prune_stage(recipe, parts) for recipe, parts in gives.items() if parts}


def has_next_window(stages: Sequence[Stage], stage: Stage) -> bool:
    """Whether a stage of a schedule trains again, in a later window."""
    return any(later.depth == stage.depth for later in stages[stage.place + 1 :])
