"""How stages train: choices with settings of their own, the settings of one stage, the defaults of all."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stackwise.config.adapters import AdaptersConfig
from stackwise.config.choices import Adaptation, Divergence, Fusion, Lookahead, Mode, ScheduleFacts, Span, cut
from stackwise.config.continual import Continual, Meta
from stackwise.config.fields import (
    AutoBool,
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
    Text,
)
from stackwise.config.growth import Grown, Growth
from stackwise.config.kinds import Kind, Objective, Optimizer, choice

if TYPE_CHECKING:
    from stackwise.config.model import ModelConfig

Precision = Literal["auto", "fp64", "fp32", "bf16", "fp16"]
StackPrecision = Literal["full", "fp32", "half", "fp16", "bfloat16", "bf16", "fp8", "nvfp4", "fp4", "qlora"]
STACK_PRECISION: dict[str, Precision] = {
    "fp32": "fp32", "half": "fp16", "fp16": "fp16", "bfloat16": "bf16", "bf16": "bf16",
}  # fmt: skip
"""What a stack's precision is in words of `precision`; full is whatever `precision` says."""


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
        "all", description="what trains: all, or the scales of weights whose codes are frozen (and nothing else)"
    )
    activations: Annotated[int, Field(ge=2, le=8)] | None = Field(
        None, description="bits of what enters a layer; null: it stays as it is"
    )
    activations_symmetric: bool = Field(False, description="zero is the middle of the activations' grid")
    activations_range: Literal["token", "minmax", "moving_average", "percentile"] = Field(
        "token",
        description="what the activations' grid spans: each token's extremes, or a range that is fixed from the first "
        "batches: all their extremes, a moving average of each batch's, or a percentile",
    )
    calibration: Annotated[int, Field(ge=1, le=4096)] = Field(
        8, description="batches that a fixed range is measured on, before the first step"
    )
    averaging: Fraction = Field(0.1, description="moving_average: share of it that a batch's extremes replace")
    percentile: Annotated[float, Field(gt=50, le=100)] = Field(
        99.9, description="percentile: share of values, in percent, below the range's end; as many are above its begin"
    )
    provider: Literal["stackwise", "torchao"] = Field(
        "stackwise", description="what rounds weights in training; torchao: symmetric, by channel or group, extremes"
    )

    @model_validator(mode="after")
    def _activations_have_a_range(self) -> Self:
        if self.activations is None and self.activations_range != "token":
            raise ValueError(f"activations_range: {self.activations_range} without activations: give their bits")
        return self

    @property
    def name(self) -> str:
        """Its name as a precision and as a weight format, such as int4-g64-asym-learned-a8."""
        marks = [f"g{self.group}" if isinstance(self.group, int) else self.group]
        marks += ["asym"] * (not self.symmetric) + ["learned"] * (self.scale == "learned")
        if self.activations:
            marks.append(f"a{self.activations}{'s' if self.activations_symmetric else ''}")
            marks += {
                "token": [],
                "minmax": [f"minmax{self.calibration}"],
                "moving_average": [f"average{self.calibration}x{self.averaging!r}"],
                "percentile": [f"percentile{self.calibration}x{self.percentile!r}"],
            }[self.activations_range]
        marks += ["torchao"] * (self.provider == "torchao")
        return "-".join([f"int{self.bits}", *marks])

    @classmethod
    def named(cls, name: str) -> Quantization | None:
        """The settings that a name stands for; None: it names no format of integers."""
        parts = _INTEGERS.fullmatch(name)
        if parts is None:
            return None
        bits, group, asymmetric, learned, activations, symmetric, measured, batches, number, torchao = parts.groups()
        settings: dict[str, Any] = {
            "bits": int(bits),
            "group": int(group[1:]) if group[0] == "g" else group,
            "symmetric": not asymmetric,
            "scale": "learned" if learned else "extremes",
            "activations": int(activations) if activations else None,
            "activations_symmetric": bool(symmetric),
            "provider": "torchao" if torchao else "stackwise",
        }
        if measured:
            kinds = {"minmax": "minmax", "average": "moving_average", "percentile": "percentile"}
            settings |= {"activations_range": kinds[measured], "calibration": int(batches)}
            settings |= {} if number is None else {"averaging" if measured == "average" else measured: float(number)}
        return cls.model_validate(settings)

    @property
    def bits_per_weight(self) -> float:
        """Bits of a packed weight, its scales included but for a row's or a matrix's."""
        # A float32 scale, and an int8 zero point where there is one.
        shared = (32 + 8 * (not self.symmetric)) / self.group if isinstance(self.group, int) else 0
        return self.bits + shared


