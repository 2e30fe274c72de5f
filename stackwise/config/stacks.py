"""What precisions and adapters of stacks must hold together, and which of their settings are in vain."""

from __future__ import annotations

from collections.abc import Iterator

from stackwise.config.precision import FORMATS, canonical, holds_trunk, stack_adapters, stack_precision
from stackwise.config.schema import Settings
from stackwise.errors import UsageError

KEY = "training.progressive"


def stack_faults(config: Settings) -> Iterator[tuple[str, str]]:
    """Each contradiction, as a dotted key and what is wrong with it."""
    progressive, model = config.training.progressive, config.model
    trunk = progressive.trunk_precision
    if progressive.enabled and trunk is not None and canonical(trunk) not in ("full", *FORMATS):
        yield f"{KEY}.trunk_precision", f"{trunk} is no way to hold a trunk: full, fp8, nvfp4 and qlora are"
    limit = min(model.d_model, model.kv_heads * model.head_dim, model.ffn_width)
    if model.attention == "mla":
        limit = min(limit, model.latent_rank, model.q_rank or limit, model.rotary_width or limit)
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


def stack_notes(config: Settings, given: set[str]) -> Iterator[str]:
    """One line for each setting that was given in vain.

    Args:
        config: The configuration.
        given: The settings of `training.progressive` that differ from their defaults.
    """
    for depth, own in config.stages.items():
        if own.precision is not None and config.n_sections <= depth:
            yield f"stages.{depth}.precision is unused: no block is new with that stage"
    progressive = config.training.progressive
    if not progressive.enabled:
        return
    adapters = {name for name in given if "qlora" in name}
    if progressive.trunk_strategy == "frozen":
        if any(stack_precision(config, depth) == "qlora" for depth in range(config.n_sections)):
            adapters = {name for name in adapters if name.startswith("progressive_")}
        if adapters:
            yield f"{KEY}.{', '.join(sorted(adapters))}: unused, the trunk is frozen"
    elif "cache_activations" in progressive.model_fields_set:
        yield f"{KEY}.cache_activations is unused: a QLoRA trunk changes with every step, so nothing of it is stored"
    if "trunk_precision" in given and not holds_trunk(config):
        yield f"{KEY}.trunk_precision is unused: a stage reads activations, and holds no trunk"
