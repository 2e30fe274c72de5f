"""The parts of a stage that is swapped: made one at a time, in groups that take turns in memory.

A group is a `StageModel` of its own: the front, some blocks, or the head, above a boundary that lives for one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from stackwise.training.ranks import Ranks, Reducer, SingleProcess
from stackwise.training.stage import StageModel
from stackwise.training.swap_pieces import Lender

L = TypeVar("L")

FRONT, HEAD = "front", "head"


@dataclass(frozen=True)
class SwapSpace:
    """Where a stage is swapped to, and in what portions."""

    directory: Path  # where its state lives, its own alone; taken up where there is one
    groups: int  # groups that its blocks make
    memory: int  # bytes of boundaries kept in memory; the rest goes to files
    warn: Callable[[str], None]
    pieces: int | None = None  # pieces of a part (experts of a block) in memory at once; None: all that rows reach
    passes: int = 0  # bytes of the device that passes may take which wait for the way down
    ahead: bool = True  # whether the device has room for groups that come and go, beside the one that computes
    kept: int = 0  # bytes of the host's memory in which pieces stay beside their files
    ranks: Ranks = field(default_factory=SingleProcess)  # those that train it together
    direct: bool = False  # whether files go past the page cache, where the file system can
    place: Callable[[int], Path] | None = None  # where the files of a rank of several are; None: in `directory`


class Parts(Protocol):
    """Makes the parts of one stage."""

    names: Sequence[str]  # in forward order: "front" where the stage reads tokens, the blocks, "head" where it has one
    order: Sequence[str]  # the same names in the order in which a whole stage's model has them
    trains: Sequence[str]  # those with parameters that train
    precision: str  # what the stage computes in
    tied: bool  # whether the head projects with the front's embedding, both of them held here

    def pieces(self, name: str) -> Sequence[str]:
        """The modules in a part that are there only while rows reach them, by their paths: they train, whole."""

    def make(
        self,
        name: str,
        trained: Mapping[str, Tensor] | None,
        embedding_VD: Tensor | None = None,
        *,
        whole: bool = True,
    ) -> nn.Module:
        """A part on the CPU, gradients required for what trains. Called in threads: it draws from no global generator.

        Args:
            trained: Values of its trained parameters; None: it starts as it does in a fresh stage.
            embedding_VD: What a tied head projects with.
            whole: Otherwise its pieces are without values, and `trained` has none of theirs.
        """

    def piece(self, name: str, path: str) -> Mapping[str, Tensor]:
        """The parameters of a piece as it starts, by their names in the part."""

    def model(self, parts: Mapping[str, nn.Module]) -> StageModel:
        """Some neighbouring parts as the model of a stage, in training mode."""


class DividedParts(Parts, Protocol):
    """Makes the parts of one stage, also without values."""

    def outline(self, name: str) -> nn.Module:
        """A part on the meta device, gradients required for what trains."""


@dataclass(frozen=True)
class PartGroup:
    """Neighbouring parts that are resident together."""

    index: int
    names: tuple[str, ...]


def make_groups(parts: Parts, count: int) -> list[PartGroup]:
    """The front, the blocks in `count` groups of about one size, the head."""
    blocks = [name for name in parts.names if name not in (FRONT, HEAD)]
    count = max(1, min(count, len(blocks)))
    edges = [len(blocks) * k // count for k in range(count + 1)]
    middle = [tuple(blocks[edges[k] : edges[k + 1]]) for k in range(count)]
    front, head = ([(name,)] if name in parts.names else [] for name in (FRONT, HEAD))
    return [PartGroup(index, names) for index, names in enumerate([*front, *middle, *head])]


@dataclass
class Loaded:
    """A group in memory: its parts, and what an update needs of the disk, by part."""

    group: PartGroup
    parts: dict[str, nn.Module]
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    gradients: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    means: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shares: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # of several ranks, this one's of the weights
    sums: Reducer = field(default_factory=Reducer)  # what adds up its gradients over microbatches and ranks

    def to(self, device: torch.device) -> None:
        """Move the parts and what an update needs, in place; pieces that are not there stay away."""
        for module in self.parts.values():
            module._apply(lambda t: t if t.is_meta else t.to(device, non_blocking=True))  # type: ignore[no-untyped-call]
        for tensors in (*self.states.values(), *self.gradients.values(), *self.shares.values()):
            for name, tensor in tensors.items():
                tensors[name] = tensor.to(device, non_blocking=True)

    def tensors(self) -> Iterator[Tensor]:
        """All that it has on the device."""
        for module in self.parts.values():
            yield from (t for t in (*module.parameters(), *module.buffers()) if not t.is_meta)
        for tensors in (*self.states.values(), *self.gradients.values(), *self.shares.values()):
            yield from tensors.values()

    def parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Part, name and parameter of all that trains, as a whole stage has them in order; on meta: not there."""
        for part, module in self.parts.items():
            for name, p in module.named_parameters():
                if p.requires_grad:
                    yield part, name, p


def in_turn(turns: Sequence[Callable[[], L]]) -> Iterator[L]:
    """Each turn's group loaded; the next one is being loaded, in a thread, while the caller works with one.

    Whoever works with one lets go of it before asking for the next: three would be in memory otherwise.
    """
    with ThreadPoolExecutor(1, "swap-loader") as pool:
        following = pool.submit(turns[0]) if turns else None
        for place in range(len(turns)):
            assert following is not None
            loaded = following.result()
            following = pool.submit(turns[place + 1]) if place + 1 < len(turns) else None
            yield loaded
            del loaded


def pieces_of(parts: Parts) -> dict[str, Sequence[str]]:
    """The paths of the pieces of each part that trains and has some."""
    return {name: paths for name in parts.names if name in parts.trains and (paths := parts.pieces(name))}


def lend(part: nn.Module, lender: Lender) -> None:
    """Let a part ask for its pieces when rows reach them."""
    for module in part.modules():
        if hasattr(module, "lend"):
            setattr(module, "lend", lender)  # noqa: B010


def lender_of(part: nn.Module) -> Lender | None:
    """What lends a part its pieces."""
    lenders = (getattr(module, "lend", None) for module in part.modules())
    return next((lender for lender in lenders if lender is not None), None)
