"""Which rows the stages train on: samples chosen once, each under its masks, the same at every depth.

Where rows are trained in windows, each has a slice of them, cut between samples: together they are the rows, and the
masks, of training in one window. Where tasks are learned in turn, a window has the rows of its task, drawn as those of
a corpus of its own, and after them what is replayed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from stackwise.config import StackWiseConfig
from stackwise.config.continual import Meta, Replay
from stackwise.data.split import Split
from stackwise.errors import UsageError
from stackwise.identity import NUMERICS, Hex, content_id, derive_seed, generator
from stackwise.objectives.masks import FixedMaskAssigner, MaskScheduler, child, seed_key, uniform_masks
from stackwise.pipeline.schedule import Stage, drawn_and_window
from stackwise.store import ActivationStore

if TYPE_CHECKING:  # torch stays out of the orchestrator
    from stackwise.data import PreparedData
    from stackwise.training.feed import Samples

HELD_OUT = -1
"""The number of the rowset that stages are evaluated on as they train: held-out samples, each at every fraction."""
ROW_KEYS = (
    *("rows", "steps", "batch_size", "accumulation", "min_mask_fraction", "max_mask_fraction"),
    *("masks_per_sample", "mask_pool"),
)
"""Settings of training that rows and masks are drawn by."""
SLICE = 1 << 15  # rows whose masks are in memory at once


def assigner(config: StackWiseConfig, rowset: int) -> FixedMaskAssigner:
    """The mask plan of a configuration; rows that are drawn anew have masks of their own."""
    training = config.training
    drawn, _ = drawn_and_window(config, rowset)
    return FixedMaskAssigner(
        MaskScheduler(training.min_mask_fraction, training.max_mask_fraction, config.training.mask_schedule_type),
        training.seq_len,
        masks_per_sample=training.masks_per_sample,
        pool=training.mask_pool,
        seed=derive_seed(config.seed, "masks", drawn),
        windows=[(low, high) for low, high in training.mask_windows] if training.mask_windows is not None else None,
    )


def count_rows(config: StackWiseConfig, samples: int) -> int:
    """Rows in every boundary: `training.rows`, else what the steps need, at most every sample under every mask."""
    training = config.training
    most = samples * training.masks_per_sample
    if training.rows is not None:
        return min(training.rows, most)
    budget = training.budget(training.seq_len)
    if budget is not None:
        rows = budget * training.batch_size * training.accumulation
        if config.objective.rolls_out:  # each window's are drawn by themselves
            rows = config.objective.window_rows(rows // config.windows)
        return min(rows, most)
    return most


def limit_passes(config: StackWiseConfig, split: Samples) -> str | None:
    """Keep `training.steps` within `training.max_passes`, and give samples masks enough for a row a step's row.

    A rack that sees a small corpus often knows it by heart, under the same masks soonest.

    Returns:
        A line for people; None: everything stays as it is.
    """
    training = config.training
    steps, samples = training.budget(training.seq_len), split.n_samples(training.seq_len)
    if config.tasks_in_turn and isinstance(split, Split):  # each task has the same steps
        samples = int(np.bincount(split.sample_tasks(training.seq_len)).min())
    if training.max_passes is None or steps is None:
        return None
    of_step = training.batch_size * training.accumulation
    most = max(1, int(training.max_passes * samples / of_step))
    lines = []
    if most < steps:
        lines.append(f"training.steps: {most:,}, not {steps:,}, which are {steps * of_step / samples:.3g} passes")
        training.steps = most
    rows = min(training.rows or most * of_step, min(steps, most) * of_step)
    if config.objective.masks and rows > samples * training.masks_per_sample:
        training.masks_per_sample = math.ceil(rows / samples)
        lines.append(f"training.masks_per_sample: {training.masks_per_sample}")
    if not lines:
        return None
    what = "smallest task" if config.tasks_in_turn else "corpus"
    passes = f"(training.max_passes {training.max_passes:g})"
    return f"{', '.join(lines)}: the {what} has {samples:,} samples {passes}"


def choose_samples(config: StackWiseConfig, split: Samples, rowset: int) -> np.ndarray:
    """For each row its sample's index in the split, [R]; a pure function of data and configuration.

    Samples are drawn without replacement, in random order, each distinct one once; the masks of a sample stand
    next to each other.
    """
    if rowset == HELD_OUT:
        return _held_out_samples(config, split)
    drawn, window = drawn_and_window(config, rowset)
    if config.objective.rolls_out:
        windows = range(config.windows) if window is None else (window,)
        return np.concatenate([_drawn_samples(config, split, drawn, number) for number in windows])
    if config.tasks_in_turn and window is not None:
        return np.concatenate([_task_samples(config, split, drawn, window), _replayed(config, split, drawn, window)])
    samples_R = _drawn_samples(config, split, drawn)
    if window is None:
        return samples_R
    first, end = window_edges(config, len(samples_R))[window : window + 2]
    return samples_R[first:end]


def window_edges(config: StackWiseConfig, rows: int) -> list[int]:
    """Where windows begin among so many rows, and where the last one ends: between samples, as even as that goes."""
    per_sample, windows = config.training.masks_per_sample, config.windows
    samples = math.ceil(rows / per_sample)
    return [min(rows, samples * window // windows * per_sample) for window in range(windows + 1)]


def _task_samples(config: StackWiseConfig, split: Samples, drawn: int, task: int) -> np.ndarray:
    """The samples of the rows of a task, each under all its masks: what is replayed keeps them."""
    samples_R = _drawn_samples(config, split, drawn, task=task)
    per_sample = config.training.masks_per_sample
    return samples_R[: max(1, len(samples_R) // per_sample) * per_sample]


def _replayed(config: StackWiseConfig, split: Samples, drawn: int, task: int) -> np.ndarray:
    """The samples of the rows of earlier tasks that are replayed in a task.

    Every sample has a random key, and those of the lowest keys are kept: a reservoir, as what a longer stream keeps of
    its beginning is part of what that kept.
    """
    replay = config.training.continual
    if not isinstance(replay, Replay) or not task:
        return np.empty(0, np.int64)
    per_sample = config.training.masks_per_sample
    kept, keys = list[np.ndarray](), list[np.ndarray]()
    most = replay.buffer if replay.by == "reservoir" else max(1, replay.buffer // task)
    for before in range(task):
        samples_N = _task_samples(config, split, drawn, before)[::per_sample]
        words = generator(config.seed, "replay", drawn, before).bit_generator.random_raw(len(samples_N))
        lowest = np.argsort(np.atleast_1d(words), kind="stable")[:most]
        kept.append(samples_N[lowest])
        keys.append(np.atleast_1d(words)[lowest])
    chosen = np.concatenate(kept)
    if replay.by == "reservoir":
        chosen = chosen[np.argsort(np.concatenate(keys), kind="stable")[:most]]
    return np.repeat(np.sort(chosen), per_sample)


def task_ranges(config: StackWiseConfig, split: Split) -> list[tuple[int, int]]:
    """For each task its rows of the held-out rowset, from … to."""
    of_rows = split.sample_tasks(config.training.seq_len)[choose_samples(config, split, HELD_OUT)]
    edges = np.searchsorted(of_rows, np.arange(len(split.tasks) + 1)).tolist()
    return list(itertools.pairwise(edges))


def _drawn_samples(config: StackWiseConfig, split: Samples, *drawn: int, task: int | None = None) -> np.ndarray:
    per_sample = config.training.masks_per_sample
    ids = split.sample_ids(config.training.seq_len)
    order = generator(config.seed, "samples", *drawn).permutation(len(ids))
    if task is not None:
        assert isinstance(split, Split), "tasks are of prepared data"
        order = order[split.sample_tasks(config.training.seq_len)[order] == task]
    rows = count_rows(config, len(order))
    needed = math.ceil(rows / per_sample)
    # A repeated sample would be the same row twice: its mask follows from its id.
    _, first = np.unique(np.ascontiguousarray(ids[order]).view("V16").ravel(), return_index=True)
    chosen = order[np.sort(first)[:needed]]
    return np.repeat(chosen, per_sample)[:rows]


def drawn_rows(config: StackWiseConfig, split: Samples, rowset: int) -> int:
    """Rows of all windows of a rowset together; of tasks in turn those of its task, without what is replayed."""
    drawn, window = drawn_and_window(config, rowset)
    if config.tasks_in_turn and window is not None:
        return len(_task_samples(config, split, drawn, window))
    if config.objective.rolls_out:
        return config.windows * len(_drawn_samples(config, split, drawn, 0))
    return len(_drawn_samples(config, split, drawn))


def put_rows(config: StackWiseConfig, split: Samples, store: ActivationStore, rowset: int) -> tuple[str, int]:
    """Store the masks and the rows of a rowset; the same rows have the same id, however often they are put.

    Returns:
        The rowset's id, and how many rows it has.

    Raises:
        UsageError: There are fewer samples than windows.
    """
    samples_R = choose_samples(config, split, rowset)
    if not len(samples_R) and config.windows > 1:
        raise UsageError(
            f"training.windows: {config.windows} windows are more than the samples of the corpus",
            hint="lower training.windows, or raise training.rows where it is set",
        )
    ids_R16 = np.ascontiguousarray(split.sample_ids(config.training.seq_len)[samples_R])
    masks_of = _masks(config, rowset)
    mask_ids = [
        store.put_masks(masks_of(ids_R16[first : first + SLICE], first)) for first in range(0, len(ids_R16), SLICE)
    ]
    return store.put_rowset(ids_R16, np.concatenate(mask_ids)), len(ids_R16)


def row_settings(config: StackWiseConfig, rowset: int) -> dict[str, Any]:
    """The settings that a rowset follows from, the data's aside, by the keys of the configuration."""
    keys = {"seq_len"} if rowset == HELD_OUT else {"seq_len", *ROW_KEYS}
    training = config.training.model_dump(include=keys)
    settings: dict[str, Any] = {"seed": config.seed, "training": training}
    training["objective"] = "masks" if config.objective.masks else "no masks"
    if rowset == HELD_OUT:
        return settings | {"evaluation": config.evaluation.model_dump(include={"fractions", "samples"})}
    training["mask_schedule_type"] = config.training.mask_schedule_type
    if config.training.steps is None and config.training.tokens is not None:
        training["tokens"] = config.training.tokens
    if drawn_and_window(config, rowset)[1] is not None and config.windows > 1:
        training["windows"] = config.windows
    if config.objective.rolls_out:  # each window draws its rows anew
        training["objective"] = {"rolls out": config.objective.window_rows(1 << 20)}
    if config.tasks_in_turn:
        replay = config.training.continual
        training["continual"] = replay.model_dump(include={"buffer", "by"}) if isinstance(replay, Replay) else "in turn"
    return settings


