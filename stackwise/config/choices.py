"""Choices of how stages train and follow each other: mode, divergence, lookahead, fusion, adaptation."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from stackwise.config.fields import AUTO, AutoInt, Fraction, PositiveInt, Size, Small
from stackwise.config.kinds import Fault, Kind
from stackwise.registry import Registry

if TYPE_CHECKING:
    from stackwise.config.model import ModelConfig

Span = tuple[int, int]
"""First and last block of a run of blocks."""

MODES: Registry[type[Any]] = Registry(
    "mode",
    f"{__name__}:Mode",
    __name__,
    {
        "layerwise": "Layerwise",
        "blockwise": "Blockwise",
        "fused": "Fused",
        "independent": "Independent",
        "end_to_end": "EndToEnd",
        "in_turn": "InTurn",
    },
)
DIVERGENCES: Registry[type[Any]] = Registry(
    "divergence policy",
    f"{__name__}:Divergence",
    __name__,
    {"stop": "Stop", "skip": "Skip", "rollback": "Rollback"},
)
LOOKAHEADS: Registry[type[Any]] = Registry(
    "lookahead",
    f"{__name__}:Lookahead",
    __name__,
    {"none": "NoLookahead", "auxiliary": "Auxiliary", "tail": "Tail"},
)
FUSIONS: Registry[type[Any]] = Registry(
    "fusion strategy",
    f"{__name__}:Fusion",
    __name__,
    {
        "none": "NoFusion",
        "frozen": "FrozenFusion",
        "trainable": "TrainableFusion",
        "hierarchical": "HierarchicalFusion",
        "adaptive": "AdaptiveFusion",
    },
)
ADAPTATIONS: Registry[type[Any]] = Registry(
    "adaptation", f"{__name__}:Adaptation", __name__, {"none": "NoAdaptation", "causal": "CausalAdaptation"}
)


class ScheduleFacts(abc.ABC):
    """What decides the schedule (a mode, growth, progressive training) says of it.

    A stage trains its blocks above the boundary that the stages below have made, unless a fact says otherwise.
    """

    apart: ClassVar[bool] = False
    """Whether no section of the rack stands on another: each trains between the front and a head of its own."""
    whole: ClassVar[bool] = False
    """Whether each stage holds the whole rack, of which its own blocks train."""
    joint: ClassVar[bool] = False
    """Whether its stages are phases of one budget, in which all blocks that there are train."""

    @property
    def grows(self) -> bool:
        """Whether each stage trains all the blocks so far, from tokens."""
        return self.joint

    @property
    def own_rows(self) -> bool:
        """Whether each stage has rows of its own, whatever `training.fresh_masks` says."""
        return False

    @property
    def finds_size(self) -> bool:
        """Whether the size of its stages is still to be found."""
        return False

    @abc.abstractmethod
    def partition(self, model: ModelConfig) -> list[Span]:
        """First and last block of each part of the rack that becomes new with a stage, lowest first."""


class Mode(ScheduleFacts, Kind):
    """The schedule: which blocks become new with each stage, and what a stage holds, trains and reads."""

    registry: ClassVar[Registry[Any]] = MODES
    default: ClassVar[str] = "blockwise"

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        """What of its settings the model cannot have."""
        yield from ()

    def unused(self, model: ModelConfig) -> Iterator[tuple[str, str | bool]]:
        """Names of its settings, with blanks between, and why they are unused; False: they are used."""
        yield from ()


def cut(blocks: int, size: int) -> list[Span]:
    """Spans of `size` blocks; the last one takes what does not divide."""
    # the last one takes what is left
    return [(first, min(first + size, blocks) - 1) for first in range(0, blocks, size)]


class EndToEnd(Mode):
    """One stage, which trains the whole rack."""

    def partition(self, model: ModelConfig) -> list[Span]:
        return cut(model.n_blocks, model.n_blocks)


class Layerwise(Mode):
    """Stages of one block."""

    def partition(self, model: ModelConfig) -> list[Span]:
        return cut(model.n_blocks, 1)


class Blockwise(Mode):
    """Stages of several blocks."""

    block_size: AutoInt = Field(4, description="blocks in a stage; auto: from memory and gain, found by trial")
    n_stages: Small | None = Field(None, description="number of stages instead of block_size")
    block_sizes: Annotated[list[Small], Field(min_length=1, max_length=1024)] | None = Field(
        None, description="blocks in each stage, lowest first, instead of block_size: [4, 2, 1, 1]"
    )
    trial_steps: PositiveInt = Field(
        100, description="block_size auto: steps of each stage of the racks that are tried"
    )

    @property
    def finds_size(self) -> bool:
        return self.block_size == AUTO and self.n_stages is None and self.block_sizes is None  # these say the sizes

    def partition(self, model: ModelConfig) -> list[Span]:
        n_blocks = model.n_blocks
        if self.block_sizes is not None and sum(self.block_sizes) == n_blocks:  # `faults` reports others
            ends = list(itertools.accumulate(self.block_sizes))
            return [(first, end - 1) for first, end in itertools.pairwise([0, *ends])]
        if self.n_stages is None:
            return cut(n_blocks, self.block_size or 1)  # until `auto` is found
        n = min(self.n_stages, n_blocks)  # the fault is reported by `faults`; a list is needed until then
        edges = [n_blocks * k // n for k in range(n + 1)]  # sizes differ by one block at most
        return [(first, end - 1) for first, end in itertools.pairwise(edges)]

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        if self.n_stages is not None and self.n_stages > model.n_blocks:
            yield "n_stages", f"{self.n_stages} stages are more than the {model.n_blocks} blocks of the model"
        if self.block_sizes is not None and (total := sum(self.block_sizes)) != model.n_blocks:
            yield "block_sizes", f"{self.block_sizes} are {total} blocks, and the model has {model.n_blocks}"
        if self.block_sizes is not None and self.n_stages is not None:
            yield "n_stages", "block_sizes say how many stages there are: leave one of both out"
        if not self.finds_size:
            return
        if self.apart:
            yield "block_size", f"auto: {self.name} stages do not stand on each other; give a number"
        if self.grows:
            text = f"{self.name} trainable stages hold all blocks so far, whatever the size; give a number"
            yield "block_size", f"auto: {text}"

    def unused(self, model: ModelConfig) -> Iterator[tuple[str, str | bool]]:
        """See `Mode.unused`; a size that divides the rack as `n_stages` do is no second opinion."""
        other = self.partition(model) != cut(model.n_blocks, self.block_size or 1)
        instead = "block_sizes are" if self.block_sizes is not None else "n_stages is"
        yield "block_size", other and f"training.mode.{instead} given"
        yield "trial_steps", not self.finds_size and "training.mode.block_size is a number"


class InTurn(Blockwise):
    """The whole rack's loss, under which one section trains at a time (BAdam, arXiv 2404.02827).

    A round over all sections is a window of the rows (`training.windows`); each section takes up its optimizer's state
    where its round before left it.
    """

    whole: ClassVar[bool] = True

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        yield from super().faults(model)
        if self.finds_size:
            yield "block_size", f"auto: {self.name} stages hold all blocks, whatever the size; give a number"


class Fused(Blockwise):
    """Stages of several blocks on rows of their own; or each with all the blocks so far."""

    fusion_mode: Literal["frozen", "trainable"] = Field(
        "frozen", description="the blocks below are frozen, or trainable"
    )

    @property
    def grows(self) -> bool:
        return self.fusion_mode == "trainable"

    @property
    def own_rows(self) -> bool:
        return self.fusion_mode == "frozen"


class Independent(Blockwise):
    """Stages of several blocks, each on its own window of masked fractions."""

    apart: ClassVar[bool] = True  # its boundaries would be of other rows than its stages see


class Divergence(Kind):
    """What becomes of a step whose loss or gradient is no number, or whose loss explodes."""

    registry: ClassVar[Registry[Any]] = DIVERGENCES
    tag: ClassVar[str] = "policy"
    default: ClassVar[str] = "stop"
    goes_back: ClassVar[bool] = False
    """Whether weights of earlier steps are taken up again."""

    def lowered(self, rollbacks: int) -> float:
        """The factor on the learning rate after so many rollbacks."""
        return 1.0


class Stop(Divergence):
    """The stage fails where a number is none; a loss may explode."""


class Skip(Divergence):
    """The step is not taken."""

    factor: Annotated[float, Field(gt=1.0, le=1e15)] = Field(
        3.0, description="a loss explodes above so many times the median of the last 32"
    )
    limit: PositiveInt = Field(5, description="skips or rollbacks of a stage before it is given up")


class Rollback(Skip):
    """The stage goes back to its last checkpoint by steps, with a lower learning rate."""

    goes_back: ClassVar[bool] = True  # so a swapped stage, which keeps no earlier weights, cannot have it

    rate_factor: Fraction = Field(0.5, description="factor on the learning rate at each rollback")

    def lowered(self, rollbacks: int) -> float:
        return float(self.rate_factor**rollbacks)  # it falls further with each one


class Lookahead(Kind):
    """Blocks between a stage's own and its head, training along."""

    registry: ClassVar[Registry[Any]] = LOOKAHEADS
    tag: ClassVar[str] = "kind"
    default: ClassVar[str] = "none"


