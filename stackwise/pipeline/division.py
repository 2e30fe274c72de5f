"""How rows are divided: a step's over ranks, and the rowset into groups, each a boundary of its own.

Every rank takes whole microbatches of a step, as many as every other.

Where the ranks do not divide `training.accumulation`, each microbatch is divided into smaller ones. That is a setting
like any other (`accumulation` and `batch_size`), and written down as such: so no recipe knows of ranks.

A stage's batches are of the groups in turn (`store.GroupedOrder`), so rank r of N needs the groups r, r + N, … alone.
Where each rank has a store of its own it keeps these and no others: N disks hold a boundary once. The groups, and with
them the order, follow from `training.row_groups` and not from N: the weights are the same at every N that divides it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.precision import weight_format
from stackwise.config.schema import StageOverrides
from stackwise.config.training import Quantization
from stackwise.errors import UsageError
from stackwise.identity import Hex
from stackwise.pipeline.rows import HELD_OUT
from stackwise.pipeline.schedule import schedule
from stackwise.store import ActivationStore, boundary_id_of, nearest
from stackwise.words import plural

KEY = "training.row_groups"
GROUPS = 24
"""Groups where nobody says how many: 1, 2, 3, 4, 6, 8, 12 and 24 ranks divide them."""
GROUP_CHUNKS = 1
"""Groups of rows (`order_rows`) that are shuffled together: as many windows are open at once as a rank has groups."""


def several_stores(config: StackWiseConfig) -> bool:
    """Whether ranks may have stores of their own."""
    return "{" in (config.store.path or "")


def groups_of(config: StackWiseConfig, rowset: int) -> int:
    """In how many groups the rows of a rowset are stored; held-out rows, which every rank needs, in one."""
    return 1 if rowset == HELD_OUT else config.training.row_groups or 1


def disks(config: StackWiseConfig) -> int:
    """How many disks share a boundary, as far as the configuration says."""
    grouped = groups_of(config, 0) > 1 and "{rank}" in (config.store.path or "")
    return config.parallel.shares if grouped else 1


def edges(rows: int, groups: int) -> list[int]:
    """Where groups of rows begin, and where the last one ends; as even as that goes.

    Raises:
        UsageError: There are fewer rows.
    """
    if rows < groups:
        raise UsageError(
            f"{KEY}: {groups} groups are more than the {rows} rows of a boundary",
            hint=f"set {KEY} to {rows} or less, or train on more rows",
        )
    return [rows * group // groups for group in range(groups + 1)]


def put_groups(store: ActivationStore, rowset: Hex, groups: int) -> list[Hex]:
    """The ids of the rowsets of a rowset's groups; they are put into the store."""
    if groups == 1:
        return [rowset]
    rows = store.rowset(rowset)
    starts = edges(rows.rows, groups)
    return [
        store.put_rowset(rows.sample_ids[first:last], rows.mask_ids[first:last])
        for first, last in itertools.pairwise(starts)
    ]


def group_attributes(trunk: Hex, rowsets: Sequence[Hex], codec: str, group: int) -> dict[str, Any]:
    """What the boundary of a group says of itself."""
    return {"group": [group, len(rowsets)], "head": boundary_id_of(trunk, rowsets[0], codec)}


def settle_groups(config: StackWiseConfig, earlier: StackWiseConfig | None) -> list[str]:
    """Say how many groups there are, where ranks have stores of their own and nobody has said it; in place.

    Args:
        earlier: What the run was before: its rows stay in the groups that they were in.

    Returns:
        Lines for people.

    Raises:
        UsageError: The ranks do not divide the groups, or what trains needs rows of other ranks.
    """
    if not several_stores(config):
        return []
    training, shares = config.training, config.parallel.shares
    why = _needs_all_rows(config)
    if training.row_groups is None:
        if why is not None:
            return [f"store.path: each store has all rows, as {why} needs them"] if shares > 1 else []
        before = earlier.training.row_groups if earlier is not None and several_stores(earlier) else None
        training.row_groups = before or math.lcm(GROUPS, shares)
    if training.row_groups == 1:
        return []
    if why is not None:
        raise UsageError(
            f"{KEY}: {why} needs rows that other ranks keep",
            hint=f"set {KEY}: 1 (each store then has all rows), or a store.path that ranks share",
        )
    if training.row_groups % shares:
        raise UsageError(
            f"parallel: {shares} ranks with stores of their own do not divide the {training.row_groups} groups of rows "
            f"({KEY})",
            hint=f"nearest that do: {nearest(training.row_groups, shares)}; another {KEY} trains again from the start",
        )
    return []


def _needs_all_rows(config: StackWiseConfig) -> str | None:
    """The setting by which a rank reads rows that are not of its batches; None: there is none."""
    if config.own_order is not None:
        return config.own_order
    if config.time_as_depth and config.n_sections > 1:
        return "training.mask_schedule_over"
    forms = {weight_format(how.precision) for stage in schedule(config) for how in stage.formats.values()}
    ranges = [Quantization.named(form) for form in forms if form]
    if any(one is not None and one.activations and one.activations_range != "token" for one in ranges):
        return "a fixed range of activations (training.quantization)"
    return None


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
    parallel, lines = config.parallel, settle_groups(config, earlier)
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
