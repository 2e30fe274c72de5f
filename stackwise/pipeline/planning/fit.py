"""Sizes that fit: blocks of a stage, rows of a microbatch, windows of the rows (`stackwise plan --fit`)."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

from stackwise import words
from stackwise.config import StackWiseConfig
from stackwise.config.choices import Blockwise, Mode
from stackwise.config.training import ProgressiveConfig
from stackwise.errors import StackWiseError, UsageError
from stackwise.pipeline.estimate import SHARE, recompute_blocks
from stackwise.pipeline.planning.forecast import Forecast, estimates, forecast, settled, vocabulary_size
from stackwise.pipeline.planning.machines import Machine
from stackwise.pipeline.planning.trace import Tracer
from stackwise.pipeline.runner.auto import largest_fitting

BUSY = 4  # rows of a microbatch from which a card's kernels are busy: one at a time takes up to a third longer

Sizes = dict[str, Any]  # by key, for `-o`


def fit(config: StackWiseConfig, machine: Machine, tokens: int | None = None, *, tracer: Tracer | None = None) -> Sizes:
    """The sizes of stages that fit into a machine's memory, and windows of the rows that fit onto its disk.

    The rows of a step stay what they are. Stages are as fat as four rows a microbatch allow (where not even one block
    fits with so many: recomputed in the backward pass, then with fewer rows), and then the microbatch as large as it
    goes. Where not one block fits, stages are swapped: of those that then fit, the ones that take the least time.

    Args:
        tokens: That each stage trains on; None: as the configuration says, else 10^9.
        tracer: Has the last word of stages in memory; None: closed forms do.

    Returns:
        Settings by key, with the mode that has them where the configuration's is another one; `batch_size` of a stage's
        own stays as it is.

    Raises:
        UsageError: Nothing fits.
    """
    config = config.model_copy(deep=True)
    config.training.batch_size = max(1, config.training.batch_size)
    if config.precision == "auto":
        config.precision = settled(config, machine)[0].precision
    sizes = _in_memory_whole(config, machine, tracer)
    if sizes is None and config.training.swap != "never":
        sizes = _in_turn(config, machine, tokens)
    if sizes is None:
        raise _nothing_fits(config, machine, tokens)
    return _of_mode(config) | sizes | _windows(config, sizes, machine, tokens)


def _nothing_fits(config: StackWiseConfig, machine: Machine, tokens: int | None) -> UsageError:
    """Says why, of one block and one row."""
    said = f"--fit: not one block of {config.name} fits into {words.size(machine.memory)}, a row at a time"
    if config.training.swap == "never":
        return UsageError(said, hint="set training.swap: auto, or shorten training.seq_len")
    smallest = with_mode(config, "layerwise")
    _split(smallest, 1)
    why = forecast(smallest, machine, tokens).out_of_memory()
    return UsageError(
        f"{said}, nor swapped" + (f": {why[0]}" if why else ""),
        hint="plan for more memory, narrower blocks (model.d_model, model.d_ff) or shorter rows (training.seq_len)",
    )


def _of_mode(config: StackWiseConfig) -> Sizes:
    """What lets a configuration have stages of so many blocks; nothing where it does."""
    training, keys = config.training, Sizes()
    if training.growth:
        keys["training.growth"] = []
    if training.progressive.enabled:
        keys["training.progressive.enabled"] = False
    mode = training.mode
    if not isinstance(mode, Blockwise) or mode.n_stages is not None or mode.block_sizes is not None:
        keys["training.mode"] = "blockwise"
    return keys


def _windows(config: StackWiseConfig, sizes: Sizes, machine: Machine, tokens: int | None) -> Sizes:
    """Windows of the rows, where a disk is too small for two boundaries of all; nothing where it is not."""
    chosen = with_mode(config, "blockwise")
    for key, value in sizes.items():
        setattr(chosen.training, key.rpartition(".")[2], value)
    windows = windows_that_fit(forecast(chosen, machine, tokens))
    if windows is None or config.training.windows != 1:
        return {}
    chosen.training.windows = windows
    try:
        chosen.validate()
    except StackWiseError:  # with another setting; the plan says what else helps
        return {}
    return {"training.windows": windows}


def _step_sizes(config: StackWiseConfig) -> list[int]:
    """The rows that a microbatch can have, where those of a step stay as they are, the best ones first.

    Four, more, then fewer.
    """
    rows = config.training.batch_size * config.training.accumulation
    sizes = [size for size in (1 << n for n in range(rows.bit_length())) if rows % size == 0]
    return sorted(sizes, key=lambda size: (size < min(BUSY, rows), abs(size - BUSY)))


def _in_memory_whole(config: StackWiseConfig, machine: Machine, tracer: Tracer | None) -> Sizes | None:
    """The sizes of stages that fit as they are; None: none do."""
    order = _step_sizes(config)
    tried = order[:1] + [size for size in order[1:] if size < BUSY]
    can = not config.training.activation_checkpointing and config.training.meta is None
    for size, recomputed in itertools.product(tried, (False, True) if can else (False,)):
        changed = with_mode(config, "blockwise")
        changed.training.swap = "never"
        _split(changed, size)
        if recomputed:
            recompute_blocks(changed)
        blocks = largest_fitting(changed, vocabulary_size(changed), int(machine.memory), machine.kind)
        for count in range(blocks, 0, -1):
            set_blocks(changed, count)
            if not _in_memory(changed, machine, tracer):
                continue
            for larger in sorted(other for other in order if other > size):
                before = changed.training.batch_size
                _split(changed, larger)
                if not _in_memory(changed, machine, tracer):
                    _split(changed, before)
                    break
            if tracer is not None and not _in_memory(changed, machine, tracer, near=math.inf):
                _split(changed, size)
                continue  # of a layer that closed forms do not know well
            return _sizes(changed) | ({"training.activation_checkpointing": True} if recomputed else {})
    return None


def _in_turn(config: StackWiseConfig, machine: Machine, tokens: int | None) -> Sizes | None:
    """The sizes of swapped stages that take the least time, by closed forms; None: none fit."""
    changed, most, order = with_mode(config, "blockwise"), config.model.n_blocks, _step_sizes(config)
    busy = [size for size in order if size >= BUSY]
    for rows in filter(None, (busy, *([size] for size in order if size < BUSY))):
        best, least = None, math.inf
        for count, size in itertools.product(sorted({*(1 << n for n in range(most.bit_length())), most}), rows):
            set_blocks(changed, count)
            _split(changed, size)
            planned = forecast(changed, machine, tokens)
            takes = max(stage.memory["peak"] for stage in planned.stages)
            if planned.seconds < least and takes <= SHARE * machine.memory and not planned.out_of_memory():
                best, least = _sizes(changed), planned.seconds
        if best is not None:
            return best
    return None


def _sizes(config: StackWiseConfig) -> Sizes:
    training = config.training
    return {
        "training.mode.block_size": training.block_size,
        "training.batch_size": training.batch_size,
        "training.accumulation": training.accumulation,
    }


def _split(config: StackWiseConfig, size: int) -> None:
    """Let a microbatch have so many rows, and a step as many as it has."""
    training = config.training
    rows = training.batch_size * training.accumulation
    training.batch_size, training.accumulation = size, rows // size


NEAR = 0.1  # of the limit: so near to it a trace decides, which takes seconds; closed forms are held to 5%


def _in_memory(config: StackWiseConfig, machine: Machine, tracer: Tracer | None, *, near: float = NEAR) -> bool:
    """Whether all stages fit; those that take most are traced first, as one that does not fit ends it."""
    limit = SHARE * machine.memory
    of_stages = estimates(settled(config, machine)[0], machine)
    sized = sorted(((one.memory, at) for at, one in enumerate(of_stages)), reverse=True)
    if tracer is None or sized[0][0] > (1 + near) * limit:
        return sized[0][0] <= limit
    close = (of_stages[at] for memory, at in sized if memory > (1 - near) * limit)
    return all(tracer.traced(one).parts["peak"] <= limit for one in close)


def windows_that_fit(planned: Forecast) -> int | None:
    """The fewest windows whose boundaries fit onto a disk that is too small; None: it is not, or none do."""
    size = planned.machine.disk.size
    in_two = replace(planned, windows=max(2, planned.windows))  # what is committed has moments from two on
    free = size - in_two.live + in_two.boundaries
    if planned.live <= size or free <= 0 or not planned.config.has_windows:
        return None
    return max(2, math.ceil(in_two.boundaries * in_two.windows / free))


def set_mode(config: StackWiseConfig, name: str) -> None:
    """Give a configuration another mode, with what that one is by default."""
    config.training.progressive = ProgressiveConfig()
    config.training.growth = []  # a rack that grows has no other mode
    config.training.mode = Mode.of(name)


def with_mode(config: StackWiseConfig, name: str) -> StackWiseConfig:
    """A copy of a configuration with another mode."""
    config = config.model_copy(deep=True)
    set_mode(config, name)
    return config


def set_blocks(config: StackWiseConfig, blocks: int) -> None:
    """Give a configuration stages of so many blocks."""
    set_mode(config, "blockwise")
    config.training.block_size = blocks
