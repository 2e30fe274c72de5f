"""What a run takes, asked before it: disk for boundaries, weights and checkpoints; memory; how many windows fit.

And what to change after a stage ran out of memory all the same.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stackwise.config import AUTO, StackWiseConfig
from stackwise.config.fields import changed
from stackwise.data import PreparedData
from stackwise.errors import NoSpaceError, UsageError
from stackwise.host import host_total
from stackwise.identity import content_id
from stackwise.pipeline.decisions import Decision, separate_traffic, traffic_of
from stackwise.pipeline.device import check_free
from stackwise.pipeline.division import GROUP_CHUNKS, disks, groups_of
from stackwise.pipeline.estimate import (
    RECORD_BYTES,
    WEIGHT_BYTES,
    WIDE,
    Estimate,
    committed_bytes,
    kind_of,
    recompute_blocks,
)
from stackwise.pipeline.plan import Plan, check_data
from stackwise.pipeline.recipe import SHUFFLED_CHUNKS, boundary_bytes, order_rows, stage_steps, whole_boundary
from stackwise.pipeline.rows import HELD_OUT, choose_samples, drawn_rows
from stackwise.pipeline.schedule import HEAD, Stage, schedule
from stackwise.words import size as in_bytes

KEY = "training.windows"


def below_memory(plan: Plan, stage: Stage) -> int:
    """About the bytes that committed stages take below one in training, where it computes its boundary on demand.

    Their weights alone; what a forward pass has in hand; the rows of the shuffle window in hand and of the next.
    """
    below = plan.base(stage)[1]
    if not below:
        return 0
    config, model = plan.config, plan.config.model
    parts = [(part, other) for other in below for part in other.forward_parts]
    weights = sum(Estimate(config, plan.vocabulary.size, other).parameters(part) for part, other in parts)
    positions, size = config.row_positions, 4 if config.precision in WIDE else 2
    # Of each position a few vectors of the stream, and at most what the feed-forward would keep for a backward pass.
    by_block = [model.at(block) for stage in below for block in range(stage.first, stage.last + 1)]
    numbers = 4 * model.d_model + max(block.ffn.kept(block) for block in by_block)
    in_hand = max(1, 8192 // config.training.seq_len) * positions * numbers * size
    rows = plan.rowset(stage.rowset)[1]
    groups = groups_of(config, stage.rowset)
    windows, group_rows = (SHUFFLED_CHUNKS, rows) if groups == 1 else (GROUP_CHUNKS, -(-rows // groups))
    windows *= max(1, groups // config.parallel.shares)  # as many as a rank has groups are open at once
    shuffled = min(rows, 2 * windows * order_rows(config, group_rows)) * positions * model.d_model * size
    return WEIGHT_BYTES * weights + in_hand + shuffled


def check_fit(plan: Plan, decisions: Sequence[Decision], disk: Path) -> dict[str, Any]:
    """What the stages that train (`decisions`) need, and what is there; `disk` is where the store is or will be.

    Returns:
        `disk_needed`, `disk_free`, `memory_needed` (the estimate of the largest stage), `memory_total`, in bytes;
        `swapped`: the groups by stage; `tight`: bytes of a stage that even swapped takes more than it may;
        `past_cache`: bytes of disk of a stage whose files are more than the page cache can keep;
        `traffic`: bytes of boundaries that are `read` and `written`, and `flops` of forward passes beside training;
        `separate`: the same with every boundary stored, each by a pass of its own.

    Raises:
        NoSpaceError: The disk is too small, or `store.max_bytes` is.
        BusyError: Other processes hold so much of the GPU that the largest stage does not fit beside them.
        UsageError: On a CPU, a stage takes more than the machine has, with its blocks in turn where they may be.
    """
    config, size, todo = plan.config, plan.vocabulary.size, [decision.stage for decision in decisions]
    estimates = [Estimate(config, size, stage, kind_of(plan.device)) for stage in todo]
    # Rows in windows: those of one window, of the stages whose boundaries are stored.
    kept = [stage for stage in todo if stage.reads_boundary or plan.writes_above(stage)] if config.windows > 1 else todo
    rows = -(-max((plan.rowset(stage.rowset)[1] for stage in kept), default=0) // disks(config))
    boundary, keep = boundary_bytes(config, rows), config.store.keep
    reading = sum(plan.stores(stage) for stage in {stage.depth: stage for stage in plan.stages}.values())
    live = _at_once(reading, keep)
    present = sum(info.disk_bytes for info in plan.store.boundaries())
    boundaries = max(0, boundary * live - present) if todo else 0
    weights = sum(estimate.trained_parameters for estimate in estimates) * WEIGHT_BYTES
    allowed = config.store.max_bytes
    if todo and config.windows > 1:
        weights = committed_bytes(config, size, plan.drawn(todo[0]))
        allowed = None if allowed is None else max(0, allowed - weights)
        boundary = whole_boundary(config, rows)
    total = host_total()
    limit = min(plan.memory or total, config.training.memory or total)
    swaps = {estimate.stage.depth: estimate.swap(plan.memory or total, total) for estimate in estimates}
    swapped = {depth: swap for depth, swap in swaps.items() if swap is not None}
    resident = [estimate for estimate in estimates if estimate.stage.depth not in swapped]
    # One more than are kept is written before the oldest goes.
    checkpoints = max(
        3 * max((estimate.state_bytes(gradients=False) for estimate in resident), default=0),
        max((swap.disk for swap in swapped.values()), default=0),
    )
    needed = boundaries + weights + checkpoints
    free = shutil.disk_usage(next(path for path in (disk.absolute(), *disk.absolute().parents) if path.exists())).free
    lines = [
        (estimate.memory if (swap := swaps[estimate.stage.depth]) is None else swap.memory)
        + below_memory(plan, estimate.stage)
        for estimate in estimates
    ]
    state = max((estimate.state_bytes(gradients=True) for estimate in resident), default=0)
    if needed > free:
        # What takes most decides what helps.
        most = max(boundaries, weights, checkpoints)
        if most == boundaries:
            ways = _smaller_boundaries(plan, estimates, boundaries, free - checkpoints)
        elif most == weights:
            heads = (len(estimates) - 1) * WEIGHT_BYTES * estimates[-1].parameters(HEAD)
            less = [f"take larger stages (training.mode.block_size): {in_bytes(heads)} are heads"]
            ways = less if needed - heads <= free else []
        else:
            ways = ["take smaller stages (training.mode.block_size)"]
        raise NoSpaceError(
            f"the run needs {in_bytes(needed)} of disk (boundaries {in_bytes(boundaries)}, committed weights "
            f"{in_bytes(weights)}, checkpoints {in_bytes(checkpoints)}) and {disk} has {in_bytes(free)} free",
            hint="; ".join([*ways, "name a larger disk with store.path"]),
        )
    if todo and config.store.max_bytes is not None and allowed is not None and boundary * min(live, 2) > allowed:
        beside = f" beside {in_bytes(weights)} of committed stages" if config.windows > 1 else ""
        raise NoSpaceError(
            f"store.max_bytes is {in_bytes(config.store.max_bytes)}, and two boundaries of {in_bytes(boundary)} "
            f"live at once{beside}",
            hint="raise store.max_bytes, set training.windows: auto, or lower training.rows or training.steps",
        )
    device = config.device if config.device.startswith("cuda") else plan.device
    needs = max(lines, default=0)
    check_free(device, needs)
    state *= config.parallel.data
    if plan.device == "cpu" and state > total:
        raise UsageError(
            f"the largest stage takes {in_bytes(state)} for weights, gradients and moments alone; "
            f"this machine has {in_bytes(total)} of memory",
            hint="lower training.block_size, or set training.swap: auto",
        )
    # A GPU that is full ends the step with a line; a machine that is full ends other programs, without a word.
    if plan.device == "cpu" and needs > total:
        largest = estimates[lines.index(needs)]
        raise UsageError(
            f"stage {largest.stage.depth} takes about {in_bytes(needs)} of memory, and this machine has "
            f"{in_bytes(total)}",
            hint=oom_advice(largest, {"limit": total, "base": below_memory(plan, largest.stage)}),
        )
    return {
        "disk_needed": needed,
        "disk_free": free,
        "memory_needed": needs,
        "memory_total": total,
        "swapped": {depth: swap.groups for depth, swap in swapped.items()},
        "past_cache": {depth: swap.disk for depth, swap in swapped.items() if swap.direct},
        "tight": {depth: swap.memory for depth, swap in swapped.items() if swap.memory > limit},
        "boundary": boundary,
        "traffic": traffic_of(decisions).plain(),
        "separate": separate_traffic(plan, decisions).plain(),
    }


def _smaller_boundaries(plan: Plan, estimates: Sequence[Estimate], boundaries: int, free: int) -> list[str]:
    """What makes the boundaries of a run smaller, each change with the bytes that they then take.

    Args:
        boundaries: Bytes of those that live at once.
        free: Bytes of the disk for them and for committed weights.
    """
    config, ways, stages = plan.config, list[str](), {stage.depth: stage for stage in plan.stages}.values()
    if config.has_windows and config.windows == 1:
        room = free - committed_bytes(config, plan.vocabulary.size, plan.drawn(plan.stages[0]), windows=2)
        if room > 0:
            windows = max(2, math.ceil(boundaries / room))
            ways.append(f"training.windows: {windows} leaves {in_bytes(boundaries / windows)} of boundaries")
    rows = boundaries / max(1, boundary_bytes(config, 1))
    for key, value in (("keep", "none"), ("codec", "int8"), ("every", 2)):
        other = config.model_copy(deep=True)
        setattr(other.store, key, value)
        stored = [sum(s.reads_boundary and one.stores_boundary(s.depth) for s in stages) for one in (config, other)]
        alive = [_at_once(count, one.store.keep) for count, one in zip(stored, (config, other), strict=True)]
        left = rows * boundary_bytes(other, 1) * alive[1] / max(1, alive[0])
        if left < 0.98 * boundaries:
            ways.append(f"store.{key}: {value} leaves {in_bytes(left)}")
    if config.training.grown is None and len(estimates) > 1:
        ways.append("training.growth stores none")
    return [*ways, "lower training.rows or training.steps"]


def _at_once(stored: int, keep: int | str) -> int:
    """Boundaries that live at once: at a handoff two, one that is read and one that is written; and those kept."""
    return stored if keep == "all" else min(stored, 2 if keep == "none" else 2 + int(keep))


def planned_notes(plan: Plan, swapped: Collection[int] | None) -> list[str]:
    """One line for each setting that was given and that the plan cannot use whole.

    Args:
        swapped: The stages that are swapped; None: none is to be trained.
    """
    training, lines = plan.config.training, []
    rows = plan.drawn(plan.stages[0])
    if training.rows is not None and training.rows > rows:
        lines.append(f"training.rows: {training.rows} is more than the corpus gives: {rows} is used")
    stages = {stage.depth: plan.config.stage_training(stage.depth) for stage in plan.stages}
    late = [str(depth) for depth, one in stages.items() if one.clip_by == "last" and one.grad_clip]
    if late:
        lines.append(
            f"training.clip_by is last (stages {', '.join(late)}): the clipped gradient is not exact, as a step is "
            "clipped by the norm of the one before"
        )
    recomputed = [str(depth) for depth in sorted(swapped or ()) if stages[depth].activation_checkpointing]
    if recomputed and training.swap == "auto":
        lines.append(
            f"training.activation_checkpointing is unused in swapped stages ({', '.join(recomputed)}): what does not "
            "wait in memory is recomputed there anyway"
        )
    if swapped is not None and not swapped and training.swap == "auto":
        unused = [key for key in ("swap_parts", "swap_experts") if key in changed(training)]
        lines += [f"training.{key} is unused: no stage is swapped (training.swap is auto)" for key in unused]
    return lines


def settle_windows(config: StackWiseConfig, data: PreparedData, record: dict[str, Any]) -> list[str]:
    """Find `training.windows: auto`: the fewest whose boundaries fit into `store.max_bytes` beside committed stages.

    Args:
        record: What `auto` came to before, by key; the number is added. It is kept as long as it fits: a budget that
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
    before = record.get(KEY, {})
    windows = int(before["windows"]) if before.get("conditions") == conditions else 0
    how = ", as found before"
    if not windows or takes(windows) > limit:
        windows, how = next((number for number in range(1, most + 1) if takes(number) <= limit), 0), ""
    if not windows:
        least = min(range(1, most + 1), key=takes)
        raise NoSpaceError(
            f"{KEY}: auto: no windows fit into store.max_bytes {in_bytes(limit)}: with {least} of them, boundaries and "
            f"committed stages take {in_bytes(takes(least))}",
            hint=f"raise store.max_bytes to {takes(least)} or more",
        )
    config.training.windows = windows
    record[KEY] = {"conditions": conditions, "windows": windows}
    return [f"{KEY}: auto is {windows}{how}; at most {in_bytes(takes(windows))} in the store"]


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
    read = sum(stage.reads_boundary and config.stores_boundary(stage.depth) for stage in stages)
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
    state = Estimate(config, size, stage).state_bytes(gradients=False)
    present = int(plan.store.usage()["stages"]) + state + RECORD_BYTES
    return max(0, limit - max(present, committed_bytes(config, size, plan.drawn(stage))))