def rows_key(config: StackWiseConfig, data_id: str, rowset: int) -> str:
    """Names what a rowset follows from, so that a later run need not make it again to know its id."""
    number = rowset
    if rowset != HELD_OUT and drawn_and_window(config, rowset)[1] is None:
        number = drawn_and_window(config, rowset)[0]  # of all windows together
    values = {"settings": row_settings(config, rowset), "data": data_id, "rowset": number, "numerics": NUMERICS}
    return content_id("rows", values)


def stage_fractions(config: StackWiseConfig, depth: int) -> tuple[float, float] | None:
    """With time as depth, the masked fractions that stage `depth` trains on, from … to; None: all of them."""
    if not config.time_as_depth or config.n_sections == 1 or depth >= config.n_sections:
        return None
    return assigner(config, 0).window(depth, config.n_sections)


def stage_rows(config: StackWiseConfig, sample_ids_R16: np.ndarray, depth: int, rowset: int) -> np.ndarray | None:
    """With time as depth, the rows that stage `depth` trains on: those whose fraction is its own; else None.

    Raises:
        UsageError: No row is left for the stage.
    """
    if stage_fractions(config, depth) is None:
        return None
    plan = assigner(config, rowset)
    counts_R = plan.counts(sample_ids_R16, np.arange(len(sample_ids_R16)) % config.training.masks_per_sample)
    chosen = np.flatnonzero(plan.in_window(counts_R, depth, config.n_sections))
    if not len(chosen):
        raise UsageError(
            f"stage {depth}: none of the {len(counts_R)} rows has a masked fraction of its own window",
            hint="raise training.rows or training.masks_per_sample, or set mask_schedule_over: time",
        )
    return chosen


