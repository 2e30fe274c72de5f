"""Pretrained models in and out: families, checkpoints, exports."""

from stackwise.pretrained.checkpoint import Checkpoint, load_rack, read_part
from stackwise.pretrained.families import Description, TensorRef

__all__ = ["Checkpoint", "Description", "TensorRef", "load_rack", "read_part"]
