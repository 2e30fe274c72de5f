"""Inference: filling holes, continuing prompts, exporting racks and loading them back."""

from stackwise.inference.export import ExportOptions, export
from stackwise.inference.exported import Exported, load_rack, read_export
from stackwise.inference.forward import LoadedModel, Stages
from stackwise.inference.generate import Continuing, Filling, FillStep, fill, sample_causal
from stackwise.model.rack import StageModules

__all__ = [
    "Continuing",
    "ExportOptions",
    "Exported",
    "FillStep",
    "Filling",
    "LoadedModel",
    "StageModules",
    "Stages",
    "export",
    "fill",
    "load_rack",
    "read_export",
    "sample_causal",
]