_INTEGERS = re.compile(
    r"int([2-8])-(tensor|channel|g[1-9]\d{0,8})(-asym)?(-learned)?"
    r"(?:-a([2-8])(s)?(?:-(minmax|average|percentile)([1-9]\d{0,3})(?:x(\d[\d.e-]*))?)?)?(-torchao)?"
)


class Curriculum(Section):
    """Easy rows first: a step draws from the easiest share of all rows, which grows (arXiv 1903.09848)."""

    by: Literal["rarity", "compression", "length", "model", "loss"] = Field(
        "rarity",
        description="what makes a row hard: rarity of its tokens, how little its ids compress, the length of its "
        "documents, its loss by a model, or its loss by the stage itself at the end of the window before (self-paced)",
    )
    model: Annotated[Text, Field(min_length=1)] | None = Field(
        None, description="by: model: its directory (a Hugging Face directory or an export), of the same tokens"
    )
    competence: Literal["sqrt", "linear"] = Field("sqrt", description="how the share of rows grows with steps")
    start: Fraction = Field(0.1, description="the share of rows, the easiest, that the first step draws from")
    until: Fraction = Field(0.5, description="share of the steps after which all rows are drawn, as without it")

    @property
    def specification(self) -> dict[str, Any]:
        """What of it is in a recipe as a setting: which model says how hard rows are, is among what a stage reads."""
        return self.model_dump(exclude={"model"})


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
    activation_checkpointing: bool | Small = Field(
        False,
        description="keep only the input of a block and recompute it in the backward pass: less memory, up to a third "
        "more time, the same result; true: every block; a number n: every n-th block",
    )
    optimizer: Optimizer = choice(Optimizer, "how parameters follow from gradients")
    learning_rate: Positive = Field(1e-3, description="peak learning rate")
    block_learning_rates: dict[Count, Positive] = Field(
        default_factory=dict, description="peak learning rates of single blocks, by their number in the rack: {3: 1e-4}"
    )
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="shape after warm-up; wsd holds, then falls; with training.growth by default wsd"
    )
    decay: Fraction | None = Field(
        None,
        description="lr_schedule wsd: share of the steps over which it falls at the end; null: a fifth, with "
        "training.growth at most what follows the last expansion",
    )
    min_learning_rate: NonNegative = Field(0.1, description="where the schedule ends, as a share of the peak")
    warmup: Share = Field(0.05, description="share of the steps that warm up")
    weight_decay: NonNegative = Field(0.1, description="weight decay, on matrices alone")
    grad_clip: NonNegative = Field(1.0, description="largest global gradient norm; 0: no clipping")
    clip_by: Literal["step", "last"] = Field(
        "step",
        description="the norm that clips: the step's own; or that of the step before, which is not exact, and spares a "
        "swapped stage the gradients' way to the disk and back",
    )
    loss_scale: Literal["dynamic"] | Positive = Field(
        "dynamic", description="precision fp16: factor on the loss before gradients are taken; dynamic finds it"
    )
    quantization: Quantization | None = Field(
        None, description="train blocks for integers: {bits: 4, group: 64, scale: learned}; null: no rounding"
    )
    products: Literal["full", "fp8"] = Field(
        "full",
        description="what blocks' linear layers multiply in: full (the run's precision), or fp8 (e4m3 with a scale for "
        "each row, forward and backward; weights stay float32)",
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
    curriculum: Curriculum | None = Field(
        None, description="easy rows first: {by: rarity, competence: sqrt, start: 0.1, until: 0.5}; null: random order"
    )
    routes: Literal["count", "order"] | None = Field(
        None,
        description="one forward pass before a stage with experts trains; count: say how many experts a step reaches; "
        "order: put rows that reach the same experts into one step, so that a swapped stage reads fewer; null: neither",
    )
    meta: Meta | None = Field(
        None,
        description="learn to adapt: {method: maml, inner_steps: 3, inner_rate: 0.1, support: 4}; a microbatch is then "
        "a task; null: no tasks",
    )
    divergence: Divergence = choice(Divergence, "at a loss or gradient that is no number, or a loss that explodes")

    def specification(self, precision: str) -> dict[str, Any]:
        """What of it shapes a stage's result: all but the budget, which counts in steps, and what has no effect.

        Args:
            precision: The run's.
        """
        # These two are in the recipe as the format of the blocks.
        unused = {"steps", "tokens", "epochs_per_layer", "block_learning_rates", "quantization", "products"}
        unused |= {"activation_checkpointing"}  # what is recomputed comes out the same
        unused |= {"loss_scale"} if precision != "fp16" else set()
        unused |= {"clip_by"} if self.clip_by == "step" or not self.grad_clip else set()
        unused |= {"min_learning_rate"} if self.lr_schedule == "constant" else set()
        unused |= {"decay"} if self.lr_schedule != "wsd" or self.decay is None else set()
        unused |= {name for name in ("curriculum", "meta") if getattr(self, name) is None}
        unused |= set() if self.routes == "order" else {"routes"}  # to count changes nothing
        unused |= set() if self.uses_held_out else {"eval_every"}
        values = self.model_dump(exclude=unused)
        kinds = {name: kind for name in values if isinstance(kind := getattr(self, name), Kind)}
        if self.curriculum is not None:
            values["curriculum"] = self.curriculum.specification
        if self.meta is not None:
            values["meta"] = self.meta.specification(judged=self.uses_held_out)
        return values | {name: values[name] | kind.code for name, kind in kinds.items()}

    @property
    def recomputed_every(self) -> int:
        """Of how many blocks one is recomputed in the backward pass, the lowest first; 0: none is."""
        return int(self.activation_checkpointing)

    @property
    def evaluates(self) -> bool:
        """Whether a stage is evaluated on held-out rows as it trains, or at its end."""
        return self.eval_every is not None or self.meta is not None

    @property
    def uses_held_out(self) -> bool:
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


class ProgressiveConfig(ScheduleFacts, Section):
    """Progressive training: the rack grows stack by stack. Where enabled, it wins over `training.mode`."""

    name: ClassVar[str] = "progressive"

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
        "are frozen",
    )

    def partition(self, model: ModelConfig) -> list[Span]:
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

    mode: Mode = choice(Mode, "the schedule: the blocks of each stage, and what it holds, trains and reads")
    growth: Annotated[list[Growth], Field(max_length=16)] = Field(
        default_factory=list,
        description="begin shallow, train end to end, and grow: [{blocks: 2, until: 0.8}] trains 2 blocks for 0.8 of "
        "the steps, then the whole rack; training.steps are those of all phases",
    )
    objective: Objective = choice(Objective, "what is predicted, and how it is scored")
    seq_len: Size = Field(512, description="tokens in a sample")
    rows: PositiveInt | None = Field(
        None, description="rows (sample under a mask) of every boundary; null: what steps need, at most the corpus"
    )
    row_groups: Small | None = Field(
        None,
        description="groups of rows, each with its own order; batches come from the groups in turn. With {rank} or "
        "{host} in store.path each rank keeps only the groups of its own batches; null: 1, with {rank} or {host} 24",
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
    max_passes: Positive | None = Field(
        None,
        description="passes over the corpus that steps may come to: on a small one there are fewer steps, and several "
        "masks for each sample; null: steps as they are",
    )
    masks_per_sample: Size = Field(1, description="masks that each sample is seen under, at every depth")
    mask_pool: Annotated[int, Field(ge=0, le=1 << 24)] = Field(
        0, description="distinct masks to draw from; 0: a fresh one for each row"
    )
    mask_token_id: Count | None = Field(None, description="id shown at masked positions; null: the tokenizer's")
    lookahead: Lookahead = choice(Lookahead, "blocks between a stage's own and its head, training along")
    tied_head: Literal["copy", "frozen"] = Field(
        "copy", description="a tied projection above stage 0: a trainable copy of the embedding, or frozen"
    )
    compile: AutoBool = Field(
        None,
        description="torch.compile the blocks, once for each shape; auto: on a GPU with Triton. If that fails, a "
        "warning says so and they run uncompiled",
    )
    swap: Literal["auto", "always", "never"] = Field(
        "auto", description="swap a stage's parts between disk and memory; auto: where it does not fit. Same result"
    )
    swap_parts: Small | None = Field(
        None, description="groups that a swapped stage's blocks take turns in; null: as few as fit"
    )
    swap_experts: Small | None = Field(
        None,
        description="experts of a block in memory at once in a swapped stage, and from step to step; null: as many as "
        "fit. Same result",
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
    adaptation: Adaptation = choice(Adaptation, "a last stage that turns the trained rack into another")
    save_fused_checkpoints: bool = Field(False, description="export the fused rack into the run directory at the end")
    fusion: Fusion = choice(Fusion, "stages that train sections together, after each was trained alone")
    continual: Continual = choice(
        Continual,
        "how data.tasks are learned: none (all at once), or one after the other, each for the budget of a stage: "
        "naive, or against forgetting replay, ewc, lwf",
    )
    adapters: AdaptersConfig | None = Field(
        None,
        description="train low-rank adapters beside the weights of init.weights, and nothing else: {rank: 16, "
        "alpha: 32, targets: [q, v], above: 8, precision: nf4}; null: the weights train",
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
    def grown(self) -> Grown | None:
        """How the rack grows; None: it has its depth from the start."""
        return Grown(self.growth) if self.growth and not self.progressive.enabled else None

    @property
    def plan(self) -> Mode | ProgressiveConfig | Grown:
        """What decides the schedule."""
        return self.progressive if self.progressive.enabled else self.grown or self.mode
