"""Out of memory: which of batch, sequence and stage size to change, and to what."""

from __future__ import annotations

import math
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.pipeline.fit import in_bytes, memory_parts
from stackwise.pipeline.schedule import Stage

SAFETY = 0.9
"""Share of the memory that what is proposed may take."""

GROWTH = 1.5
"""What grows with the batch beside what the estimate counts: the backward pass's own buffers, batches read ahead."""


def remedy(config: StackWiseConfig, vocab_size: int, stage: Stage, measured: dict[str, Any] | None) -> str:
    """What to change, in a line: each of the changes is enough alone.

    What a stage takes is a fixed part (its state, and what the process held before it) and one that grows linearly
    with batch_size and with seq_len. As the whole did not fit, the growing part is at least what the estimate leaves
    of the limit.

    Args:
        config: The configuration.
        vocab_size: Ids that the model knows.
        stage: The stage that ran out.
        measured: `limit`, `base` (bytes held before the stage was built), `peak` and `what`; None: nothing was, half as
            much that grows is aimed at.
    """
    settings = config.stage_training(stage.depth)
    fixed, row = memory_parts(config, vocab_size, stage)
    row *= GROWTH
    if measured is not None:
        limit, base = measured["limit"], measured["base"]
        row = max(row, (limit - base - fixed) / settings.batch_size)
    else:  # as if everything had just not fit
        limit, base = (fixed + settings.batch_size * row / 2) / SAFETY, 0
    room = SAFETY * limit - base - fixed
    own = config.stages.get(stage.depth)
    mine = own is not None and "batch_size" in own.training.model_fields_set
    found = []
    if batch := _divisor(settings.batch_size, room / row):
        times = settings.batch_size // batch
        key = f"stages.{stage.depth}.training" if mine else "training"
        found.append(
            f"{key}.batch_size: {settings.batch_size} → {batch} (with accumulation: {settings.accumulation} → "
            f"{settings.accumulation * times} the step stays the same)"
        )
    length = config.training.seq_len
    if shorter := _divisor(length, length * room / (row * settings.batch_size)):
        found.append(f"training.seq_len: {length} → {shorter}")
    found += _fewer_blocks(config, vocab_size, stage, row * settings.batch_size, SAFETY * limit - base)
    peak = ""
    if measured is not None and measured.get("peak"):
        peak = f" (it held {in_bytes(measured['peak'])} of {in_bytes(measured['limit'])} of {measured['what']})"
    if not found:
        return f"neither a smaller batch_size, seq_len nor block_size fits: lower model.d_model{peak}"
    return f"change {', or '.join(found)}{peak}"


def _fewer_blocks(config: StackWiseConfig, vocab_size: int, stage: Stage, growing: float, room: float) -> list[str]:
    """The stage with fewer blocks, where that is enough."""
    blocks = stage.last - stage.first + 1
    ends, _ = memory_parts(config, vocab_size, stage, blocks=0)
    whole, _ = memory_parts(config, vocab_size, stage)
    each = (whole - ends + growing) / blocks
    fewer = min(blocks - 1, math.floor((room - ends) / each))
    if fewer < 1:
        return []
    if config.training.n_stages is not None:
        return [f"training.n_stages: {config.training.n_stages} → {math.ceil(config.model.n_blocks / fewer)}"]
    if config.n_stages == 1:
        return [f"training.mode: blockwise with training.block_size: {fewer}"]
    return [f"training.block_size: {blocks} → {fewer}"]


def _divisor(whole: int, most: float) -> int:
    """The largest proper divisor of `whole` that is not more than `most`; 0 where there is none."""
    return max((d for d in range(1, whole // 2 + 1) if whole % d == 0 and d <= most), default=0)
