"""Rows in groups, each a boundary of its own: how many there are, which rows they have, and who keeps them.

A stage's batches are of the groups in turn (`store.GroupedOrder`), so rank r of N needs the groups r, r + N, … alone.
Where each rank has a store of its own it keeps these and no others: N disks hold a boundary once. The groups, and with
them the order, follow from `training.row_groups` and not from N: the weights are the same at every N that divides it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.precision import weight_format
from stackwise.config.training import Quantization
from stackwise.errors import UsageError
from stackwise.identity import Hex
from stackwise.pipeline.rows import HELD_OUT
from stackwise.pipeline.schedule import schedule
from stackwise.store import ActivationStore, boundary_id_of, nearest

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


def settle(config: StackWiseConfig, earlier: StackWiseConfig | None) -> list[str]:
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
