"""A step's rows divided over ranks: every rank takes whole microbatches, as many as every other.

Where the ranks do not divide `training.accumulation`, each microbatch is divided into smaller ones. That is a setting
like any other (`accumulation` and `batch_size`), and written down as such: so no recipe knows of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.schema import StageOverrides
from stackwise.errors import UsageError
from stackwise.pipeline import row_groups
from stackwise.pipeline.schedule import schedule
from stackwise.words import plural

NEAR = 256  # how far from the number of ranks another one that divides is looked for


def divide(config: StackWiseConfig, earlier: StackWiseConfig | None) -> list[str]:
    """Give every rank as many microbatches as any other, in every stage; in place.

    Args:
        earlier: What the run was before: what it had divided stays so where it can, whatever the number of ranks is by
            now, so that the run goes on instead of beginning anew.

    Returns:
        Lines for people.

    Raises:
        UsageError: The rows of a step do not divide; names the nearest number of ranks that does.
    """
    parallel, lines = config.parallel, row_groups.settle(config, earlier)
    ranks = parallel.shares * parallel.pipeline  # those with other blocks each want a microbatch at a time
    _check_blocks(config)
    config.parallel.divided |= config.parallel.divides or (earlier is not None and earlier.parallel.divided)
    for depth in range(config.n_stages):
        settings = config.stage_training(depth)
        before, size = settings.accumulation, settings.batch_size
        parts = _parts(before, size, ranks)
        if parts is None:
            raise UsageError(
                f"parallel: {ranks} ranks do not divide the {before * size} rows of a step of stage {depth} "
                f"(training.batch_size {size}, accumulation {before})",
                hint=f"nearest that do: {_nearest(config, ranks)}; or make training.batch_size a multiple of {ranks}",
            )
        kept = _kept(config, earlier, depth)
        if kept is not None and settings.meta is None and kept % ranks == 0 and kept > before * parts:
            parts = kept // before
        if parts == 1:
            continue
        if settings.meta is not None:  # a microbatch is a task
            raise UsageError(
                f"parallel: {ranks} ranks do not divide the tasks of a step of stage {depth}",
                hint=f"make training.accumulation, which is {before}, a multiple of {ranks}",
            )
        _set(config, depth, before * parts, size // parts)
        line = (
            f"a step is {before * parts} microbatches of {size // parts} rows, not {before} of {size}, so that ranks "
            "have whole ones: as training.accumulation and batch_size it gives the same weights in one process"
        )
        lines += [line] if line not in lines else []
    return lines


def check_alike(ranks: Sequence[Mapping[str, Any]]) -> None:
    """Look whether ranks compute alike.

    Args:
        ranks: Of each, what shapes its numbers, by name.

    Raises:
        UsageError: One differs from the first.
    """
    for rank, other in enumerate(ranks):
        for name, value in other.items():
            if value != ranks[0][name]:
                raise UsageError(
                    f"rank {rank} has {name} {value}, rank 0 has {ranks[0][name]}",
                    hint="ranks have the same versions and numbers of threads, or their numbers differ",
                )


def _check_blocks(config: StackWiseConfig) -> None:
    """Raises UsageError: a stage has no blocks, or none that train, for each part of it (`parallel.pipeline`)."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return
    per_rank = 2 if parallel.schedule == "interleaved" else 1
    for stage in schedule(config):
        blocks = (*stage.blocks, *stage.lookahead)
        if still := [block for block in blocks if block not in stage.trains]:
            raise UsageError(
                f"parallel.pipeline: {still[0]} of stage {stage.depth} does not train; gradients go through all blocks",
                hint="set parallel.pipeline: 1, or training.fusion.strategy: trainable",
            )
        if len(blocks) < parallel.pipeline * per_rank:
            raise UsageError(
                f"parallel.pipeline: {parallel.pipeline} ranks with {plural(per_rank, 'part')} each, and stage "
                f"{stage.depth} has {plural(len(blocks), 'block')}",
                hint=f"nearest that does: {max(1, len(blocks) // per_rank)}; "
                "or make stages larger (training.block_size)",
            )


def _parts(accumulation: int, batch_size: int, ranks: int) -> int | None:
    """How many smaller ones a microbatch becomes; None: that cannot be."""
    parts = ranks // math.gcd(accumulation, ranks)
    return parts if batch_size % parts == 0 else None


def _nearest(config: StackWiseConfig, ranks: int) -> str:
    """The numbers of ranks below and above that divide every stage's rows, in words."""
    settings = [config.stage_training(depth) for depth in range(config.n_stages)]

    def divides(n: int) -> bool:
        return all(_parts(section.accumulation, section.batch_size, n) is not None for section in settings)

    below = next((n for n in range(ranks - 1, 0, -1) if divides(n)), 1)
    above = next((n for n in range(ranks + 1, ranks + NEAR) if divides(n)), None)
    return f"{below}" if above is None else f"{below} and {above}"


def _kept(config: StackWiseConfig, earlier: StackWiseConfig | None, depth: int) -> int | None:
    """The microbatches that ranks had divided the same step into before; None: they had not."""
    if earlier is None or earlier.parallel.shares * earlier.parallel.pipeline == 1 or depth >= earlier.n_stages:
        return None
    now, was = config.stage_training(depth), earlier.stage_training(depth)
    rows = now.accumulation * now.batch_size
    same = was.accumulation * was.batch_size == rows and was.accumulation % now.accumulation == 0
    return was.accumulation if same else None


def _set(config: StackWiseConfig, depth: int, accumulation: int, batch_size: int) -> None:
    """For one stage alone, as the others may have another step."""
    overrides = config.stages.setdefault(depth, StageOverrides())
    overrides.training.accumulation, overrides.training.batch_size = accumulation, batch_size
    overrides.training = overrides.training  # it counts as set, or a file of the configuration would lack it