class NoLookahead(Lookahead):
    """None."""


class Auxiliary(Lookahead):
    """Blocks that are thrown away after the stage."""

    blocks: Small = Field(1, description="how many")


class Tail(Auxiliary):
    """The rack's last ones, shared by every stage."""


class Fusion(Kind):
    """Stages that train sections of the rack together, after they were trained one by one."""

    registry: ClassVar[Registry[Any]] = FUSIONS
    tag: ClassVar[str] = "strategy"
    default: ClassVar[str] = "none"

    head_alone: ClassVar[bool] = False
    """Whether the blocks are frozen and only the head trains."""
    probes: ClassVar[bool] = False
    """Whether the section that trains is found by probes, on held-out loss."""

    @property
    def budget(self) -> int | None:
        """Optimizer steps of all its stages; None: as many as a stage each."""
        return None

    @abc.abstractmethod
    def groups(self, sections: list[Span]) -> list[Span]:
        """First and last block of each stage, in order.

        Args:
            sections: What was trained one by one, two or more, lowest first.
        """


class NoFusion(Fusion):
    """None."""

    def groups(self, sections: list[Span]) -> list[Span]:
        return []


class TrainableFusion(Fusion):
    """The whole rack."""

    steps: PositiveInt | None = Field(
        None, description="optimizer steps in all, shared by these stages; null: as many as a stage each"
    )
    share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None,
        description="instead of steps: the share of training.steps that one last stage takes, and every other stage "
        "leaves to it: all go by one schedule of learning rates; null: it has a schedule of its own",
    )

    @property
    def budget(self) -> int | None:
        return self.steps

    def groups(self, sections: list[Span]) -> list[Span]:
        return [(sections[0][0], sections[-1][1])]


