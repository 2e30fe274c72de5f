"""What settings that are valid on their own must hold together."""

from __future__ import annotations

import re
from collections.abc import Iterator

from stackwise.config.adapters import adapter_faults
from stackwise.config.choices import AdaptiveFusion, CausalAdaptation, HierarchicalFusion, NoFusion
from stackwise.config.continual import continual_faults, meta_faults
from stackwise.config.fields import AUTO
from stackwise.config.growth import Grown
from stackwise.config.kinds import Fault
from stackwise.config.parallel import parallel_faults
from stackwise.config.precision import (
    FORMATS,
    canonical,
    provider_fault,
    stack_adapters,
    weight_format,
)
from stackwise.config.schema import Settings
from stackwise.config.training import Curriculum
from stackwise.errors import UsageError

MOST_BLOCKS = 1024
"""Blocks of a rack, at most: what is made for each block must stay cheap to list."""
MOST_PARAMETERS = 10**14
"""Parameters of a rack, at most: 200 TB in 16 bits."""


def faults(config: Settings) -> list[Fault]:
    """Every contradiction."""
    if sizes := list(_sizes(config)):
        return sizes  # what follows makes lists of that size
    kinds = (
        _model,
        _data,
        _distillation,
        _training,
        _stacks,
        adapter_faults,
        _fusion,
        _adaptation,
        parallel_faults,
        meta_faults,
    )
    return [fault for kind in kinds for fault in kind(config)]


def _sizes(config: Settings) -> Iterator[Fault]:
    """What is too large as a product of numbers that are not."""
    model, training = config.model, config.training
    if model.n_blocks > MOST_BLOCKS:
        yield "model.architecture.n_stacks", f"{model.n_blocks} blocks are more than the {MOST_BLOCKS} that a rack has"
    elif (parameters := model.total(lambda block: block.block_parameters)) > MOST_PARAMETERS:
        text = f"{model.n_blocks} blocks of {parameters / model.n_blocks:.1e} parameters are beyond any disk"
        yield "model.d_model", text
    if (model.vocab_size or 1) * model.d_model > MOST_PARAMETERS // 100:
        yield "model.vocab_size", f"{model.vocab_size} ids of width {model.d_model} are beyond any memory"
    if config.row_positions * model.d_model * max(1, training.batch_size) > 10**13:
        text = f"{training.batch_size} rows of {config.row_positions} positions of width {model.d_model}"
        yield "training.batch_size", f"{text} are beyond any memory"


def _model(config: Settings) -> Iterator[Fault]:
    model, data = config.model, config.data
    yield from ((f"model.{key}", text) for key, text in model.stream.faults(model))
    model = model.column
    if model.head_size is None and model.d_model % model.n_heads:
        width = "d_model" if config.model.stream.columns == 1 else "a column's width"
        text = f"{model.n_heads} heads do not divide {width} {model.d_model}: take a divisor of it"
        yield "model.n_heads", f"{text}, or set model.head_size"
    elif model.positions == "rope" and model.head_dim % 2:
        key = "model.n_heads" if model.head_size is None else "model.head_size"
        yield key, f"rotary positions need an even head width, not {model.head_dim}"
    else:
        yield from ((f"model.attention.{key}", text) for key, text in model.attention.faults(model))
        yield from ((f"model.ffn.{key}", text) for key, text in model.ffn.faults(model))
        yield from ((f"model.rope_scaling.{key}", text) for key, text in model.rope_scaling.faults(model))
    if not model.first_norm and model.norm_place != "pre":
        yield "model.first_norm", f"false, but with norm_place {model.norm_place} no norm comes first: leave it out"
    if model.position_offset and model.positions != "learned":
        yield "model.position_offset", f"{model.position_offset}, but only learned positions have a table"
    needed, by = config.training.seq_len, ""
    if config.objective.sequences > 1:
        needed, by = needed // config.objective.sequences, f" by {config.objective.sequences} sequences"
    if model.max_seq_len is not None and model.max_seq_len < needed:
        yield "model.max_seq_len", f"{model.max_seq_len} is less than training.seq_len {config.training.seq_len}{by}"
    if model.vocab_size is not None and model.vocab_size < 4:
        yield "model.vocab_size", f"{model.vocab_size} is too small for text, a separator and a mask token"
    if data.vocab_size is not None:
        if data.tokenizer == "bpe" and data.vocab_size < 258:
            yield "data.vocab_size", f"{data.vocab_size} is less than 258: 256 bytes, a separator, a mask token"
        if model.vocab_size is not None and data.vocab_size > model.vocab_size:
            yield "data.vocab_size", f"{data.vocab_size} is more than model.vocab_size {model.vocab_size}"
    if model.time_embedding.parameters(1) and not config.objective.masks:
        text = f"{config.objective.name} masks nothing: there is no masked share to take as input"
        yield "model.time_embedding", text


