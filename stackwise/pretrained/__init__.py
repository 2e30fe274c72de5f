"""Pretrained models in and out: families, checkpoints, exports."""

from stackwise.pretrained.checkpoint import Checkpoint, load_rack
from stackwise.pretrained.families import Description, TensorRef
from stackwise.pretrained.reading import read_part

__all__ = ["Checkpoint", "Description", "TensorRef", "load_rack", "read_part"]
