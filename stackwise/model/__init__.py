"""The model: blocks, stacks, racks, their front and head. Plain `nn.Module`s, each usable by itself.

The kinds' facts (`stackwise.model.kinds`) need no torch; the package loads without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stackwise.model.attention import Cache, Caches, SoftmaxAttention
    from stackwise.model.block import Block, Stack, evaluating
    from stackwise.model.build import build_block, build_front, build_head, build_rack, part_digest
    from stackwise.model.builder import PRECISIONS, ProgressiveRackBuilder, create_stack_from_config, stack_dtype
    from stackwise.model.projections import AdaptedLinear, Adapter, add_adapters, merge_adapters
    from stackwise.model.rack import Front, Head, Rack, StageModules, enter, stages_of

_MODULES = {
    "attention": (
        "SoftmaxAttention",
        "Cache",
        "Caches",
    ),
    "block": (
        "Block",
        "Stack",
        "evaluating",
    ),
    "build": (
        "build_block",
        "build_front",
        "build_head",
        "build_rack",
        "part_digest",
    ),
    "builder": (
        "PRECISIONS",
        "ProgressiveRackBuilder",
        "create_stack_from_config",
        "stack_dtype",
    ),
    "projections": (
        "AdaptedLinear",
        "Adapter",
        "add_adapters",
        "merge_adapters",
    ),
    "rack": (
        "Front",
        "Head",
        "Rack",
        "StageModules",
        "enter",
        "stages_of",
    ),
}

__all__ = [
    "PRECISIONS",
    "AdaptedLinear",
    "Adapter",
    "Block",
    "Cache",
    "Caches",
    "Front",
    "Head",
    "ProgressiveRackBuilder",
    "Rack",
    "SoftmaxAttention",
    "Stack",
    "StageModules",
    "add_adapters",
    "build_block",
    "build_front",
    "build_head",
    "build_rack",
    "create_stack_from_config",
    "enter",
    "evaluating",
    "merge_adapters",
    "part_digest",
    "stack_dtype",
    "stages_of",
]


def __getattr__(name: str) -> Any:
    """Load what needs torch when it is first asked for (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
