"""A mode is a schedule of stages: a configuration in, `Stage` entries out. No worker asks for a mode.

Everything below works on `Stage` alone: which blocks it holds, in which format, which parts it trains, what it reads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.adapters import HELD, AdapterSize
from stackwise.config.choices import Auxiliary, CausalAdaptation, Tail
from stackwise.config.growth import Grown
from stackwise.config.kinds import BlockPart
from stackwise.config.precision import stack_adapters, stack_precision, trunk_precision

FRONT, HEAD = "front", "head"
ADAPTER = "adapter."  # what the name of a block's adapters begins with; the block's follows
FIRST_HEAD = "first head"  # the head of a pretrained model, whatever stages made of it
STATE = "state."
"""What the name of an optimizer state for a later window begins with: the stage's depth, and the part, follow."""


def block_part(index: int) -> str:
    """The name of a block as a part: its file, its digest and its seed go by it."""
    return f"block.{index}"


def block_number(part: str) -> int:
    """The place in the rack that a block's part is made for: its own, or of a block beyond, that of the same number."""
    return int(part.rpartition(".")[2])


def block_parts(first: int, last: int) -> tuple[str, ...]:
    """The parts of blocks `first` to `last`, both included."""
    return tuple(block_part(index) for index in range(first, last + 1))


def adapter_part(block: str) -> str:
    """The name of a block's adapters as a part of their own."""
    return f"{ADAPTER}{block}"


def head_version(depth: int) -> str:
    """What the newest head of stage `depth` goes by, beside those of other stages."""
    return f"{HEAD}.{depth}"


def state_names(depth: int, parts: Iterable[str]) -> tuple[str, ...]:
    """The states of a stage that trains these parts: one a part, and the trainer's own."""
    return (*dict.fromkeys(f"{STATE}{depth}.{part}" for part in parts), f"{STATE}{depth}")


def is_state(name: str, depth: int) -> bool:
    """Whether a name is that of a state of stage `depth`."""
    return name == f"{STATE}{depth}" or name.startswith(f"{STATE}{depth}.")


def window_rowset(config: StackWiseConfig, drawn: int, window: int | None) -> int:
    """The number of the rowset of a window (None: of all windows together) of rows that are drawn as number `drawn`."""
    # Of all windows together it is below -1, which is the held-out rows' number.
    return drawn * config.windows + window if window is not None else -2 - drawn if config.windows > 1 else drawn


def drawn_and_window(config: StackWiseConfig, rowset: int) -> tuple[int, int | None]:
    """The inverse of `window_rowset`."""
    return divmod(rowset, config.windows) if rowset >= 0 else (-2 - rowset, None)


