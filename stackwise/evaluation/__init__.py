"""Evaluation: held-out figures of a rack and of every stage of it, with one stage in memory at a time."""

from stackwise.evaluation.evaluate import evaluate, score
from stackwise.evaluation.passes import HeldOut, Measure, bits_per_byte, bound_masks, fraction_masks
from stackwise.model.rack import StageModules

__all__ = ["HeldOut", "Measure", "StageModules", "bits_per_byte", "bound_masks", "evaluate", "fraction_masks", "score"]
