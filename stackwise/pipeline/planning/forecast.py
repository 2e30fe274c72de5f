"""What a run takes on a machine: memory, disk, seconds and what bounds them, stage by stage.

Times are sums over a few terms: products at the rate that the machine reaches, updates at its memory's bandwidth,
boundaries at the disk's, copies at the bus's. What overlaps in the engines counts as the longest of its terms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stackwise.config import AUTO, StackWiseConfig
from stackwise.config.precision import FP8_PRODUCTS
from stackwise.pipeline.decisions import forward_flops
from stackwise.pipeline.estimate import WEIGHT_BYTES, WIDE, Estimate, Swap
from stackwise.pipeline.planning.machines import Machine
from stackwise.pipeline.planning.trace import PARTS, Traced, Tracer, estimated
from stackwise.pipeline.recipe import codec_name, whole_boundary
from stackwise.pipeline.schedule import ADAPTER, FRONT, HEAD, Stage, schedule
from stackwise.words import size, span

DEFAULT_TOKENS = 10**9
AHEAD = 3  # batches that lie ready
HOLES = 0.35
"""On a CPU, of what comes and goes in a step, what the heap of glibc takes beside it (docs/log.md)."""
FIRST = 45e6
"""Bytes that a CPU worker grows by at its first step, however small: pages of kernels' code, and their own buffers."""
MAPPED = 1 / 8
"""Share of the memory of which a reader maps files: their pages count as its own, and go where memory is short."""
CACHED = 0.5  # share of the host's memory that files may stay in, to be read from there again
COMPUTE, READ, WRITE, COPIES = "compute", "disk read", "disk write", "host copies"


@dataclass(frozen=True)
class Phase:
    """Something that takes time.

    Args:
        terms: Seconds by what they go by; those of one phase overlap.
    """

    terms: dict[str, float]

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return max(self.terms.values())

    @property
    def bound(self) -> str:
        """What it waits for."""
        return max(self.terms, key=lambda term: self.terms[term])


@dataclass(frozen=True)
class StageForecast:
    """What a stage takes.

    Args:
        memory: Bytes of the device by part, and `peak`.
        train, write: Its training, and the pass that writes the boundary above it.
        boundary: Bytes of the boundary that it reads; 0: it reads tokens.
        commits: Bytes of its weights and its optimizer's state.
        written: Bytes that it writes beside boundaries: checkpoints, what is committed, what is swapped.
    """

    stage: Stage
    parameters: int
    memory: dict[str, int]
    host_memory: int
    swap: Swap | None
    train: Phase
    write: Phase | None
    boundary: int
    state: int
    commits: int
    written: float
    note: str | None = None
    reached: float | None = None  # of a stage that is streamed, its speed over what it would be in memory

    @property
    def seconds(self) -> float:
        """How long it takes, the pass above it included."""
        return self.train.seconds + (self.write.seconds if self.write else 0.0)

    @property
    def bound(self) -> str:
        """What its longer phase waits for."""
        return max((phase for phase in (self.train, self.write) if phase), key=lambda phase: phase.seconds).bound

    def plain(self) -> dict[str, Any]:
        """As the contract has it."""
        return {
            "depth": self.stage.depth,
            "blocks": [self.stage.first, self.stage.last],
            "parameters": self.parameters,
            "memory": {part: self.memory[part] for part in (*PARTS, "peak")},
            "host_memory": self.host_memory,
            "seconds": self.seconds,
            "bound": self.bound,
        }


