"""Pretrained models in and out: families, checkpoints, exports."""