def _data(config: Settings) -> Iterator[Fault]:
    data, names = config.data, [task.name for task in config.data.tasks]
    if len(names) == 1:
        yield "data.tasks", f"{names[0]} alone: name two tasks or more, or its paths in data.paths"
    if doubled := next((name for name in names if names.count(name) > 1), None):
        yield "data.tasks", f"two tasks are called {doubled}: give each a name of its own"
    if names and data.paths:
        yield "data.paths", "data.tasks names what is read already: leave one of both out"
    if config.tasks_in_turn:
        yield from continual_faults(config)
    if config.model.stream.columns > 1 and not config.training.continual.columns:
        yield "model.stream", "a column for each task: set training.continual: columns, or leave model.stream out"


def _distillation(config: Settings) -> Iterator[Fault]:
    distillation = config.distillation
    parts = config.n_stages > 1 or not config.training.plan.whole
    if distillation.teacher is not None and parts and not distillation.task_weight and distillation.match == "none":
        yield "distillation.task_weight", "0 and match none: a stage of some blocks has nothing to learn: raise one"


def _training(config: Settings) -> Iterator[Fault]:
    training, objective = config.training, config.objective
    if training.min_mask_fraction > training.max_mask_fraction:
        text = f"{training.min_mask_fraction} is more than max_mask_fraction {training.max_mask_fraction}"
        yield "training.min_mask_fraction", text
    if training.mask_token_id is not None and (size := config.model.vocab_size) and training.mask_token_id >= size:
        yield "training.mask_token_id", f"{training.mask_token_id} is not below model.vocab_size {size}"
    if not training.progressive.enabled:
        yield from ((f"training.mode.{key}", text) for key, text in training.mode.faults(config.model))
    yield from ((f"training.objective.{key}", text) for key, text in objective.faults(training.seq_len))
    if objective.reference is not None and config.n_stages > 1 and not training.plan.whole:
        text = f"{objective.name} compares whole models: stages of some blocks have none; set training.mode: end_to_end"
        yield "training.objective", text
    if objective.reference is not None and config.distillation.teacher is not None:
        yield "distillation.teacher", f"{objective.name} has a reference already: leave one of both out"
    if objective.rolls_out:
        yield from _rollouts(config)
    if not objective.masks:
        nothing = f"{objective.name} masks nothing"
        if training.masks_per_sample > 1:
            yield "training.masks_per_sample", f"{nothing}: every further mask would repeat the sample"
        if training.mask_schedule_over == "depth":
            yield "training.mask_schedule_over", f"{nothing}: there are no fractions to spread over depth; leave it out"
        elif config.time_as_depth:
            yield "training.mode", f"{training.mode.name} gives each stage its own masked fractions, and {nothing}"
    for place, part in (("attention", config.model.attention), ("ffn", config.model.ffn)):
        yield from ((f"model.{place}.{key}", text) for key, text in part.faults_in(config))
    yield from _store(config)
    yield from _stages(config)
    yield from _growth(config)
    yield from _block_size(config)
    if (training.row_groups or 1) > 1 and config.own_order is not None:
        yield "training.row_groups", f"{config.own_order} has its own order of rows: leave one of the two out"
    yield from _windows(config)
    yield from _mask_windows(config)


def _store(config: Settings) -> Iterator[Fault]:
    for name in re.findall(r"\{(.*?)\}", config.store.path or ""):
        if name not in ("rank", "host"):
            yield "store.path", f"{{{name}}} stands for nothing; {{rank}} is the number of a rank, {{host}} its host"


def _curriculum(config: Settings, curriculum: Curriculum, depth: int) -> Iterator[str]:
    """What rows cannot be ordered by."""
    objective, by = config.objective, curriculum.by
    if objective.rolls_out:
        yield f"{objective.name} trains on answers, which have no order: leave it out"
    if by == "model" and curriculum.model is None:
        yield "by: model needs model: DIR, a Hugging Face directory or an export"
    if by in ("model", "loss") and objective.sequences > 1:
        yield f"by: {by} goes by the loss of a row, and {objective.name} compares two answers: set by: length or rarity"
    if by == "loss" and (config.windows == 1 or depth >= config.n_sections):
        yield "by: loss goes by a stage's loss at the end of its window before: set training.windows, or by: model"