@dataclass(frozen=True)
class BlockFormat:
    """How a stage holds a block.

    Args:
        precision: By its canonical name; full: as the run computes. Weights in a narrow format are packed where they
            do not train.
    """

    precision: str = "full"
    adapters: tuple[AdapterSize, ...] = ()

    def plain(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {"precision": self.precision, "adapters": [size.plain() for size in self.adapters]}


PLAIN = BlockFormat()


BELOW = -1
"""The home of blocks below every stage."""


def block_format(config: StackWiseConfig, home: int, top: int, trains: bool) -> BlockFormat:
    """How stage `top` holds the blocks that were new with stage `home`.

    Args:
        trains: Whether the blocks, or else their adapters, train. Under a frozen trunk they then train as they did.
    """
    if (beside := config.training.adapters) is not None:
        return BlockFormat(HELD[beside.precision], () if home == BELOW else (beside.size,))
    qlora = config.training.progressive.trunk_strategy == "qlora"
    standing = home < top and config.training.progressive.holds_trunk and (qlora or not trains)
    precision = trunk_precision(config, home) if standing else stack_precision(config, home)
    adapters = stack_adapters(config, home, min(max(home, top), config.n_sections - 1))
    return BlockFormat(precision, tuple(AdapterSize(name, *sizes) for name, sizes in adapters.items()))


@dataclass(frozen=True)
class Rise:
    """Blocks whose learning rates rise from a point on, beside others that go on."""

    blocks: tuple[str, ...]
    first: float  # the share of the budget at which they begin
    warmup: float  # the share of the budget over which they rise


@dataclass(frozen=True)
class Stage:
    """One entry of the schedule.

    Args:
        starts_from: Parts that start from other weights than the newest of that name, and the name these go by.
        formats: How it holds its blocks, and how those below are held, where that is not plainly, by part.
        causal: Whether it trains the rack causally, whatever the stages before it did.
        share: Where it begins and ends in a budget that it has in common with others, as shares of its steps; they
            go through one stream of rows. None: its budget is its own.
        candidates: First and last block of the sections of which it unfreezes one at a time, the one that gains most;
            none: all that trains does so at once.
    """

    depth: int  # its number, from 0: `stages.K` of the configuration means it
    first: int  # the lowest block that it passes rows through: below it lies the boundary that the stage may read
    last: int  # the highest one: the boundary above the stage lies over it
    trains: tuple[str, ...]  # parts that train: "front", "block.N", "adapter.block.N", "auxiliary.K.N", "head"
    reads_boundary: bool  # whether the boundary below block `first` enters it; otherwise it reads tokens with the front
    rowset: int  # which rowset it trains on; stages with one number share their rows and masks
    lookahead: tuple[str, ...] = ()  # blocks between block `last` and its head, on its loss's way only
    fresh: tuple[str, ...] = ()  # parts that start fresh although the run has committed weights for them
    commits_frozen: tuple[str, ...] = ()  # blocks that it draws and commits although they do not train
    window: int = 0
    place: int = -1  # its place in the schedule, from 0
    starts_from: Mapping[str, str] = field(default_factory=dict)
    states_in: tuple[str, ...] = ()  # optimizer states that it takes up from its window before, by part
    states_out: tuple[str, ...] = ()  # optimizer states that it commits for its next window
    formats: Mapping[str, BlockFormat] = field(default_factory=dict)
    causal: bool = False
    scales_alone: bool = False  # whether of its blocks' packed weights the scales alone train
    candidates: tuple[tuple[int, int], ...] = ()
    share: tuple[float, float] | None = None
    silent: tuple[str, ...] = ()  # fresh blocks that add nothing at first: what they write with is zero
    rises: Rise | None = None
    column: int | None = None  # the column of each part (`model.stream`) that trains; None: all of a part does

    @property
    def holds(self) -> tuple[str, ...]:
        """Every part in memory while the stage trains, in forward order."""
        return (*self.forward_parts, *self.with_adapters(self.lookahead), HEAD)

    @property
    def forward_parts(self) -> tuple[str, ...]:
        """The parts that make the boundary above from what the stage reads, in forward order."""
        return (*(() if self.reads_boundary else (FRONT,)), *self.with_adapters(self.blocks))

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks between its two boundaries, in forward order."""
        return block_parts(self.first, self.last)

    @property
    def trunk(self) -> tuple[str, ...]:
        """The parts below it, which made the boundary that it reads; empty where it reads tokens."""
        return (FRONT, *self.with_adapters(block_parts(0, self.first - 1))) if self.reads_boundary else ()

    @property
    def commits(self) -> tuple[str, ...]:
        """What it leaves in the store: the parts that train, the fresh blocks that are frozen under adapters, and what
        its next window takes up."""
        return (*self.trains, *self.commits_frozen, *self.states_out)

    @property
    def trunk_above(self) -> tuple[str, ...]:
        """The parts that make the boundary above it from tokens: the trunk of the stage above."""
        return (*self.trunk, *self.forward_parts)

    def unfreezing(self, first: int, last: int) -> Stage:
        """The same stage with blocks `first` to `last` training alone, and the head; the front with the lowest."""
        unfrozen = {*self.with_adapters(block_parts(first, last)), HEAD, *((FRONT,) if first == 0 else ())}
        return dataclasses.replace(self, trains=tuple(part for part in self.trains if part in unfrozen), candidates=())

    def with_blocks(self, count: int) -> Stage:
        """The same stage with the lowest few of its blocks that train, or the lowest where none does."""
        trained = [block_number(part) for part in self.trains if part not in (FRONT, HEAD)]
        first = min(max(self.first, min(trained, default=self.first)), self.last - count + 1)
        kept = {FRONT, HEAD, *block_parts(first, first + count - 1), *self.lookahead}
        trains = tuple(part for part in self.trains if part.removeprefix(ADAPTER) in kept)
        return dataclasses.replace(self, first=first, last=first + count - 1, trains=trains, candidates=())

    def precisions(self, parts: Iterable[str]) -> dict[str, str]:
        """The precision of each of these parts that is not held in the run's."""
        return {part: self.formats[part].precision for part in parts if self.format(part).precision != PLAIN.precision}

    @property
    def just_grown(self) -> bool:
        """Whether it is the first of its budget with blocks that the one before had not."""
        return self.share is not None and self.share[0] > 0 and not self.window

    @property
    def label(self) -> str:
        """Its number, and its window's where there are several."""
        return f"{self.depth}, window {self.window}" if self.window or self.states_out else str(self.depth)

    def packs(self, part: str) -> bool:
        """Whether it packs a block's weights where these are in a narrow format: their codes are frozen."""
        return self.scales_alone or part not in self.trains

    def pieces(self, config: StackWiseConfig, part: str) -> list[str]:
        """The modules in a part that can be in memory only while rows go through them, by their paths.

        Not where it has adapters or narrow weights, or is compiled: what is small is then what trains. Nor where
        weights are held, and measured, part by part.
        """
        if config.training.continual.measures:
            return []
        whole = part in (FRONT, HEAD) or part.startswith(ADAPTER) or part not in self.trains
        if whole or self.scales_alone or config.training.compile or self.format(part) != PLAIN:
            return []
        model = config.model.at(block_number(part))
        kinds: dict[str, BlockPart] = {"attention": model.attention, "ffn": model.ffn}
        return [f"{name}.{path}" for name, kind in kinds.items() for path in kind.pieces(model)]

    def format(self, part: str) -> BlockFormat:
        """How a block is held."""
        return self.formats.get(part, PLAIN)

    def with_adapters(self, blocks: Iterable[str]) -> tuple[str, ...]:
        """Blocks, each followed by its adapters where it has some."""
        pairs = ((block, adapter_part(block)) if self.format(block).adapters else (block,) for block in blocks)
        return tuple(part for pair in pairs for part in pair)


def schedule(config: StackWiseConfig) -> list[Stage]:
    """The stages of a configuration, in the order in which they train."""
    partition = config.partition
    homes = {
        block: depth
        for depth, (first, last) in enumerate(reversed(partition) if config.prepends else partition)
        for block in block_parts(first, last)
    }
    homes |= dict.fromkeys(block_parts(0, config.bottom - 1), BELOW)
    stages = (dataclasses.replace(stage, place=place) for place, stage in enumerate(_stages(config)))
    format_of = functools.cache(functools.partial(block_format, config))  # stages hold the same blocks in common
    formatted = (_with_formats(config, stage, homes, format_of) for stage in stages)
    return [_in_its_window(config, stage) for stage in formatted]


def stage_below(stages: list[Stage], stage: Stage) -> Stage:
    """The stage that makes the boundary which enters `stage`: the newest before it that ends where it begins.

    Below the lowest, it is what makes its boundary of blocks that no stage trains: an entry of no schedule.
    """
    below = (s for s in reversed(stages[: stage.place]) if s.last + 1 == stage.first)
    standing = dataclasses.replace(
        stage, depth=stage.depth - 1, first=0, last=stage.first - 1, trains=(), reads_boundary=False, lookahead=(),
        states_in=(), states_out=(), fresh=(), commits_frozen=(), starts_from={}, candidates=(),
    )  # fmt: skip
    return next(below, standing)


def _stages(config: StackWiseConfig) -> Iterator[Stage]:
    """Each window goes through every section before the next one does; then each stage that follows.

    A stage after the sections that reads tokens needs no windows: it trains on all rows at once.
    """
    if config.training.grown is not None:
        yield from _grown(config, config.training.grown)
        yield from _adaptation(config)
        return
    windows, sections, fusions = range(config.windows), list(_sections(config)), list(_fusions(config))
    if (share := config.joint_share) is not None:
        sections, fusions = _under_one_budget(sections, fusions[0], 1.0 - share)
    order: list[tuple[Stage, int | None]] = [(stage, window) for window in windows for stage in sections]
    for stage in (*fusions, *_adaptation(config)):
        order += [(stage, window) for window in windows] if stage.reads_boundary else [(stage, None)]
    for stage, window in order:
        yield dataclasses.replace(stage, window=window or 0, rowset=window_rowset(config, stage.rowset, window))


def _in_its_window(config: StackWiseConfig, stage: Stage) -> Stage:
    """A stage with what it takes up from its window before, and what it commits for its next one.

    Parts go by name, newest first, as they do from stage to stage; but a head belongs to the depth that it was
    trained at, unless all stages share it with the tail that they have in common.
    """
    if stage.share is not None:
        return _in_its_share(config, stage)
    states = state_names(stage.depth, [part.removeprefix(ADAPTER) for part in stage.trains])
    whole = drawn_and_window(config, stage.rowset)[1] is None
    states_out = () if whole or stage.window + 1 == config.windows else states
    if config.training.continual.columns:
        stage, states, states_out = dataclasses.replace(stage, column=stage.window), (), ()
    if not stage.window:
        return dataclasses.replace(stage, states_out=states_out)
    tail = isinstance(config.training.lookahead, Tail) and stage.depth < config.n_sections
    shared = tail or config.training.plan.whole
    starts_from = {HEAD: head_version(stage.depth)} if HEAD in stage.trains and not shared else {}
    # What was fresh in the first window is not in the next; what is frozen is committed already.
    return dataclasses.replace(
        stage, starts_from=starts_from, states_in=states, states_out=states_out, fresh=(), commits_frozen=()
    )


def _under_one_budget(sections: list[Stage], joint: Stage, until: float) -> tuple[list[Stage], list[Stage]]:
    """Sections that leave the end of their budget to a joint stage, which goes on with each part's optimizer state."""
    newest = {part: stage.depth for stage in sections for part in stage.trains}
    states = {f"{STATE}{joint.depth}.{part}": f"{STATE}{newest[part]}.{part}" for part in joint.trains}
    states |= {f"{STATE}{joint.depth}": f"{STATE}{sections[-1].depth}"}
    joint = dataclasses.replace(joint, share=(until, 1.0), starts_from=dict(joint.starts_from) | states)
    return [dataclasses.replace(stage, share=(0.0, until)) for stage in sections], [joint]


def _in_its_share(config: StackWiseConfig, stage: Stage) -> Stage:
    """A stage of a shared budget with the optimizer states that it takes up, and commits for the one that goes on.

    The states of a rack that grows go by its first phase's number.
    """
    grown, first, until = config.training.grown, *(stage.share or (0.0, 1.0))
    names = state_names(0 if grown is not None else stage.depth, [part.removeprefix(ADAPTER) for part in stage.trains])
    states_in, starts_from = names if first else (), dict(stage.starts_from)
    if grown is not None and stage.just_grown:
        kept = grown.inherited(stage.depth, config.model.n_blocks)
        new = set(stage.blocks + stage.lookahead) - {block_part(block) for block in kept}
        states_in = state_names(0, [part.removeprefix(ADAPTER) for part in stage.trains if part not in new])
        moved = {block_part(now): block_part(before) for now, before in kept.items() if now != before}
        starts_from |= {f"{STATE}0.{now}": f"{STATE}0.{before}" for now, before in moved.items()}
    states_out = names if until < 1.0 else ()
    return dataclasses.replace(stage, starts_from=starts_from, states_in=states_in, states_out=states_out)


def _grown(config: StackWiseConfig, grown: Grown) -> Iterator[Stage]:
    """The phases of a rack that grows, each from tokens with all its blocks; an early one in parts, each committed."""
    top, first, budget = config.model.n_blocks, 0.0, config.training.budget(config.training.seq_len)
    for depth in range(len(grown.phases) + 1):
        blocks = grown.blocks(depth, top)
        last = next(block for block in blocks if block + 1 not in blocks)  # those between the ends are yet to come
        lookahead = tuple(block_part(block) for block in blocks if block > last)
        trains = (FRONT, *block_parts(0, last), *lookahead, HEAD)
        phase = grown.phases[depth] if depth < len(grown.phases) else None
        ends = phase.commits_at(first, budget) if phase is not None else [1.0]
        stage = Stage(depth, 0, last, trains, False, 0, lookahead)
        origins = grown.origins(depth, top) if depth else {}
        if depth:
            new = [block for block in blocks if block not in grown.inherited(depth, top)]
            fresh = tuple(block_part(block) for block in blocks if origins[block] is None)
            began, rise = grown.phases[depth - 1], grown.phases[depth - 1].warmup
            stage = dataclasses.replace(
                stage,
                rises=Rise(tuple(map(block_part, new)), first, rise) if rise else None,
                fresh=fresh,
                silent=fresh if began.new == "identity" else (),
                starts_from={
                    block_part(now): block_part(before)
                    for now, before in origins.items()
                    if before is not None and before != now
                },
            )
        for window, until in enumerate(ends):
            yield dataclasses.replace(stage, window=window, share=(first, until))
            stage, first = dataclasses.replace(stage, fresh=(), silent=(), starts_from={}), until


def _sections(config: StackWiseConfig) -> Iterator[Stage]:
    if config.prepends:
        return _prepended(config)
    return _independent(config) if config.stands_apart else _stacked(config)


def _stacked(config: StackWiseConfig) -> Iterator[Stage]:
    """Each section of the rack in turn, above its boundary; or above tokens, with all blocks so far."""
    grows, holds, top = config.grows, config.training.progressive.holds_trunk, config.model.n_blocks - 1
    bottom = config.bottom
    for depth, (first, last) in enumerate(config.partition):
        if config.training.plan.whole:
            trains = (*((FRONT,) if depth == 0 else ()), *block_parts(first, last), HEAD)
            yield Stage(depth, bottom, top, trains, bottom > 0, depth if config.fresh_masks else 0)
            continue
        low = bottom if grows or holds else first
        reads_boundary = low > 0
        lookahead = _lookahead(config, depth, last)
        front = (FRONT,) if grows or depth == 0 else ()
        trains = (*front, *block_parts(low if grows else first, last), *lookahead, HEAD)
        yield Stage(depth, low, last, trains, reads_boundary, depth if config.fresh_masks else 0, lookahead)


def _prepended(config: StackWiseConfig) -> Iterator[Stage]:
    """The highest section first, each new one below those there are and above the front, which are all frozen."""
    top = config.model.n_blocks - 1
    for depth, (first, last) in enumerate(reversed(config.partition)):
        ends = ((FRONT,), (HEAD,)) if depth == 0 else ((), ())
        trains = (*ends[0], *block_parts(first, last), *ends[1])
        yield Stage(depth, first, top, trains, False, depth if config.fresh_masks else 0)


def _independent(config: StackWiseConfig) -> Iterator[Stage]:
    """Each section between the front, which trains with the first alone, and a head of its own."""
    for depth, (first, last) in enumerate(config.partition):
        trains = (*((FRONT,) if depth == 0 else ()), *block_parts(first, last), HEAD)
        rowset = depth if config.fresh_masks else 0
        begun = config.init.weights is not None
        starts_from = {HEAD: FIRST_HEAD} if begun else {}
        fresh = () if begun or depth == 0 else (HEAD,)
        yield Stage(depth, first, last, trains, False, rowset, fresh=fresh, starts_from=starts_from)


def _fusions(config: StackWiseConfig) -> Iterator[Stage]:
    """Sections together, after each was trained: a stage like any other, that starts from what they came to."""
    for number, (first, last) in enumerate(config.fusions):
        depth = config.n_sections + number
        low = 0 if config.training.progressive.holds_trunk else first
        front = () if first > 0 else (FRONT,)
        fusion = config.training.fusion
        trains = (HEAD,) if fusion.head_alone else (*front, *block_parts(first, last), HEAD)
        sections = tuple(sorted(config.partition)) if fusion.probes else ()
        yield Stage(depth, low, last, trains, low > 0, depth if config.fresh_masks else 0, candidates=sections)


def _adaptation(config: StackWiseConfig) -> Iterator[Stage]:
    """The whole rack once more, from tokens, to be causal."""
    if isinstance(config.training.adaptation, CausalAdaptation):
        depth, top = config.n_stages - 1, config.model.n_blocks - 1
        trains = (FRONT, *block_parts(0, top), HEAD)
        rowset = depth if config.fresh_masks else 0
        yield Stage(depth, 0, top, trains, False, rowset, causal=True)


def _lookahead(config: StackWiseConfig, depth: int, last: int) -> tuple[str, ...]:
    """The blocks between a stage that ends with block `last` and its head."""
    top = config.model.n_blocks - 1
    if last == top:
        return ()
    match config.training.lookahead:
        case Tail(blocks=count):
            return block_parts(max(last, top - count) + 1, top)
        case Auxiliary(blocks=count):
            return tuple(f"auxiliary.{depth}.{index}" for index in range(count))
    return ()


def _with_formats(
    config: StackWiseConfig, stage: Stage, homes: Mapping[str, int], format_of: Callable[[int, int, bool], BlockFormat]
) -> Stage:
    """A stage with the formats of its blocks; where weights are frozen under adapters, these train in their place."""
    below = block_parts(0, stage.first - 1) if stage.reads_boundary else ()
    progressive, formats = config.training.progressive, dict[str, BlockFormat]()
    for part in (*below, *stage.blocks, *stage.lookahead):
        if (home := homes.get(part)) is not None:
            top = stage.depth if progressive.holds_trunk else home  # else it makes no difference
            if (form := format_of(home, top, part in stage.trains)) != PLAIN:
                formats[part] = form
    whole_trunk = progressive.enabled and progressive.trunk_strategy == "qlora" and stage.trains != (HEAD,)
    trains: list[str] = [FRONT] if FRONT in stage.trains else []
    commits_frozen = []
    for part in (*stage.blocks, *stage.lookahead):
        form, frozen = formats.get(part, PLAIN), part not in stage.trains
        packed = form.precision == "qlora"
        if not frozen and not packed:
            trains.append(part)
        if not frozen and packed and homes[part] == stage.depth:
            commits_frozen.append(part)
        if form.adapters and (whole_trunk or not frozen):
            trains.append(adapter_part(part))
    trains += [HEAD] if HEAD in stage.trains else []
    if config.training.adapters is not None:
        # A head that gives scores has a new layer, which must train too.
        scores = config.objective.score_width is not None
        trains = [part for part in trains if part.startswith(ADAPTER) or (part == HEAD and scores)]
        commits_frozen = []  # they stay where they are: among the files of the model
    quantization = config.stage_training(stage.depth).quantization
    alone = quantization is not None and quantization.trains == "scales"
    if alone:  # arXiv 2407.11062, section 3.3: codes, norms, front and head are frozen
        trains = [part for part in trains if part in stage.blocks]
    return dataclasses.replace(
        stage, formats=formats, trains=tuple(trains), commits_frozen=tuple(commits_frozen), scales_alone=alone
    )
