"""What settings must hold together."""

from __future__ import annotations

from collections.abc import Iterator

from stackwise.config.after import after_faults
from stackwise.config.fields import AUTO
from stackwise.config.schema import Settings
from stackwise.config.stacks import stack_faults

Fault = tuple[str, str]
"""A dotted key, and what is wrong with it."""


def faults(config: Settings) -> list[Fault]:
    """Every contradiction between settings that are valid on their own."""
    return [*_model(config), *_training(config), *stack_faults(config), *after_faults(config), *_stages(config)]


def _model(config: Settings) -> Iterator[Fault]:
    model = config.model
    if model.d_model % model.n_heads:
        yield "model.n_heads", f"{model.n_heads} heads do not divide d_model {model.d_model}: take a divisor of it"
    elif model.positions == "rope" and model.head_dim % 2:
        yield "model.n_heads", f"rotary positions need an even head width, not {model.head_dim}"
    else:
        yield from ((f"model.attention.{key}", text) for key, text in model.attention.faults(model))
    if model.max_seq_len is not None and model.max_seq_len < config.training.seq_len:
        yield "model.max_seq_len", f"{model.max_seq_len} is less than training.seq_len {config.training.seq_len}"
    if model.vocab_size is not None and model.vocab_size < 4:
        yield "model.vocab_size", f"{model.vocab_size} is too small for text, a separator and a mask token"
    if config.data.vocab_size is not None:
        if config.data.tokenizer == "bpe" and config.data.vocab_size < 258:
            yield "data.vocab_size", f"{config.data.vocab_size} is less than 258: 256 bytes, a separator, a mask token"
        if model.vocab_size is not None and config.data.vocab_size > model.vocab_size:
            yield "data.vocab_size", f"{config.data.vocab_size} is more than model.vocab_size {model.vocab_size}"
    blocks, memory = model.n_blocks, model.block_parameters
    if blocks * memory > 10**14:
        yield "model.d_model", f"{blocks} blocks of {memory:.1e} parameters are beyond any disk"


def _training(config: Settings) -> Iterator[Fault]:
    training, objective, n_blocks = config.training, config.objective, config.model.n_blocks
    if training.min_mask_fraction > training.max_mask_fraction:
        yield (
            "training.min_mask_fraction",
            (f"{training.min_mask_fraction} is more than max_mask_fraction {training.max_mask_fraction}"),
        )
    if training.n_stages is not None and training.n_stages > n_blocks:
        yield "training.n_stages", f"{training.n_stages} stages are more than the {n_blocks} blocks of the model"
    for key, text in objective.faults(training.seq_len):
        yield f"training.objective.{key}", text
    if training.mask_token_id is not None and (size := config.model.vocab_size) and training.mask_token_id >= size:
        yield "training.mask_token_id", f"{training.mask_token_id} is not below model.vocab_size {size}"
    if training.swap == "always":
        for depth in range(config.n_stages):
            settings = config.stage_training(depth)
            if settings.keep_best or settings.on_divergence == "rollback":
                what = "keep_best" if settings.keep_best else "on_divergence: rollback"
                text = f"always, but a swapped stage has no earlier weights for {what} (stage {depth}): leave that out"
                yield "training.swap", f"{text}, or set swap: auto where the stage fits"
                break
    yield from _windows(config)
    if training.cache_dir and config.store.path and training.cache_dir != config.store.path:
        yield "training.cache_dir", f"is another name of store.path, which says {config.store.path!r}"
    if not objective.masks and training.masks_per_sample > 1:
        yield (
            "training.masks_per_sample",
            f"{objective.name} masks nothing: every further mask would repeat the sample",
        )
    if training.mask_schedule_over == "depth" and not objective.masks:
        yield (
            "training.mask_schedule_over",
            f"{objective.name} masks nothing: there are no fractions to spread over depth",
        )
    elif training.progressive.enabled and config.time_as_depth and not objective.masks:
        key = "training.progressive.time_interpretation"
        yield (
            key,
            f"depth, and {objective.name} masks nothing: there are no fractions to spread over depth; leave it out",
        )
    for depth in range(config.n_stages):
        settings = config.stage_training(depth)
        if settings.heeds_held_out and settings.eval_every is None:
            which = "patience" if settings.patience is not None else "keep_best"
            key = f"stages.{depth}.training" if depth in config.stages else "training"
            yield f"{key}.{which}", "needs held-out losses: set training.eval_every too"
            break
    for key, rates in (
        ("training", training.block_learning_rates),
        *((f"stages.{depth}.training", own.training.block_learning_rates) for depth, own in config.stages.items()),
    ):
        for block in rates:
            if block >= n_blocks:
                yield f"{key}.block_learning_rates", f"there is no block {block}: the rack has 0 to {n_blocks - 1}"
    if training.mode == "independent" and not training.progressive.enabled and not objective.masks:
        yield (
            "training.mode",
            f"independent gives each stage its own masked fractions, and {objective.name} masks nothing",
        )
    if config.model.time_embedding != "none" and not objective.masks:
        yield (
            "model.time_embedding",
            f"{objective.name} masks nothing: there is no masked share to take as input",
        )
    yield from _block_size(config)
    yield from _mask_windows(config)


