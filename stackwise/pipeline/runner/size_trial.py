"""`block_size: auto`: the stage size that memory allows and that measures best, found by small runs.

Memory bounds the sizes: the largest whose stages fit. What it bounds is a rack of that many blocks, the lowest ones,
and each size of 1, 2, 4, … blocks and the largest trains that rack for real, stage by stage, with the run's own
settings and the same steps a stage. So every block of every candidate gets the same updates, and the mean held-out loss
of the finished small racks (over `evaluation.fractions`) says what a size is worth at equal block updates. The lowest
wins; of equal ones the smaller.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.schema import StoreConfig, TrackingConfig
from stackwise.config.training import FusionConfig
from stackwise.identity import NUMERICS, content_id
from stackwise.pipeline.fit import SHARE, stage_memory
from stackwise.pipeline.schedule import schedule

KEY = "training.block_size"

SmallRun = Callable[[StackWiseConfig, Path, Callable[[dict[str, Any]], None]], dict[str, Any]]
"""Runs a configuration in a directory, telling its events; returns its evaluation."""


@dataclass(frozen=True)
class Sizes:
    """What is tried.

    Args:
        most: The largest size that fits, and the blocks of the small racks.
        candidates: Sizes, ascending.
        conditions: Names what the outcome holds for.
    """

    most: int
    candidates: list[int]
    conditions: str


def sizes(config: StackWiseConfig, vocab_size: int, data_id: str, device: str, memory: int) -> Sizes:
    """The sizes to try, and what the outcome depends on.

    Args:
        config: The configuration, `precision` resolved.
        vocab_size: Ids that the model knows.
        data_id: The prepared data's.
        device: The kind of device.
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
        if max(stage_memory(config, vocab_size, stage) for stage in stages) > SHARE * memory:
            break
        largest = size
    return largest


def try_sizes(
    config: StackWiseConfig, found: Sizes, directory: Path, small_run: SmallRun, tell: Callable[..., None]
) -> dict[str, Any]:
    """Try the sizes; runs that are finished in `directory` are not done again.

    Args:
        config: The configuration.
        found: The sizes.
        directory: Where the small runs live.
        small_run: Runs one.
        tell: Told the progress, as an event's name and its values.

    Returns:
        `blocks`, the size; `losses`, the mean held-out loss in nats of each size that was tried.
    """
    losses: dict[str, float] = {}
    tried = found.candidates if len(found.candidates) > 1 else []
    for number, size in enumerate(tried, 1):
        trial = _small(config, size, found.most).validate()
        phase = f"trying stages of {size} block{'s' if size > 1 else ''}, {number} of {len(tried)} sizes"
        tell("preparing", phase=phase, done=0, total=None)

        def progress(event: dict[str, Any], phase: str = phase, stages: int = trial.n_stages) -> None:
            if event["event"] == "step":
                done = event["stage"] * event["steps"] + event["step"]
                tell("preparing", phase=phase, done=done, total=stages * event["steps"])
            elif event["event"] == "warning":
                tell("warning", text=f"{phase}: {event['text']}")

        result = small_run(trial, directory / f"size-{size}", progress)
        losses[str(size)] = statistics.fmean(loss for loss in result["loss"].values() if loss is not None)
    best = min(found.candidates, key=lambda size: losses.get(str(size), 0.0))
    return {"blocks": best, "losses": losses}


def said(config: StackWiseConfig, found: Sizes, result: dict[str, Any]) -> str:
    """What was found and why, in a line."""
    best = result["blocks"]
    fit = f"at most {found.most} of {config.model.n_blocks} blocks fit"
    if not result["losses"]:
        return f"{KEY}: auto is {best}: {fit}"
    tried = ", ".join(f"{size}: {loss:.3f}" for size, loss in result["losses"].items())
    steps = config.training.trial_steps
    return f"{KEY}: auto is {best}: lowest held-out loss after {steps} steps of each block ({tried}); {fit}"


def _small(config: StackWiseConfig, size: int, blocks: int) -> StackWiseConfig:
    """The run's configuration for a rack of so many blocks, in stages of one size."""
    small = config.model_copy(deep=True)
    small.name, small.stages, small.tracking = "trial", {}, TrackingConfig(tensorboard=False)
    small.model.architecture.n_stacks, small.model.architecture.blocks_per_stack = blocks, 1
    small.store = StoreConfig(codec=config.store.codec, chunk_bytes=config.store.chunk_bytes, keep="none")
    training = small.training
    training.block_size, training.steps, training.cache_dir = size, training.trial_steps, None
    training.windows = type(training).model_fields["windows"].default
    training.fusion, training.adaptation, training.save_fused_checkpoints = FusionConfig(), "none", False
    training.eval_every, training.patience, training.keep_best, training.windows = None, None, False, 1
    rates = training.block_learning_rates
    training.block_learning_rates = {block: rate for block, rate in rates.items() if block < blocks}
    return small
