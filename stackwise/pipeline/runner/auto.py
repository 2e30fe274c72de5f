"""Every `auto` becomes a number before anything is hashed: `block_size` by small runs, `batch_size` by trial.

Memory bounds a stage's blocks: the largest stages that fit. What it bounds is a rack of that many blocks, the lowest
ones; each size of 1, 2, 4, … blocks and the largest trains that rack for real, with the run's own settings and the same
steps a stage. So every block of every candidate gets the same updates, and the mean held-out loss of the small racks
(over `evaluation.fractions`) says what a size is worth at equal block updates. The lowest wins; of equal ones the
smaller.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from stackwise.config import AUTO, StackWiseConfig
from stackwise.config.choices import Blockwise, NoAdaptation, NoFusion
from stackwise.config.schema import StoreConfig, TrackingConfig
from stackwise.config.yaml_files import dump
from stackwise.data import PreparedData
from stackwise.identity import NUMERICS, content_id
from stackwise.pipeline.estimate import SHARE, Estimate
from stackwise.pipeline.events import Emit, Event, Observer
from stackwise.pipeline.plan import check_data
from stackwise.pipeline.schedule import Stage, schedule
from stackwise.pipeline.trial import CompileJob, TrialJob
from stackwise.words import size as in_bytes

KEY, COMPILE = "training.block_size", "training.compile"

SmallRun = Callable[[StackWiseConfig, str, Observer], dict[str, Any]]
"""Runs a configuration in a directory of this name; returns its evaluation."""


Auto = dict[str, Any]  # what `auto` settings came to, by their keys, each with the conditions of its trial


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
    most = largest_fitting(config, vocab_size, min(memory, config.training.memory or memory), device)
    candidates = sorted({*(1 << n for n in range(most.bit_length())), most})
    trial = _small(config, most, most).model_dump(mode="json", exclude={"device", "name", "slurm", "tracking", "data"})
    values = {"trial": trial, "data": data_id, "device": device, "most": most, "numerics": NUMERICS}
    values["within_documents"] = config.data.within_documents
    return Sizes(most, candidates, content_id("block size", values))


def largest_fitting(config: StackWiseConfig, vocab_size: int, memory: int, device: str = "cpu") -> int:
    """The most blocks a stage can have so that every stage of the schedule fits; 1 where none does."""
    config = config.model_copy(deep=True)
    largest = 1
    for size in range(1, config.model.n_blocks + 1):
        config.training.block_size = size
        stages = schedule(config)[: config.n_sections]
        if max(Estimate(config, vocab_size, stage, device).memory for stage in stages) > SHARE * memory:
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


def wanted(config: StackWiseConfig) -> dict[str, Stage]:
    """The keys that are `auto`, each with the stage to try: the largest of those that it holds for."""
    size = config.model.vocab_size or 4096
    stages = [Estimate(config, size, stage).largest_phase.stage for stage in schedule(config)]

    def takes(stage: Stage) -> float:
        return sum(Estimate(config, size, stage).memory_parts())

    with_size = {k for k, overrides in config.stages.items() if "batch_size" in overrides.training.model_fields_set}
    rest = [stage for stage in stages if stage.depth not in with_size]
    searched = {"training.batch_size": max(rest, key=takes)} if rest and config.training.batch_size == AUTO else {}
    for depth in sorted(with_size):
        if config.stages[depth].training.batch_size == AUTO:
            mine = max((stage for stage in stages if stage.depth == depth), key=takes)
            searched[f"stages.{depth}.training.batch_size"] = mine
    return searched


def settle(config: StackWiseConfig, key: str, rows: int) -> None:
    """Set a key that was `auto`."""
    section = config.training if key.startswith("training.") else config.stages[int(key.split(".")[1])].training
    section.batch_size = rows


def conditions(config: StackWiseConfig, job: TrialJob, device: str) -> str:
    """Names what a trial's outcome holds for."""
    stage = asdict(job.stage) | {"place": 0}
    settings = config.stage_training(job.stage.depth)
    values = {"model": config.model.model_dump(), "positions": config.row_positions, "stage": stage, "device": device}
    values |= {"optimizer": settings.optimizer.plain(), "precision": config.precision}
    values |= {"ema": settings.ema, "most": job.most}
    if settings.accumulation > 1:  # gradients of one microbatch lie beside the next
        values["microbatches"] = 2
    if settings.recomputed_every:
        values["recomputed_every"] = settings.recomputed_every
    return content_id("batch size", values | {"objective": config.objective.plain(), "vocabulary": job.vocab_size})


