"""What precisions and adapters of stacks must hold together, and which of their settings are in vain."""

from __future__ import annotations

from collections.abc import Iterator

from stackwise.config.precision import FORMATS, canonical, holds_trunk, own_adapters, stack_adapters
from stackwise.config.progressive import ProgressiveConfig
from stackwise.config.rules import Rule, when
from stackwise.config.schema import Settings
from stackwise.errors import UsageError

KEY = "training.progressive"


def stack_faults(config: Settings) -> Iterator[tuple[str, str]]:
    """Each contradiction, as a dotted key and what is wrong with it."""
    progressive, model = config.training.progressive, config.model
    trunk = progressive.trunk_precision
    if progressive.enabled and trunk is not None and canonical(trunk) not in ("full", *FORMATS):
        yield f"{KEY}.trunk_precision", f"{trunk} is no way to hold a trunk: full, fp8, nvfp4 and qlora are"
    limit = min(model.attention.narrowest(model), model.ffn.narrowest(model))
    found: dict[str, str] = {}
    for depth in range(config.n_sections):
        try:
            adapters = stack_adapters(config, depth, config.n_sections - 1)
        except UsageError as error:
            found.setdefault(f"{KEY}.qlora_configs", error.message)
            continue
        for name, (rank, _) in adapters.items():
            if rank > limit:
                where = f"qlora_configs.{depth}.rank" if progressive.qlora_strategy == "variable" else "qlora_rank"
                key = where if name == "stack" else "progressive_qlora_rank"
                grown = f", by the pattern {pattern}" if name == "stack" and (pattern := _pattern(config)) else ""
                text = f"adapters of rank {rank} (stack {depth}{grown}) are above the rank of the matrices"
                found.setdefault(f"{KEY}.{key}", f"{text}: at most {limit}")
    yield from found.items()


def _pattern(config: Settings) -> str | None:
    """How ranks change from stack to stack, where they do."""
    progressive = config.training.progressive
    changing = progressive.qlora_strategy == "progressive" and progressive.qlora_rank_pattern != "constant"
    return progressive.qlora_rank_pattern if changing else None


def precision_notes(config: Settings) -> Iterator[str]:
    """One line for each precision of a stage's own that no block is in."""
    for depth, own in config.stages.items():
        if own.precision is not None and config.n_sections <= depth:
            yield f"stages.{depth}.precision is unused: no block is new with that stage"


def _own_adapters(config: Settings) -> bool:
    return any(own_adapters(config, depth) for depth in range(config.n_sections))


def _no_adapters(config: Settings, progressive: ProgressiveConfig) -> str | None:
    if _own_adapters(config):
        return None
    return _frozen(config, progressive) or "beside progressive_qlora stacks have adapters of their own by qlora_enabled"


def _frozen(config: Settings, progressive: ProgressiveConfig) -> str | None:
    return when(progressive.trunk_strategy == "frozen", "the trunk is frozen")


def _enabled(config: Settings, progressive: ProgressiveConfig) -> str | None:
    if progressive.qlora_enabled:
        return _no_adapters(config, progressive)
    if not _own_adapters(config):
        return None
    if progressive.trunk_strategy == "qlora" and not progressive.progressive_qlora:
        return "a QLoRA trunk learns by its adapters (trunk_strategy: frozen has none)"
    return "weights in precision qlora learn by their adapters"


def _cache(config: Settings, progressive: ProgressiveConfig) -> str | None:
    if progressive.trunk_strategy == "qlora":
        return "a QLoRA trunk changes with every step, so nothing of it is stored"
    return when(progressive.building_mode == "prepend", "with stacks added below, every stage reads tokens")


OWN_ADAPTERS = "qlora_rank qlora_alpha qlora_strategy qlora_rank_pattern qlora_alpha_pattern qlora_configs"
"""What says of which size a stack's own adapters are."""

PROGRESSIVE_RULES = (
    Rule(
        " ".join(name for name in ProgressiveConfig.model_fields if name not in ("enabled", *OWN_ADAPTERS.split())),
        lambda c, p: when(not p.enabled, f"{KEY}.enabled is false"),
    ),
    # A stage whose precision is qlora has adapters whatever the mode.
    Rule(OWN_ADAPTERS, lambda c, p: when(not p.enabled and not _own_adapters(c), f"{KEY}.enabled is false")),
    Rule(
        "max_stacks",
        lambda c, p: when(p.max_stacks > (n := c.model.architecture.n_stacks or p.max_stacks), f"there are {n} stacks"),
    ),
    Rule("cache_activations", _cache),
    Rule("trunk_precision", lambda c, p: when(not holds_trunk(c), "a stage reads activations, and holds no trunk")),
    Rule("qlora_enabled", _enabled),
    Rule(OWN_ADAPTERS, _no_adapters),
    Rule("progressive_qlora progressive_qlora_rank progressive_qlora_alpha", _frozen),
    Rule(
        "progressive_qlora_rank progressive_qlora_alpha",
        lambda c, p: when(not p.progressive_qlora, f"{KEY}.progressive_qlora is false"),
    ),
    Rule(
        "progressive_qlora progressive_qlora_rank progressive_qlora_alpha",
        lambda c, p: when(c.n_sections == 1, "there is one stack"),
    ),
    Rule(
        "qlora_rank_pattern qlora_alpha_pattern",
        lambda c, p: when(p.qlora_strategy != "progressive", f"{KEY}.qlora_strategy is {p.qlora_strategy}"),
    ),
    Rule(
        "qlora_configs",
        lambda c, p: when(p.qlora_strategy != "variable", f"{KEY}.qlora_strategy is {p.qlora_strategy}"),
    ),
    Rule(
        "qlora_rank qlora_alpha",
        lambda c, p: when(p.qlora_strategy == "variable", f"{KEY}.qlora_configs are given, stack by stack"),
    ),
    Rule("time_per_stack", lambda c, p: "a stack sees masked shares, and no count of time steps"),
    Rule(
        "time_embedding_dim time_encoding_type",
        lambda c, p: when(p.time_interpretation != "input", "time is not an input"),
    ),
    Rule(
        "time_embedding_dim",
        lambda c, p: when(p.time_embedding_dim != c.model.time_embedding_dim, "model.time_embedding_dim is given"),
    ),
    Rule(
        "time_encoding_type",
        lambda c, p: when(p.time_encoding_type != c.model.time_embedding, "model.time_embedding is given"),
    ),
    Rule("stack_time_mapping", lambda c, p: when(not c.objective.masks, "clm masks nothing")),
    Rule(
        "stack_time_mapping",
        lambda c, p: when(
            p.stack_time_mapping == "custom" and not c.time_as_depth,
            "custom is for fractions that go over depth (time_interpretation)",
        ),
    ),
    Rule(
        "time_interpretation",
        lambda c, p: when(p.time_interpretation == "depth" and c.n_sections == 1, "there is one stage"),
    ),
)