@dataclass(frozen=True)
class Forecast:
    """What a run takes."""

    config: StackWiseConfig
    machine: Machine
    vocab_size: int
    tokens: int  # that each stage trains on
    stages: Sequence[StageForecast]
    windows: int
    notes: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Of the whole rack."""
        model, size = self.config.model, self.vocab_size
        ends = model.front_parameters(size, self.config.training.seq_len)
        ends += model.head_parameters(size, shared=model.tie_embeddings)
        return model.total(lambda block: block.block_parameters) + ends

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def live(self) -> int:
        """Bytes on the disk at most: boundaries, committed weights, the checkpoints of a stage."""
        return round(self.boundaries + self.committed + max((stage.state for stage in self.stages), default=0))

    @property
    def boundaries(self) -> float:
        """Bytes of the boundaries that live at once."""
        reads, keep = [stage.boundary for stage in self.stages if stage.boundary], self.config.store.keep
        alive = len(reads) if keep == "all" else min(len(reads), 2 + (keep if isinstance(keep, int) else 0))
        return sum(sorted(reads)[-alive:]) / self.windows if alive else 0.0

    @property
    def committed(self) -> int:
        """Bytes of weights in the store at the end; beside them, of rows in windows, the optimizer's state."""
        return sum(stage.commits if self.windows > 1 else WEIGHT_BYTES * stage.parameters for stage in self.stages)

    @property
    def written(self) -> float:
        """Bytes written to the disk in all; each window commits anew."""
        return sum(stage.boundary + stage.written + (self.windows - 1) * stage.commits for stage in self.stages)

    def out_of_memory(self) -> list[str]:
        """The stages that take more memory than there is, a line for neighbours that take the same."""
        machine, lines = self.machine, []
        for key, group in itertools.groupby(self.stages, lambda stage: (stage.memory["peak"], stage.host_memory)):
            peak, host = key
            depths = [stage.stage.depth for stage in group]
            name = f"each of stages {span(depths[0], depths[-1])}" if len(depths) > 1 else f"stage {depths[0]}"
            if peak > machine.memory:
                lines.append(f"{name} takes {size(peak)} of {size(machine.memory)} of {machine.name}")
            if host > machine.ram:
                lines.append(f"{name} takes {size(host)} of {size(machine.ram)} of host memory")
        return lines

    def misfits(self) -> list[str]:
        """What does not fit, a line each."""
        lines = self.out_of_memory()
        if self.live > self.machine.disk.size:
            lines.append(f"the disk holds {size(self.machine.disk.size)}, and {size(self.live)} live on it at once")
        return lines

    @property
    def fits(self) -> bool:
        """Whether everything fits."""
        return not self.misfits()


def settled(config: StackWiseConfig, machine: Machine) -> tuple[StackWiseConfig, list[str]]:
    """A configuration for a machine, with numbers for what is `auto`; and a line for each of them.

    Raises:
        UsageError: Not a block fits, where `training.block_size` is auto.
    """
    config, notes = config.model_copy(deep=True), list[str]()
    if config.precision == "auto":
        config.precision = "bf16" if machine.kind == "cuda" else "fp32"
    _settle(config, machine, vocabulary_size(config), notes)
    return config, notes


def vocabulary_size(config: StackWiseConfig) -> int:
    """The vocabulary that a run will have, as far as it is known before there is data."""
    known = config.model.vocab_size or config.data.vocab_size
    return known or (257 if config.data.tokenizer == "bytes" else 4096)


def estimates(config: StackWiseConfig, machine: Machine) -> list[Estimate]:
    """Of a settled configuration's stages, by depth; of one with several windows its first."""
    first = {stage.depth: stage for stage in reversed(schedule(config))}
    return [Estimate(config, vocabulary_size(config), first[depth], machine.kind) for depth in sorted(first)]


