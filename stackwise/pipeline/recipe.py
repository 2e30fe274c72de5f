"""What determines a stage's result, and the ids that follow from it.

A recipe names the content of every artefact its worker may open and every setting that shapes the outcome, and
nothing else: no directory, no device, no log interval. Equal recipes have equal results, so none trains twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stackwise.config import StackWiseConfig, StoreConfig
from stackwise.errors import UsageError
from stackwise.identity import NUMERICS, Hex, content_id
from stackwise.pipeline.device import cpu_alone
from stackwise.pipeline.rows import stage_fractions, window_edges
from stackwise.pipeline.schedule import FRONT, HEAD, Stage, block_number, block_part, drawn_and_window
from stackwise.store import codec_named, default_chunk_rows

Recipe = dict[str, Any]

VERSION = 2  # of the recipe's form: raise it when entries are named otherwise

SHUFFLED_CHUNKS = 8  # groups of rows that are shuffled together
ROW_BYTES, GROUP_BYTES = 48, 16 << 10  # of a boundary beside its activations, about: of each row, and of the whole


def codec_name(store: StoreConfig) -> str:
    """The codec that boundaries are written with."""
    return store.codec or "bf16"


LOSSLESS = ("fp32", "bf16", "fp16")
"""Precisions of which a codec keeps exactly what was computed, each of its own name."""


def lossless_codec(precision: str) -> str:
    """The codec that keeps exactly the numbers that leave a block; none is wider than fp32."""
    return precision if precision in LOSSLESS else "fp32"


def order_rows(config: StackWiseConfig, rows: int) -> int:
    """Rows that stay together through the order's first permutation.

    About what a chunk of bf16 holds, whatever the store's codec and chunk size are: these must not change a result.
    """
    return default_chunk_rows(config.training.seq_len, config.model.d_model, 2, rows)


def boundary_bytes(config: StackWiseConfig, rows: int) -> int:
    """Bytes of one boundary."""
    return rows * codec_named(codec_name(config.store)).row_bytes(config.row_positions, config.model.d_model)


def whole_boundary(config: StackWiseConfig, rows: int) -> int:
    """Bytes that a boundary takes on the disk at most: its columns and descriptions among them."""
    return boundary_bytes(config, rows) + ROW_BYTES * rows + GROUP_BYTES


def boundary_chunk_rows(config: StackWiseConfig, rows: int) -> int:
    """Rows in a chunk of a boundary, by `store.chunk_bytes`: a power of two, or all rows where they are fewer."""
    row_bytes = codec_named(codec_name(config.store)).row_bytes(config.row_positions, config.model.d_model)
    fitting = max(1, config.store.chunk_bytes // row_bytes)
    return min(rows, 1 << (fitting.bit_length() - 1))


def forward_specification(config: StackWiseConfig, vocab_size: int, mask_token: int, data: Hex) -> dict[str, Any]:
    """What a forward pass computes beside its weights, by the keys of the configuration.

    Args:
        data: Id of the prepared data, which says where documents begin.
    """
    objective = config.objective
    shown = {"causal": objective.causal} | objective.specification(config.seed) | objective.code
    return {
        "numerics": NUMERICS,
        "precision": config.precision,
        "model": config.model.specification() | {"vocab_size": vocab_size},
        "data": {"within_documents": data if config.data.within_documents else False},
        "training": {"objective": shown} | ({"mask_token_id": mask_token} if objective.masks else {}),
    }


def trunk_id(forward: Mapping[str, Any], digests: list[Hex], precisions: Mapping[str, str]) -> Hex:
    """The id of a trunk: its forward specification and its parts' digests, the front first, block by block.

    Args:
        digests: Of the parts; a block's adapters follow it.
        precisions: Of the blocks that are not held in the run's, by part.
    """
    narrow = {"precisions": dict(precisions)} if precisions else {}
    return content_id("trunk", {"forward": dict(forward), "parts": digests} | narrow)


@dataclass(frozen=True)
class Reads:
    """What a stage's worker opens, by content.

    Args:
        initial: For each part that the stage holds, the digest it starts from; None where it is fresh. For each
            optimizer state that it takes up, its digest.
    """

    rowset: Hex  # id of its rows
    rows: int  # how many they are
    initial: Mapping[str, Hex | None]
    trunk: Hex | None  # the id of what made the boundary that it reads; None where it reads tokens
    inputs: Mapping[str, Hex]  # digests of the columns that the objective needs beside tokens and masks, by name
    held_out: Hex | None = None  # the rowset that the stage is evaluated on, where the result depends on it


def stage_recipe(config: StackWiseConfig, stage: Stage, forward: Mapping[str, Any], span: Span, reads: Reads) -> Recipe:
    """The recipe of one stage."""
    settings = stage_settings(config, stage)
    settings["training"]["steps"] = span.steps
    if any(digest is None for digest in reads.initial.values()):  # drawn from the seed
        settings["model"]["init_std"] = config.model.init_std
    if reads.trunk is not None:
        settings["store"] = codec_named(codec_name(config.store)).specification
    return {
        "version": VERSION,
        "settings": settings,
        "forward": dict(forward),
        "stage": _plain_stage(config, stage),
        "order": {"chunk_rows": order_rows(config, reads.rows), "window_chunks": SHUFFLED_CHUNKS},
        "rowset": reads.rowset,
        "reads": None if reads.trunk is None else {"trunk": reads.trunk},
        "initial": dict(reads.initial),
    } | (
        ({"inputs": dict(reads.inputs)} if reads.inputs else {})
        | ({"held_out": reads.held_out} if reads.held_out is not None else {})
        # Which steps of the budget these are; with the window the order of rows is another.
        | ({"span": [span.first, span.until]} if span.length < span.steps else {})
        | ({"window": stage.window} if span.length < span.steps and stage.share is None else {})
        | ({"task": stage.window} if config.tasks_in_turn and stage.window else {})
    )


def stage_settings(config: StackWiseConfig, stage: Stage) -> dict[str, Any]:
    """The settings that shape what a stage makes of its weights and rows, by the keys of the configuration.

    What has no effect on the stage is left out, so that changing it trains nothing again. The device, the number of
    threads and the versions of libraries are not in it: they say where it is computed, and equal recipes have equal
    results on equal machines.
    """
    settings, training = config.stage_training(stage.depth), config.training
    held = {block_part(block): block for block in settings.block_learning_rates}
    rates = {str(block): settings.block_learning_rates[block] for part, block in held.items() if part in stage.holds}
    values = settings.specification(config.precision)
    values["objective"] = config.objective.scoring() | config.objective.code
    distillation = config.distillation
    if distillation.teacher is not None:  # which teacher and at what depth, is among the inputs
        values["distillation"] = distillation.model_dump(include={"match", "task_weight", "temperature"})
    if rates:
        values["block_learning_rates"] = rates
    if (training.row_groups or 1) > 1:  # the order
        values["row_groups"] = training.row_groups
    if settings.divergence.goes_back:  # what a rollback goes back to
        values["checkpoint_steps"] = training.checkpoint_steps
    if config.parallel.divides or config.parallel.divided:  # sums in any order, at any number of ranks
        values["ranks"] = "divided"
    elif config.parallel.ranks > 1 and not config.parallel.deterministic:  # the order of sums
        values["ranks"] = config.parallel.ranks
        values |= config.parallel.compressed
    if training.compile:  # fused kernels round otherwise
        values["compile"] = True
    model: dict[str, Any] = {"dropout": config.model.dropout, "tie_embeddings": config.model.tie_embeddings}
    if config.model.tie_embeddings and HEAD in stage.trains and FRONT not in stage.trains:
        values["tied_head"] = training.tied_head
    if stage_fractions(config, stage.depth) is not None:  # the rows that it chooses among those of the rowset
        values |= {"mask_schedule_over": "depth", "mask_schedule_type": training.mask_schedule_type}
        values |= {"mask_windows": training.mask_windows}
    resolved = [config.model.at(block_number(part)) for part in (*stage.blocks, *stage.lookahead)]
    for place in ("attention", "ffn"):  # of a router its losses: what no forward pass shows
        trained = [getattr(block, place).training_specification(block) for block in resolved]
        if alone := next(filter(None, trained), None):
            model[place] = alone
    method = training.continual
    shaped = {**(method.later() if stage.window else {}), **(method.earlier() if stage.states_out else {})}
    if config.tasks_in_turn and shaped:
        values["continual"] = shaped | method.code
    if stage.candidates:
        values["fusion"] = training.fusion.model_dump(include={"rounds", "probe_steps"})
    result = {"seed": config.seed, "model": model, "training": values}
    # Kernels that need not repeat bit for bit: a CPU has none.
    repeats = config.deterministic or cpu_alone(config.device)
    return result | ({} if repeats else {"deterministic": False})


def _plain_stage(config: StackWiseConfig, stage: Stage) -> dict[str, Any]:
    """What a stage holds and trains."""
    parts = (*stage.blocks, *stage.lookahead)
    return {
        "depth": stage.depth,  # two stages of one run must not draw the same order and dropout
        "blocks": [stage.first, stage.last],
        "trains": list(stage.trains),
        "lookahead": list(stage.lookahead),
        "formats": {part: stage.formats[part].plain() for part in parts if part in stage.formats},
        "candidates": [list(section) for section in stage.candidates],
        "causal_from": 0 if stage.causal else None,  # as recipes say it since there were steps that led there
        **({"scales_alone": True} if stage.scales_alone else {}),
        **({"silent": list(stage.silent)} if stage.silent else {}),
        **(
            {"rises": [list(stage.rises.blocks), stage.rises.first, stage.rises.warmup]}
            if stage.rises is not None
            else {}
        ),
        "sections": config.n_sections if stage_fractions(config, stage.depth) is not None else None,
    }


def recipe_id(recipe: Recipe) -> Hex:
    """The id of a recipe."""
    return content_id("recipe", recipe)


@dataclass(frozen=True)
class Span:
    """The steps of a stage in one window, among all that it takes."""

    first: int  # steps taken in the windows before
    until: int  # steps taken when the window ends
    steps: int  # the whole budget, which learning rates run over

    @property
    def length(self) -> int:
        """Steps in the window."""
        return self.until - self.first


def stage_span(config: StackWiseConfig, stage: Stage, drawn: int) -> Span:
    """A stage's steps in its window: the budget goes by rows.

    Args:
        drawn: Rows of all windows together.

    Raises:
        UsageError: No step is left for the window.
    """
    steps, edges = stage_steps(config, stage.depth, drawn), window_edges(config, drawn)
    if config.tasks_in_turn:  # each task has a budget of its own
        return Span(0, steps, steps)
    if stage.share is not None:
        first, until = (round(steps * edge) for edge in stage.share)
        if first == until:
            raise UsageError(
                f"training.growth: no step of {steps} is between {stage.share[0]:g} and {stage.share[1]:g} of them",
                hint="raise training.steps, or set until (or commit) of training.growth further from its neighbours",
            )
        return Span(first, until, steps)
    if drawn_and_window(config, stage.rowset)[1] is None:
        return Span(0, steps, steps)
    first, until = (steps * edge // max(1, drawn) for edge in edges[stage.window : stage.window + 2])
    if first == until:
        raise UsageError(
            f"training.windows: {config.windows} windows are more than the {steps} steps of stage {stage.depth}",
            hint="lower training.windows, or give the stage more steps",
        )
    return Span(first, until, steps)


def known_steps(config: StackWiseConfig, stage: Stage) -> int | None:
    """Steps of a stage as far as the configuration says; None: its rows say."""
    steps = config.stage_training(stage.depth).steps
    if steps is None or config.windows > 1:
        return None
    first, until = stage.share or (0.0, 1.0)
    return round(steps * until) - round(steps * first)


def stage_steps(config: StackWiseConfig, depth: int, rows: int) -> int:
    """Optimizer steps of a stage in all windows: by `steps`, `tokens`, or passes over so many rows."""
    settings = config.stage_training(depth)
    budget = settings.budget(config.training.seq_len)
    if budget is not None:
        return budget
    return max(1, round(settings.epochs_per_layer * rows / (settings.batch_size * settings.accumulation)))
