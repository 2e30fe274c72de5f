"""Does it fit? Disk for boundaries, weights and checkpoints; memory for the largest stage. Asked before a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import psutil

from stackwise.config import StackWiseConfig
from stackwise.errors import NoSpaceError, UsageError
from stackwise.pipeline.plan import Plan
from stackwise.pipeline.recipe import WINDOW_CHUNKS, boundary_bytes, order_rows
from stackwise.pipeline.schedule import FRONT, HEAD, Stage
from stackwise.pipeline.traffic import separate_traffic, traffic

WEIGHT_BYTES = 4
MOMENT_BYTES = {"adamw": 8, "muon": 4, "adamw8bit": 2}
"""Of a parameter's optimizer state; muon's is that of a block's matrices."""


LOSS_BYTES = 3 * (32 << 20)
"""Of the loss: a slice of logits, its gradient and what makes it."""


def part_parameters(config: StackWiseConfig, vocab_size: int, part: str, stage: Stage) -> int:
    """Parameters of a part of a stage."""
    model = config.model
    if part == FRONT:
        positions = (model.max_seq_len or config.training.seq_len) if model.positions == "learned" else 0
        return (vocab_size + positions) * model.d_model + model.time_parameters
    if part == HEAD:
        shared = model.tie_embeddings and (not stage.reads_boundary or config.training.tied_head == "frozen")
        return model.d_model + (0 if shared else vocab_size * model.d_model)
    return model.block_parameters


def stage_parameters(config: StackWiseConfig, vocab_size: int, stage: Stage) -> int:
    """Parameters that a stage holds."""
    return sum(part_parameters(config, vocab_size, part, stage) for part in stage.holds)


def state_bytes(config: StackWiseConfig, vocab_size: int, stage: Stage, *, gradients: bool) -> int:
    """Bytes of a stage's weights and optimizer state (what a checkpoint holds), with or without their gradients."""
    settings = config.stage_training(stage.depth)
    whole = stage_parameters(config, vocab_size, stage)
    blocks = (stage.last - stage.first + 1) * config.model.block_parameters
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
    model, own = config.model, stage.last - stage.first + 1
    kv = model.kv_heads * model.head_dim
    inner = (4 if model.ffn == "swiglu" else 2) * model.ffn_width
    numbers = 8 * model.d_model + 2 * kv + inner
    half = config.precision in ("bf16", "fp16")
    blocks = own if blocks is None else blocks
    state = state_bytes(config, vocab_size, stage, gradients=True)
    state -= round(
        (own - blocks) * state / max(1, stage_parameters(config, vocab_size, stage)) * model.block_parameters
    )
    blocks += len(stage.beyond)
    copies = 2 * blocks * model.block_parameters if half else 0
    return state + copies + LOSS_BYTES, config.row_positions * blocks * numbers * (2 if half else 4)


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
        `disk_needed`, `disk_free`, `memory_needed`, `memory_total`, in bytes; `traffic`: bytes of boundaries that are
        `read` and `written`, and `flops` of forward passes beside training; `separate`: the same with every boundary
        stored, each by a pass of its own.

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
    weights = sum(stage_parameters(config, size, stage) for stage in todo) * WEIGHT_BYTES
    # One more than are kept is written before the oldest goes.
    checkpoints = 3 * max((state_bytes(config, size, stage, gradients=False) for stage in todo), default=0)
    needed = boundaries + weights + checkpoints
    free = shutil.disk_usage(next(path for path in (disk.absolute(), *disk.absolute().parents) if path.exists())).free
    memory = max((stage_memory(config, size, stage) + below_memory(plan, stage) for stage in todo), default=0)
    state = max((state_bytes(config, size, stage, gradients=True) for stage in todo), default=0)
    total = psutil.virtual_memory().total
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
            hint="lower training.block_size",
        )
    return {
        "disk_needed": needed,
        "disk_free": free,
        "memory_needed": memory,
        "memory_total": total,
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
