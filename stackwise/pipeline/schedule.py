"""A mode is a schedule of stages: the one place where a mode's name decides anything.

Everything below works on `Stage` alone: which blocks it holds, which parts it trains, what it reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from stackwise.config import StackWiseConfig

FRONT, HEAD = "front", "head"


def block_part(index: int) -> str:
    """The name of a block as a part: its file, its digest and its seed go by it."""
    return f"block.{index}"


@dataclass(frozen=True)
class Stage:
    """One entry of the schedule.

    Args:
        depth: Its place, from 0.
        first: The lowest block it holds.
        last: The highest block it holds.
        trains: Parts that train: "front", "block.N", "head".
        reads_boundary: Whether boundary `depth` enters it; otherwise it reads tokens and holds the front.
        rowset: Which rowset it trains on; stages with one number share their rows and masks.
    """

    depth: int
    first: int
    last: int
    trains: tuple[str, ...]
    reads_boundary: bool
    rowset: int

    @property
    def holds(self) -> tuple[str, ...]:
        """Every part in memory while the stage trains, in forward order."""
        front = () if self.reads_boundary else (FRONT,)
        return (*front, *self.blocks, HEAD)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks it holds, in forward order."""
        return tuple(block_part(i) for i in range(self.first, self.last + 1))

    @property
    def trunk(self) -> tuple[str, ...]:
        """The parts below it, which made the boundary that it reads; empty where it reads tokens."""
        return (FRONT, *(block_part(i) for i in range(self.first))) if self.reads_boundary else ()


def schedule(config: StackWiseConfig) -> list[Stage]:
    """The stages of a configuration, lowest first.

    A stage holds either its own blocks above a boundary, or (fused, trainable) all blocks so far above tokens;
    its rows are either everyone's or (fused, frozen) fresh. The other modes differ in block count alone.
    """
    training = config.training
    fused = training.mode == "fused" and not training.progressive.enabled
    grows = fused and training.fusion_mode == "trainable"
    fresh_rows = fused and training.fusion_mode == "frozen"
    stages = []
    for depth, (first, last) in enumerate(config.partition):
        low = 0 if grows else first
        reads_boundary = low > 0
        blocks = tuple(block_part(i) for i in range(low, last + 1))
        trains = (*(() if reads_boundary else (FRONT,)), *blocks, HEAD)
        stages.append(Stage(depth, low, last, trains, reads_boundary, depth if fresh_rows else 0))
    return stages
