"""Passes of a group that wait in memory for the way down, as far as it goes: these are not computed a second time.

What a pass keeps of its group's own weights is only where they are: they leave with the group, and are put under the
same parameters when it comes again. So what waits is activations, and the gradients are the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
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


class _Weight:
    """What stands for a weight, a view of one, or what autocast made of one, in all passes of its group."""

    def __init__(self, parameter: nn.Parameter, like: Tensor, offset: int | torch.SymInt) -> None:
        self._parameter, self._dtype, self._offset = parameter, like.dtype, offset  # offset: in the parameter
        self._shape, self._stride = like.size(), like.stride()
        self._tensor: Tensor | None = None

    def tensor(self) -> Tensor:
        """It, of the values that the parameter has when the first pass asks; the group keeps them until all are gone.

        It lives as long as the graphs that refer to it, so no longer than the last pass of its group.
        """
        if self._tensor is None:
            whole = self._parameter.detach().to(self._dtype)
            self._tensor = whole.as_strided(self._shape, self._stride, whole.storage_offset() + self._offset)
        return self._tensor


class GroupWeights:
    """The weights of a group, which passes of it that wait only refer to.

    Attributes:
        may_wait: Whether its parts may wait without them: all of them train, and nothing else of any size is there.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        parameters = [p for part in parts.values() for p in part.parameters()]
        self.may_wait = all(p.requires_grad and not p.is_meta for p in parameters) and not any(
            getattr(module, "anchored", None) is not None for part in parts.values() for module in part.modules()
        )
        self._parameters = {id(p): p for p in parameters}
        dtypes = {p.dtype for p in parameters}
        self._dtype = dtypes.pop() if len(dtypes) == 1 else None  # None: they differ
        self._references: dict[tuple[Any, ...], _Weight] = {}

    @contextlib.contextmanager
    def apart(self) -> Iterator[_Count]:
        """Inside, what is computed keeps references to these weights in place of them."""
        count = _Count(self)
        with torch.autograd.graph.saved_tensors_hooks(count.pack, _unpacked):
            yield count

    def reference(self, tensor: Tensor) -> _Weight | None:
        """What stands for a tensor that is made of a weight; None: it is not."""
        whole = tensor if tensor._base is None else tensor._base
        if (parameter := self._origin(whole)) is None:
            return None
        offset = tensor.storage_offset() - whole.storage_offset()
        key = id(parameter), tensor.dtype, tensor.size(), tensor.stride(), offset
        if (reference := self._references.get(key)) is None:
            reference = self._references[key] = _Weight(parameter, tensor, offset)
        return reference

    def _origin(self, whole: Tensor) -> nn.Parameter | None:
        """The group's parameter that a tensor is, or is a cast of."""
        if (parameter := self._parameters.get(id(whole))) is not None:
            return parameter
        if whole.dtype is self._dtype:  # a cast has another
            return None
        cast: Any = whole.grad_fn
        if cast is None or cast.name() != "ToCopyBackward0":
            return None
        return self._parameters.get(id(getattr(cast.next_functions[0][0], "variable", None)))


class _Count:
    """Counts the bytes that a pass keeps, as it is computed."""

    def __init__(self, weights: GroupWeights) -> None:
        self.weights, self.nbytes = weights, 0
        self._seen: set[int] = set()

    def pack(self, tensor: Tensor) -> Tensor | _Weight:
        """What is kept for the backward pass in place of a tensor."""
        if (reference := self.weights.reference(tensor)) is not None:
            return reference
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._seen:  # what is kept is alive, so an address is one storage
            self._seen.add(address)
            self.nbytes += storage.nbytes()
        return tensor.detach()


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
        self._weights: dict[int, GroupWeights] = {}

    def clear(self) -> None:
        """Let everything go."""
        self._passes.clear()
        self._parts.clear()
        self._weights.clear()
        self.nbytes = 0

    def room(self, following: int) -> bool:
        """Whether a pass is kept that so many will follow on the way up: the last ones are, as they wait for least."""
        if not self.largest:
            return self.budget > 0  # what one takes is measured on the first
        return self.nbytes + (following + 1) * self.largest <= self.budget

    def weights(self, index: int, parts: Mapping[str, nn.Module]) -> GroupWeights:
        """The weights of the group that goes up: made for its first microbatch, the same for all of them."""
        if (weights := self._weights.get(index)) is None:
            weights = self._weights[index] = GroupWeights(parts)
        return weights

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
        self._weights.pop(index, None)  # graphs alone refer to weights from here on, and these go with them
        if not any(group == index for group, _ in self._passes):
            return
        for part in parts.values():
            for p in part.parameters():
                p.data = torch.empty(0, dtype=p.dtype, device=p.device)
        self._parts[index] = parts

    def parts(self, index: int) -> Mapping[str, nn.Module] | None:
        """The parts of a group that waits, to have their weights again; None: it does not."""
        return self._parts.pop(index, None)


def _unpacked(kept: Tensor | _Weight) -> Tensor:
    return kept.tensor() if isinstance(kept, _Weight) else kept
