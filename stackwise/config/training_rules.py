"""Which settings of the schedule, of masks and of a stage's training are given in vain."""

from __future__ import annotations

from stackwise.config.precision import stack_precision
from stackwise.config.rules import Limit, Rule, when
from stackwise.config.schema import Settings
from stackwise.config.training import TrainingConfig
from stackwise.config.uses import has_blocks_above, trains_heads_apart

ENABLED = "training.progressive.enabled is true"
ONE_STAGE = "there is one stage"


def _block_size(config: Settings, training: TrainingConfig) -> str | None:
    if config.finds_block_size or _sections_of(config, training.block_size) == config.partition:
        return None  # what decides says the same
    return _decides(config) or when(training.n_stages is not None, "training.n_stages is given")


def _sections_of(config: Settings, size: int) -> list[tuple[int, int]]:
    n_blocks = config.model.n_blocks
    return [(first, min(first + size, n_blocks) - 1) for first in range(0, n_blocks, max(1, size))]


def _decides(config: Settings) -> str | None:
    """What says how many blocks a stage has, where neither block_size nor n_stages does."""
    training = config.training
    if training.progressive.enabled:
        return "model.architecture.blocks_per_stack says how many blocks a stack has"
    return when(training.mode in ("layerwise", "end_to_end"), f"training.mode is {training.mode}")


def _mask_schedule_over(config: Settings, training: TrainingConfig) -> str | None:
    if training.mask_schedule_over == "depth":
        return when(config.n_sections == 1, ONE_STAGE)
    if not config.time_as_depth or config.n_sections == 1:
        return None
    depth = training.progressive.enabled
    return (
        "training.progressive.time_interpretation is depth" if depth else "independent stages go over depth, each alone"
    )


def _mask_windows(config: Settings, training: TrainingConfig) -> str | None:
    if not config.time_as_depth:
        return "fractions go over time (training.mask_schedule_over)"
    return when(config.n_sections == 1, ONE_STAGE)


def _lookahead(config: Settings, training: TrainingConfig) -> str | None:
    return when(not has_blocks_above(config), "no stage of this schedule has blocks above it")


def _blocks_above(config: Settings, training: TrainingConfig) -> int | None:
    if training.lookahead not in ("overlap", "tail"):
        return None
    return config.model.n_blocks - 1 - config.partition[0][1]


def _in_half(config: Settings) -> bool:
    return "fp16" in (config.precision, *(stack_precision(config, depth) for depth in range(config.n_sections)))


TRAINING_RULES: tuple[Rule | Limit, ...] = (
    Rule("mode", lambda c, t: when(t.progressive.enabled, ENABLED)),
    Rule("cache_mode", lambda c, t: "the mode decides what is stored"),
    Rule("fusion_evaluation", lambda c, t: "every run evaluates the fused rack"),
    Rule("fusion_mode", lambda c, t: when(t.progressive.enabled, ENABLED)),
    Rule("fusion_mode", lambda c, t: when(t.mode != "fused", f"training.mode is {t.mode}")),
    Limit("block_size", lambda c, t: None if _decides(c) or t.n_stages else c.model.n_blocks, "the model's blocks"),
    Rule("block_size", _block_size),
    Rule("n_stages", lambda c, t: None if t.n_stages == c.n_sections else _decides(c)),
    Rule("trial_steps", lambda c, t: when(not c.finds_block_size, "training.block_size is a number")),
    Rule(
        "min_mask_fraction max_mask_fraction mask_schedule_type mask_pool mask_token_id",
        lambda c, t: when(not c.objective.masks, "clm masks nothing"),
    ),
    Rule(
        "mask_schedule_type",
        lambda c, t: when(
            c.mask_schedule_type != t.mask_schedule_type,
            f"training.progressive.stack_time_mapping is {t.progressive.stack_time_mapping}",
        ),
    ),
    Rule("mask_schedule_over", _mask_schedule_over),
    Rule("mask_windows", _mask_windows),
    Rule("fresh_masks", lambda c, t: when(c.n_stages == 1, ONE_STAGE)),
    Rule("windows", lambda c, t: when(not c.has_windows, "no stage of this schedule reads a boundary")),
    Rule("lookahead", _lookahead),
    Rule("lookahead_blocks", lambda c, t: when(t.lookahead == "none", "training.lookahead is none")),
    Rule("lookahead_blocks", _lookahead),
    Limit("lookahead_blocks", _blocks_above, "the blocks above the lowest stage"),
    Rule("swap_parts", lambda c, t: when(t.swap == "never", "training.swap is never")),
    Rule("memory", lambda c, t: when(t.swap == "never" and not c.finds_block_size, "training.swap is never")),
    Rule("tied_head", lambda c, t: when(not c.model.tie_embeddings, "model.tie_embeddings is false")),
    Rule("tied_head", lambda c, t: when(not trains_heads_apart(c), "no stage trains a head without the front")),
)
STAGE_RULES: tuple[Rule | Limit, ...] = (
    Rule("tokens", lambda c, s: when(s.steps is not None, "steps is given")),
    Rule("epochs_per_layer", lambda c, s: when(s.steps is not None, "steps is given")),
    Rule("epochs_per_layer", lambda c, s: when(s.tokens is not None, "tokens is given")),
    Rule("min_learning_rate", lambda c, s: when(s.lr_schedule == "constant", "lr_schedule is constant")),
    Rule("divergence_factor divergence_limit", lambda c, s: when(s.on_divergence == "stop", "on_divergence is stop")),
    Rule("rollback_factor", lambda c, s: when(s.on_divergence != "rollback", f"on_divergence is {s.on_divergence}")),
    Rule("loss_scale", lambda c, s: when(not _in_half(c), f"precision is {c.precision}")),
)
