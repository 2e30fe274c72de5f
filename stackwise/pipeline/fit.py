"""Does it fit? Disk for boundaries, weights and checkpoints; memory for the largest stage. Asked before a run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from stackwise.config import StackWiseConfig
from stackwise.config.precision import BITS, FORMATS
from stackwise.errors import NoSpaceError, UsageError
from stackwise.pipeline.holding import ADAPTER
from stackwise.pipeline.plan import Plan
from stackwise.pipeline.recipe import WINDOW_CHUNKS, boundary_bytes, order_rows
from stackwise.pipeline.schedule import FRONT, HEAD, Stage
from stackwise.pipeline.traffic import separate_traffic, traffic

WEIGHT_BYTES = 4
MOMENT_BYTES = {"adamw": 8, "muon": 4, "adamw8bit": 2}
"""Of a parameter's optimizer state; muon's is that of a block's matrices."""


LOSS_BYTES = 3 * (32 << 20)
"""Of the loss: a slice of logits, its gradient and what makes it."""

SHARE = 0.9
"""Of the memory: what a stage may take of it."""


def part_parameters(config: StackWiseConfig, vocab_size: int, part: str, stage: Stage) -> int:
    """Parameters of a part of a stage."""
    model = config.model
    if part.startswith(ADAPTER):
        sides = 6 * model.d_model + 2 * model.kv_heads * model.head_dim
        sides += (3 if model.ffn == "swiglu" else 2) * (model.d_model + model.ffn_width)
        return sides * sum(size.rank for size in stage.holding(part.removeprefix(ADAPTER)).adapters)
    if part == FRONT:
        positions = (model.max_seq_len or config.training.seq_len) if model.positions == "learned" else 0
        return (vocab_size + positions) * model.d_model + model.time_parameters
    if part == HEAD:
        shared = model.tie_embeddings and (FRONT in stage.trains or config.training.tied_head == "frozen")
        return model.d_model + (0 if shared else vocab_size * model.d_model)
    return model.block_parameters


def trained_parameters(config: StackWiseConfig, vocab_size: int, stage: Stage) -> int:
    """Parameters that a stage trains."""
    return sum(part_parameters(config, vocab_size, part, stage) for part in stage.trains)


def largest_phase(config: StackWiseConfig, vocab_size: int, stage: Stage) -> Stage:
    """Of a stage that unfreezes one section at a time, what it is with the largest of them; else the stage itself."""

    def takes(phase: Stage) -> int:
        return state_bytes(config, vocab_size, phase, gradients=True) + still_bytes(config, vocab_size, phase)

    return max((stage.unfreezing(*section) for section in stage.candidates), key=takes, default=stage)


def still_bytes(config: StackWiseConfig, vocab_size: int, stage: Stage) -> int:
    """Bytes of the weights that a stage holds and does not train; packed where they are in a narrow format."""
    found = 0.0
    for part in set(stage.holds) - set(stage.trains):
        form = FORMATS.get(stage.holding(part).precision)
        found += part_parameters(config, vocab_size, part, stage) * (BITS[form] / 8 if form else WEIGHT_BYTES)
    return round(found)


def state_bytes(config: StackWiseConfig, vocab_size: int, stage: Stage, *, gradients: bool) -> int:
    """Bytes of what a stage trains and its optimizer state (as a checkpoint holds them), with or without gradients."""
    stage, settings = largest_phase(config, vocab_size, stage), config.stage_training(stage.depth)
    whole = trained_parameters(config, vocab_size, stage)
    blocks = sum(part not in (FRONT, HEAD) and not part.startswith(ADAPTER) for part in stage.trains)
    blocks *= config.model.block_parameters
    moments = MOMENT_BYTES[settings.optimizer] * blocks
    moments += MOMENT_BYTES["adamw" if settings.optimizer == "muon" else settings.optimizer] * (whole - blocks)
    return (WEIGHT_BYTES * (1 + gradients + bool(settings.ema))) * whole + moments


def stage_memory(config: StackWiseConfig, vocab_size: int, stage: Stage) -> int:
    """About the bytes that training a stage takes: its state, and the activations of one microbatch.

    What a block keeps for its backward pass, in numbers a token, after Korthikanti et al. (arXiv 2205.05198, section
    4.1), without the attention matrix, which fused attention does not keep: two norms' inputs and outputs, queries,
    keys, values and the attention's output, and what lies inside the feed-forward. Autocast adds a 16-bit copy of
    every matrix in use. The loss keeps no logits beyond a slice.
    """
    fixed, row = memory_parts(config, vocab_size, stage)
    return int(fixed + config.stage_training(stage.depth).batch_size * row)


def memory_parts(
    config: StackWiseConfig, vocab_size: int, stage: Stage, *, blocks: int | None = None
) -> tuple[float, float]:
    """The terms of `stage_memory`: bytes whatever the batch is, and bytes of each of its rows.

    Args:
        config: The configuration.
        vocab_size: Ids that the model knows.
        stage: The stage.
        blocks: Blocks of the stage; None: its own.
    """
    stage = largest_phase(config, vocab_size, stage)
    model, own = config.model, stage.last - stage.first + 1
    numbers = block_numbers(config)
    half = config.precision in ("bf16", "fp16")
    blocks = own if blocks is None else blocks
    state = state_bytes(config, vocab_size, stage, gradients=True)
    state -= round(
        (own - blocks) * state / max(1, trained_parameters(config, vocab_size, stage)) * model.block_parameters
    )
    blocks += len(stage.beyond)
    copies = 2 * blocks * model.block_parameters if half else 0
    state += still_bytes(config, vocab_size, stage)
    return state + copies + LOSS_BYTES, config.row_positions * blocks * numbers * (2 if half else 4)


