"""How stages train: the settings of one stage, those of fusion, and the defaults of all."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from stackwise.config.fields import (
    AutoInt,
    Count,
    Fraction,
    NonNegative,
    Positive,
    PositiveInt,
    Probability,
    Section,
)
from stackwise.config.kinds import Objective, Optimizer
from stackwise.config.progressive import ProgressiveConfig

Mode = Literal["layerwise", "blockwise", "fused", "independent", "end_to_end"]


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
    accumulation: PositiveInt = Field(1, description="microbatches in a step")
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
    warmup: Annotated[float, Field(ge=0.0, le=1.0)] = Field(0.05, description="share of the steps that warm up")
    weight_decay: NonNegative = Field(0.1, description="weight decay, on matrices alone")
    grad_clip: NonNegative = Field(1.0, description="largest global gradient norm; 0: no clipping")
    loss_scale: Literal["dynamic"] | Positive = Field(
        "dynamic", description="precision fp16: factor on the loss before gradients are taken; dynamic finds it"
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
    on_divergence: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="at a loss or gradient that is no number, or (skip, rollback) a loss that explodes: stop, skip the "
        "step, or go back to the last checkpoint by steps with a lower learning rate",
    )
    divergence_factor: Annotated[float, Field(gt=1.0, allow_inf_nan=False)] = Field(
        3.0, description="a loss explodes above so many times the median of the last 32"
    )
    divergence_limit: PositiveInt = Field(5, description="skips or rollbacks of a stage before it is given up")
    rollback_factor: Fraction = Field(0.5, description="factor on the learning rate at each rollback")

    def specification(self, precision: str) -> dict[str, Any]:
        """What of it shapes a stage's result: all but the budget, which counts in steps, and what has no effect.

        Args:
            precision: The run's.
        """
        unused = {"steps", "tokens", "epochs_per_layer", "block_learning_rates"}
        unused |= {"loss_scale"} if precision != "fp16" else set()
        unused |= {"min_learning_rate"} if self.lr_schedule == "constant" else set()
        unused |= set() if self.heeds_held_out else {"eval_every"}
        unused |= {"divergence_factor", "divergence_limit"} if self.on_divergence == "stop" else set()
        unused |= {"rollback_factor"} if self.on_divergence != "rollback" else set()
        return self.model_dump(exclude=unused)

    @property
    def heeds_held_out(self) -> bool:
        """Whether what is committed depends on held-out loss."""
        return self.patience is not None or self.keep_best

    def budget(self, seq_len: int) -> int | None:
        """Steps by `steps` or `tokens`; None: `epochs_per_layer` says."""
        if self.steps is not None or self.tokens is None or not self.batch_size:
            return self.steps
        return max(1, round(self.tokens / (self.batch_size * self.accumulation * seq_len)))


class FusionConfig(Section):
    """Stages that train sections of the rack together, after they were trained one by one."""

    strategy: Literal["none", "frozen", "trainable", "hierarchical", "adaptive"] = Field(
        "none",
        description="frozen (the head alone, over the finished rack), trainable (the whole rack), hierarchical "
        "(neighbours first, then pairs of pairs, up to the whole), adaptive (the section whose unfreezing gains most "
        "on held-out loss, found by probes)",
    )
    steps: PositiveInt | None = Field(
        None, description="optimizer steps in all, shared by these stages; null: as many as a stage each"
    )
    rounds: PositiveInt = Field(
        1, description="adaptive: how often it is probed anew which section to train; each round has its share of steps"
    )
    probe_steps: PositiveInt | None = Field(
        None, description="adaptive: steps of a section's probe; null: a quarter of a round's, shared by the sections"
    )

    def allotment(self, steps: int, sections: int) -> list[tuple[int, int]]:
        """Steps of each probe, and those of the section that is chosen, for each round of adaptive fusion.

        Args:
            steps: The budget in all.
            sections: How many are probed.
        """
        each = [steps * (k + 1) // self.rounds - steps * k // self.rounds for k in range(self.rounds)]
        probes = [self.probe_steps or max(1, own // (4 * sections)) for own in each]
        return [(probe, own - sections * probe) for own, probe in zip(each, probes, strict=True)]


class TrainingConfig(StageTraining):
    """Mode, objective and masks, and the defaults of every stage's training."""

    mode: Mode = Field("blockwise", description="the schedule: layerwise, blockwise, fused, independent, end_to_end")
    block_size: AutoInt = Field(
        4, description="blocks in a stage (blockwise, fused, independent); auto: from memory and gain, found by trial"
    )
    trial_steps: PositiveInt = Field(
        100, description="block_size auto: steps of each stage of the racks that are tried"
    )
    n_stages: PositiveInt | None = Field(None, description="number of stages instead of block_size")
    fusion_mode: Literal["frozen", "trainable"] = Field(
        "frozen", description="fused: the blocks below are frozen, or trainable"
    )
    objective: Objective = Field(
        default_factory=lambda: Objective.of(Objective.default),
        description="mask_diffusion, mlm, clm (causal), custom (targets of the data's own); with settings of its own: "
        "{name: mlm, mask_share: 0.8}",
    )
    seq_len: PositiveInt = Field(512, description="tokens in a sample")
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
        "time, but depth for independent stages and time_interpretation depth",
    )
    mask_windows: list[Annotated[list[float], Field(min_length=2, max_length=2)]] | None = Field(
        None,
        description="masked fractions of each stage as [from, to], lowest stage first, where they go over depth; they "
        "may overlap; null: equal parts of the schedule",
    )
    fresh_masks: bool = Field(
        False, description="new samples and masks for each stage, made by forward passes; else the same at every depth"
    )
    masks_per_sample: PositiveInt = Field(1, description="masks that each sample is seen under, at every depth")
    mask_pool: Count = Field(0, description="distinct masks to draw from; 0: a fresh one for each row")
    mask_token_id: Count | None = Field(None, description="id shown at masked positions; null: the tokenizer's")
    lookahead: Literal["none", "auxiliary", "overlap", "tail"] = Field(
        "none",
        description="blocks between a stage's own and its head, training along: auxiliary (thrown away), overlap "
        "(those of the next stage, which trains them again), tail (the rack's last ones, shared by every stage)",
    )
    lookahead_blocks: PositiveInt = Field(
        1, description="blocks that lookahead puts between a stage's own and its head"
    )
    tied_head: Literal["copy", "frozen"] = Field(
        "copy", description="a tied projection above stage 0: a trainable copy of the embedding, or frozen"
    )
    compile: bool = Field(False, description="torch.compile the blocks")
    swap: Literal["auto", "always", "never"] = Field(
        "auto", description="swap a stage's parts between disk and memory; auto: where it does not fit. Same result"
    )
    swap_parts: PositiveInt | None = Field(
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
    adaptation: Literal["none", "causal"] = Field(
        "none",
        description="a last stage that turns the trained rack from bidirectional to causal: it then continues text",
    )
    adaptation_steps: PositiveInt | None = Field(
        None, description="optimizer steps of the adaptation stage; null: as many as any stage"
    )
    adaptation_anneal: Count = Field(
        0,
        description="first steps of the adaptation stage, on which what follows is hidden bit by bit; 0: all of it "
        "from the first step",
    )
    cache_mode: Literal["layerwise", "fusion"] | None = Field(None, description="implied by mode; accepted, unused")
    cache_dir: str | None = Field(None, description="another name of store.path")
    fusion_evaluation: bool = Field(False, description="implied: every run evaluates the fused rack; unused")
    save_fused_checkpoints: bool = Field(False, description="export the fused rack into the run directory at the end")
    fusion: FusionConfig = Field(default_factory=lambda: FusionConfig())
    progressive: ProgressiveConfig = Field(default_factory=lambda: ProgressiveConfig())
