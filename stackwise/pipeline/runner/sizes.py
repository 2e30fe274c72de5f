"""What fits: `block_size: auto`, found by small runs; and what to change where memory ran out.

Memory bounds a stage's blocks: the largest stages that fit. What it bounds is a rack of that many blocks, the lowest
ones; each size of 1, 2, 4, … blocks and the largest trains that rack for real, with the run's own settings and the same
steps a stage. So every block of every candidate gets the same updates, and the mean held-out loss of the small racks
(over `evaluation.fractions`) says what a size is worth at equal block updates. The lowest wins; of equal ones the
smaller.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.choices import Blockwise, NoAdaptation, NoFusion
from stackwise.config.schema import StoreConfig, TrackingConfig
from stackwise.identity import NUMERICS, content_id
from stackwise.pipeline.estimate import SHARE, Estimate
from stackwise.pipeline.events import Emit, Event, Observer
from stackwise.pipeline.schedule import Stage, schedule
from stackwise.words import size as in_bytes

KEY = "training.block_size"
SAFETY = 0.9  # share of the memory that what is proposed after a failure may take
GROWTH = 1.5
"""What grows with the batch beside what the estimate counts: the backward pass's own buffers, batches read ahead."""

SmallRun = Callable[[StackWiseConfig, str, Observer], dict[str, Any]]
"""Runs a configuration in a directory of this name; returns its evaluation."""


@dataclass(frozen=True)
class Sizes:
    """What is tried."""

    most: int  # the largest size that fits, and the blocks of the small racks
    candidates: list[int]
    conditions: str  # names what the outcome holds for


def sizes(config: StackWiseConfig, vocab_size: int, data_id: str, device: str, memory: int) -> Sizes:
    """The sizes to try, and what the outcome depends on.

    Args:
        memory: Bytes of its memory; `training.memory` comes before it.
    """
    most = largest_fitting(config, vocab_size, min(memory, config.training.memory or memory))
    candidates = sorted({*(1 << n for n in range(most.bit_length())), most})
    trial = _small(config, most, most).model_dump(mode="json", exclude={"device", "name", "slurm", "tracking", "data"})
    values = {"trial": trial, "data": data_id, "device": device, "most": most, "numerics": NUMERICS}
    values["within_documents"] = config.data.within_documents
    return Sizes(most, candidates, content_id("block size", values))


def largest_fitting(config: StackWiseConfig, vocab_size: int, memory: int) -> int:
    """The most blocks a stage can have so that every stage of the schedule fits; 1 where none does."""
    config = config.model_copy(deep=True)
    largest = 1
    for size in range(1, config.model.n_blocks + 1):
        config.training.block_size = size
        stages = schedule(config)[: config.n_sections]
        if max(Estimate(config, vocab_size, stage).memory for stage in stages) > SHARE * memory:
            break
        largest = size
    return largest


def try_sizes(config: StackWiseConfig, chosen: Sizes, small_run: SmallRun, emit: Emit) -> dict[str, Any]:
    """Try the sizes; small runs that are finished are not done again.

    Returns:
        `blocks`, the size; `losses`, the mean held-out loss in nats of each size that was tried.
    """
    losses: dict[str, float] = {}
    tried = chosen.candidates if len(chosen.candidates) > 1 else []
    for number, size in enumerate(tried, 1):
        trial = _small(config, size, chosen.most).validate()
        phase = f"trying stages of {size} block{'s' if size > 1 else ''}, {number} of {len(tried)} sizes"
        emit("preparing", phase=phase, done=0, total=None)

        def progress(event: Event, phase: str = phase, stages: int = trial.n_stages) -> None:
            if event["event"] == "step":
                done = event["stage"] * event["steps"] + event["step"]
                emit("preparing", phase=phase, done=done, total=stages * event["steps"])
            elif event["event"] == "warning":
                emit("warning", text=f"{phase}: {event['text']}")

        result = small_run(trial, f"size-{size}", progress)
        losses[str(size)] = statistics.fmean(loss for loss in result["loss"].values() if loss is not None)
    best = min(chosen.candidates, key=lambda size: losses.get(str(size), 0.0))
    return {"blocks": best, "losses": losses}


def outcome(config: StackWiseConfig, most: int, result: dict[str, Any]) -> str:
    """What the search came to and why, in a line; `most` blocks fit."""
    fit = f"at most {most} of {config.model.n_blocks} blocks fit"
    if not result["losses"]:
        return f"{KEY}: auto is {result['blocks']}: {fit}"
    tried = ", ".join(f"{size}: {loss:.3f}" for size, loss in result["losses"].items())
    why = f"lowest held-out loss after {_trial_steps(config)} steps of each block ({tried})"
    return f"{KEY}: auto is {result['blocks']}: {why}; {fit}"


def _small(config: StackWiseConfig, size: int, blocks: int) -> StackWiseConfig:
    """The run's configuration for a rack of so many blocks, in stages of one size."""
    small = config.model_copy(deep=True)
    small.init.weights = None  # a rack of another depth, whose weights are thrown away
    small.name, small.stages, small.tracking = "trial", {}, TrackingConfig(trackers=[])
    small.model.architecture.n_stacks, small.model.architecture.blocks_per_stack = blocks, 1
    small.store = StoreConfig(codec=config.store.codec, chunk_bytes=config.store.chunk_bytes, keep="none")
    training = small.training
    training.block_size, training.steps = size, _trial_steps(config)
    training.fusion, training.adaptation, training.save_fused_checkpoints = NoFusion(), NoAdaptation(), False
    training.eval_every, training.patience, training.keep_best, training.windows = None, None, False, 1
    rates = training.block_learning_rates
    training.block_learning_rates = {block: rate for block, rate in rates.items() if block < blocks}
    return small


def _trial_steps(config: StackWiseConfig) -> int:
    mode = config.training.mode
    assert isinstance(mode, Blockwise), "no other mode has its size found"
    return mode.trial_steps


def oom_advice(config: StackWiseConfig, vocab_size: int, stage: Stage, measured: dict[str, Any] | None) -> str:
    """What to change after running out of memory, in a line: each of the changes is enough alone.

    What a stage takes is a fixed part (its state, and what the process held before it) and one that grows linearly
    with batch_size and with seq_len. As the whole did not fit, the growing part is at least what the estimate leaves
    of the limit.

    Args:
        measured: `limit`, `base` (bytes held before the stage was built), `peak` and `what`; None: nothing was, half as
            much that grows is aimed at.
    """
    settings = config.stage_training(stage.depth)
    fixed, row = Estimate(config, vocab_size, stage).memory_parts()
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
    changes += _fewer_blocks(config, vocab_size, stage, row * settings.batch_size, SAFETY * limit - base)
    peak = ""
    if measured is not None and measured.get("peak"):
        peak = f" (it held {in_bytes(measured['peak'])} of {in_bytes(measured['limit'])} of {measured['what']})"
    if not changes:
        return f"neither a smaller batch_size, seq_len nor block_size fits: lower model.d_model{peak}"
    return f"change {', or '.join(changes)}{peak}"


def _fewer_blocks(config: StackWiseConfig, vocab_size: int, stage: Stage, growing: float, room: float) -> list[str]:
    """The stage with fewer blocks, where that is enough."""
    blocks = stage.last - stage.first + 1
    estimate = Estimate(config, vocab_size, stage)
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
