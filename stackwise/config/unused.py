"""Settings that were given and that this configuration cannot use: one line for each reason.

The canonical form leaves few: a choice carries its settings. Old keys without a place are named by the translations.
"""

from __future__ import annotations

from collections.abc import Iterable

from stackwise.config.choices import Blockwise, EndToEnd, Mode, NoFusion, Tail
from stackwise.config.fields import Section, changed
from stackwise.config.precision import own_adapters, stack_precision
from stackwise.config.schema import Settings
from stackwise.config.training import ProgressiveConfig

OWN_ADAPTERS = (
    *("qlora_rank", "qlora_alpha", "qlora_strategy", "qlora_rank_pattern", "qlora_alpha_pattern", "qlora_configs"),
)
"""What says of which size a stack's own adapters are."""
SHARED = "the phases of training.growth share rows and a budget"
NO_BOUNDARY = "no stage of this schedule reads a boundary"


def reading_depths(config: Settings) -> list[int]:
    """The stages that read a boundary. The schedule says so stage by stage; tests hold the two against each other."""
    if config.bottom:  # what is frozen below all of them makes one
        return list(range(config.n_stages))
    reads = config.has_windows and not config.training.plan.whole
    sections = range(1, config.n_sections) if reads else ()
    fusions = [] if config.training.progressive.holds_trunk else config.fusions
    return [*sections, *(config.n_sections + k for k, (first, _) in enumerate(fusions) if first > 0)]


def has_blocks_above(config: Settings) -> bool:
    """Whether some section of the rack has blocks above it that it could train along."""
    plan = config.training.plan
    on_top = not config.prepends and not plan.apart and not plan.whole and not plan.joint
    return config.n_sections > 1 and on_top


def trains_heads_apart(config: Settings) -> bool:
    """Whether some stage trains a head while the front that it may be tied to is frozen."""
    if config.training.adapters is not None:  # both do
        return False
    sections = config.n_sections > 1 and not config.prepends and not config.grows
    return sections or any(first > 0 or config.training.fusion.head_alone for first, _ in config.fusions)


