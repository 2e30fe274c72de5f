"""What stages take: parameters, memory while they train, bytes once they are committed; and how one is swapped."""

from __future__ import annotations

from dataclasses import dataclass

from stackwise.config import StackWiseConfig
from stackwise.config.precision import BITS, FORMATS
from stackwise.pipeline.recipe import stage_steps
from stackwise.pipeline.schedule import ADAPTER, FRONT, HEAD, Stage, schedule

WEIGHT_BYTES = 4

LOSS_BYTES = 3 * (32 << 20)
"""Of the loss: a slice of logits, its gradient and what makes it."""

RECORD_BYTES, FILE_BYTES, STEP_BYTES = 6 << 10, 4 << 10, 32
"""Of a committed stage beside its weights, about: its record, the head of each file, and of each step in the record."""

SHARE = 0.9
"""Of the memory: what a stage may take of it."""


def part_parameters(config: StackWiseConfig, vocab_size: int, part: str, stage: Stage) -> int:
    """Parameters of a part of a stage."""
    model = config.model
    if part.startswith(ADAPTER):
        sides = model.attention.adapter_parameters(model) + model.ffn.adapter_parameters(model)
        return sides * sum(size.rank for size in stage.format(part.removeprefix(ADAPTER)).adapters)
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
        form = FORMATS.get(stage.format(part).precision)
        found += part_parameters(config, vocab_size, part, stage) * (BITS[form] / 8 if form else WEIGHT_BYTES)
    return round(found)


def state_bytes(config: StackWiseConfig, vocab_size: int, stage: Stage, *, gradients: bool) -> int:
    """Bytes of what a stage trains and its optimizer state (as a checkpoint holds them), with or without gradients."""
    stage, settings = largest_phase(config, vocab_size, stage), config.stage_training(stage.depth)
    whole = trained_parameters(config, vocab_size, stage)
    blocks = sum(part not in (FRONT, HEAD) and not part.startswith(ADAPTER) for part in stage.trains)
    blocks *= config.model.block_parameters
    moments = settings.optimizer.state_bytes(blocks, whole - blocks)
    return (WEIGHT_BYTES * (1 + gradients + bool(settings.ema))) * whole + moments


def committed_bytes(config: StackWiseConfig, vocab_size: int, drawn: int, *, windows: int | None = None) -> int:
    """Bytes that committed stages take at most: each one's weights and optimizer state, and those of one more.

    Args:
        config: The configuration.
        vocab_size: Ids that the model knows.
        drawn: Rows of all windows together.
        windows: How many there are; None: as configured.
    """
    windows = config.windows if windows is None else windows
    stages = {stage.depth: stage for stage in schedule(config)}.values()
    each = [files_bytes(config, vocab_size, stage) for stage in stages]
    records = sum(windows * RECORD_BYTES + STEP_BYTES * stage_steps(config, stage.depth, drawn) for stage in stages)
    return sum(each) + max(each) + records


def files_bytes(config: StackWiseConfig, vocab_size: int, stage: Stage) -> int:
    """Bytes that a committed stage's weights and optimizer state take at most."""
    still = still_bytes(config, vocab_size, stage) if stage.commits_frozen else 0
    files = FILE_BYTES * (1 + 2 * len(stage.trains) + len(stage.commits_frozen))
    return state_bytes(config, vocab_size, stage, gradients=False) + still + files


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
    blocks += len(stage.lookahead)
    copies = 2 * blocks * model.block_parameters if half else 0
    state += still_bytes(config, vocab_size, stage)
    return state + copies + LOSS_BYTES, config.row_positions * blocks * numbers * (2 if half else 4)


def block_numbers(config: StackWiseConfig) -> int:
    """Numbers a token that a block keeps for its backward pass (see `stage_memory`)."""
    return config.model.attention.kept(config.model) + config.model.ffn.kept(config.model)


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
    most = len((*stage.blocks, *stage.lookahead))
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


def in_bytes(count: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
