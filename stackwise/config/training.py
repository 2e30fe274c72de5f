"""How stages train: choices with settings of their own, the settings of one stage, the defaults of all."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from stackwise.config.fields import (
    AUTO,
    AutoInt,
    Count,
    Fraction,
    NonNegative,
    Positive,
    PositiveInt,
    Probability,
    Section,
    Share,
    Size,
    Small,
)
from stackwise.config.kinds import (
    ADAPTATIONS,
    DIVERGENCES,
    FUSIONS,
    LOOKAHEADS,
    MODES,
    Fault,
    Kind,
    Objective,
    Optimizer,
)
from stackwise.registry import Registry

if TYPE_CHECKING:
    from stackwise.config.model import ModelConfig

Span = tuple[int, int]
"""First and last block of a run of blocks."""
Precision = Literal["auto", "fp32", "bf16", "fp16"]
StackPrecision = Literal["full", "fp32", "half", "fp16", "bfloat16", "bf16", "fp8", "nvfp4", "fp4", "qlora"]
STACK_PRECISION: dict[str, Precision] = {
    "fp32": "fp32", "half": "fp16", "fp16": "fp16", "bfloat16": "bf16", "bf16": "bf16",
}  # fmt: skip
"""What a stack's precision is in words of `precision`; full is whatever `precision` says."""


class Mode(Kind):
    """The schedule: which blocks become new with each stage, and what a stage holds, trains and reads.

    A stage trains its blocks above the boundary that the stages below have made, unless a fact says otherwise.
    """

    registry: ClassVar[Registry[Any]] = MODES
    default: ClassVar[str] = "blockwise"
    apart: ClassVar[bool] = False
    """Whether no section of the rack stands on another: each trains between the front and a head of its own."""

    @property
    def grows(self) -> bool:
        """Whether each stage trains all the blocks so far, from tokens."""
        return False

    @property
    def own_rows(self) -> bool:
        """Whether each stage has rows of its own, whatever `training.fresh_masks` says."""
        return False

    @property
    def finds_size(self) -> bool:
        """Whether the size of its stages is still to be found."""
        return False

    def partition(self, model: ModelConfig) -> list[Span]:
        """First and last block of each part of the rack that becomes new with a stage, lowest first."""
        return cut(model.n_blocks, model.n_blocks)

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        """What of its settings the model cannot have."""
        yield from ()

    def unused(self, model: ModelConfig) -> Iterator[tuple[str, str | bool]]:
        """Names of its settings, with blanks between, and why they are unused; False: they are used."""
        yield from ()


def cut(blocks: int, size: int) -> list[Span]:
    """Spans of `size` blocks; the last one takes what does not divide."""
    return [(first, min(first + size, blocks) - 1) for first in range(0, blocks, size)]


class EndToEnd(Mode):
    """One stage, which trains the whole rack."""


class Layerwise(Mode):
    """Stages of one block."""

    def partition(self, model: ModelConfig) -> list[Span]:
        """See `Mode.partition`."""
        return cut(model.n_blocks, 1)