def forecast(
    config: StackWiseConfig, machine: Machine, tokens: int | None = None, *, tracer: Tracer | None = None
) -> Forecast:
    """What a configuration takes on a machine.

    Args:
        tokens: That each stage trains on; None: as the configuration says, else 10^9.
        tracer: Traces the memory of stages that are held whole; None: it is estimated.

    Raises:
        UsageError: Not a block fits, where `training.block_size` is auto.
    """
    config, notes = settled(config, machine)
    vocab_size, of_stages = vocabulary_size(config), estimates(config, machine)
    at = {estimate.stage.depth: estimate.stage for estimate in of_stages}
    settings = config.stage_training(0)
    rowed = settings.batch_size * settings.accumulation * config.training.seq_len
    if tokens is None:
        tokens = settings.steps * rowed if settings.steps else settings.tokens
    if tokens is None:
        tokens = DEFAULT_TOKENS
        notes.append("training.steps and training.tokens are null: 1 G tokens a stage are taken (--tokens says others)")
    stages, direct = [], False
    for estimate in of_stages:
        swap = estimate.swap(int(machine.memory), int(machine.ram))
        if swap is not None:
            memory, direct = _swapped(estimate, swap), direct or swap.direct
        else:
            memory = tracer.traced(estimate) if tracer is not None else Traced(estimated(estimate))
        stages.append(_stage(estimate, swap, memory, machine, tokens, _place(config, at, estimate.stage)))
    if speeds := [stage.reached for stage in stages if stage.reached is not None]:
        of_step = f"{rowed:,} tokens a step"
        notes.append(f"what is streamed reaches {min(speeds):.0%} of its speed in memory, with {of_step}")
    if direct:
        notes.append("files of what is streamed go past the page cache, which cannot keep them")
    whole = Forecast(config, machine, vocab_size, tokens, stages, config.windows, notes)
    if config.has_windows and config.training.windows == AUTO and whole.boundaries:
        limit = min(machine.disk.size, config.store.max_bytes or machine.disk.size) - whole.live + whole.boundaries
        windows = max(1, math.ceil(whole.boundaries / limit)) if limit > 0 else 1
        notes.append(f"training.windows: auto is taken as {windows}")
        return Forecast(config, machine, vocab_size, tokens, stages, windows, notes)
    return whole


def _settle(config: StackWiseConfig, machine: Machine, vocab_size: int, notes: list[str]) -> None:
    """Give what is `auto` the number that memory allows."""
    from stackwise.pipeline.runner.auto import largest_fitting

    if config.training.batch_size == AUTO and config.finds_block_size:
        config.training.batch_size = 1
    if config.finds_block_size:
        config.training.block_size = largest_fitting(config, vocab_size, int(machine.memory), machine.kind)
        notes.append(f"training.block_size: auto is taken as {config.training.block_size}, the most that fits")
    for section in (config.training, *(overrides.training for overrides in config.stages.values())):
        if section.batch_size == AUTO:
            section.batch_size = 1
            stages = schedule(config)
            while section.batch_size < 1 << 12:
                section.batch_size *= 2
                if any(Estimate(config, vocab_size, s, machine.kind).memory > 0.8 * machine.memory for s in stages):
                    section.batch_size //= 2
                    break
            notes.append(f"batch_size: auto is taken as {section.batch_size}")


def _place(config: StackWiseConfig, stages: dict[int, Stage], stage: Stage) -> _Place:
    above = stages.get(stage.depth + 1)
    writes = above is not None and above.reads_boundary and above.first == stage.last + 1
    every = config.boundary_every
    recomputed = stage.depth % every if stage.reads_boundary else 0
    return _Place(above if writes and above is not None and above.depth % every == 0 else None, recomputed)


def _swapped(estimate: Estimate, swap: Swap) -> Traced:
    """The device's memory of a stage whose groups take turns."""
    phase = estimate.largest_phase
    state, without = phase.state_bytes(gradients=True), phase.state_bytes(gradients=False)
    weights = WEIGHT_BYTES * phase.trained_parameters
    parts = dict.fromkeys(PARTS, 0)
    share = (swap.alive * swap.group + (0 if swap.host else swap.kept)) / max(1, state)
    parts["weights"], parts["gradients"] = round(weights * share), round((state - without) * share)
    parts["optimizer"] = round((without - weights) * share)
    parts["head"] = swap.loss
    parts["activations"] = max(0, swap.memory - sum(parts.values()))
    return Traced(parts | {"peak": sum(parts.values())})


