"""Precisions of stacks by name, and the sizes of adapters: what configuration, builder and schedule agree on."""

from __future__ import annotations

from stackwise.config.schema import ProgressiveConfig
from stackwise.errors import UsageError

SYNONYMS = {"half": "fp16", "bfloat16": "bf16", "fp4": "nvfp4"}
"""Names that the original documents use, and ours."""

FORMATS = {"fp8": "fp8", "nvfp4": "nvfp4", "qlora": "nf4"}
"""Precisions that put weights into a narrow format, and the format's name."""


def canonical(precision: str) -> str:
    """One name for each precision: full, fp32, fp16, bf16, fp8, nvfp4, qlora."""
    return SYNONYMS.get(precision, precision)


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
        own = progressive.qlora_configs.get(stack)
        if own is None:
            raise UsageError(
                f"training.progressive.qlora_configs has no entry for stack {stack}",
                hint=f"give it entries 0 to {max_stacks - 1}, or set qlora_strategy to simplified",
            )
        return own.rank, own.alpha
    rank, alpha = progressive.qlora_rank, progressive.qlora_alpha
    if progressive.qlora_strategy == "simplified":
        return rank, alpha
    return (
        max(1, int(_pattern(progressive.qlora_rank_pattern, rank, stack))),
        _pattern(progressive.qlora_alpha_pattern, alpha, stack),
    )


def _pattern(pattern: str, first: float, stack: int) -> float:
    factor = {"increasing": 2.0**stack, "decreasing": 0.5**stack, "linear": 1.0 + stack, "constant": 1.0}
    return first * factor[pattern]
