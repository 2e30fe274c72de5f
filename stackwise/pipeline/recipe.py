"""What determines a stage's result, and the ids that follow from it.

A recipe names the content of every artefact its worker may open and every setting that shapes the outcome, and
nothing else: no directory, no device, no log interval. Equal recipes have equal results, so none trains twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stackwise.config import StackWiseConfig, StageTraining, StoreConfig
from stackwise.errors import UsageError
from stackwise.identity import NUMERICS, Hex, content_id
from stackwise.pipeline.rows import stage_fractions, window_edges
from stackwise.pipeline.schedule import Stage, block_part, drawn_and_window
from stackwise.store import CODECS, default_chunk_rows

Recipe = dict[str, Any]

WINDOW_CHUNKS = 8
"""Groups of rows that are shuffled together."""
ROW_BYTES, GROUP_BYTES = 48, 16 << 10
"""Of a boundary beside its activations, about: of each row, and of the whole."""


def codec_name(store: StoreConfig) -> str:
    """The codec that boundaries are written with."""
    return store.codec or "bf16"


def order_rows(config: StackWiseConfig, rows: int) -> int:
    """Rows that stay together through the order's first permutation.

    About what a chunk of bf16 holds, whatever the store's codec and chunk size are: these must not change a result.
    """
    return default_chunk_rows(config.training.seq_len, config.model.d_model, 2, rows)


def boundary_bytes(config: StackWiseConfig, rows: int) -> int:
    """Bytes of one boundary."""
    return rows * CODECS[codec_name(config.store)].row_bytes(config.row_positions, config.model.d_model)


def whole_boundary(config: StackWiseConfig, rows: int) -> int:
    """Bytes that a boundary takes on the disk at most: its columns and descriptions among them."""
    return boundary_bytes(config, rows) + ROW_BYTES * rows + GROUP_BYTES


def boundary_chunk_rows(config: StackWiseConfig, rows: int) -> int:
    """Rows in a chunk of a boundary, by `store.chunk_bytes`: a power of two, or all rows where they are fewer."""
    row_bytes = CODECS[codec_name(config.store)].row_bytes(config.row_positions, config.model.d_model)
    fitting = max(1, config.store.chunk_bytes // row_bytes)
    return min(rows, 1 << (fitting.bit_length() - 1))


def forward_specification(config: StackWiseConfig, vocab_size: int, mask_token: int) -> dict[str, Any]:
    """What a forward pass computes beside its weights."""
    objective = config.objective
    specification = {
        "numerics": NUMERICS,
        "model": config.model.specification(),
        "vocab_size": vocab_size,
        "causal": objective.causal,
        "mask_token": mask_token if objective.masks else None,
        "precision": config.precision,
        "within_documents": config.data.within_documents,
    }
    return specification | objective.specification(config.seed)


def trunk_id(forward: Mapping[str, Any], digests: list[Hex], precisions: Mapping[str, str]) -> Hex:
    """The id of a trunk: its forward specification and its parts' digests, the front first, block by block.

    Args:
        forward: The specification.
        digests: Of the parts; a block's adapters follow it.
        precisions: Of the blocks that are not held in the run's, by part.
    """
    own = {"precisions": dict(precisions)} if precisions else {}
    return content_id("trunk", {"forward": dict(forward), "parts": digests} | own)


def stage_recipe(
    config: StackWiseConfig,
    stage: Stage,
    *,
    forward: Mapping[str, Any],
    rows: int,
    rowset: Hex,
    span: Span,
    initial: Mapping[str, Hex | None],
    trunk: Hex | None,
    targets: Hex | None,
    held_out: Hex | None = None,
) -> Recipe:
    """The recipe of one stage.

    Args:
        config: The configuration, `auto` values resolved.
        stage: The stage.
        forward: `forward_specification` of the configuration.
        rows: Rows in the rowset.
        rowset: Its id.
        span: Its steps.
        initial: For each part that the stage holds, the digest it starts from; None where it is fresh. For each state
            that it takes up, its digest.
        trunk: The id of what the stage reads; None where it reads tokens.
        targets: Digest of the data's own targets, where the objective uses them.
        held_out: The rowset that the stage is evaluated on, where the result heeds it.
    """
    fresh = any(digest is None for digest in initial.values())
    held = {part: stage.formats[part].plain() for part in (*stage.blocks, *stage.lookahead) if part in stage.formats}
    windowed = stage_fractions(config, stage.depth) is not None
    objective = config.objective.scoring()
    if stage.causal_from is not None:
        objective["causal_from"] = stage.causal_from
    window: dict[str, Any] = {"window": [stage.depth, config.n_sections], "schedule": config.mask_schedule_type}
    if config.training.mask_windows is not None:
        window |= {"windows": config.training.mask_windows}
    return {
        "forward": dict(forward),
        "training": training_recipe(config, stage) | {"steps": span.steps, "dropout": config.model.dropout},
        "objective": objective,
        "stage": {"blocks": [stage.first, stage.last], "trains": list(stage.trains)}
        | ({"held": held} if held else {})
        | ({"beyond": list(stage.lookahead)} if stage.lookahead else {})
        | ({"unfreezes": _unfreezes(config, stage)} if stage.candidates else {}),
        "head": {"tied": config.model.tie_embeddings, "above": config.training.tied_head},
        "order": {"chunk_rows": order_rows(config, rows), "window_chunks": WINDOW_CHUNKS},
        # The seed of order and dropout: two stages of one run must not draw alike.
        "seed": [config.seed, stage.depth],
        "rowset": rowset,
        "rows": window if windowed else None,
        "reads": {"trunk": trunk, "codec": CODECS[codec_name(config.store)].base} if trunk is not None else None,
        "initial": dict(initial),
        "fresh": {"seed": config.seed, "init_std": config.model.init_std} if fresh else None,
        "targets": targets,
    } | (
        # Which steps of the budget these are; with the window the order of rows is another.
        ({"held_out": held_out} if held_out is not None else {})
        | ({"span": [span.first, span.until], "window": stage.window} if span.length < span.steps else {})
    )


def _unfreezes(config: StackWiseConfig, stage: Stage) -> dict[str, Any]:
    fusion = config.training.fusion
    return {"sections": [list(each) for each in stage.candidates]} | fusion.model_dump(
        include={"rounds", "probe_steps"}
    )


_ADDED = (
    "block_learning_rates", "loss_scale", "ema", "eval_every", "patience", "keep_best",
    "on_divergence", "divergence_factor", "divergence_limit", "rollback_factor",
)  # fmt: skip
"""Settings that are named where they differ from their default: what was trained before they were there stays."""


def training_recipe(config: StackWiseConfig, stage: Stage) -> dict[str, Any]:
    """The settings of a stage's training that shape its result, the budget aside."""
    settings = config.stage_training(stage.depth)
    values = settings.model_dump(exclude={"steps", "tokens", "epochs_per_layer"})
    own = {str(block): rate for block, rate in sorted(settings.block_learning_rates.items())}
    values["block_learning_rates"] = {b: own[b] for b in own if block_part(int(b)) in stage.holds}
    if config.precision != "fp16":
        del values["loss_scale"]
    if not settings.heeds_held_out:
        del values["eval_every"]
    if settings.on_divergence == "stop":
        del values["divergence_factor"], values["divergence_limit"]
    if settings.on_divergence != "rollback":
        del values["rollback_factor"]
    defaults = StageTraining().model_dump()
    named = {key: value for key, value in values.items() if key not in _ADDED or value != defaults[key]}
    if settings.on_divergence == "rollback":  # what a rollback goes back to
        named["checkpoint_steps"] = config.training.checkpoint_steps
    return named


