"""Inference: filling holes, continuing prompts."""

from stackwise.inference.forward import LoadedModel, Stages
from stackwise.inference.generate import Continuing, Filling, FillStep, fill, sample_causal
from stackwise.model.rack import StageModules

__all__ = [
    "Continuing",
    "FillStep",
    "Filling",
    "LoadedModel",
    "StageModules",
    "Stages",
    "fill",
    "sample_causal",
]
