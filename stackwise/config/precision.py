"""Precisions of stacks by name, and their adapters: what configuration, builder and schedule agree on."""

from __future__ import annotations

import importlib.util

from stackwise.config.adapters import layers
from stackwise.config.model import ModelConfig
from stackwise.config.schema import Settings
from stackwise.config.training import ProgressiveConfig, Quantization
from stackwise.errors import UsageError

SYNONYMS = {"half": "fp16", "bfloat16": "bf16", "fp4": "nvfp4"}
"""Names that the original documents use, and ours."""

FORMATS = {"fp8": "fp8", "nvfp4": "nvfp4", "qlora": "nf4"}
"""Precisions that put weights into a narrow format by themselves, and the format's name."""

FP8_PRODUCTS = "fp8-products"
"""The precision of blocks that multiply in 8 bits (`training.products`): their weights are in no format."""

HELD_FORMATS = {"held-bf16": "bf16"}
"""The same of those that only frozen weights are held in."""

BITS = {"bf16": 16.0, "fp8": 8.0, "nvfp4": 4.5, "nf4": 4.127}
"""Bits of a packed weight in each format, its scales included but for a row's."""


def weight_format(precision: str) -> str | None:
    """The name of the narrow format that a precision puts weights into; None: it leaves them as they are."""
    return precision if Quantization.named(precision) else (FORMATS | HELD_FORMATS).get(canonical(precision))


def bits_per_weight(form: str) -> float:
    """Bits of a packed weight, its scales included but for a row's or a matrix's."""
    integers = Quantization.named(form)
    return BITS[form] if integers is None else integers.bits_per_weight


def canonical(precision: str) -> str:
    """One name for each precision: full, fp32, fp16, bf16, fp8, nvfp4, qlora."""
    return SYNONYMS.get(precision, precision)


def stack_precision(config: Settings, depth: int) -> str:
    """The precision of the blocks that are new with a stage, by its canonical name; full where it is the run's own."""
    settings = config.stage_training(depth)
    if settings.quantization:
        return settings.quantization.name
    if settings.products == "fp8":
        return FP8_PRODUCTS
    overrides, progressive = config.stages.get(depth), config.training.progressive
    name = (overrides.precision if overrides else None) or (
        progressive.new_stack_precision if progressive.enabled else "full"
    )
    return "full" if canonical(name) == config.precision else canonical(name)  # the same arithmetic is the same recipe


def trunk_precision(config: Settings, depth: int) -> str:
    """The precision that the blocks of stage `depth` are held in once another one trains, by its canonical name.

    Weights that were trained in a narrow format stay in it: no second rounding.
    """
    progressive, precision = config.training.progressive, stack_precision(config, depth)
    strategy = progressive.trunk_precision or ("qlora" if progressive.trunk_strategy == "qlora" else "full")
    return precision if weight_format(precision) or strategy == "full" else canonical(strategy)


def stack_adapters(config: Settings, depth: int, top: int) -> dict[str, tuple[int, float]]:
    """Rank and alpha of the adapters on the blocks of stage `depth` while stage `top` trains, by name.

    `stack` came with the blocks; `trunk_K` came when stage K was added (`progressive_qlora`). A QLoRA trunk for which
    neither kind is asked has the first.
    """
    progressive, adapters = config.training.progressive, {}
    qlora = progressive.holds_trunk and progressive.trunk_strategy == "qlora"
    if own_adapters(config, depth):
        adapters["stack"] = adapter_sizes(progressive, depth, config.n_sections)
    if qlora and progressive.progressive_qlora:
        sizes = progressive.progressive_qlora_rank, progressive.progressive_qlora_alpha
        adapters |= {trunk_adapters(above): sizes for above in range(depth + 1, top + 1)}
    return adapters


def own_adapters(config: Settings, depth: int) -> bool:
    """Whether the blocks of stage `depth` come with adapters."""
    progressive = config.training.progressive
    qlora = progressive.holds_trunk and progressive.trunk_strategy == "qlora"
    enabled = progressive.qlora_enabled or not progressive.progressive_qlora  # a trunk without either could not learn
    return (qlora and enabled) or stack_precision(config, depth) == "qlora"


def trunk_adapters(stack: int) -> str:
    """Name of the adapters that the stacks below get when a stack is added."""
    return f"trunk_{stack}"


def adapter_sizes(progressive: ProgressiveConfig, stack: int, max_stacks: int) -> tuple[int, float]:
    """Rank and alpha of the adapters of a stack.

    `simplified`: the same everywhere. `progressive`: by pattern over the stacks, from `qlora_rank` (`qlora_alpha`):
    `increasing` doubles each time, `decreasing` halves (to no less than 1), `linear` adds itself each time, `constant`
    stays. `variable`: `qlora_configs`, by stack.

    Args:
        progressive: The settings.
        stack: Index of the stack, in the order of making.
        max_stacks: How many there may be.

    Raises:
        UsageError: `variable` without an entry for this stack.
    """
    if progressive.qlora_strategy == "variable":
        sizes = progressive.qlora_configs.get(stack)
        if sizes is None:
            raise UsageError(
                f"no entry for stack {stack}: give entries 0 to {max_stacks - 1}, or set qlora_strategy: simplified"
            )
        return sizes.rank, sizes.alpha
    rank, alpha = progressive.qlora_rank, progressive.qlora_alpha
    if progressive.qlora_strategy == "simplified":
        return rank, alpha
    return (
        max(1, int(_pattern(progressive.qlora_rank_pattern, rank, stack))),
        _pattern(progressive.qlora_alpha_pattern, alpha, stack),
    )


def _pattern(pattern: str, first: float, stack: int) -> float:
    factor = {
        "increasing": 2.0 ** min(stack, 64),  # far above any rank: refused by the checks, not by an overflow
        "decreasing": 0.5 ** min(stack, 64),
        "linear": 1.0 + stack,
        "constant": 1.0,
    }
    return first * factor[pattern]


def provider_fault(settings: Quantization, model: ModelConfig) -> str | None:
    """Why torchao cannot round a model's weights so, where it is asked to; None: it can, or is not asked."""
    if settings.provider != "torchao":
        return None
    if settings.scale == "learned" or not settings.symmetric or settings.group == "tensor":
        return "torchao is used for symmetric integers by channel or group that span extremes: leave provider out"
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed: pip install stackwise[quantization], or leave provider out"
    for block in range(model.n_blocks):
        for layer, (_, inputs) in layers(model, block).items():
            if isinstance(settings.group, int) and (settings.group < 2 or inputs % settings.group):
                return (
                    f"torchao needs groups that divide a row, and {settings.group} does not divide {inputs} ({layer})"
                )
    return None
