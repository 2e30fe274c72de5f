"""What settings must hold together, and which of them a configuration sets in vain."""

from __future__ import annotations

from collections.abc import Iterator

from stackwise.config.after import after_faults, after_notes
from stackwise.config.fields import AUTO, Section
from stackwise.config.model import LINEAR_SETTINGS, MLA_SETTINGS
from stackwise.config.schema import Settings
from stackwise.config.stacks import stack_faults, stack_notes
from stackwise.config.training import StageTraining

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
    if model.n_heads % model.kv_heads:
        yield (
            "model.n_kv_heads",
            f"{model.kv_heads} key and value heads do not divide {model.n_heads} heads: take a divisor of it",
        )
    if model.attention == "mha" and model.kv_heads != model.n_heads:
        yield "model.attention", f"mha has as many key and value heads as heads; n_kv_heads {model.kv_heads} means gqa"
    if model.attention == "gqa" and model.n_kv_heads is None:
        yield "model.attention", "gqa needs model.n_kv_heads, fewer than n_heads"
    if model.attention == "mla" and model.rotary_width % 2:
        yield "model.rope_head_dim", f"rotary positions need an even width, not {model.rotary_width}"
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
    training, n_blocks = config.training, config.model.n_blocks
    if training.min_mask_fraction > training.max_mask_fraction:
        yield (
            "training.min_mask_fraction",
            (f"{training.min_mask_fraction} is more than max_mask_fraction {training.max_mask_fraction}"),
        )
    if training.n_stages is not None and training.n_stages > n_blocks:
        yield "training.n_stages", f"{training.n_stages} stages are more than the {n_blocks} blocks of the model"
    if training.mlm_mask + training.mlm_random > 1:
        yield "training.mlm_random", f"with mlm_mask it makes {training.mlm_mask + training.mlm_random:g}, more than 1"
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
    if config.objective == "clm" and training.masks_per_sample > 1:
        yield "training.masks_per_sample", "clm masks nothing: every further mask would repeat the sample"
    if training.mask_schedule_over == "depth" and config.objective == "clm":
        yield "training.mask_schedule_over", "clm masks nothing: there are no fractions to spread over depth"
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
    if training.mode == "independent" and not training.progressive.enabled and config.objective == "clm":
        yield "training.mode", "independent gives each stage its own masked fractions, and clm masks nothing"
    if training.loss_weight != "none" and config.objective in ("clm", "custom"):
        yield "training.loss_weight", f"{training.loss_weight} weighs by masked fraction; {config.objective} has none"
    if (size := training.diffusion_block) is not None:
        if config.objective != "mask_diffusion":
            yield "training.diffusion_block", f"blocks are of mask_diffusion; the objective is {config.objective}"
        if training.seq_len % size:
            yield (
                "training.diffusion_block",
                f"{size} does not divide training.seq_len {training.seq_len}: take a divisor of it",
            )
    if config.model.time_embedding != "none" and config.objective == "clm":
        yield "model.time_embedding", "clm masks nothing: there is no masked share to take as input"
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


def _training_notes(key: str, settings: StageTraining, given: set[str], precision: str) -> Iterator[str]:
    """One line for each setting of a stage's training that was given in vain; `key` is where it was."""
    if "tokens" in given and settings.steps:
        yield f"{key}.tokens is unused: steps is given"
    if "epochs_per_layer" in given and (settings.steps or settings.tokens):
        yield f"{key}.epochs_per_layer is unused: training.{'steps' if settings.steps else 'tokens'} is given"
    if "muon_momentum" in given and settings.optimizer != "muon":
        yield f"{key}.muon_momentum is unused: optimizer is {settings.optimizer}"
    if settings.on_divergence == "stop" and (unused := sorted(given & {"divergence_factor", "divergence_limit"})):
        yield f"{key}.{', '.join(unused)}: unused, on_divergence is stop"
    if "rollback_factor" in given and settings.on_divergence != "rollback":
        yield f"{key}.rollback_factor is unused: on_divergence is {settings.on_divergence}"
    if "loss_scale" in given and precision != "fp16":
        yield f"{key}.loss_scale is unused: precision is {precision}"


def changed(section: Section) -> list[str]:
    """The settings of a section that were given, and differ from their defaults."""
    fields = type(section).model_fields
    return [
        name
        for name in fields
        if name in section.model_fields_set
        and getattr(section, name) != fields[name].get_default(call_default_factory=True)
    ]


