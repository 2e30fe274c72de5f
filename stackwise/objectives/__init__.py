"""Objectives: masks, what is shown, what is scored. Masks need no torch, and the package loads without it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stackwise.objectives.masks import FixedMaskAssigner, MaskScheduler, corrupt, no_masks, uniform_masks

if TYPE_CHECKING:
    from stackwise.objectives.cross_entropy import head_cross_entropy
    from stackwise.objectives.objective import RuntimeObjective
    from stackwise.objectives.objectives import (
        AdaptationObjective,
        BlockDiffusionObjective,
        CLMObjective,
        CustomObjective,
        MaskDiffusionObjective,
        MLMObjective,
        make_objective,
    )

__all__ = [
    "AdaptationObjective",
    "BlockDiffusionObjective",
    "CLMObjective",
    "CustomObjective",
    "FixedMaskAssigner",
    "MLMObjective",
    "MaskDiffusionObjective",
    "MaskScheduler",
    "RuntimeObjective",
    "corrupt",
    "head_cross_entropy",
    "make_objective",
    "no_masks",
    "uniform_masks",
]


_MODULES = {"head_cross_entropy": "cross_entropy", "RuntimeObjective": "objective"}


def __getattr__(name: str) -> Any:
    """Load what needs torch when it is first asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, "objectives")
    return getattr(import_module(f"{__name__}.{module}"), name)
