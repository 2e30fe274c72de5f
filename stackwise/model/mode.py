"""Running modules to look at them, not to train them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; afterwards each module is in the mode it was in."""
    before = [(child, child.training) for module in modules for child in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, mode in before:
            child.training = mode