def _routes(config: Settings, depth: int) -> Iterator[str]:
    """What has no routes, or has an order of rows already."""
    settings, objective = config.stage_training(depth), config.objective
    if not config.model.total(lambda model: len(model.ffn.pieces(model))):
        yield "no block has experts: set model.ffn: {kind: moe, experts: 8}, or leave it out"
    if objective.rolls_out or objective.sequences > 1:
        yield f"{objective.name} trains on answers, whose routes are not counted: leave it out"
    if not isinstance(config.training.fusion, NoFusion):
        yield "training.fusion chooses blocks while it trains: leave one of both out"
    others = {"curriculum": settings.curriculum is not None, "meta": settings.meta is not None}
    others["continual: replay"] = config.training.continual.name == "replay"
    for name in [name for name, there in others.items() if there and settings.routes == "order"]:
        yield f"order, but training.{name} orders rows too: set routes: count, or leave one of both out"


def _stages(config: Settings) -> Iterator[Fault]:
    """What single stages cannot have."""
    training, n_blocks, count = config.training, config.model.n_blocks, config.n_stages
    for depth in config.stages:
        if depth >= count:
            yield f"stages.{depth}", f"there is no such stage: the schedule has {count} (0 to {count - 1})"
    apart = [depth for depth in sorted(config.stages) if depth < count]
    for depth in [*apart, *(depth for depth in range(count) if depth not in config.stages)]:
        settings = config.stage_training(depth)
        key = f"stages.{depth}.training" if depth in config.stages else "training"
        if settings.uses_held_out and settings.eval_every is None:
            which = "patience" if settings.patience is not None else "keep_best"
            yield f"{key}.{which}", "needs held-out losses: set training.eval_every too"
            break
        if settings.curriculum is not None and (faults := list(_curriculum(config, settings.curriculum, depth))):
            yield from ((f"{key}.curriculum", fault) for fault in faults)
            break
        if settings.routes is not None and (faults := list(_routes(config, depth))):
            yield from ((f"{key}.routes", fault) for fault in faults)
            break
        if depth not in config.stages:
            break  # the others are like it
    if training.swap == "always" and config.parallel.ranks > 1 and (why := config.swap_undivided) is not None:
        yield "training.swap", f"always, but {why}"
    if training.swap == "always":
        for depth in range(count):
            settings = config.stage_training(depth)
            if settings.keep_best or settings.divergence.goes_back:
                what = "keep_best" if settings.keep_best else f"divergence: {settings.divergence.name}"
                text = f"always, but a swapped stage has no earlier weights for {what} (stage {depth}): leave that out"
                yield "training.swap", f"{text}, or set swap: auto where the stage fits"
                break
    rates = [("training", training.block_learning_rates)]
    rates += [
        (f"stages.{depth}.training", overrides.training.block_learning_rates)
        for depth, overrides in config.stages.items()
    ]
    for key, by_block in rates:
        for block in by_block:
            if block >= n_blocks:
                yield f"{key}.block_learning_rates", f"there is no block {block}: the rack has 0 to {n_blocks - 1}"


def _growth(config: Settings) -> Iterator[Fault]:
    """How a rack cannot grow, and what cannot grow."""
    training, key = config.training, "training.growth"
    if not training.growth:
        return
    yield from ((f"{key}.{at}", text) for at, text in Grown(training.growth).faults(config.model))
    if training.progressive.enabled:
        how = "adds stacks below those there are" if config.prepends else "grows the rack stack by stack"
        yield key, f"training.progressive {how}: leave one of both out"
    elif training.mode.apart or training.mode.whole:
        yield key, f"{training.mode.name} stages cannot grow into one rack: leave one of both out (training.growth: [])"
    if config.init.weights is not None:
        yield key, "init.weights brings every block already: leave one of both out"
    for depth, overrides in config.stages.items():
        for name in sorted({"steps", "tokens", "epochs_per_layer"} & overrides.training.model_fields_set):
            yield f"stages.{depth}.training.{name}", "the phases of training.growth share the budget of training.steps"


