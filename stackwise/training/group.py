"""The processes that train one stage together. Today there is one; engines call this where several would add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor


class Group(Protocol):
    """Ranks that hold the same weights, each with rows of its own. Every call is made by all of them, in one order."""

    rank: int
    """Which of them this process is, from 0."""
    size: int
    """How many there are."""

    def sum_counts(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The sums over all ranks, by name."""

    def sum_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Let each tensor (losses, gradients) become its sum over all ranks, in place and in a fixed order."""

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Let each tensor become that of rank 0, in place."""

    def barrier(self) -> None:
        """Wait until every rank is here."""


class SingleProcess:
    """A group of one: sums are what they are."""

    rank, size = 0, 1

    def sum_counts(self, counts: Mapping[str, int]) -> dict[str, int]:
        """See `Group`."""
        return dict(counts)

    def sum_tensors(self, tensors: Sequence[Tensor]) -> None:
        """See `Group`."""

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """See `Group`."""

    def barrier(self) -> None:
        """See `Group`."""
