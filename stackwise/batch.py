"""What goes through a stage: named tensors by row on the way up, named terms of the loss at the end.

Shapes in names: B rows, S positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stackwise.errors import UsageError

TOKENS, MASKS, ACTIVATIONS, SEGMENTS, TASKS = "tokens", "masks", "activations", "segments", "tasks"
"""Inputs that every stage knows. All others are named columns of the data, such as "targets"."""


_HOST = "stackwise_host"
"""The attribute of a tensor on a device that has what it was copied from."""


def on_host(tensor: Tensor) -> Tensor:
    """A tensor's values on the CPU; of a batch's tokens, without waiting for the device."""
    host: Tensor = getattr(tensor, _HOST, tensor)
    return host.cpu()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; what comes from the CPU travels by itself, and nothing is waited for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        with contextlib.suppress(RuntimeError):  # where nothing can be pinned, the copy is waited for
            tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Batch:
    """Some rows, each of its inputs under a name.

    Args:
        rows_B: Their numbers in the rowset.
        sample_ids_B16: Ids of their samples, uint8; None: whoever needs ids makes them of the tokens.
        tensors: By name, rows first: "tokens" [B, S]; "masks" [B, S], bool; "activations" [B, S, D], where the stage
            reads a boundary; "segments" [B, S], where attention stays within documents; "tasks" [B], where tasks are
            answered by columns of their own; and named columns.
        passes: Passes over the stage's rows when it is read in training, counted from its first step. None: for no
            training.
    """

    rows_B: np.ndarray
    sample_ids_B16: np.ndarray | None
    tensors: Mapping[str, Tensor]
    passes: float | None = None

    def __getitem__(self, name: str) -> Tensor:
        """The input of this name.

        Raises:
            UsageError: The batch has none.
        """
        if name not in self.tensors:
            raise UsageError(f"the batch has no {name}", hint=f"give each batch a `{name}` tensor [B, S]")
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def tokens_BS(self) -> Tensor:  # noqa: N802
        """The samples' tokens."""
        return self.tensors[TOKENS]

    @property
    def masks_BS(self) -> Tensor:  # noqa: N802
        """Their masks, on the CPU: which positions are scored is then known without waiting for the device."""
        return self.tensors[MASKS]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, but for the masks; pinned tensors travel while the device computes."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in pinned memory, from which a GPU copies by itself."""
        return self._moved(Tensor.pin_memory)

    def above(self, x_BSD: Tensor) -> Batch:
        """The same rows one stage higher: `x_BSD` is what enters there."""
        return replace(self, tensors={**self.tensors, ACTIVATIONS: x_BSD})

    def part(self, first: int, until: int) -> Batch:
        """Some of its rows."""
        ids = None if self.sample_ids_B16 is None else self.sample_ids_B16[first:until]
        tensors = {name: tensor[first:until] for name, tensor in self.tensors.items()}
        return replace(self, rows_B=self.rows_B[first:until], sample_ids_B16=ids, tensors=tensors)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        moved = {name: tensor if name == MASKS else move(tensor) for name, tensor in self.tensors.items()}
        if (tokens_BS := moved.get(TOKENS)) is not None and tokens_BS.device.type != "cpu":
            setattr(tokens_BS, _HOST, self.tensors[TOKENS])  # a slice of it, or a cast, has none
        return replace(self, tensors=moved)


@dataclass(frozen=True)
class Term:
    """A named part of the loss, of one batch. Over a step it counts as `weight` times the mean of all its summands.

    An objective returns its terms. A module within a block (a router that balances its experts, say) leaves those of
    its last forward pass in an attribute `terms` of its own, by name; they are taken from there right after the pass.
    Terms of one name from several blocks are added up.

    Args:
        sum: Sum of the summands, a float32 scalar whose graph leads to what trains. A vector, of
            several sums with one count, is only looked at: it plays no part in the loss.
        count: How many there are. It must follow from masks and shapes alone, as it is asked for ahead of the pass
            (`RuntimeObjective.counts`). A module's term counts the positions that the module saw.
        weight: Factor on the mean.
    """

    sum: Tensor
    count: int
    weight: float = 1.0