def _block_size(config: Settings) -> Iterator[Fault]:
    training, key = config.training, "training.block_size"
    if not config.finds_block_size:
        return
    if training.progressive.enabled:
        yield key, "auto: stacks of progressive training have model.architecture.blocks_per_stack blocks; give a number"
    elif training.mode == "independent":
        yield key, "auto: independent stages do not stand on each other; give a number"
    elif training.mode == "fused" and training.fusion_mode == "trainable":
        yield key, "auto: fused trainable stages hold all blocks so far, whatever the size; give a number"
    if training.batch_size == AUTO:
        yield key, "auto: batch_size is auto as well, and each is found with the other given; give one a number"
    if training.mask_windows is not None:
        yield key, "auto: mask_windows are for a known number of stages; give a number, or leave them out"


def _windows(config: Settings) -> Iterator[Fault]:
    """Windows of the corpus: how many cannot be."""
    windows, key = config.training.windows, "training.windows"
    if not config.has_windows:
        return
    if windows == AUTO:
        if config.store.max_bytes is None:
            yield key, "auto makes boundaries fit into store.max_bytes, which is not set"
        return
    budgets = {
        depth: config.stage_training(depth).budget(config.training.seq_len) for depth in range(config.n_sections)
    }
    short = min(((steps, depth) for depth, steps in budgets.items() if steps is not None), default=None)
    if short is not None and windows > short[0]:
        text = f"{windows} windows are more than the {short[0]} steps of stage {short[1]}, and each needs one"
        yield key, f"{text}: give at most {short[0]}, or more steps"


def _mask_windows(config: Settings) -> Iterator[Fault]:
    training, key = config.training, "training.mask_windows"
    windows, mapping = training.mask_windows, training.progressive.stack_time_mapping
    if not config.time_as_depth or config.finds_block_size:
        return
    if windows is None:
        if training.progressive.enabled and mapping == "custom":
            yield "training.progressive.stack_time_mapping", f"custom needs {key}: a [from, to] for each stage"
        return
    if len(windows) != config.n_sections:
        given = f"{len(windows)} window" + ("s" if len(windows) > 1 else "")
        yield key, f"{given} for {config.n_sections} stages: give a [from, to] for each"
        return
    reached = training.min_mask_fraction
    for low, high in sorted(map(tuple, windows)):
        if not 0.0 <= low < high <= 1.0:
            yield key, f"[{low:g}, {high:g}] does not run upwards within 0 and 1"
            return
        if low > reached:
            break
        reached = max(reached, high)
    if reached < training.max_mask_fraction:
        yield key, f"no stage trains on the fractions just above {reached:g}: widen a window to hold them"


def _stages(config: Settings) -> Iterator[Fault]:
    count = config.n_stages
    for depth in config.stages:
        if depth >= count:
            yield f"stages.{depth}", f"there is no such stage: the schedule has {count} (0 to {count - 1})"
