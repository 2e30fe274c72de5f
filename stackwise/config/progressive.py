"""Progressive training: the rack grows stack by stack, in precisions and under adapters of their own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stackwise.config.fields import Positive, PositiveInt, Section

Precision = Literal["auto", "fp32", "bf16", "fp16"]
StackPrecision = Literal["full", "fp32", "half", "fp16", "bfloat16", "bf16", "fp8", "nvfp4", "fp4", "qlora"]
STACK_PRECISION: dict[str, Precision] = {
    "fp32": "fp32", "half": "fp16", "fp16": "fp16", "bfloat16": "bf16", "bf16": "bf16",
}  # fmt: skip
"""What a stack's precision is in words of `precision`; full is whatever `precision` says."""


class QLoRAConfig(Section):
    """Adapters of one stack (`training.progressive.qlora_configs`)."""

    rank: PositiveInt = Field(16, description="rank of the adapter")
    alpha: Positive = Field(32.0, description="its scale is alpha / rank")


class ProgressiveConfig(Section):
    """Progressive training: the rack grows stack by stack. Where enabled, it wins over `training.mode`."""

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
    qlora_rank: PositiveInt = Field(
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
    qlora_configs: dict[int, QLoRAConfig] = Field(
        default_factory=dict,
        description="qlora_strategy variable: a stack's own adapters, by its number in the order of making: "
        "{0: {rank: 16, alpha: 32.0}, 1: {rank: 8, alpha: 16.0}}",
    )
    progressive_qlora: bool = Field(
        False,
        description="further adapters on every stack below, new ones each time a stack is added over a qlora trunk",
    )
    progressive_qlora_rank: PositiveInt = Field(8, description="rank of the adapters of progressive_qlora")
    progressive_qlora_alpha: Positive = Field(
        16.0, description="alpha of the adapters of progressive_qlora: what they add is scaled by alpha / rank"
    )
    max_stacks: PositiveInt | None = Field(
        None, description="most stacks to grow to; where model.architecture.n_stacks is null, as many"
    )
    building_mode: Literal["append", "prepend"] = Field(
        "append",
        description="append: a new stack goes above those there are; prepend: below them, above the front, and they "
        "stand still",
    )
    time_interpretation: Literal["input", "depth"] | None = Field(
        None,
        description="time is the masked share of a row. input: it is embedded and added by the front; depth: stage k "
        "trains on the rows whose share falls into its window; null: neither",
    )
    time_embedding_dim: PositiveInt = Field(512, description="time_interpretation input: width of the time embedding")
    time_encoding_type: Literal["sinusoidal", "learned"] = Field(
        "sinusoidal", description="time_interpretation input: features of the share, fixed sinusoids or a learned table"
    )
    stack_time_mapping: Literal["linear", "exponential", "custom"] | None = Field(
        None,
        description="how masked shares run from smallest to largest, over stages where time is depth: linear, "
        "exponential, custom (training.mask_windows); null: by mask_schedule_type",
    )
    time_per_stack: PositiveInt = Field(100, description="accepted, unused: a row's time is its masked share")