def notes(config: Settings) -> list[str]:
    """One line for each setting that was given and that this configuration cannot use."""
    training, given = config.training, set(changed(config.training))
    lines = []
    if "cache_mode" in given and training.cache_mode is not None:
        lines.append("training.cache_mode is unused: the mode decides what is stored")
    if training.fusion_evaluation:
        lines.append("training.fusion_evaluation is unused: every run evaluates the fused rack")
    if training.mode != "fused" and "fusion_mode" in given:
        lines.append(f"training.fusion_mode is unused: training.mode is {training.mode}")
    if "block_size" in given and (training.mode in ("layerwise", "end_to_end") and not training.progressive.enabled):
        lines.append(f"training.block_size is unused: training.mode is {training.mode}")
    if "trial_steps" in given and not config.finds_block_size:
        lines.append("training.trial_steps is unused: training.block_size is a number")
    if training.n_stages and "block_size" in given:
        lines.append("training.block_size is unused: training.n_stages is given")
    lines += _training_notes("training", training, given, config.precision)
    for depth, own in config.stages.items():
        settings = config.stage_training(depth)
        lines += _training_notes(f"stages.{depth}.training", settings, set(changed(own.training)), config.precision)
    if "mask_windows" in given and not config.time_as_depth:
        lines.append("training.mask_windows is unused: fractions go over time (training.mask_schedule_over)")
    if "windows" in given and not config.has_windows:
        lines.append("training.windows is unused: no stage of this schedule reads a boundary")
    stacked = (
        training.progressive.building_mode == "append"
        if training.progressive.enabled
        else (training.mode != "independent")
    )
    lines += after_notes(config, given)
    if "lookahead" in given and (not stacked or config.n_sections == 1):
        lines.append("training.lookahead is unused: no stage of this schedule has blocks above it")
    if training.lookahead == "none" and "lookahead_blocks" in given:
        lines.append("training.lookahead_blocks is unused: training.lookahead is none")
    if training.swap == "never" and given & {"swap_parts", "memory"}:
        lines.append("training.swap_parts and memory are unused: training.swap is never")
    if config.model.tie_embeddings is False and "tied_head" in given:
        lines.append("training.tied_head is unused: model.tie_embeddings is false")
    if config.objective != "mlm" and given & {"mlm_mask", "mlm_random"}:
        lines.append(f"training.mlm_mask and mlm_random are unused: the objective is {config.objective}")
    if config.objective == "clm" and given & {"min_mask_fraction", "max_mask_fraction", "mask_schedule_type"}:
        lines.append("training.min_mask_fraction, max_mask_fraction, mask_schedule_type are unused: clm masks nothing")
    lines += _model_notes(config)
    lines += _store_notes(config)
    lines += stack_notes(config, set(changed(training.progressive)))
    lines += _progressive_notes(config)
    named = sorted(set(changed(config.tracking)) & {"project", "group", "name"})
    if named and not config.tracking.wandb and not config.tracking.mlflow:
        lines.append(f"tracking.{', '.join(named)}: unused, neither tracking.wandb nor tracking.mlflow is on")
    return lines


def _model_notes(config: Settings) -> list[str]:
    model = config.model
    kind, given = model.attention or "mha", set(changed(model))
    users = dict.fromkeys(MLA_SETTINGS, "mla") | dict.fromkeys(LINEAR_SETTINGS, "linear")
    idle = sorted(name for name, user in users.items() if name in given and user != kind)
    lines = [f"model.{name} is unused: model.attention is {kind}" for name in idle]
    if kind == "mla" and "n_kv_heads" in given:
        lines.append("model.n_kv_heads is unused: mla makes the keys of all heads from one latent")
    if kind == "mla" and model.positions != "rope" and "rope_head_dim" in given:
        lines.append("model.rope_head_dim is unused: model.positions is learned")
    if kind == "linear" and model.feature_map != "performer" and "random_features" in given:
        lines.append(f"model.random_features is unused: model.feature_map is {model.feature_map}")
    if model.time_embedding == "none" and "time_embedding_dim" in given:
        lines.append("model.time_embedding_dim is unused: model.time_embedding is none")
    return lines


def _store_notes(config: Settings) -> list[str]:
    given = [f"store.{name}" for name in ("every", "fuse_passes") if name in changed(config.store)]
    whole = config.training.mode == "fused" and config.training.fusion_mode == "trainable"
    if given and (config.n_stages == 1 or (whole and not config.training.progressive.enabled)):
        return [f"{' and '.join(given)}: unused, every stage reads tokens"]
    return []


def _progressive_notes(config: Settings) -> list[str]:
    progressive = config.training.progressive
    given = set(changed(progressive)) - {"enabled"}
    if not progressive.enabled:
        given.discard("max_stacks")
        if not given:
            return []
        return [f"training.progressive.{', '.join(sorted(given))}: unused, training.progressive.enabled is false"]
    lines = []
    if "mode" in changed(config.training):
        lines.append("training.mode is unused: training.progressive.enabled is true")
    time = given & {"time_embedding_dim", "time_encoding_type", "time_per_stack"}
    if progressive.time_interpretation == "input":
        time -= {"time_embedding_dim", "time_encoding_type"}
    if time:
        lines.append(f"training.progressive.{', '.join(sorted(time))}: unused, time is not an input")
    return lines