def recipe_id(recipe: Recipe) -> Hex:
    """The id of a recipe."""
    return content_id("recipe", recipe)


@dataclass(frozen=True)
class Span:
    """The steps of a stage in one window, among all that it takes.

    Args:
        first: Steps taken in the windows before.
        until: Steps taken when the window ends.
        steps: The whole budget, which learning rates run over.
    """

    first: int
    until: int
    steps: int

    @property
    def length(self) -> int:
        """Steps in the window."""
        return self.until - self.first


def stage_span(config: StackWiseConfig, stage: Stage, drawn: int) -> Span:
    """A stage's steps in its window: the budget goes by rows.

    Args:
        config: The configuration.
        stage: The stage.
        drawn: Rows of all windows together.

    Raises:
        UsageError: No step is left for the window.
    """
    steps, edges = stage_steps(config, stage.depth, drawn), window_edges(config, drawn)
    if drawn_and_window(config, stage.rowset)[1] is None:
        return Span(0, steps, steps)
    first, until = (steps * edge // max(1, drawn) for edge in edges[stage.window : stage.window + 2])
    if first == until:
        raise UsageError(
            f"training.windows: {config.windows} windows are more than the {steps} steps of stage {stage.depth}",
            hint="lower training.windows, or give the stage more steps",
        )
    return Span(first, until, steps)


def stage_steps(config: StackWiseConfig, depth: int, rows: int) -> int:
    """Optimizer steps of a stage in all windows: by `steps`, `tokens`, or passes over so many rows."""
    settings = config.stage_training(depth)
    budget = settings.budget(config.training.seq_len)
    if budget is not None:
        return budget
    return max(1, round(settings.epochs_per_layer * rows / (settings.batch_size * settings.accumulation)))
