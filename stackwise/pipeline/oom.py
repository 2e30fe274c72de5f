"""What to change after a stage ran out of memory."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from stackwise.pipeline.estimate import Estimate, recompute_blocks
from stackwise.words import size as in_bytes

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
