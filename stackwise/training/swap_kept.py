"""Passes of a group that wait in memory for the way down, as far as it goes: these are not computed a second time.

What a pass keeps of its group's own weights is only where they are: they leave with the group, and are put under the
same parameters when it comes again. So what waits is activations, and the gradients are the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.batch import Batch, Term


@dataclass(frozen=True)
class Pass:
    """A microbatch through a group, its graph alive: what entered, what left, and the terms so far."""

    batch: Batch
    leaving: Tensor
    terms: Mapping[str, Term]
    nbytes: int


@dataclass(frozen=True)
class _Weight:
    """What stands for a weight, a view of one, or what autocast made of one."""

    parameter: nn.Parameter
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt  # in the parameter
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """It, of the values that the parameter has now."""
        whole = self.parameter.detach().to(self.dtype)
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)


class _Count:
    """Counts the bytes that a pass keeps, as it is computed."""

    def __init__(self, parameters: Mapping[int, nn.Parameter]) -> None:
        self.parameters, self.nbytes = parameters, 0
        self._seen: set[int] = set()

    def pack(self, tensor: Tensor) -> Tensor | _Weight:
        """What is kept for the backward pass in place of a tensor."""
        whole = tensor if tensor._base is None else tensor._base
        if (parameter := self._origin(whole)) is not None:
            offset = tensor.storage_offset() - whole.storage_offset()
            return _Weight(parameter, tensor.size(), tensor.stride(), offset, tensor.dtype)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:  # what is kept is alive, so an address is one storage
            self._seen.add(storage.data_ptr())
            self.nbytes += storage.nbytes()
        return tensor.detach()

    def _origin(self, whole: Tensor) -> nn.Parameter | None:
        """The group's parameter that a tensor is, or is a cast of."""
        if (parameter := self.parameters.get(id(whole))) is not None:
            return parameter
        cast: Any = whole.grad_fn
        if cast is None or cast.name() != "ToCopyBackward0":
            return None
        return self.parameters.get(id(getattr(cast.next_functions[0][0], "variable", None)))


class KeptPasses:
    """Those of one step.

    Args:
        budget: Bytes that they may take.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.nbytes = budget, 0
        self.largest = 0
        """Bytes of one pass, at most."""
        self._passes: dict[tuple[int, int], Pass] = {}
        self._parts: dict[int, Mapping[str, nn.Module]] = {}

    def clear(self) -> None:
        """Let everything go."""
        self._passes.clear()
        self._parts.clear()
        self.nbytes = 0

    def room(self, following: int) -> bool:
        """Whether a pass is kept that so many will follow on the way up: the last ones are, as they wait for least."""
        if not self.largest:
            return self.budget > 0  # what one takes is measured on the first
        return self.nbytes + (following + 1) * self.largest <= self.budget

    @contextlib.contextmanager
    def counting(self, parts: Mapping[str, nn.Module]) -> Iterator[_Count]:
        """Inside, what is computed keeps references to the weights of parts, not these."""
        parameters = {id(p): p for part in parts.values() for p in part.parameters()}
        count = _Count(parameters)
        with torch.autograd.graph.saved_tensors_hooks(count.pack, _unpacked):
            yield count

    def put(self, index: int, number: int, kept: Pass) -> bool:
        """Keep a pass, if there is room for what it came to."""
        self.largest = max(self.largest, kept.nbytes)
        if self.nbytes + kept.nbytes > self.budget:
            return False
        self._passes[index, number] = kept
        self.nbytes += kept.nbytes
        return True

    def take(self, index: int, number: int) -> Pass | None:
        """The pass of a microbatch through a group, which is then let go; None: it is to be computed again."""
        kept = self._passes.pop((index, number), None)
        self.nbytes -= 0 if kept is None else kept.nbytes
        return kept

    def put_away(self, index: int, parts: Mapping[str, nn.Module]) -> None:
        """The group goes: its parts wait without their weights where passes of theirs do."""
        if not any(group == index for group, _ in self._passes):
            return
        for part in parts.values():
            for p in part.parameters():
                p.data = torch.empty(0, dtype=p.dtype, device=p.device)
        self._parts[index] = parts

    def parts(self, index: int) -> Mapping[str, nn.Module] | None:
        """The parts of a group that waits, to have their weights again; None: it does not."""
        return self._parts.pop(index, None)


def keepable(parts: Sequence[nn.Module]) -> bool:
    """Whether parts may wait without weights: all of them train, and nothing else of any size is in them."""
    return all(p.requires_grad and not p.is_meta for part in parts for p in part.parameters()) and not any(
        getattr(module, "anchored", None) is not None for part in parts for module in part.modules()
    )


def _unpacked(kept: Tensor | _Weight) -> Tensor:
    return kept.tensor() if isinstance(kept, _Weight) else kept