def _block_size(config: Settings) -> Iterator[Fault]:
    """Where the stages' size cannot be found by trial."""
    training, key = config.training, "training.mode.block_size"
    if not config.finds_block_size:
        return
    if training.batch_size == AUTO:
        yield key, "auto: batch_size is auto as well, and each is found with the other given; give one a number"
    if training.mask_windows is not None:
        yield key, "auto: mask_windows are for a known number of stages; give a number, or leave them out"


def _rollouts(config: Settings) -> Iterator[Fault]:
    """What stages that train on their own answers cannot have."""
    training, name = config.training, config.objective.name
    if config.n_stages > 1 or training.grown is not None:
        yield "training.objective", f"{name} draws answers from a whole rack: set training.mode: end_to_end"
    elif config.bottom:
        yield "training.adapters.above", f"{name} draws answers from a whole rack, each of its blocks in the stage: 0"
    if config.distillation.teacher is not None:
        yield "distillation.teacher", f"{name} has a reference already: leave one of both out"
    if config.data.within_documents:
        yield "data.within_documents", f"{name} gives a row to each prompt: leave it out"
    by_section = {f"stages.{depth}.training": overrides.training for depth, overrides in config.stages.items()}
    for key, settings in {"training": training, **by_section}.items():
        if settings.eval_every is not None:
            text = f"{name} has no held-out loss, as its rows are answers of the rack as it is"
            yield f"{key}.eval_every", f"{text}: leave it out"


def _windows(config: Settings) -> Iterator[Fault]:
    """Windows of the corpus: how many cannot be."""
    windows, key = config.training.windows, "training.windows"
    if not config.has_windows:
        return
    if config.objective.rolls_out and windows == AUTO:
        yield key, f"auto bounds boundaries, and {config.objective.name} has none: give the number of its phases"
        return
    if windows == AUTO:
        if config.store.max_bytes is None:
            yield key, "auto makes boundaries fit into store.max_bytes, which is not set"
        return
    if windows == 1:
        return
    budgets = {
        depth: config.stage_training(depth).budget(config.training.seq_len) for depth in range(config.n_sections)
    }
    short = min(((steps, depth) for depth, steps in budgets.items() if steps is not None), default=None)
    if short is not None and windows > short[0]:
        text = f"{windows} windows are more than the {short[0]} steps of stage {short[1]}, and each needs one"
        yield key, f"{text}: give at most {short[0]}, or more steps"


def _mask_windows(config: Settings) -> Iterator[Fault]:
    """Windows of masked fractions that do not cover them, or are not one a stage."""
    training, key = config.training, "training.mask_windows"
    windows = training.mask_windows
    if not config.time_as_depth or config.finds_block_size or windows is None:
        return
    if len(windows) != config.n_sections:
        count = f"{len(windows)} window" + ("s" if len(windows) > 1 else "")
        yield key, f"{count} for {config.n_sections} stages: give a [from, to] for each"
        return
    reached = training.min_mask_fraction
    for low, high in sorted(map(tuple, windows)):
        if not low < high:
            yield key, f"[{low:g}, {high:g}] does not run upwards within 0 and 1"
            return
        if low > reached:
            break
        reached = max(reached, high)
    if reached < training.max_mask_fraction:
        yield key, f"no stage trains on the fractions just above {reached:g}: widen a window to hold them"


