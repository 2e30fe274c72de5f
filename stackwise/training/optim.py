"""The optimizer and the learning rate, both plain functions of the settings and the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from stackwise.config import StageTraining


def learning_rate(settings: StageTraining, step: int, steps: int) -> float:
    """The learning rate of step `step` of `steps` (both count from 0).

    Linear warm-up over the share `warmup` of the steps, then the shape that `lr_schedule` names, down to
    `min_learning_rate` times the peak. wsd (warm-up, stable, decay: arXiv 2404.06395) holds the peak until the
    last fifth of the steps.
    """
    warm = math.ceil(settings.warmup * steps)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    match settings.lr_schedule:
        case "constant":
            left = 1.0
        case "linear":
            left = 1.0 - done
        case "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * done))
        case "wsd":
            left = min(1.0, (1.0 - done) * 5.0)
    floor = settings.min_learning_rate
    return settings.learning_rate * (floor + (1.0 - floor) * left)


def make_optimizer(parameters: Iterable[nn.Parameter], settings: StageTraining) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), fused where the device has it; weight decay on matrices alone."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = bool(trained) and all(p.device.type in ("cuda", "cpu") for p in trained)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.adam_eps,
        fused=fused,
    )