class _Lines:
    """Collects settings by the reason why they are unused; the first reason that is given counts."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def section(self, path: str, section: Section, reasons: Iterable[tuple[str, str | bool | None]]) -> None:
        """What of one section is unused.

        Args:
            path: The section's key.
            section: The section.
            reasons: Names with blanks between, and why they are unused; None or False: they are used.
        """
        changes, by_reason = changed(section), dict[str, list[str]]()
        for names, why in reasons:
            hit = [name for name in names.split() if name in changes]
            if why and hit:  # the first reason counts
                by_reason.setdefault(str(why), []).extend(hit)
                changes = [name for name in changes if name not in hit]
        for why, names_of in by_reason.items():
            many = len(names_of) > 1
            self.lines.append(f"{path}.{', '.join(sorted(names_of))}{': unused,' if many else ' is unused:'} {why}")


def unused_settings(config: Settings) -> list[str]:
    """One line for each reason why settings that were given are not used, or not whole."""
    lines = _Lines()
    training, progressive, store = config.training, config.training.progressive, config.store
    alone = "there is one stage"
    lines.lines += config.unused
    # A mode that the preset gave, and that divides the rack as the stacks do, is not worth a line.
    other = type(training.mode) is not type(Mode.of(Mode.default)) or training.mode.grows
    other = other or training.mode.partition(config.model) != config.partition
    joint = training.plan.joint
    grows = joint and "training.growth is given"
    above = has_blocks_above(config)
    lines.section(
        "training",
        training,
        [
            ("mode", progressive.enabled and other and "training.progressive.enabled is true"),
            ("mode", not isinstance(training.mode, EndToEnd) and grows),
            (
                "fresh_masks mask_schedule_over mask_windows fusion",
                joint and SHARED,
            ),
            (
                "min_mask_fraction max_mask_fraction mask_schedule_type mask_pool mask_token_id",
                not config.objective.masks and f"{config.objective.name} masks nothing",
            ),
            ("mask_schedule_over", training.mask_schedule_over == "depth" and config.n_sections == 1 and alone),
            (
                "mask_schedule_over",
                training.mask_schedule_over == "time"
                and config.n_sections > 1
                and config.time_as_depth
                and "independent stages go over depth, each alone",
            ),
            ("mask_windows", not config.time_as_depth and "fractions go over time (training.mask_schedule_over)"),
            ("mask_windows", config.n_sections == 1 and alone),
            ("fresh_masks", config.n_stages == 1 and alone),
            ("windows", not config.has_windows and NO_BOUNDARY),
            ("lookahead", not above and "no stage of this schedule has blocks above it"),
            ("fusion", not isinstance(training.fusion, NoFusion) and config.n_sections == 1 and alone),
            ("swap_parts", training.swap == "never" and "training.swap is never"),
            ("swap_experts", training.swap == "never" and "training.swap is never"),
            ("swap_experts", not config.model.total(lambda m: len(m.ffn.pieces(m))) and "no block has experts"),
            (
                "activation_checkpointing",
                training.swap == "always" and "training.swap is always, and swapped stages recompute blocks anyway",
            ),
            ("memory", training.swap == "never" and not config.finds_block_size and "training.swap is never"),
            ("tied_head", not config.model.tie_embeddings and "model.tie_embeddings is false"),
            ("tied_head", not trains_heads_apart(config) and "no stage trains a head without the front"),
        ],
    )
    objective = config.objective
    # an objective from outside says only when it is built which way attention looks
    looks_back = objective.causal or objective.unadaptable() or objective.code or config.adapts
    both = not looks_back and f"with {objective.name} attention sees in both directions"
    attention = config.model.attention
    both = getattr(attention, "window_sides", None) != "both" and both
    norm = config.model.norm
    lines.section("model", config.model, [("norm_bias", norm != "layernorm" and f"model.norm is {norm}")])
    lines.section("model.attention", attention, [("window window_blocks", both)])
    lines.section("model.ffn", config.model.ffn, config.model.ffn.unused())
    if not progressive.enabled and not grows:
        lines.section("training.mode", training.mode, training.mode.unused(config.model))
    _limits(config, lines.lines, above)
    # only there gradients can underflow
    half = "fp16" in (config.precision, *(stack_precision(config, depth) for depth in range(config.n_sections)))
    for depth, section in [(None, training), *((depth, entry.training) for depth, entry in config.stages.items())]:
        effective = training if depth is None else config.stage_training(depth)
        key = "training" if depth is None else f"stages.{depth}.training"
        if section.curriculum is not None:
            by = section.curriculum.by
            lines.section(f"{key}.curriculum", section.curriculum, [("model", by != "model" and f"by is {by}")])
        if section.meta is not None:
            named = bool(config.data.tasks) and "data.tasks names the tasks"
            lines.section(f"{key}.meta", section.meta, [("permutations permuted", named)])
        lines.section(
            key,
            section,
            [
                ("tokens epochs_per_layer", effective.steps is not None and "steps is given"),
                ("epochs_per_layer", effective.tokens is not None and "tokens is given"),
                ("decay", effective.lr_schedule != "wsd" and f"lr_schedule is {effective.lr_schedule}"),
                ("min_learning_rate", effective.lr_schedule == "constant" and "lr_schedule is constant"),
                ("loss_scale", not half and f"precision is {config.precision}"),
            ],
        )
    for depth, entry in config.stages.items():
        if entry.precision is not None and config.n_sections <= depth:
            lines.lines.append(f"stages.{depth}.precision is unused: no block is new with that stage")
    lines.section("training.progressive", progressive, _progressive(config, progressive))
    reads = reading_depths(config)
    recomputes = progressive.enabled and progressive.cache_activations is False
    # a stage may read a boundary that is recomputed
    stored = any(config.stores_boundary(depth) for depth in reads)
    lines.section(
        "store",
        store,
        [
            ("every fuse_passes codec keep chunk_bytes", not reads and NO_BOUNDARY),
            ("every fuse_passes keep", recomputes and "training.progressive.cache_activations is false"),
            ("fuse_passes keep", not stored and f"store.every is {store.every}: none is stored"),
        ],
    )
    distillation, others = config.distillation, "match at task_weight top_k temperature"
    lines.section(
        "init", config.init, [("blocks base adapters experts", config.init.weights is None and "the weights are fresh")]
    )
    lines.section("distillation", distillation, [(others, distillation.teacher is None and "there is no teacher")])
    tracking = config.tracking
    off = not any(tracker.named for tracker in tracking.trackers)  # event files have no projects
    lines.section("tracking", tracking, [("project group name", off and "no tracker in use knows runs by name")])
    return lines.lines


def _progressive(config: Settings, progressive: ProgressiveConfig) -> list[tuple[str, str | bool | None]]:
    has_adapters = any(own_adapters(config, depth) for depth in range(config.n_sections))
    frozen, disabled = progressive.trunk_strategy == "frozen", "training.progressive.enabled is false"
    qlora_only = not frozen and not progressive.progressive_qlora
    learns = "a QLoRA trunk learns by its adapters (trunk_strategy: frozen has none)" if qlora_only else None
    without = "the trunk is frozen" if frozen else "beside progressive_qlora stacks have adapters by qlora_enabled"
    strategy = progressive.qlora_strategy
    others = " ".join(name for name in ProgressiveConfig.model_fields if name not in ("enabled", *OWN_ADAPTERS))
    stacks = config.model.architecture.n_stacks or 1
    further = "progressive_qlora_rank progressive_qlora_alpha"
    return [
        (others, not progressive.enabled and disabled),
        (" ".join(OWN_ADAPTERS), not progressive.enabled and not has_adapters and disabled),
        ("max_stacks", (progressive.max_stacks or 0) > stacks and f"there are {stacks} stacks"),
        ("cache_activations", not frozen and "a QLoRA trunk changes with every step, so nothing of it is stored"),
        ("cache_activations", config.prepends and "with stacks added below, every stage reads tokens"),
        (
            "trunk_precision",
            not progressive.holds_trunk and "a stage reads activations, and holds no trunk",
        ),
        ("qlora_enabled", bool(progressive.qlora_enabled) and not has_adapters and without),
        (
            "qlora_enabled",
            not progressive.qlora_enabled
            and has_adapters
            and (learns or "weights in precision qlora learn by their adapters"),
        ),
        (" ".join(OWN_ADAPTERS), not has_adapters and without),
        (f"progressive_qlora {further}", frozen and "the trunk is frozen"),
        (further, not progressive.progressive_qlora and "training.progressive.progressive_qlora is false"),
        (f"progressive_qlora {further}", config.n_sections == 1 and "there is one stack"),
        ("qlora_rank_pattern qlora_alpha_pattern", strategy != "progressive" and f"qlora_strategy is {strategy}"),
        ("qlora_configs", strategy != "variable" and f"qlora_strategy is {strategy}"),
        ("qlora_rank qlora_alpha", strategy == "variable" and "qlora_configs are given, stack by stack"),
    ]


def _limits(config: Settings, lines: list[str], above: bool) -> None:
    """Numbers of which only so much can be used."""
    training, n_blocks = config.training, config.model.n_blocks
    mode = training.plan
    is_set = isinstance(mode, Blockwise) and "block_size" in changed(mode) and not (mode.n_stages or mode.block_sizes)
    if is_set and training.block_size > n_blocks:
        text = f"{training.block_size} is more than the model's blocks: {n_blocks} is used"
        lines.append(f"training.mode.block_size: {text}")
    lookahead, most = training.lookahead, n_blocks - 1 - config.partition[0][1]
    if isinstance(lookahead, Tail) and above and lookahead.blocks > most:
        text = f"{lookahead.blocks} is more than the blocks above the lowest stage: {most} is used"
        lines.append(f"training.lookahead.blocks: {text}")