def _stacks(config: Settings) -> Iterator[Fault]:
    """Precisions and adapters of stacks."""
    progressive, model, key = config.training.progressive, config.model, "training.progressive"
    trunk = progressive.trunk_precision
    if progressive.enabled and trunk is not None and canonical(trunk) not in ("full", *FORMATS):
        yield f"{key}.trunk_precision", f"{trunk} is no way to hold a trunk: full, fp8, nvfp4 and qlora are"
    # every adapted matrix must carry the rank
    blocks = [model.at(block) for block in range(model.n_blocks)]
    limit = min(min(block.attention.narrowest(block), block.ffn.narrowest(block)) for block in blocks)
    faults: dict[str, str] = {}
    integers = [config.stage_training(depth).quantization for depth in range(config.n_stages)]
    for depth, settings in enumerate(integers):
        if settings is None or settings.trains != "scales":
            continue
        if depth < config.n_sections or not all(integers[: config.n_sections]):
            text = "scales train alone in a stage above blocks that were trained for integers: set training.fusion"
            yield f"stages.{depth}.training.quantization.trains", text
    for depth, settings in enumerate(integers):
        where = f"stages.{depth}.training.quantization" if depth in config.stages else "training.quantization"
        if settings is None or (fault := provider_fault(settings, model)) is None:
            continue
        yield f"{where}.provider", fault
        break
    for depth in range(config.n_sections):
        precision = config.stages[depth].precision if depth in config.stages else progressive.new_stack_precision
        if config.stage_training(depth).quantization and precision and weight_format(precision):
            yield f"stages.{depth}.precision", f"{precision} and training.quantization are two formats: keep one"
        if config.stage_training(depth).products != "full":
            where = f"stages.{depth}.training.products" if depth in config.stages else "training.products"
            if config.stage_training(depth).quantization:
                yield where, "fp8 and training.quantization exclude each other: keep one"
            elif precision not in (None, "full"):
                yield where, f"fp8 and the precision {precision} exclude each other: keep one"
        try:
            # Adapters that come with the stacks above are alike: those of the next one stand for all.
            adapters = stack_adapters(config, depth, min(depth + 1, config.n_sections - 1))
        except UsageError as error:
            faults.setdefault(f"{key}.qlora_configs", error.message)  # one line, whatever the number of stacks
            continue
        for name, (rank, _) in adapters.items():
            if rank > limit:
                where = f"qlora_configs.{depth}.rank" if progressive.qlora_strategy == "variable" else "qlora_rank"
                place = where if name == "stack" else "progressive_qlora_rank"
                changing = progressive.qlora_strategy == "progressive" and progressive.qlora_rank_pattern != "constant"
                pattern = f", by the pattern {progressive.qlora_rank_pattern}" if name == "stack" and changing else ""
                text = f"adapters of rank {rank} (stack {depth}{pattern}) are above the rank of the matrices"
                faults.setdefault(f"{key}.{place}", f"{text}: at most {limit}")
    yield from faults.items()


def _fusion(config: Settings) -> Iterator[Fault]:
    """Stages that train sections together."""
    fusion, key = config.training.fusion, "training.fusion"
    if isinstance(fusion, NoFusion):
        return
    if (share := getattr(fusion, "share", None)) is not None:
        yield from ((f"{key}.share", text) for text in _joint_share(config, share))
    if config.stands_apart:
        yield key, f"{fusion.name}: independent stages do not stand on each other"
    elif isinstance(fusion, HierarchicalFusion) and config.prepends:
        yield key, "hierarchical needs stacks that stand on finished ones; use trainable"
    elif isinstance(fusion, AdaptiveFusion) and config.fusions:
        steps, sections = config.stage_training(config.n_sections).steps, config.n_sections
        if fusion.steps is None:
            yield key, "adaptive spends a budget: set training.fusion.steps"
        elif fusion.rounds > (steps or fusion.steps) or (
            min(left for _, left in fusion.allotment(steps or fusion.steps, sections)) < 1
        ):
            text = f"{steps} leave none beside the probes of {sections} sections in {fusion.rounds} rounds"
            yield f"{key}.steps", f"{text}: raise it, or lower training.fusion.rounds or probe_steps"


def _joint_share(config: Settings, share: float) -> Iterator[str]:
    """Where no part of the stages' budget can be kept for a last one."""
    training = config.training
    if training.fusion.budget is not None:
        yield f"{share:g}, and training.fusion.steps {training.fusion.budget}: give one of both"
    if len(config.fusions) > 1 or isinstance(training.fusion, AdaptiveFusion):
        yield f"{training.fusion.name} has a budget of its own: set training.fusion.steps, or strategy: trainable"
    if training.progressive.enabled or training.plan.whole:
        what = training.plan.name
        yield f"the stages of {what} share no schedule with one after them: set training.fusion.steps"
    if config.has_windows and training.windows != 1:
        yield "one schedule for all stages goes through the rows once: leave training.windows out"
    for depth, overrides in config.stages.items():
        if {"steps", "tokens", "epochs_per_layer"} & overrides.training.model_fields_set:
            yield f"all stages share the budget of training.steps: leave that of stages.{depth} out"


def _adaptation(config: Settings) -> Iterator[Fault]:
    """The last stage, which turns the rack causal."""
    adaptation, key = config.training.adaptation, "training.adaptation"
    if not isinstance(adaptation, CausalAdaptation):
        return
    if (why := config.objective.unadaptable()) is not None:
        yield key, f"causal: {why}"
    if config.stands_apart:
        yield key, "causal: independent stages do not stand on each other; choose another training.mode"
