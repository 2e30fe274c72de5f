"""Inference: filling holes, continuing prompts, exporting racks and loading them back."""

from stackwise.inference.causal import sample_causal
from stackwise.inference.export import Exported, export, load_rack, read_export
from stackwise.inference.fill import FillStep, fill
from stackwise.inference.forward import Stages, logits_at
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