SAFETY = 0.9  # share of the memory that what is proposed after a failure may take

GROWTH = 1.5
"""What grows with the batch beside what the estimate counts: the backward pass's own buffers, batches read ahead."""


def oom_advice(estimate: Estimate, measured: dict[str, Any] | None) -> str:
    """What to change after running out of memory, in a line: each of the changes is enough alone.

    What a stage takes is a fixed part (its state, and what the process held before it) and one that grows linearly
    with batch_size and with seq_len. As the whole did not fit, the growing part is at least what the estimate leaves
    of the limit.

    Args:
        measured: `limit`, `base` (bytes held before the stage was built), `peak` and `what`; None: nothing was, half as
            much that grows is aimed at.
    """
    config, stage = estimate.config, estimate.stage
    settings = config.stage_training(stage.depth)
    fixed, row = estimate.memory_parts()
    row *= GROWTH
    if measured is not None:
        limit, base = measured["limit"], measured["base"]
        row = max(row, (limit - base - fixed) / settings.batch_size)
    else:  # as if everything had just not fit
        limit, base = (fixed + settings.batch_size * row / 2) / SAFETY, 0
    room = SAFETY * limit - base - fixed
    overrides = config.stages.get(stage.depth)
    overridden = overrides is not None and "batch_size" in overrides.training.model_fields_set
    changes = []
    if batch := _divisor(settings.batch_size, room / row):
        times = settings.batch_size // batch
        key = f"stages.{stage.depth}.training" if overridden else "training"
        changes.append(
            f"{key}.batch_size: {settings.batch_size} → {batch} (with accumulation: {settings.accumulation} → "
            f"{settings.accumulation * times} the step stays the same)"
        )
    length = config.training.seq_len
    if shorter := _divisor(length, length * room / (row * settings.batch_size)):
        changes.append(f"training.seq_len: {length} → {shorter}")
    if not settings.activation_checkpointing and settings.meta is None:
        again = config.model_copy(deep=True)
        recompute_blocks(again)
        fixed_then, row_then = replace(estimate, config=again).memory_parts()
        if fixed_then + settings.batch_size * row_then * row / estimate.memory_parts()[1] <= SAFETY * limit - base:
            changes.append("training.activation_checkpointing: true")
    changes += _fewer_blocks(estimate, row * settings.batch_size, SAFETY * limit - base)
    peak = ""
    if measured is not None and measured.get("peak"):
        peak = f" (it held {in_bytes(measured['peak'])} of {in_bytes(measured['limit'])} of {measured['what']})"
    if not changes:
        return f"neither a smaller batch_size, seq_len nor block_size fits: lower model.d_model{peak}"
    return f"change {', or '.join(changes)}{peak}"


def _fewer_blocks(estimate: Estimate, growing: float, room: float) -> list[str]:
    """The stage with fewer blocks, where that is enough."""
    config, blocks = estimate.config, estimate.stage.last - estimate.stage.first + 1
    (ends, _), (whole, _) = estimate.memory_parts(0), estimate.memory_parts()
    one = (whole - ends + growing) / blocks
    fewer = min(blocks - 1, math.floor((room - ends) / one))
    if fewer < 1:
        return []
    if (stages := getattr(config.training.plan, "n_stages", None)) is not None:
        return [f"training.n_stages: {stages} → {math.ceil(config.model.n_blocks / fewer)}"]
    if config.n_stages == 1:
        return [f"training.mode: blockwise with training.block_size: {fewer}"]
    return [f"training.block_size: {blocks} → {fewer}"]


def _divisor(whole: int, most: float) -> int:
    """The largest proper divisor of `whole` that is not more than `most`; 0 where there is none."""
    return max((d for d in range(1, whole // 2 + 1) if whole % d == 0 and d <= most), default=0)
