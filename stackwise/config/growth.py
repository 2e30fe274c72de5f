"""A rack that begins shallow and grows: what it grows by, where each block comes from, what cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from stackwise.config.choices import ScheduleFacts, Span
from stackwise.config.fields import Section, Share, Small

if TYPE_CHECKING:
    from stackwise.config.model import ModelConfig

TENTH = 0.1
LEAST_STEPS = 25
"""Steps between two commits of a phase, at least, unless `commit` says: each has a worker of its own."""


class Growth(Section):
    """A phase of a rack that grows: its depth, how long it trains, and what the blocks begin as that follow."""

    blocks: Small = Field(description="blocks that the rack has in this phase")
    until: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(description="share of the steps at which the rack grows")
    new: Literal["identity", "copy", "double", "fresh"] = Field(
        "identity",
        description="what new blocks begin as: identity (fresh, output projections zero), copy (the run of blocks once "
        "more on top, and again), double (each block again above itself), fresh",
    )
    ends: bool = Field(
        False, description="begin with the lowest and the highest blocks of the rack, and grow between them"
    )
    warmup: Share = Field(0.0, description="share of the steps over which the learning rate of new blocks rises")
    commit: Annotated[float, Field(ge=0.001, le=1.0)] | None = Field(  # each commit has a worker: not a million
        None,
        description="commit the phase at every such share of the steps, so that another `until` takes up what is in "
        f"common; null: every tenth, where that is {LEAST_STEPS} steps or more",
    )

    def commits_at(self, first: float, budget: int | None) -> list[float]:
        """The shares of the budget at which the phase is committed, the last one where it ends.

        They do not depend on `until` but for the last: so do not the recipes of what is committed before.

        Args:
            first: The share at which it begins.
            budget: Steps of all phases; None: not known before the rows are.
        """
        stride = self.commit or TENTH
        if self.commit is None and budget is not None:
            stride *= max(1, -(-LEAST_STEPS // max(1, round(stride * budget))))
        shares = [share for k in range(1, int(1 / stride) + 1) if first < (share := round(k * stride, 9)) < self.until]
        ends = [*shares, self.until]
        if budget is not None:  # two within a step are one; the phase's end stays
            ends = [s for s in shares if round(first * budget) < round(s * budget) < round(self.until * budget)]
            ends = [*{round(share * budget): share for share in ends}.values(), self.until]
        return ends


@dataclass(frozen=True)
class Grown(ScheduleFacts):
    """The schedule of a rack that grows."""

    phases: Sequence[Growth]

    name: ClassVar[str] = "growth"
    joint: ClassVar[bool] = True

    def partition(self, model: ModelConfig) -> list[Span]:
        """The blocks by which each phase is deeper; blocks that grow between the ends count as if on top."""
        depths = [min(phase.blocks, model.n_blocks) for phase in self.phases] + [model.n_blocks]
        rising = sorted(set(depths))
        return [(low, high - 1) for low, high in zip([0, *rising], rising, strict=False)]

    def blocks(self, phase: int, depth: int) -> list[int]:
        """The numbers of a phase's blocks in the rack of `depth` blocks, lowest first."""
        if phase == len(self.phases):
            return list(range(depth))
        shape = self.phases[phase]
        low = -(-shape.blocks // 2) if shape.ends else shape.blocks
        return [*range(low), *range(depth - (shape.blocks - low), depth)]

    def origins(self, phase: int, depth: int) -> dict[int, int | None]:
        """For each block of a phase the block of the phase before that it begins as; None: it is drawn fresh."""
        before, now = self.blocks(phase - 1, depth), self.blocks(phase, depth)
        grown, kept, short, size = self.phases[phase - 1], self.inherited(phase, depth), len(before), len(now)
        match grown.new:
            case "copy":  # the run of blocks again and again: "G_stack" (arXiv 2405.15319)
                new = {block: before[place % short] for place, block in enumerate(now)}
            case "double":
                new = {block: before[place * short // size] for place, block in enumerate(now)}
            case _:
                return {block: kept.get(block) for block in now}
        return {block: kept.get(block, new[block]) for block in now}

    def inherited(self, phase: int, depth: int) -> dict[int, int]:
        """The blocks of a phase that go on as those of the phase before, with their optimizer's state."""
        before, now, grown = self.blocks(phase - 1, depth), self.blocks(phase, depth), self.phases[phase - 1]
        short, size = len(before), len(now)
        low = -(-short // 2) if grown.ends else short
        if grown.new == "double" and not grown.ends:  # the lowest of those that begin as it
            return {now[-(-place * size // short)]: block for place, block in enumerate(before)}
        return {now[place if place < low else size - short + place]: block for place, block in enumerate(before)}

    def faults(self, model: ModelConfig) -> Iterator[tuple[str, str]]:
        """What of it cannot be in a rack: the key within `training.growth`, and why."""
        amiss = list(self._shape_faults(model.n_blocks))
        yield from amiss or self._other_layers(model)

    def _shape_faults(self, depth: int) -> Iterator[tuple[str, str]]:
        blocks, until = 0, 0.0
        for number, phase in enumerate(self.phases):
            if phase.blocks >= depth:
                yield f"{number}.blocks", f"{phase.blocks} leave nothing to grow: the rack has {depth} blocks"
            elif phase.blocks <= blocks:
                yield f"{number}.blocks", f"{phase.blocks} are no more than the {blocks} of the phase before"
            if phase.until <= until:
                yield f"{number}.until", f"{phase.until:g} is not after {until:g}, where the phase before ends"
            if phase.ends and phase.blocks < 2:
                yield f"{number}.ends", "the lowest and the highest are two blocks: set blocks to 2 or more"
            blocks, until = phase.blocks, phase.until

    def _other_layers(self, model: ModelConfig) -> Iterator[tuple[str, str]]:
        """New blocks that would begin as a block whose layers are others."""
        for number, phase in enumerate(self.phases):
            for block, origin in self.origins(number + 1, model.n_blocks).items():
                if origin is not None and not model.alike(block, origin):
                    text = (
                        f"{phase.new}, but block {block} has other layers than block {origin}, as which it would begin"
                    )
                    yield f"{number}.new", f"{text}: take identity or fresh"
                    break
