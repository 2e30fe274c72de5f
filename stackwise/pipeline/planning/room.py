"""Does a run fit? Disk for boundaries, weights and checkpoints; memory for the largest stage. Asked before it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import psutil

from stackwise.errors import NoSpaceError, UsageError
from stackwise.pipeline.fit import (
    WEIGHT_BYTES,
    committed_bytes,
    in_bytes,
    part_parameters,
    stage_memory,
    state_bytes,
    swap_of,
    trained_parameters,
)
from stackwise.pipeline.planning.plan import Plan
from stackwise.pipeline.planning.traffic import separate_traffic, traffic
from stackwise.pipeline.recipe import WINDOW_CHUNKS, boundary_bytes, order_rows, whole_boundary
from stackwise.pipeline.schedule import Stage


def below_memory(plan: Plan, stage: Stage) -> int:
    """About the bytes that committed stages take below one in training, where it computes its boundary on demand.

    Their weights alone; what a forward pass has in hand; the rows of the window in hand and of the next.
    """
    below = plan.base(stage)[1]
    if not below:
        return 0
    config, model = plan.config, plan.config.model
    parts = [(part, one) for one in below for part in one.forward_parts]
    weights = WEIGHT_BYTES * sum(part_parameters(config, plan.vocabulary.size, part, one) for part, one in parts)
    positions, size = config.row_positions, 4 if config.precision == "fp32" else 2
    in_hand = max(1, 8192 // config.training.seq_len) * positions * (4 * model.d_model + 3 * model.ffn_width) * size
    rows = plan.rowset(stage.rowset)[1]
    window = min(rows, 2 * WINDOW_CHUNKS * order_rows(config, rows)) * positions * model.d_model * size
    return weights + in_hand + window


def check_fit(plan: Plan, todo: list[Stage], disk: Path) -> dict[str, Any]:
    """What the stages in `todo` need and what is there.

    Args:
        plan: The plan.
        todo: The stages that are not committed.
        disk: Where the store is, or will be.

    Returns:
        `disk_needed`, `disk_free`, `memory_needed`, `memory_total`, in bytes; `swapped`: the groups by stage;
        `tight`: bytes that a stage takes where even swapped it takes more than it may;
        `traffic`: bytes of boundaries that are `read` and `written`, and `flops` of forward passes beside training;
        `separate`: the same with every boundary stored, each by a pass of its own.

    Raises:
        NoSpaceError: The disk is too small, or `store.max_bytes` is.
        UsageError: The largest stage's weights, gradients and moments alone exceed the memory.
    """
    config, size = plan.config, plan.vocabulary.size
    kept = [stage for stage in todo if stage.reads_boundary or plan.writes_above(stage)] if config.windows > 1 else todo
    rows = max((plan.rowset(stage.rowset)[1] for stage in kept), default=0)
    boundary = boundary_bytes(config, rows)
    reading = sum(plan.keeps(stage) for stage in {stage.depth: stage for stage in plan.stages}.values())
    live = (
        min(reading, 2 if config.store.keep == "none" else 2 + int(config.store.keep))
        if config.store.keep != "all"
        else reading
    )
    present = sum(info.disk_bytes for info in plan.store.boundaries())
    boundaries = max(0, boundary * live - present) if todo else 0
    weights = sum(trained_parameters(config, size, stage) for stage in todo) * WEIGHT_BYTES
    allowed = config.store.max_bytes
    if todo and config.windows > 1:
        weights = committed_bytes(config, size, plan.drawn(todo[0]))
        allowed = None if allowed is None else max(0, allowed - weights)
        boundary = whole_boundary(config, rows)
    total = psutil.virtual_memory().total
    limit = min(plan.memory or total, config.training.memory or total)
    swaps = {stage.depth: swap_of(config, size, stage, plan.memory or total) for stage in todo}
    swapped = {depth: swap for depth, swap in swaps.items() if swap is not None}
    resident = [stage for stage in todo if stage.depth not in swapped]
    # One more than are kept is written before the oldest goes.
    checkpoints = max(
        3 * max((state_bytes(config, size, stage, gradients=False) for stage in resident), default=0),
        max((swap.disk for swap in swapped.values()), default=0),
    )
    needed = boundaries + weights + checkpoints
    free = shutil.disk_usage(next(path for path in (disk.absolute(), *disk.absolute().parents) if path.exists())).free
    taken = [stage_memory(config, size, stage) + below_memory(plan, stage) for stage in resident]
    taken += [swapped[stage.depth].memory + below_memory(plan, stage) for stage in todo if stage.depth in swapped]
    state = max((state_bytes(config, size, stage, gradients=True) for stage in resident), default=0)
    if needed > free:
        raise NoSpaceError(
            f"the run needs {in_bytes(needed)} of disk ({in_bytes(boundaries)} of them boundaries) and "
            f"{disk} has {in_bytes(free)} free",
            hint="lower training.rows or training.steps, set store.keep: none or training.windows, or name a larger "
            "disk with store.path",
        )
    if todo and config.store.max_bytes is not None and allowed is not None and boundary * min(live, 2) > allowed:
        beside = f" beside {in_bytes(weights)} of committed stages" if config.windows > 1 else ""
        raise NoSpaceError(
            f"store.max_bytes is {in_bytes(config.store.max_bytes)}, and two boundaries of {in_bytes(boundary)} "
            f"live at once{beside}",
            hint="raise store.max_bytes, set training.windows: auto, or lower training.rows or training.steps",
        )
    if plan.device == "cpu" and state > total:
        raise UsageError(
            f"the largest stage takes {in_bytes(state)} for weights, gradients and moments alone; "
            f"this machine has {in_bytes(total)} of memory",
            hint="lower training.block_size, or set training.swap: auto",
        )
    return {
        "disk_needed": needed,
        "disk_free": free,
        "memory_needed": max(taken, default=0),
        "memory_total": total,
        "swapped": {depth: swap.groups for depth, swap in swapped.items()},
        "tight": {depth: swap.memory for depth, swap in swapped.items() if swap.memory > limit},
        "boundary": boundary,
        "traffic": traffic(plan, todo).plain(),
        "separate": separate_traffic(plan, todo).plain(),
    }