def grown(parts: Mapping[str, int]) -> float:
    """Bytes that a worker on a CPU grows by over what it has when it starts, of a stage's traced parts."""
    return FIRST + parts["peak"] + HOLES * (parts["activations"] + parts["head"])


def products_of_a_row(estimate: Estimate, machine: Machine, every: int) -> tuple[float, float]:
    """Products of a row: of one step's passes, and of a forward pass to the boundary above.

    Those that a machine carries out faster in 8 bits count as so much fewer.

    Args:
        every: Of how many blocks one is recomputed in the backward pass; 0: none is.
    """
    config, stage = estimate.config, estimate.largest_phase.stage
    trained = {part.removeprefix(ADAPTER) for part in stage.trains}
    forward = forward_flops(config, stage)
    if machine.fp8 and any(stage.format(part).precision == FP8_PRODUCTS for part in stage.blocks):
        scores = 4.0 * config.row_positions**2 * config.model.heads_width * (stage.last - stage.first + 1)
        forward = scores + (forward - scores) * machine.flops / machine.fp8
    block = forward / max(1, stage.last - stage.first + 1)
    parts = [*stage.blocks, *stage.lookahead]
    lowest = next((at for at, part in enumerate(parts) if part in trained), len(parts))
    # Forward; the gradient of what enters each above the lowest that trains; that of the weights that train.
    passes = sum(1 + (at >= lowest) + (part in trained) for at, part in enumerate(parts))
    passes += sum(at >= lowest for at in range(0, len(parts), every)) if every else 0
    scored = (
        (config.training.min_mask_fraction + config.training.max_mask_fraction) / 2 if config.objective.masks else 1
    )
    head = 2 * scored * config.row_positions * estimate.vocab_size * config.model.d_model
    return passes * block + (2 + (HEAD in trained)) * head, forward


@dataclass(frozen=True)
class _Place:
    """Where a stage stands in its run: the stage above it, and the stages whose output is made as it is asked for."""

    above: Stage | None
    recomputed: int  # stages between it and the stored boundary below it


def _stage(
    estimate: Estimate, swap: Swap | None, trace: Traced, machine: Machine, tokens: int, place: _Place
) -> StageForecast:
    config, stage = estimate.config, estimate.stage
    settings, training = config.stage_training(stage.depth), config.training
    step_rows = settings.batch_size * settings.accumulation
    steps = max(1, round(tokens / (step_rows * training.seq_len)))
    seen = steps * step_rows
    rows = min(training.rows or seen, seen)
    boundary = whole_boundary(config, rows)
    row = boundary / max(1, rows)
    flops, forward = products_of_a_row(estimate, machine, settings.recomputed_every if swap is None else 0)
    if settings.meta is not None:
        flops *= settings.meta.work(settings.batch_size) / settings.batch_size
    state = estimate.state_bytes(gradients=False)
    gradients = estimate.state_bytes(gradients=True) - state
    reads = boundary if stage.reads_boundary and not place.recomputed else 0
    cold = reads / machine.disk.read * (seen / max(1, rows) if reads > CACHED * machine.ram else 1.0)
    compute = seen * flops / machine.rate + steps * (2 * state + 3 * gradients) / machine.bandwidth
    compute += place.recomputed * seen * forward / machine.rate  # of stages as large as this one
    copies = seen * row / machine.host if stage.reads_boundary and machine.kind == "cuda" else 0.0
    host, written = machine.base + AHEAD * settings.batch_size * row, float(state)
    reached = None
    if swap is not None:
        moved, resident = streamed(estimate, swap), compute
        # Each group goes forward again on the way down, but for passes that wait.
        compute += seen * forward / machine.rate * (1 - swap.share)
        host += swap.host
        terms = {
            COMPUTE: compute,
            READ: cold + steps * moved.read / machine.disk.read,
            WRITE: steps * moved.written / machine.disk.write,
            COPIES: steps * max(moved.up, moved.down) / machine.host if machine.kind == "cuda" else 0.0,
        }
        terms = {name: term + steps * moved.edges(machine) for name, term in terms.items()}
        reached = resident / max(terms.values())
        written += steps * moved.written
    else:
        host += state
        if machine.kind != "cuda":
            host += grown(trace.parts)
            if "-" not in codec_name(config.store):  # compressed files are not mapped
                host += max(0.0, min(reads, MAPPED * machine.ram, machine.ram - host))
        terms = {COMPUTE: compute, READ: cold, COPIES: copies}
        seconds = max(terms.values())
        saves = (
            steps / training.checkpoint_steps
            if training.checkpoint_steps
            else seconds / 60 / training.checkpoint_minutes
        )
        written += math.floor(saves) * state
    write = None
    if place.above is not None:
        write = Phase(
            {
                COMPUTE: rows * forward / machine.rate,
                READ: reads / machine.disk.read,
                WRITE: boundary / machine.disk.write,
            }
        )
    memory = dict(trace.parts)
    return StageForecast(
        stage=stage,
        parameters=estimate.trained_parameters,
        memory=memory,
        host_memory=round(host),
        swap=swap,
        train=Phase(terms),
        write=write,
        boundary=reads,
        state=3 * state if swap is None else swap.disk,
        commits=state,
        written=written,
        note=trace.note,
        reached=reached,
    )