def block_numbers(config: StackWiseConfig) -> int:
    """Numbers a token that a block keeps for its backward pass (see `stage_memory`).

    Latent attention keeps the rotary parts of queries, keys, values and output, the latents beside their norms, and a
    copy of the output; linear attention three times the width of the features, of queries, keys and what they make.
    """
    model = config.model
    inner = (4 if model.ffn == "swiglu" else 2) * model.ffn_width
    numbers = 8 * model.d_model + 2 * model.kv_heads * model.head_dim + inner
    if model.attention == "mla":
        numbers += (
            5 * model.n_heads * model.rotary_width + 2 * (model.latent_rank + (model.q_rank or 0)) + model.d_model
        )
    if model.attention == "linear":
        features = (model.random_features or model.head_dim) * model.n_heads if model.feature_map == "performer" else 0
        numbers += 3 * (model.d_model + features)
    return numbers


@dataclass(frozen=True)
class Swap:
    """How a stage that does not fit is swapped.

    Args:
        groups: Groups that its blocks take turns in.
        boundaries: Bytes of a step's boundaries that stay in memory.
        memory: About the bytes that it takes, boundaries included.
        disk: About the bytes of disk: weights, moments and gradients, and what is left of a step's boundaries.
    """

    groups: int
    boundaries: int
    memory: int
    disk: int


def swap_of(config: StackWiseConfig, vocab_size: int, stage: Stage, memory: int) -> Swap | None:
    """How a stage is swapped; None where it is resident. It decides nothing about the result.

    The largest of its groups is in memory three times over: one being written, one computing, one being read.

    Args:
        config: The configuration, `precision` resolved.
        vocab_size: Ids that the model knows.
        stage: The stage.
        memory: Bytes of the device, or on a CPU of the machine; `training.memory` comes before it.
    """
    stage = largest_phase(config, vocab_size, stage)
    training, settings = config.training, config.stage_training(stage.depth)
    limit = min(memory, training.memory or memory)
    fits = stage_memory(config, vocab_size, stage) <= SHARE * limit
    goes_back = settings.on_divergence == "rollback" or settings.keep_best  # which takes weights of earlier steps
    if training.swap == "never" or (training.swap == "auto" and (fits or goes_back)):
        return None
    block = config.model.block_parameters
    state = state_bytes(config, vocab_size, stage, gradients=True)
    each = state / trained_parameters(config, vocab_size, stage)
    ends = max(part_parameters(config, vocab_size, part, stage) for part in stage.holds if part in (FRONT, HEAD))
    most = len((*stage.blocks, *stage.beyond))
    copies = 0 if config.precision == "fp32" else 2 * block
    activations = settings.batch_size * memory_parts(config, vocab_size, stage)[1] / most + copies

    def taken(groups: int) -> int:
        blocks = -(-most // groups)
        return round(3 * each * max(ends, blocks * block) + blocks * activations) + LOSS_BYTES

    room = SHARE * limit - limit // 4
    groups = training.swap_parts or next((n for n in range(1, most) if taken(n) <= room), most)
    groups = min(groups, most)
    tokens = settings.batch_size * settings.accumulation * config.row_positions
    step = tokens * config.model.d_model * (4 if config.precision == "fp32" else 2) * (groups + 3)
    kept = min(limit // 4, step)
    return Swap(groups, limit // 4, taken(groups) + kept, state + round(each * max(ends, block)) + step - kept)


def below_memory(plan: Plan, stage: Stage) -> int:
    """About the bytes that committed stages take below one in training, where it computes its boundary on demand.

    Their weights alone; what a forward pass has in hand; the rows of the window in hand and of the next.
    """
    below = plan.base(stage)[1]
    if not below:
        return 0
    config, model = plan.config, plan.config.model
    parts = [(part, one) for one in below for part in one.hands_on]
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
        `traffic`: bytes of boundaries that are `read` and `written`, and `flops` of forward passes beside training;
        `separate`: the same with every boundary stored, each by a pass of its own.

    Raises:
        NoSpaceError: The disk is too small, or `store.max_bytes` is.
        UsageError: The largest stage's weights, gradients and moments alone exceed the memory.
    """
    config, size = plan.config, plan.vocabulary.size
    rows = max((plan.rowset(stage.rowset)[1] for stage in todo), default=0)
    boundary = boundary_bytes(config, rows)
    reading = sum(plan.keeps(stage) for stage in plan.stages)
    live = (
        min(reading, 2 if config.store.keep == "none" else 2 + int(config.store.keep))
        if config.store.keep != "all"
        else reading
    )
    present = sum(info.disk_bytes for info in plan.store.boundaries())
    boundaries = max(0, boundary * live - present) if todo else 0
    weights = sum(trained_parameters(config, size, stage) for stage in todo) * WEIGHT_BYTES
    total = psutil.virtual_memory().total
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
            hint="lower training.rows or training.steps, set store.keep: none, or name a larger disk with store.path",
        )
    if todo and config.store.max_bytes is not None and boundary * min(live, 2) > config.store.max_bytes:
        raise NoSpaceError(
            f"store.max_bytes is {in_bytes(config.store.max_bytes)}, and two boundaries of {in_bytes(boundary)} "
            "live at once",
            hint="raise store.max_bytes, or lower training.rows or training.steps",
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
        "boundary": boundary,
        "traffic": traffic(plan, todo).plain(),
        "separate": separate_traffic(plan, todo).plain(),
    }


def in_bytes(count: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
