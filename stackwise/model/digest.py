"""The content id of a part: what its weights are, whatever file, device or order they came from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stackwise.identity import Hex, content_id, digest


def part_digest(part: nn.Module | Mapping[str, Tensor]) -> Hex:
    """The id of a part's weights: xxh3-128 over (name, dtype, shape, bytes) of each tensor, in the order of names.

    A tied projection counts in the front, which owns it: it is not in a head's state dict. Tables that follow from
    the configuration (rotary positions) do not count.

    Args:
        part: A module, or a state dict.
    """
    state = part.state_dict() if isinstance(part, nn.Module) else part
    entries = []
    for name in sorted(state):
        tensor = state[name].detach()
        raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        entries.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), digest(raw)])
    return content_id("part", entries)
