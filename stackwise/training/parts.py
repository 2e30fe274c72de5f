"""The parts of a stage that is swapped, made one at a time, and the groups of them that take turns.

A group is a `StageModel` of its own: the front, some blocks, or the head, above a boundary that lives for one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from stackwise.training.stage import StageModel

L = TypeVar("L")

FRONT, HEAD = "front", "head"


class Parts(Protocol):
    """Makes the parts of one stage."""

    names: Sequence[str]
    """In forward order: "front" where the stage reads tokens, the blocks, "head" where it has one."""
    order: Sequence[str]
    """The same names in the order in which a whole stage's model has them."""
    trains: Sequence[str]
    """Those with parameters that train."""
    precision: str
    """What the stage computes in."""
    tied: bool
    """Whether the head projects with the front's embedding, both of them held here."""

    def make(self, name: str, trained: Mapping[str, Tensor] | None, embedding_VD: Tensor | None = None) -> nn.Module:
        """A part on the CPU, gradients required for what trains. Called in threads: it draws from no global generator.

        Args:
            name: The part.
            trained: Values of its trained parameters; None: it starts as it does in a fresh stage.
            embedding_VD: What a tied head projects with.
        """

    def model(self, parts: Mapping[str, nn.Module]) -> StageModel:
        """Some neighbouring parts as the model of a stage, in training mode."""


@dataclass(frozen=True)
class Group:
    """Neighbouring parts that are resident together."""

    index: int
    names: tuple[str, ...]


def make_groups(parts: Parts, count: int) -> list[Group]:
    """The front, the blocks in `count` groups of about one size, the head."""
    blocks = [name for name in parts.names if name not in (FRONT, HEAD)]
    count = max(1, min(count, len(blocks)))
    edges = [len(blocks) * k // count for k in range(count + 1)]
    found = [tuple(blocks[edges[k] : edges[k + 1]]) for k in range(count)]
    front, head = ([(name,)] if name in parts.names else [] for name in (FRONT, HEAD))
    return [Group(index, names) for index, names in enumerate([*front, *found, *head])]


@dataclass
class Loaded:
    """A group in memory: its parts, and what an update needs of the disk, by part."""

    group: Group
    parts: dict[str, nn.Module]
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    gradients: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    means: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def to(self, device: torch.device) -> None:
        """Move the parts, in place."""
        for module in self.parts.values():
            module.to(device)

    def parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Part, name and parameter of everything that trains, in the order in which a whole stage has them."""
        for part, module in self.parts.items():
            for name, p in module.named_parameters():
                if p.requires_grad:
                    yield part, name, p


def in_turn(load: Callable[[Group], L], groups: Sequence[Group]) -> Iterator[L]:
    """Each group loaded; the next one is being loaded, in a thread, while the caller works with one."""
    with ThreadPoolExecutor(1, "swap-loader") as pool:
        following = pool.submit(load, groups[0]) if groups else None
        for place in range(len(groups)):
            assert following is not None
            loaded = following.result()
            following = pool.submit(load, groups[place + 1]) if place + 1 < len(groups) else None
            yield loaded
            del loaded