class Blockwise(Mode):
    """Stages of several blocks."""

    block_size: AutoInt = Field(4, description="blocks in a stage; auto: from memory and gain, found by trial")
    n_stages: Small | None = Field(None, description="number of stages instead of block_size")
    trial_steps: PositiveInt = Field(
        100, description="block_size auto: steps of each stage of the racks that are tried"
    )

    @property
    def finds_size(self) -> bool:
        """See `Mode.finds_size`."""
        return self.block_size == AUTO and self.n_stages is None

    def partition(self, model: ModelConfig) -> list[Span]:
        """See `Mode.partition`."""
        n_blocks = model.n_blocks
        if self.n_stages is None:
            return cut(n_blocks, self.block_size or 1)  # until `auto` is found
        n = min(self.n_stages, n_blocks)
        edges = [n_blocks * k // n for k in range(n + 1)]
        return [(first, end - 1) for first, end in itertools.pairwise(edges)]

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        """See `Mode.faults`."""
        if self.n_stages is not None and self.n_stages > model.n_blocks:
            yield "n_stages", f"{self.n_stages} stages are more than the {model.n_blocks} blocks of the model"
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
        yield "block_size", other and "training.mode.n_stages is given"
        yield "trial_steps", not self.finds_size and "training.mode.block_size is a number"


class Fused(Blockwise):
    """Stages of several blocks on rows of their own; or each with all the blocks so far."""

    fusion_mode: Literal["frozen", "trainable"] = Field(
        "frozen", description="the blocks below are frozen, or trainable"
    )

    @property
    def grows(self) -> bool:
        """See `Mode.grows`."""
        return self.fusion_mode == "trainable"

    @property
    def own_rows(self) -> bool:
        """See `Mode.own_rows`."""
        return self.fusion_mode == "frozen"


class Independent(Blockwise):
    """Stages of several blocks, each on its own window of masked fractions."""

    apart: ClassVar[bool] = True


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

    goes_back: ClassVar[bool] = True

    rate_factor: Fraction = Field(0.5, description="factor on the learning rate at each rollback")

    def lowered(self, rollbacks: int) -> float:
        """See `Divergence.lowered`."""
        return float(self.rate_factor**rollbacks)


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


class Overlap(Auxiliary):
    """Those of the next stage, which trains them again."""


class Tail(Auxiliary):
    """The rack's last ones, shared by every stage."""


class Fusion(Kind):
    """Stages that train sections of the rack together, after they were trained one by one."""

    registry: ClassVar[Registry[Any]] = FUSIONS
    tag: ClassVar[str] = "strategy"
    default: ClassVar[str] = "none"

    head_alone: ClassVar[bool] = False
    """Whether the blocks stand still and only the head trains."""
    probes: ClassVar[bool] = False
    """Whether the section that trains is found by probes, on held-out loss."""

    @property
    def budget(self) -> int | None:
        """Optimizer steps of all its stages; None: as many as a stage each."""
        return None

    def groups(self, sections: list[Span]) -> list[Span]:
        """First and last block of each stage, in order.

        Args:
            sections: What was trained one by one, two or more, lowest first.
        """
        return []


class NoFusion(Fusion):
    """None."""


class TrainableFusion(Fusion):
    """The whole rack."""

    steps: PositiveInt | None = Field(
        None, description="optimizer steps in all, shared by these stages; null: as many as a stage each"
    )

    @property
    def budget(self) -> int | None:
        """See `Fusion.budget`."""
        return self.steps

    def groups(self, sections: list[Span]) -> list[Span]:
        """See `Fusion.groups`."""
        return [(sections[0][0], sections[-1][1])]


class FrozenFusion(TrainableFusion):
    """The head alone, over the finished rack."""

    head_alone: ClassVar[bool] = True

    def groups(self, sections: list[Span]) -> list[Span]:
        """See `Fusion.groups`; what stands still below the last section is read as its boundary."""
        return [sections[-1]]


class HierarchicalFusion(TrainableFusion):
    """Neighbours first, then pairs of pairs, up to the whole."""

    def groups(self, sections: list[Span]) -> list[Span]:
        """See `Fusion.groups`."""
        groups: list[Span] = []
        while len(sections) > 1:
            pairs = [sections[start : start + 2] for start in range(0, len(sections), 2)]
            sections = [(pair[0][0], pair[-1][1]) for pair in pairs]
            groups += [group for group, pair in zip(sections, pairs, strict=True) if len(pair) == 2]
        return groups


class AdaptiveFusion(TrainableFusion):
    """The section whose unfreezing gains most on held-out loss, found by probes."""

    probes: ClassVar[bool] = True

    rounds: Size = Field(
        1, description="how often it is probed anew which section to train; each round has its share of steps"
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
    anneal: Count = Field(
        0, description="first steps, on which what follows is hidden bit by bit; 0: all of it from the first step"
    )


class Quantization(Section):
    """Integers in place of blocks' weights (and of what enters their layers) as the forward pass sees them."""

    bits: Annotated[int, Field(ge=2, le=8)] = Field(4, description="bits of a weight, 2 to 8")
    group: Literal["tensor", "channel"] | Size = Field(
        "channel", description="weights that share a scale: tensor, channel (a row), or so many neighbours in a row"
    )
    symmetric: bool = Field(True, description="zero is the middle of the grid; false: a zero point for each group")
    scale: Literal["extremes", "learned"] = Field(
        "extremes", description="scales follow from the weights' extremes at every step, or are trained beside them"
    )
    trains: Literal["all", "scales"] = Field(
        "all", description="what trains: all, or the scales of weights whose codes stand still (and nothing else)"
    )
    activations: Annotated[int, Field(ge=2, le=8)] | None = Field(
        None, description="bits of what enters a layer, token by token; null: it stays as it is"
    )
    activations_symmetric: bool = Field(False, description="zero is the middle of the activations' grid")

    @property
    def name(self) -> str:
        """Its name as a precision and as a weight format, such as int4-g64-asym-learned-a8."""
        marks = [f"g{self.group}" if isinstance(self.group, int) else self.group]
        marks += ["asym"] * (not self.symmetric) + ["learned"] * (self.scale == "learned")
        if self.activations:
            marks.append(f"a{self.activations}{'s' if self.activations_symmetric else ''}")
        return "-".join([f"int{self.bits}", *marks])

    @classmethod
    def named(cls, name: str) -> Quantization | None:
        """The settings that a name stands for; None: it names no format of integers."""
        parts = _INTEGERS.fullmatch(name)
        if parts is None:
            return None
        bits, group, asymmetric, learned, activations, symmetric = parts.groups()
        settings = {
            "bits": int(bits),
            "group": int(group[1:]) if group[0] == "g" else group,
            "symmetric": not asymmetric,
            "scale": "learned" if learned else "extremes",
            "activations": int(activations) if activations else None,
            "activations_symmetric": bool(symmetric),
        }
        return cls.model_validate(settings)

    @property
    def bits_per_weight(self) -> float:
        """Bits of a packed weight, its scales included but for a row's or a matrix's."""
        # A float32 scale, and an int8 zero point where there is one.
        shared = (32 + 8 * (not self.symmetric)) / self.group if isinstance(self.group, int) else 0
        return self.bits + shared


_INTEGERS = re.compile(r"int([2-8])-(tensor|channel|g[1-9]\d{0,8})(-asym)?(-learned)?(?:-a([2-8])(s)?)?")


class StageTraining(Section):
    """How one stage trains. Each of these can be set for one stage: `stages.K.training.KEY`."""

    steps: PositiveInt | None = Field(
        None, description="optimizer steps of a stage; null: by tokens or epochs_per_layer"
    )
    tokens: PositiveInt | None = Field(
        None, description="tokens that a stage trains on, where steps is null; null: by epochs_per_layer"
    )
    epochs_per_layer: Positive = Field(1.0, description="passes of a stage over its rows, where steps is null")
    batch_size: AutoInt = Field(8, description="rows in a microbatch; auto: as many as fit in memory, found by trial")
    accumulation: Size = Field(1, description="microbatches in a step")
    optimizer: Optimizer = Field(
        default_factory=lambda: Optimizer.of(Optimizer.default),
        description="adamw, muon (blocks' matrices; adamw for the rest), adamw8bit (moments in 8 bits); with settings "
        "of its own: {name: muon, momentum: 0.9}",
    )
    learning_rate: Positive = Field(1e-3, description="peak learning rate")
    block_learning_rates: dict[Count, Positive] = Field(
        default_factory=dict, description="peak learning rates of single blocks, by their number in the rack: {3: 1e-4}"
    )
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="shape after warm-up; wsd holds, then falls over the last fifth"
    )
    min_learning_rate: NonNegative = Field(0.1, description="where the schedule ends, as a share of the peak")
    warmup: Share = Field(0.05, description="share of the steps that warm up")
    weight_decay: NonNegative = Field(0.1, description="weight decay, on matrices alone")
    grad_clip: NonNegative = Field(1.0, description="largest global gradient norm; 0: no clipping")
    loss_scale: Literal["dynamic"] | Positive = Field(
        "dynamic", description="precision fp16: factor on the loss before gradients are taken; dynamic finds it"
    )
    quantization: Quantization | None = Field(
        None, description="train blocks for integers: {bits: 4, group: 64, scale: learned}; null: no rounding"
    )
    ema: Probability = Field(
        0.0, description="decay of a running mean of the weights, which is then what is committed; 0: none"
    )
    eval_every: PositiveInt | None = Field(
        None, description="steps between evaluations on held-out rows inside a stage; null: none"
    )
    patience: PositiveInt | None = Field(
        None, description="end a stage after so many evaluations without a lower held-out loss; null: never"
    )
    keep_best: bool = Field(False, description="commit the weights of the evaluation with the lowest held-out loss")
    divergence: Divergence = Field(
        default_factory=lambda: Divergence.of(Divergence.default),
        description="at a loss or gradient that is no number, or (skip, rollback) a loss that explodes: stop, skip the "
        "step, or go back to the last checkpoint by steps with a lower learning rate; {policy: skip, factor: 3.0}",
    )

    def specification(self, precision: str) -> dict[str, Any]:
        """What of it shapes a stage's result: all but the budget, which counts in steps, and what has no effect.

        Args:
            precision: The run's.
        """
        # Quantization is in the recipe as the format of the blocks.
        unused = {"steps", "tokens", "epochs_per_layer", "block_learning_rates", "quantization"}
        unused |= {"loss_scale"} if precision != "fp16" else set()
        unused |= {"min_learning_rate"} if self.lr_schedule == "constant" else set()
        unused |= set() if self.heeds_held_out else {"eval_every"}
        values = self.model_dump(exclude=unused)
        kinds = {name: kind for name in values if isinstance(kind := getattr(self, name), Kind)}
        return values | {name: values[name] | kind.code for name, kind in kinds.items()}

    @property
    def heeds_held_out(self) -> bool:
        """Whether what is committed depends on held-out loss."""
        return self.patience is not None or self.keep_best

    def budget(self, seq_len: int) -> int | None:
        """Steps by `steps` or `tokens`; None: `epochs_per_layer` says."""
        if self.steps is not None or self.tokens is None or not self.batch_size:
            return self.steps
        return max(1, round(self.tokens / (self.batch_size * self.accumulation * seq_len)))


class QLoRAConfig(Section):
    """Adapters of one stack (`training.progressive.qlora_configs`)."""

    rank: Size = Field(16, description="rank of the adapter")
    alpha: Positive = Field(32.0, description="its scale is alpha / rank")


class ProgressiveConfig(Section):
    """Progressive training: the rack grows stack by stack. Where enabled, it wins over `training.mode`.

    It says of the schedule what a `Mode` says.
    """

    apart: ClassVar[bool] = False
    grows: ClassVar[bool] = False
    own_rows: ClassVar[bool] = False
    finds_size: ClassVar[bool] = False

    enabled: bool = Field(False, description="grow the rack stack by stack")
    trunk_strategy: Literal["frozen", "qlora"] = Field(
        "frozen",
        description="the stacks below: frozen (a stage reads the activations that leave them), or qlora (a stage holds "
        "them packed in few bits, and low-rank adapters on them train along)",
    )
    trunk_precision: StackPrecision | None = Field(
        None,
        description="what the stacks made before are held in where a stage holds them: fp8, nvfp4, qlora (nf4), full; "
        "null: qlora under trunk_strategy qlora, else as they were trained",
    )
    new_stack_precision: StackPrecision = Field(
        "full",
        description="precision that each new stack trains in: full (the run's), fp32, half, bfloat16; fp8, nvfp4 "
        "(weights seen as the format rounds them); qlora (weights packed and fixed, adapters train)",
    )
    cache_activations: bool | None = Field(
        None,
        description="frozen trunk: store the activations that enter each stage; false: recompute them from tokens; "
        "null: true",
    )
    qlora_enabled: bool | None = Field(
        None,
        description="low-rank adapters on each stack as it is made, beside its weights, which train on in the trunk; "
        "null: over a qlora trunk, where progressive_qlora is false",
    )
    qlora_rank: Size = Field(
        16, description="rank of a stack's own adapters (of stack 0's where qlora_strategy is progressive)"
    )
    qlora_alpha: Positive = Field(
        32.0, description="alpha of a stack's own adapters: what they add is scaled by alpha / rank"
    )
    qlora_strategy: Literal["simplified", "progressive", "variable"] = Field(
        "simplified",
        description="ranks and alphas of stacks' own adapters: simplified (the same everywhere), progressive (by the "
        "patterns below, from qlora_rank and qlora_alpha), variable (by qlora_configs)",
    )
    qlora_rank_pattern: Literal["increasing", "decreasing", "linear", "constant"] = Field(
        "constant",
        description="qlora_strategy progressive: rank from stack to stack: increasing (doubles), decreasing (halves), "
        "linear (qlora_rank more each time), constant",
    )
    qlora_alpha_pattern: Literal["increasing", "decreasing", "linear", "constant"] = Field(
        "constant", description="qlora_strategy progressive: alpha from stack to stack, by the same patterns"
    )
    qlora_configs: dict[Count, QLoRAConfig] = Field(
        default_factory=dict,
        description="qlora_strategy variable: a stack's own adapters, by its number in the order of making: "
        "{0: {rank: 16, alpha: 32.0}, 1: {rank: 8, alpha: 16.0}}",
    )
    progressive_qlora: bool = Field(
        False,
        description="further adapters on every stack below, new ones each time a stack is added over a qlora trunk",
    )
    progressive_qlora_rank: Size = Field(8, description="rank of the adapters of progressive_qlora")
    progressive_qlora_alpha: Positive = Field(
        16.0, description="alpha of the adapters of progressive_qlora: what they add is scaled by alpha / rank"
    )
    max_stacks: Small | None = Field(
        None, description="most stacks to grow to; where model.architecture.n_stacks is null, as many"
    )
    building_mode: Literal["append", "prepend"] = Field(
        "append",
        description="append: a new stack goes above those there are; prepend: below them, above the front, and they "
        "stand still",
    )

    def partition(self, model: ModelConfig) -> list[Span]:
        """See `Mode.partition`."""
        return cut(model.n_blocks, model.architecture.blocks_per_stack)

    @property
    def prepends(self) -> bool:
        """Whether stacks are added below those there are."""
        return self.enabled and self.building_mode == "prepend"

    @property
    def holds_trunk(self) -> bool:
        """Whether a stage holds the stacks made before it, and reads tokens."""
        return self.enabled and (self.building_mode == "prepend" or self.trunk_strategy == "qlora")


class TrainingConfig(StageTraining):
    """Mode, objective and masks, and the defaults of every stage's training."""

    mode: Mode = Field(default_factory=lambda: Mode.of(Mode.default), description="the schedule")
    objective: Objective = Field(
        default_factory=lambda: Objective.of(Objective.default),
        description="mask_diffusion, mlm, clm (causal), custom (targets of the data's own); with settings of its own: "
        "{name: mlm, mask_share: 0.8}",
    )
    seq_len: Size = Field(512, description="tokens in a sample")
    rows: PositiveInt | None = Field(
        None, description="rows (sample under a mask) of every boundary; null: what steps need, at most the corpus"
    )
    windows: AutoInt = Field(
        1,
        description="windows that the rows are trained in, one after the other through every stage, so that boundaries "
        "take so much less disk; auto: as few as store.max_bytes allows",
    )
    min_mask_fraction: Fraction = Field(0.15, description="smallest share of positions masked")
    max_mask_fraction: Fraction = Field(0.90, description="largest share of positions masked")
    mask_schedule_type: Literal["linear", "exponential", "cosine"] = Field(
        "linear", description="how fractions run from smallest to largest"
    )
    mask_schedule_over: Literal["time", "depth"] | None = Field(
        None,
        description="time: every stage sees all fractions; depth: stage k trains on its own window of them; null: "
        "time, but depth for independent stages",
    )
    mask_windows: list[Annotated[list[Share], Field(min_length=2, max_length=2)]] | None = Field(
        None,
        description="masked fractions of each stage as [from, to], lowest stage first, where they go over depth; they "
        "may overlap; null: equal parts of the schedule",
    )
    fresh_masks: bool = Field(
        False, description="new samples and masks for each stage, made by forward passes; else the same at every depth"
    )
    masks_per_sample: Size = Field(1, description="masks that each sample is seen under, at every depth")
    mask_pool: Count = Field(0, description="distinct masks to draw from; 0: a fresh one for each row")
    mask_token_id: Count | None = Field(None, description="id shown at masked positions; null: the tokenizer's")
    lookahead: Lookahead = Field(
        default_factory=lambda: Lookahead.of(Lookahead.default),
        description="blocks between a stage's own and its head, training along: auxiliary (thrown away), overlap "
        "(those of the next stage, which trains them again), tail (the rack's last ones, shared by every stage); "
        "{kind: tail, blocks: 2}",
    )
    tied_head: Literal["copy", "frozen"] = Field(
        "copy", description="a tied projection above stage 0: a trainable copy of the embedding, or frozen"
    )
    compile: bool = Field(False, description="torch.compile the blocks")
    swap: Literal["auto", "always", "never"] = Field(
        "auto", description="swap a stage's parts between disk and memory; auto: where it does not fit. Same result"
    )
    swap_parts: Small | None = Field(
        None, description="groups that a swapped stage's blocks take turns in; null: as few as fit"
    )
    memory: PositiveInt | None = Field(
        None, description="bytes of memory that a stage may take before it is swapped; null: the device's"
    )
    checkpoint_steps: PositiveInt | None = Field(None, description="checkpoint every so many steps; null: by minutes")
    checkpoint_minutes: Positive = Field(10.0, description="checkpoint every so many minutes")
    keep_checkpoints: PositiveInt = Field(2, description="checkpoints of a stage that are kept; the best one beside")
    log_every: PositiveInt = Field(
        10, description="steps between plain log lines, at least; they come every few seconds"
    )
    adaptation: Adaptation = Field(
        default_factory=lambda: Adaptation.of(Adaptation.default),
        description="a last stage that turns the trained rack from bidirectional to causal, which then continues text: "
        "none, or causal; {kind: causal, steps: 500, anneal: 100}",
    )
    save_fused_checkpoints: bool = Field(False, description="export the fused rack into the run directory at the end")
    fusion: Fusion = Field(
        default_factory=lambda: Fusion.of(Fusion.default),
        description="stages that train sections together afterwards: none, frozen (the head alone, over the finished "
        "rack), trainable (the whole rack), hierarchical (neighbours first, then pairs of pairs, up to the whole), "
        "adaptive (the section whose unfreezing gains most on held-out loss, found by probes); {strategy: adaptive, "
        "steps: 1000}",
    )
    progressive: ProgressiveConfig = Field(default_factory=lambda: ProgressiveConfig())

    @property
    def block_size(self) -> int:
        """Blocks in a stage; of modes that have this setting."""
        return int(self.mode.block_size)  # type: ignore[attr-defined]

    @block_size.setter
    def block_size(self, size: int) -> None:
        self.mode.block_size = size  # type: ignore[attr-defined]

    @property
    def fusion_mode(self) -> str:
        """Whether the blocks below are frozen or trainable; of mode fused."""
        return str(self.mode.fusion_mode)  # type: ignore[attr-defined]

    @fusion_mode.setter
    def fusion_mode(self, below: str) -> None:
        self.mode.fusion_mode = below  # type: ignore[attr-defined]

    @property
    def plan(self) -> Mode | ProgressiveConfig:
        """What decides the schedule."""
        return self.progressive if self.progressive.enabled else self.mode
