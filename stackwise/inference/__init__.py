"""Inference: filling holes, continuing prompts, exporting racks and loading them back."""

from stackwise.inference.export import export
from stackwise.inference.exported import Exported, load_rack, read_export
from stackwise.inference.forward import Stages, logits_at
from stackwise.inference.generate import FillStep, fill, sample_causal
from stackwise.model.rack import StageModules

__all__ = [
    "Exported",
    "FillStep",
    "StageModules",
    "Stages",
    "export",
    "fill",
    "load_rack",
    "logits_at",
    "read_export",
    "sample_causal",
]