class FrozenFusion(TrainableFusion):
    """The head alone, over the finished rack."""

    head_alone: ClassVar[bool] = True

    def groups(self, sections: list[Span]) -> list[Span]:
        """See `Fusion.groups`; what is frozen below the last section is read as its boundary."""
        return [sections[-1]]


class HierarchicalFusion(TrainableFusion):
    """Neighbours first, then pairs of pairs, up to the whole."""

    def groups(self, sections: list[Span]) -> list[Span]:
        groups: list[Span] = []
        while len(sections) > 1:  # an odd one out goes up a level as it is
            pairs = [sections[start : start + 2] for start in range(0, len(sections), 2)]
            sections = [(pair[0][0], pair[-1][1]) for pair in pairs]
            groups += [group for group, pair in zip(sections, pairs, strict=True) if len(pair) == 2]
        return groups


class AdaptiveFusion(TrainableFusion):
    """The section whose unfreezing gains most on held-out loss, found by probes."""

    probes: ClassVar[bool] = True

    rounds: Size = Field(
        1, description="how often it is tested again which section to train; each round has its share of steps"
    )
    probe_steps: PositiveInt | None = Field(
        None, description="steps of a section's probe; null: a quarter of a round's, shared by the sections"
    )

    def allotment(self, steps: int, sections: int) -> list[tuple[int, int]]:
        """Steps of each probe, and those of the section that is chosen, for each round.

        Args:
            steps: The budget in all.
            sections: How many are probed.
        """
        # they add up to the budget exactly
        shares = [steps * (k + 1) // self.rounds - steps * k // self.rounds for k in range(self.rounds)]
        probes = [self.probe_steps or max(1, share // (4 * sections)) for share in shares]
        return [(probe, share - sections * probe) for share, probe in zip(shares, probes, strict=True)]


class Adaptation(Kind):
    """A last stage that turns the trained rack into another."""

    registry: ClassVar[Registry[Any]] = ADAPTATIONS
    tag: ClassVar[str] = "kind"
    default: ClassVar[str] = "none"


class NoAdaptation(Adaptation):
    """None."""


class CausalAdaptation(Adaptation):
    """From bidirectional to causal: it then continues text."""

    steps: PositiveInt | None = Field(None, description="optimizer steps of this stage; null: as many as any stage")
