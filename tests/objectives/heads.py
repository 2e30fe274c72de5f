"""Heads as a stage has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScoredHead(nn.Module):
    """A projection to `ids` of vectors [..., width], and a layer beside it that gives scores; float64."""

    def __init__(self, ids: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(ids, width, dtype=torch.float64))
        self.match = nn.Linear(width, 1, bias=False, dtype=torch.float64)

    def features(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T
