"""What a stage takes: parameters, memory while it trains, bytes once it is committed; and how it is swapped."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from stackwise.config import StackWiseConfig
from stackwise.config.adapters import layers
from stackwise.config.model import ModelConfig
from stackwise.config.precision import bits_per_weight, weight_format
from stackwise.pipeline.recipe import stage_steps
from stackwise.pipeline.schedule import ADAPTER, FRONT, HEAD, Stage, adapter_part, block_number, schedule

TRAVELLING = 1 << 24  # elements of gradients, or one tensor, that travel between ranks at once
GATHERED = 2  # blocks whose weights are whole at once: the one that computes, and the one that comes
WEIGHT_BYTES = 4  # of a weight in training
WIDE = ("fp32", "fp64")  # precisions that are computed in without autocast

SLICE_BYTES = {"cpu": 32 << 20, "mps": 512 << 20, "cuda": 512 << 20}
"""Of float32 logits that exist at once (`objectives/cross_entropy.py`, which imports torch)."""

RECORD_BYTES, FILE_BYTES, STEP_BYTES = 6 << 10, 4 << 10, 32
"""Of a committed stage beside its weights, about: its record, the head of each file, and of each step in the record."""

SHARE = 0.9  # of the memory: what a stage may take of it


def kind_of(device: str) -> str:
    """The kind of a device: cuda of cuda:1."""
    return device.partition(":")[0]


@dataclass(frozen=True)
class Grouping:
    """How a pass without training holds a stage that does not fit: in groups of blocks, one after another."""

    groups: int  # groups that its blocks are divided into
    boundaries: int  # bytes of activations between groups that stay in memory
    pieces: int | None = None  # experts of a block in memory at once; None: all that rows reach


@dataclass(frozen=True)
class Swap:
    """How a stage that does not fit is swapped."""

    groups: int  # groups that its blocks are divided into
    boundaries: int  # bytes of a step's boundaries that stay in memory
    memory: int  # about the bytes that it takes, boundaries included
    disk: int  # about the bytes of disk: weights, moments and gradients, and what is left of a step's boundaries
    host: int  # about the bytes that it takes of the host's memory, where the device has its own
    loss: int  # of `memory`, what the loss takes
    group: int  # bytes of the state of the largest of its groups, front and head being some of their own
    pieces: int | None = None  # experts of a block in memory at once; None: all that rows reach
    passes: int = 0  # of `memory`, bytes of passes that wait for the way down, and are not computed again
    share: float = 0.0  # of a step's passes, those that do
    alive: int = 3  # groups on the device at once: those that come and go, or the one that computes alone
    early: bool = False  # whether groups are updated on the way down, where no clipping needs the whole gradient
    kept: int = 0  # bytes of experts that stay in the host's memory beside their files; on a CPU they are in `memory`
    direct: bool = False  # whether its files are more than the page cache can keep, so that they go past it


@dataclass(frozen=True)
class Estimate:
    """What a stage takes. The kinds of its model and its optimizer say what they take themselves."""

    config: StackWiseConfig
    vocab_size: int
    stage: Stage
    device: str = "cpu"  # the kind of device that it trains on, which decides about kernels

    def parameters(self, part: str) -> int:
        """Parameters of a part."""
        config, model, stage = self.config, self.config.model, self.stage
        if part.startswith(ADAPTER):
            sides = layers(model, block_number(part))
            return sum(
                size.rank * sum(sum(sides[layer]) for layer in sides if size.covers(layer))
                for size in stage.format(part.removeprefix(ADAPTER)).adapters
            )
        if part == FRONT:
            return model.front_parameters(self.vocab_size, config.training.seq_len)
        if part == HEAD:
            moves = HEAD in stage.trains and FRONT not in stage.trains
            shared = model.tie_embeddings and (not moves or config.training.tied_head == "frozen")
            return model.head_parameters(self.vocab_size, shared=shared)
        return model.at(block_number(part)).block_parameters

    def trained(self, part: str) -> int:
        """Parameters of a part that train, where it does: of a stream in columns those of one."""
        stream, column = self.config.model.stream, self.stage.column
        if column is None or part.startswith(ADAPTER):
            return self.parameters(part)
        if part in (FRONT, HEAD):
            return self.parameters(part) // stream.columns
        return stream.column_parameters(self.config.model.at(block_number(part)), column)

    @functools.cached_property  # asked for by nearly every figure
    def trained_parameters(self) -> int:
        """Parameters that the stage trains."""
        return sum(map(self.trained, self.stage.trains))

    @property
    def largest_phase(self) -> Estimate:
        """Of a stage that unfreezes one section at a time, what it is with the largest of them; else the same."""
        phases = [replace(self, stage=self.stage.unfreezing(*section)) for section in self.stage.candidates]
        return max(phases, key=lambda phase: phase._state_bytes(True) + phase.frozen_bytes, default=self)

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the weights that it holds and does not train; packed where they are in a narrow format."""
        total = 0.0
        for part in set(self.stage.holds) - set(self.stage.trains):
            total += self._frozen_bytes(part)
        return round(total) + self._standing_bytes

    @property
    def _standing_bytes(self) -> int:
        """Bytes of what is frozen within the parts that train."""
        whole = sum(map(self.parameters, self.stage.trains)) - self.trained_parameters
        return whole * WEIGHT_BYTES * (2 if self.config.precision == "fp64" else 1)

    def _frozen_bytes(self, part: str) -> float:
        form = weight_format(self.stage.format(part).precision)
        return self.parameters(part) * (bits_per_weight(form) / 8 if form else WEIGHT_BYTES)

    def state_bytes(self, *, gradients: bool) -> int:
        """Bytes of what it trains and its optimizer state (as a checkpoint holds them), with or without gradients."""
        return self.largest_phase._state_bytes(gradients)

    def _state_bytes(self, gradients: bool) -> int:
        whole = [part for part in self.stage.trains if part not in (FRONT, HEAD) and not part.startswith(ADAPTER)]
        blocks = sum(map(self.trained, whole))
        return self._state_of(blocks, self.trained_parameters - blocks, gradients)

    def _state_of(self, blocks: int, rest: int, gradients: bool = False) -> int:
        """Bytes of the state of so many trained parameters: of blocks, and others."""
        settings = self.config.stage_training(self.stage.depth)
        moments = settings.optimizer.state_bytes(blocks, rest)
        wide = 2 if self.config.precision == "fp64" else 1
        return wide * ((WEIGHT_BYTES * (1 + gradients + bool(settings.ema))) * (blocks + rest) + moments)

    @property
    def pieces_bytes(self) -> int:
        """Bytes of the state of all pieces that a swapped stage has (`Stage.pieces`)."""
        blocks = (*self.stage.blocks, *self.stage.lookahead)
        return self._state_of(sum(self.pieces_apart(part, 0) for part in blocks), 0)

    @property
    def files_bytes(self) -> int:
        """Bytes that its weights and optimizer state take at most once it is committed."""
        frozen = self.frozen_bytes if self.stage.commits_frozen else self._standing_bytes
        files = FILE_BYTES * (1 + 2 * len(self.stage.trains) + len(self.stage.commits_frozen))
        return self.state_bytes(gradients=False) + frozen + files

    @property
    def memory(self) -> int:
        """About the bytes that training it takes: its state, and the activations of one microbatch.

        What a block keeps for its backward pass, in numbers a token, is what its attention and feed-forward say
        (`kept`, `copied`), after Korthikanti et al. (arXiv 2205.05198, section 4.1), without the attention matrix,
        which fused attention does not keep. Autocast adds a 16-bit copy of every matrix in use. The loss keeps no
        logits beyond a slice. Held to the traced peak within 5% (`planning/trace.py`) for the presets' stages. Of a
        stage that ranks divide: what the rank takes that takes most (`rank_bytes`).
        """
        if self.config.parallel.divides:
            return rank_bytes(self)["peak"]
        fixed, row = self.memory_parts()
        return int(fixed + self.config.stage_training(self.stage.depth).batch_size * row)

    def memory_parts(self, blocks: int | None = None) -> tuple[float, float]:
        """The terms of `memory`: bytes whatever the batch is (the loss's at the batch that it has), and of each row.

        Args:
            blocks: Blocks of the stage; None: its own.
        """
        phase = self.largest_phase
        config, model, stage = self.config, self.config.model, phase.stage
        settings = config.stage_training(stage.depth)
        half = config.precision in ("bf16", "fp16")
        present = stage.last - stage.first + 1
        blocks = present if blocks is None else blocks
        state, without, share = phase._state_bytes(True), phase._state_bytes(False), blocks / present
        inside = [model.at(block) for block in range(stage.first, stage.last + 1)]
        beyond = [model.at(block_number(part)) for part in stage.lookahead]

        def total(fact: Callable[[ModelConfig], float]) -> float:
            return share * sum(map(fact, inside)) + sum(map(fact, beyond))

        parameters = sum(block.block_parameters for block in inside)
        left_out = round((1 - share) / max(1, phase.trained_parameters) * parameters * state)
        blocks += len(stage.lookahead)
        projection = self.vocab_size * model.d_model
        # Products in 8 bits take the weights as they are, and make codes of one at a time.
        cast = 0.0 if settings.products == "fp8" else total(lambda block: block.block_parameters)
        copies = 2 * (cast + projection) if half else 0
        every = settings.recomputed_every
        again = 0.0  # of a block that is recomputed: all that it keeps, once it is
        copies += config.training.continual.held_bytes * phase.trained_parameters if stage.window else 0
        kept = config.row_positions * total(self.kept_bytes)
        if every:
            for block, times in [*((b, share) for b in inside[::every]), *((b, 1.0) for b in beyond[::every])]:
                of_block = config.row_positions * self.kept_bytes(block)
                # Beside it the gradients of its backward pass: within the feed-forward, and of the stream.
                in_hand = (block.ffn_width + block.d_model) * (2 if half else 4)
                again = max(again, of_block + config.row_positions * in_hand)
                kept -= times * (of_block - config.row_positions * self.entering_bytes)
        scored = config.row_positions * (config.training.max_mask_fraction if config.objective.masks else 1.0)
        at_head = scored * model.d_model * (10 if half else 16) + config.row_positions * model.d_model * (
            2 if half else 4
        )
        loss = self.loss_bytes(settings.batch_size * scored, half)
        if (meta := settings.meta) is not None and settings.batch_size:
            # Of plain attention, whose gradient has a gradient, three matrices of scores stay.
            matrices = 12.0 * model.n_heads * config.row_positions**2 * blocks if meta.second_order else 0.0
            several = meta.rows_kept(settings.batch_size) / settings.batch_size
            kept, at_head = (kept + matrices / 2.9) * several, at_head * several
            copies += meta.weights_kept * WEIGHT_BYTES * phase.trained_parameters
            if meta.second_order:  # all logits of all passes
                loss = 6.0 * settings.batch_size * several * scored * self.vocab_size / 2.9
        # In the second microbatch gradients are there from the start; in an only one they come as activations go.
        gradients = state - without if settings.accumulation > 1 else 0
        held = phase.frozen_bytes + copies - left_out
        of_lowest = max(again, kept / max(1, blocks))
        peaks = [(without + held + gradients + loss, kept + at_head)]
        if half and settings.accumulation > 1:
            # Weights are cast once a step, so that their 16-bit gradients are added up when all blocks are done: as the
            # lowest goes back those of the others are there, and then its own in place of what it kept.
            cast = share * sum(phase.parameters(part) for part in stage.trains if part != FRONT)
            lowest = min(cast, parameters / present)
            peaks += [(state + held + 2 * (cast - lowest), of_lowest), (state + held + 2 * cast, 0.0)]
        else:
            peaks.append((state + held, of_lowest))
        if every:  # as the uppermost of those blocks is recomputed, what enters those below is there
            of_head = WEIGHT_BYTES * projection * (HEAD in stage.trains)
            peaks.append((without + held + max(gradients, of_head), kept + again))
        return max(peaks, key=lambda peak: peak[0] + settings.batch_size * peak[1])

    def kept_bytes(self, model: ModelConfig) -> float:
        """Bytes a token that a block keeps for its backward pass, by the block's settings."""
        half = self.config.precision not in WIDE
        meta = self.config.stage_training(self.stage.depth).meta
        twice = meta is not None and meta.second_order  # a norm whose gradient has a gradient is plain operations
        kept = model.attention.kept(model) + model.ffn.kept(model)
        # A norm in one kernel keeps what enters it, and no more in between; under autocast what leaves it is narrow.
        fused = self.device == "cuda" and not twice
        if half and not fused:
            kept += model.attention.copied(model) + model.ffn.copied(model)
        elif fused or model.norm == "layernorm":
            kept -= 2 * model.d_model
        # Behind attention and feed-forward: on a GPU a byte a number, elsewhere its factor.
        width = 1 if self.device == "cuda" else 2 if half else 4
        dropped = 2 * model.d_model * width if model.dropout else 0
        return kept * (2 if half else 4) + dropped

    @property
    def entering_bytes(self) -> int:
        """Bytes a token of what enters a block: of one that is recomputed, all that is kept."""
        return self.config.model.d_model * {"fp32": 4, "fp64": 8}.get(self.config.precision, 2)

    def pieces_apart(self, part: str, most: int) -> int:
        """Parameters of a part's pieces that are away, where so many are in memory at once."""
        paths = self.stage.pieces(self.config, part)
        model = self.config.model.at(block_number(part)) if paths else self.config.model
        return sum(
            matrix.outputs * matrix.inputs
            for path in paths[most:]
            for name, matrix in model.ffn.matrices(model).items()
            if f"ffn.{name}".startswith(f"{path}.")
        )

    def loss_bytes(self, scored: float, half: bool) -> float:
        """Bytes of the loss beside its vectors: a slice of logits and what is made of it, the projection's gradient."""
        size, projection = SLICE_BYTES.get(self.device, 512 << 20), self.vocab_size * self.config.model.d_model
        rows = min(scored, max(16, size // (4 * self.vocab_size)))
        several = scored > rows
        gradient = 4 * projection * (HEAD in self.stage.trains or FRONT in self.stage.trains)
        products = (2 * projection + 6 * rows * self.vocab_size) if half else 4 * rows * self.vocab_size
        return max(8 * rows * self.vocab_size + several * gradient, products + gradient)

    def grouping(self, memory: int, host: int | None = None) -> Grouping | None:
        """How passes without training hold the stage; None: whole, as it is in training. See `swap`."""
        if not self.config.parallel.divides:
            swap = self.swap(memory, host)
            return None if swap is None else Grouping(swap.groups, swap.boundaries, swap.pieces)
        # As few groups as may be, two of which are in memory: on a CPU the ranks of a host share it.
        apart, ranks = self.device == "cuda", self.config.parallel.ranks
        limit = SHARE * min(memory if apart else memory // ranks, self.config.training.memory or memory)
        size = WEIGHT_BYTES * (2 if self.config.precision == "fp64" else 1)
        blocks = size * sum(map(self.parameters, self.stage.blocks))
        most = max(1, len(self.stage.blocks))
        groups = next((n for n in range(1, most) if 2 * blocks / n <= limit / 2), most)
        return Grouping(groups, int((host or memory) // ranks // 8))

    def swap(self, memory: int, host: int | None = None) -> Swap | None:
        """How it is swapped; None where it is resident. It decides nothing about the result.

        The largest of its groups is in memory three times over: one leaving, one computing, one arriving. On a GPU they
        are there if they fit, else the one that computes alone; the host's memory has what comes from the disk and goes
        there, and of the boundaries of a step as many as fit. What is left of the device's memory is for passes that
        wait for the way down, half of it: what else takes memory is not known. Of what is then left of the host's,
        half is for experts that stay from step to step.

        Args:
            memory: Bytes of the device, or on a CPU of the machine; `training.memory` comes before it.
            host: Bytes of the host's memory, where the device has its own; None: as many.
        """
        phase = self.largest_phase
        config, stage = self.config, phase.stage
        training, settings = config.training, config.stage_training(stage.depth)
        ranks, apart = config.parallel.ranks, self.device == "cuda"
        limit = min(memory if apart else memory // ranks, training.memory or memory)  # ranks on CPUs share a host
        fits = phase.memory <= SHARE * limit
        goes_back = settings.divergence.goes_back or settings.keep_best  # which takes weights of earlier steps
        divided = ranks == 1 or config.swap_undivided is None
        # Inner steps change every part at once.
        resident = fits or goes_back or not divided or settings.meta is not None
        if training.swap == "never" or (training.swap == "auto" and resident):
            return None
        block = max(phase.parameters(part) for part in (*stage.blocks, *stage.lookahead))
        half = config.precision not in WIDE
        of_host = host or memory
        behind = of_host // ranks if apart else limit  # what holds groups that do not compute, and boundaries
        state = phase._state_bytes(True)
        per_parameter = state / max(1, phase.trained_parameters)
        if ranks > 1:
            # Weights and gradients of a group are whole, and beside them is a rank's share of all of its state.
            weight = WEIGHT_BYTES * (2 if config.precision == "fp64" else 1)
            per_parameter = 2 * weight + per_parameter / ranks

        def held(part: str, pieces: int | None = None) -> float:  # bytes of a part, its adapters included
            whole = (part, *([adapter_part(part)] if stage.format(part).adapters else []))
            away = 0 if pieces is None else phase.pieces_apart(part, pieces)
            return sum(
                per_parameter * (phase.parameters(one) - away) if one in stage.trains else phase._frozen_bytes(one)
                for one in whole
            )

        blocks_held = (*stage.blocks, *stage.lookahead)
        ends = max((held(part) for part in stage.holds if part in (FRONT, HEAD)), default=0.0)
        most, pieces = len(blocks_held), training.swap_experts
        largest = max(held(part, pieces) for part in blocks_held)
        kept = max(phase.kept_bytes(config.model.at(block_number(part))) for part in (*stage.blocks, *stage.lookahead))
        activations = settings.batch_size * config.row_positions * kept + (2 * block if half else 0)
        loss = round(phase.loss_bytes(settings.batch_size * config.row_positions, half))

        def group(groups: int) -> float:
            return max(ends, -(-most // groups) * largest)

        def taken(groups: int, alive: int = 3) -> int:
            return round(alive * group(groups) + -(-most // groups) * activations + loss)

        def fitting(groups: int, alive: int = 3) -> bool:
            held = not apart or 3 * group(groups) <= SHARE * behind - behind // 4
            return held and taken(groups, alive) <= (SHARE * limit if apart else SHARE * limit - limit // 4)

        least = 1 if apart else 3
        experts = max(len(stage.pieces(config, part)) for part in blocks_held)
        while training.swap_experts is None and experts > 1 and not fitting(most, least):  # not even block by block
            pieces = experts = experts // 2
            largest = max(held(part, pieces) for part in blocks_held)
        alive = 3 if fitting(min(training.swap_parts or most, most)) else least
        groups = min(training.swap_parts or next((n for n in range(1, most) if fitting(n, alive)), most), most)
        microbatches = max(1, settings.accumulation // ranks)
        tokens = settings.batch_size * microbatches * config.row_positions
        step = tokens * config.model.d_model * (2 if half else 4) * (groups + 3)
        boundaries = behind // 4
        if apart:
            boundaries = max(boundaries, round(SHARE * behind - 3 * group(groups)))
        kept = min(boundaries, step)
        largest_part = max(phase.parameters(part) for part in stage.holds)
        travelling = min(largest_part, max(TRAVELLING, self.vocab_size * config.model.d_model))
        # Of what travels there are rows by rank, those that came, their sum, and whole tensors.
        memory = taken(groups, alive) + 4 * WEIGHT_BYTES * travelling * (ranks > 1) + (0 if apart else kept)
        pieced = [part for part in blocks_held if part in stage.trains and stage.pieces(config, part)]
        waiting = round(microbatches * (most - len(pieced)) * activations)  # experts go, and passes need them
        # Half of what is left: what else takes memory is not known (free pieces that the allocator holds, files read),
        # and a pass that finds no room costs time alone, its forward pass once more.
        passes = min(waiting, max(0, round(SHARE * limit) - memory) // 2)
        unclipped = settings.grad_clip == 0 or settings.clip_by == "last"  # by the step's own norm
        early = unclipped and not pieced
        # Updated early, states before and after a step are there until it is published, and no gradients.
        states = 2 * phase._state_bytes(False) if early else state + round(max(ends, largest))
        # What rows reach of experts, all of them at most, is written beside what the step before left.
        pieced_bytes = per_parameter * sum(phase.pieces_apart(part, 0) for part in pieced)
        states += round(pieced_bytes) if ranks == 1 else 0
        on_disk = 1 if "{rank}" in (config.store.path or "") else ranks  # ranks whose files one disk has, at most
        of_state, of_step = on_disk * states / ranks, on_disk * (step - kept)
        beside = round(3 * group(groups)) + kept if apart else 0
        room = (round(SHARE * behind) - beside if apart else round(SHARE * limit) - memory - passes) // 2
        whole = pieced_bytes
        if training.swap_experts is not None:  # as many of each block
            whole -= per_parameter * sum(phase.pieces_apart(part, training.swap_experts) for part in pieced)
        staying = max(0, min(round(whole), room))
        memory += passes + (0 if apart else staying)
        beside += staying if apart else 0
        cache = SHARE * of_host - ranks * (beside if apart else memory)  # the rest of the host's memory
        return Swap(
            groups,
            boundaries,
            memory,
            round(of_state + of_step),
            beside,
            loss,
            round(group(groups)),
            pieces,
            passes=passes,
            share=passes / max(1, waiting),
            alive=alive,
            early=early,
            kept=staying,
            direct=of_state > cache,
        )


def committed_bytes(config: StackWiseConfig, vocab_size: int, drawn: int, *, windows: int | None = None) -> int:
    """Bytes that committed stages take at most: each one's weights and optimizer state, and those of one more.

    Args:
        drawn: Rows of all windows together.
    """
    windows = config.windows if windows is None else windows
    stages = {stage.depth: stage for stage in schedule(config)}.values()
    sizes = [Estimate(config, vocab_size, stage).files_bytes for stage in stages]
    records = sum(windows * RECORD_BYTES + STEP_BYTES * stage_steps(config, stage.depth, drawn) for stage in stages)
    return sum(sizes) + max(sizes) + records


def recompute_blocks(config: StackWiseConfig) -> None:
    """Let every block of every stage be recomputed in the backward pass."""
    for section in (config.training, *(overrides.training for overrides in config.stages.values())):
        section.activation_checkpointing = True


def rank_bytes(estimate: Estimate) -> dict[str, int]:
    """By what it is for (`planning.trace.PARTS`), about the bytes of the rank that takes most; "peak" is their sum.

    Of state a rank has a slice of the blocks of its place (`pipeline`): matrices divided by `tensor`, what is left by
    `shard`. Beside that stand blocks that are whole while they compute, their gradients before they are divided, the
    ends of the stage in the same way, and activations of as many microbatches as are between their two passes.
    """
    places = [_place(estimate, place) for place in range(estimate.config.parallel.pipeline)]
    return max(places, key=lambda place: place["peak"])


def _place(estimate: Estimate, place: int) -> dict[str, int]:
    config, stage = estimate.config, estimate.stage
    parallel, settings = config.parallel, config.stage_training(stage.depth)
    names = [*stage.blocks, *stage.lookahead]
    parts = parallel.pipeline * (2 if parallel.schedule == "interleaved" else 1)
    bounds = [round(len(names) * at / parts) for at in range(parts + 1)]
    mine = [name for at in range(place, parts, parallel.pipeline) for name in names[bounds[at] : bounds[at + 1]]]
    last = place == parallel.pipeline - 1
    ends = [FRONT] if FRONT in stage.holds and (place == 0 or (last and config.model.tie_embeddings)) else []
    ends += [HEAD] if HEAD in stage.holds and last else []
    half = config.precision not in WIDE
    wide = WEIGHT_BYTES * (2 if config.precision == "fp64" else 1)

    blocks = [estimate.parameters(name) / parallel.tensor for name in mine]
    at_ends = sum(estimate.parameters(name) for name in ends)
    held = (sum(blocks) + at_ends) / parallel.shard
    trained = max(1, estimate.trained_parameters)
    moments = (estimate.state_bytes(gradients=False) - wide * trained) / trained
    largest = max(blocks, default=0.0)
    together = min(len(blocks), GATHERED) * largest if parallel.zero == 3 else sum(blocks)
    undivided = sum(blocks) if parallel.zero == 1 else largest
    gathered = (2 if half else wide) * together + wide * at_ends + wide * (undivided + at_ends)

    count = settings.accumulation // parallel.shares
    waiting = 1
    if parallel.pipeline > 1:
        waiting = count if parallel.schedule == "gpipe" else min(count, parts - place)
    rows = settings.batch_size * config.row_positions
    by_block = [estimate.kept_bytes(config.model.at(block_number(name))) / parallel.tensor for name in mine]
    every, enters = settings.recomputed_every, estimate.entering_bytes / (parallel.tensor if parallel.sequence else 1)
    again = max(by_block[::every], default=0.0) if every else 0.0  # of the one that is recomputed
    kept = sum(enters if every and at % every == 0 else size for at, size in enumerate(by_block))
    scored = rows * (config.training.max_mask_fraction if config.objective.masks else 1.0)
    at_head = scored * config.model.d_model * (10 if half else 16) + rows * config.model.d_model * (2 if half else 4)
    by_part = {
        "weights": wide * held,
        "gradients": wide * held,
        "optimizer": moments * held,
        "activations": rows * (waiting * kept + again),
        "head": at_head + estimate.loss_bytes(scored, half) if HEAD in ends else 0,
        "buffers": gathered,
    }
    sizes = {name: int(size) for name, size in by_part.items()}
    return sizes | {"peak": sum(sizes.values())}
