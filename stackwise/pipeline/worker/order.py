"""The order in which a stage takes its rows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from stackwise.config.continual import Replay
from stackwise.data import PreparedData
from stackwise.pipeline.division import GROUP_CHUNKS
from stackwise.pipeline.recipe import SHUFFLED_CHUNKS, order_rows
from stackwise.pipeline.rows import stage_rows
from stackwise.store import GroupedOrder, RowOrder
from stackwise.training.curriculum import DIFFICULTY, CurriculumOrder, ReplayOrder, RouteOrder, difficulties
from stackwise.training.feed import Order, RowGroups

if TYPE_CHECKING:
    from stackwise.pipeline.worker.training import StageContext


def row_order(context: StageContext) -> Order:
    """The order in which a stage takes its rows."""
    job, config, settings = context.job, context.config, context.settings
    if context.groups is not None:
        return _grouped_order(context, context.groups)
    order = RowOrder(
        job.rows,
        seed=job.order(config),
        chunk_rows=order_rows(config, job.rows),
        window_chunks=SHUFFLED_CHUNKS,
        select=stage_rows(config, context.feed.rowset.sample_ids, context.stage.depth, context.stage.rowset),
    )
    if context.feed.tasks is not None:
        return context.feed.tasks.order(order)
    step_rows, replay = settings.batch_size * settings.accumulation, config.training.continual
    if isinstance(replay, Replay) and job.replayed:
        return ReplayOrder(order, job.replayed, replay.share, step_rows)
    if context.routes is not None and settings.routes == "order":
        return RouteOrder(order, context.routes, step_rows)
    if settings.curriculum is None or (settings.curriculum.by == "loss" and DIFFICULTY not in context.feed.sources):
        return order  # by its own loss only a stage that has been trained can say what is hard
    separator = PreparedData.open(Path(job.data)).separator_id
    difficulty_N = difficulties(context.feed, order.selected, settings.curriculum.by, separator)
    begun = job.span.first - job.rows_begin  # positions that go on from window to window count it already
    return CurriculumOrder(
        order, difficulty_N, settings.curriculum, step_rows=step_rows, steps=job.span.steps, begun=begun
    )


def _grouped_order(context: StageContext, groups: RowGroups) -> GroupedOrder:
    """The order of rows in groups: of each group one as of rows that are alone."""
    job, config, orders = context.job, context.config, list[RowOrder]()
    chosen = stage_rows(config, context.feed.rowset.sample_ids, context.stage.depth, context.stage.rowset)
    for group, (first, last) in enumerate(itertools.pairwise(groups.edges)):
        orders.append(
            RowOrder(
                last - first,
                seed=(*job.order(config), "group", group),
                chunk_rows=order_rows(config, last - first),
                window_chunks=GROUP_CHUNKS,
                select=None if chosen is None else chosen[(chosen >= first) & (chosen < last)] - first,
            )
        )
    return GroupedOrder(orders, groups.edges)
