"""The optimizer and the learning rate, both plain functions of the settings and the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

from stackwise.config import StageTraining
from stackwise.training import optimizers as kinds
from stackwise.training.adam8bit import AdamW8bit

BLOCK = "block."
"""What the name of a block's part begins with; its number in the rack follows."""
ENDS = ("front", "head")


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


class Stepper(Protocol):
    """What an engine needs of an optimizer; each group's `scale` is its share of the stage's learning rate."""

    param_groups: list[dict[str, Any]]
    state: Any

    def step(self) -> Any:
        """Take a step by the gradients that are there."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""


def make_optimizer(trained: Iterable[tuple[str, nn.Parameter]], settings: StageTraining) -> Stepper:
    """The optimizer of `training.optimizer`. Its state is plain tensors by parameter, whichever it is.

    adamw: AdamW (arXiv 1711.05101), fused where the device has it. adamw8bit: the same with its moments in 8 bits
    (`adam8bit.py`). muon: the matrices of the blocks by Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon),
    its updates scaled to the size of AdamW's so that learning rate and decay mean the same (arXiv 2502.16982, section
    2.2); all else by AdamW. Weight decay is on matrices alone.

    Args:
        trained: Parameters, each with its part: front, block.N, head, or the name of a block beyond.
        settings: Of the stage.
    """
    kind = settings.optimizer
    assert isinstance(kind, kinds.AdamW)
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for part, p in trained:
        if p.requires_grad:
            matrix = p.dim() >= 2
            orthogonal = isinstance(kind, kinds.Muon) and p.dim() == 2 and part not in ENDS
            groups.setdefault((orthogonal, not matrix, rate_scale(settings, part)), []).append(p)

    def chosen(orthogonal: bool) -> list[dict[str, Any]]:
        return [
            {"params": ps, "weight_decay": 0.0 if plain else settings.weight_decay, "scale": scale}
            for (own, plain, scale), ps in sorted(groups.items(), key=lambda item: item[0])
            if own is orthogonal
        ]

    betas = (kind.beta1, kind.beta2)
    rest = chosen(False)
    if isinstance(kind, kinds.AdamW8bit):
        return AdamW8bit(rest, lr=settings.learning_rate, betas=betas, eps=kind.eps)
    fused = bool(rest) and all(p.device.type in ("cuda", "cpu") for group in rest for p in group["params"])
    if not isinstance(kind, kinds.Muon) or not (matrices := chosen(True)):
        return torch.optim.AdamW(rest, lr=settings.learning_rate, betas=betas, eps=kind.eps, fused=fused)
    muon = torch.optim.Muon(matrices, lr=settings.learning_rate, momentum=kind.momentum, adjust_lr_fn="match_rms_adamw")
    if not rest:
        return muon
    return Both(muon, torch.optim.AdamW(rest, lr=settings.learning_rate, betas=betas, eps=kind.eps, fused=fused))


def rate_scale(settings: StageTraining, part: str) -> float:
    """A part's share of the stage's learning rate, by `training.block_learning_rates`."""
    number = part.removeprefix(BLOCK)
    own = settings.block_learning_rates.get(int(number)) if number.isdigit() else None
    return 1.0 if own is None else own / settings.learning_rate


class Both:
    """Two optimizers with parameters of their own, as one."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self._both = (first, second)
        self.param_groups = [*first.param_groups, *second.param_groups]
        self.state = second.state = first.state  # one table for both: a parameter is in one of them

    def step(self) -> None:
        """Take a step with each."""
        for optimizer in self._both:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for optimizer in self._both:
            optimizer.zero_grad(set_to_none)