def make_job(config: StackWiseConfig, stage: Stage, vocab_size: int, mask_token: int, samples: int) -> TrialJob:
    """The job for a stage; a batch is never larger than a step's share of the samples."""
    most = max(1, samples // config.stage_training(stage.depth).accumulation)
    return TrialJob(dump(config), stage, vocab_size, mask_token, most)


def settle_block_size(
    config: StackWiseConfig, data: PreparedData, before: Auto, machine: Event, small_run: SmallRun, emit: Emit
) -> Auto:
    """Find `training.block_size: auto`; returns what is known by now.

    Args:
        machine: The kind of `device` and its `memory` in bytes.

    Raises:
        ConfigError: With the size that was found, the settings do not fit each other.
    """
    if not config.finds_block_size:
        return before
    vocab_size = check_data(config, data).size
    candidates = sizes(config, vocab_size, data.id, machine["device"], machine["memory"])
    result = before.get(KEY)
    if result is None or result["conditions"] != candidates.conditions:
        tried = try_sizes(config, candidates, small_run, emit)
        result = {"conditions": candidates.conditions, **tried}
        emit("note", text=outcome(config, candidates.most, result))
    else:
        emit("note", text=f"{KEY}: auto is {result['blocks']}, as found before")
    config.training.block_size = result["blocks"]
    config.validate()
    emit("settled", key=KEY, value=result["blocks"])
    return before | {KEY: result}


def may_compile(config: StackWiseConfig, machine: Event) -> bool:
    """Whether `training.compile: auto` is worth a trial, by what a worker said of its machine."""
    meta = any(config.stage_training(depth).meta is not None for depth in range(config.n_stages))
    return bool(machine.get("compiles")) and not config.parallel.divides and not meta


def settle_compile(
    config: StackWiseConfig,
    data: PreparedData,
    before: Auto,
    machine: Event,
    work: Callable[[CompileJob], list[Event]],
    emit: Emit,
) -> Auto:
    """Find whether blocks are compiled: `training.compile: auto` where the machine has what it takes.

    Where it is wanted, one block of the lowest stage is compiled once, before anything is hashed: what does not compile
    runs as it is, and the recipe says so.

    Args:
        machine: What a worker said of it (`device.describe`).
        work: Has the trial done by a worker; returns its events.

    Returns:
        What is known by now.
    """
    training = config.training
    if training.compile is None and not may_compile(config, machine):
        training.compile = False
    if training.compile is False:
        return before
    vocabulary, stage = check_data(config, data), schedule(config)[0].with_blocks(1)
    rows = config.stage_training(stage.depth).batch_size
    job = CompileJob(dump(config), stage, vocabulary.size, vocabulary.mask, rows)
    name = content_id("compile", [conditions(config, job, machine["device"]), machine["name"], version("torch")])
    result = before.get(COMPILE)
    if result is None or result["conditions"] != name:
        emit("preparing", phase="compiling a block", done=0, total=None)
        (trial,) = (event for event in work(job) if event["event"] == "trial")
        result = {"conditions": name, "fault": trial["fault"]}
    training.compile = result["fault"] is None
    if not training.compile:
        text = f"{COMPILE}: blocks do not compile here, and run as they are: {result['fault']}"
        emit("warning", stage=None, text=text)
    return before | {COMPILE: result}


def settle_batches(
    config: StackWiseConfig,
    data: PreparedData,
    before: Auto,
    device: str,
    work: Callable[[TrialJob], list[Event]],
    emit: Emit,
) -> Auto:
    """Find every `batch_size: auto`; returns what is known by now.

    Args:
        before: What was found before.
        work: Has a trial done by a worker; returns its events.
    """
    vocabulary = check_data(config, data)
    samples = data.train.n_samples(config.training.seq_len)
    for key, stage in wanted(config).items():
        job = make_job(config, stage, vocabulary.size, vocabulary.mask, samples)
        name = conditions(config, job, device)
        result = before.get(key)
        if result is not None and result["conditions"] == name:
            emit("note", text=f"{key}: auto is {result['rows']}, as found before")
        else:
            emit("preparing", phase=f"trying {key}", done=0, total=None)
            (trial,) = (event for event in work(job) if event["event"] == "trial")
            result = {"conditions": name, "rows": trial["rows"]}
            room = f"{in_bytes(trial['peak'])} of {in_bytes(trial['limit'])} of {trial['what']}"
            emit("note", text=f"{key}: auto is {trial['rows']}, found by trial ({room})")
        settle(config, key, result["rows"])
        before = before | {key: result}
    return before