def _held_out_samples(config: StackWiseConfig, split: Samples) -> np.ndarray:
    """Held-out samples, as the evaluation after the last stage draws them, each distinct one once a fraction, [R]."""
    seq_len = config.training.seq_len
    order = generator(config.seed, "held-out").permutation(split.n_samples(seq_len))
    if isinstance(split, Split) and split.tasks and config.training.meta is None:  # as many of each task
        of_order = split.sample_tasks(seq_len)[order]
        by_task = [order[of_order == task][: config.evaluation.samples] for task in range(len(split.tasks))]
        order = np.concatenate(by_task)
    else:
        order = order[: config.evaluation.samples]
    chosen = np.sort(order)
    _, first = np.unique(np.ascontiguousarray(split.sample_ids(seq_len)[chosen]).view("V16").ravel(), return_index=True)
    per_sample = len(set(config.evaluation.fractions)) if config.objective.masks else 1
    return np.repeat(chosen[np.sort(first)], per_sample)


def _masks(config: StackWiseConfig, rowset: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """What makes the masks [N, S] of some samples, by their ids and the first one's row."""
    training, seq_len = config.training, config.training.seq_len
    if not config.objective.masks:
        return lambda ids_N16, first: np.zeros((len(ids_N16), seq_len), dtype=bool)
    if rowset != HELD_OUT:
        plan, per_sample = assigner(config, rowset), training.masks_per_sample
        return lambda ids_N16, first: plan.masks(ids_N16, (first + np.arange(len(ids_N16))) % per_sample)
    fractions, key = sorted(set(config.evaluation.fractions)), seed_key(derive_seed(config.seed, "held-out"), "masks")
    counts = np.array([min(seq_len, max(1, round(fraction * seq_len))) for fraction in fractions])

    def held_out(ids_N16: np.ndarray, first: int) -> np.ndarray:  # a sample at one fraction after the other
        rows = first + np.arange(len(ids_N16))
        keys = child(np.full(len(rows), key, np.uint64), rows.astype(np.uint64))
        return uniform_masks(keys, counts[rows % len(fractions)], seq_len)

    return held_out


def tasks_digest(meta: Meta, data: PreparedData) -> Hex:
    """What tasks follow from beside the settings: data sets that are trained on, or the ids in use."""
    names = data.train.tasks
    return content_id("tasks", [data.id, len(names) - meta.tasks_held_out(by_data=True) if names else 0])


def check_tasks(config: StackWiseConfig, data: PreparedData, stages: list[Stage]) -> None:
    """Check that every stage that learns to adapt has tasks, and each of them rows to support and to judge.

    Raises:
        UsageError: There are too few tasks, or rows of one; or tokens of a stage that reads none would be permuted.
    """
    for stage in stages:
        settings = config.stage_training(stage.depth)
        if (meta := settings.meta) is None:
            continue
        names = data.train.tasks
        if not names and stage.reads_boundary:
            raise UsageError(
                f"training.meta: tokens are permuted, and stage {stage.label} reads activations of tokens as they are",
                hint="set training.mode: end_to_end, or name data sets as tasks (data.tasks)",
            )
        held = meta.tasks_held_out(by_data=bool(names))
        if names and len(names) - held < 2:
            left = max(0, len(names) - held)
            raise UsageError(
                f"training.meta.held_out: {held} of {len(names)} tasks leave {left} to train on, and two are needed",
                hint="lower training.meta.held_out, or name more data sets in data.tasks",
            )
        for number, split, keys in (
            (stage.rowset, data.train, "training.rows or training.steps"),
            (HELD_OUT, data.held_out, "evaluation.samples or data.held_out"),
        ):
            chosen = choose_samples(config, split, number)
            of = split.sample_tasks(config.training.seq_len)[chosen] if names else np.zeros(len(chosen), np.int64)
            which = range(len(names) - held) if number != HELD_OUT else range(len(names) - held, len(names))
            for task in which if names else (0,):
                rows = len(np.unique(chosen[of == task]))
                if rows < settings.batch_size:
                    where = "held-out" if number == HELD_OUT else "training"
                    name = f" of task {names[task]}" if names else ""
                    raise UsageError(
                        f"training.meta: {rows} {where} rows{name} are fewer than support and query, "
                        f"{settings.batch_size} (training.batch_size)",
                        hint=f"give it more text, raise {keys}, or lower training.batch_size and meta.support",
                    )