@dataclass(frozen=True)
class Streamed:
    """Bytes of one step.

    Args:
        up, down: Between host and device.
        read, written: Of the disk.
        first, last: Of these, what is read before anything is computed, and written when all of it is.
    """

    up: float
    down: float
    read: float
    written: float
    first: float
    last: float

    def edges(self, machine: Machine) -> float:
        """Seconds of a step in which nothing else is done."""
        return self.first / machine.disk.read + self.last / machine.disk.write


def streamed(estimate: Estimate, swap: Swap) -> Streamed:
    """What a step moves.

    Up: weights, moments and gradients come, are updated, and weights and moments go. Down: weights come once more, and
    gradients go. Where nothing is clipped, weights alone come up; on the way down they come with their moments, are
    updated, and go. A boundary goes down to the host, comes up for the group above, and again on the way down, where
    its gradient goes and comes beside. What of boundaries does not stay in the host's memory is written once and read
    twice. Experts that stay there are not read.
    """
    config, phase = estimate.config, estimate.largest_phase
    settings = config.stage_training(estimate.stage.depth)
    weights = WEIGHT_BYTES * phase.trained_parameters
    state = estimate.state_bytes(gradients=False)
    gradients = estimate.state_bytes(gradients=True) - state
    tokens = settings.batch_size * settings.accumulation * config.row_positions
    boundary = tokens * config.model.d_model * (4 if config.precision in WIDE else 2)
    again = 1 - swap.share
    between = boundary * (swap.groups + 1)
    spilled = max(0.0, boundary * (swap.groups + 3) - swap.boundaries)
    ends = [part for part in estimate.stage.trains if part in (FRONT, HEAD)]
    lowest = max((phase.parameters(part) for part in ends), default=weights / WEIGHT_BYTES / swap.groups)
    per_parameter = 1 / max(1, phase.trained_parameters)
    if swap.early:
        gradients = 0
    return Streamed(
        up=state + gradients + weights + between * (2 + again),
        down=state + gradients + 2 * between,
        read=(state + gradients + weights) * (1 - swap.kept / max(1, state + gradients)) + spilled * (1 + again),
        written=state + gradients + spilled,
        first=(weights if swap.early else state + gradients) * lowest * per_parameter,
        last=(state if swap.early else gradients) * lowest * per_parameter,
    )
