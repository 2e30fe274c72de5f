"""The state of the generator that dropout draws from: kept where a pass over the same rows must draw the same again."""

from __future__ import annotations

import torch
from torch import Tensor


def generator_state(device: torch.device) -> Tensor:
    """The state of the generator that draws on a device."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.get_rng_state()


def set_generator(device: torch.device, state: Tensor) -> None:
    """Let the generator that draws on a device go on from a state."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.set_rng_state(state)
