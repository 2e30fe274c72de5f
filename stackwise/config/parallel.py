"""The processes that train a stage together (`parallel.*`): their settings, and what these cannot go with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stackwise.config.choices import AdaptiveFusion
from stackwise.config.fields import Positive, Section, Small

if TYPE_CHECKING:
    from stackwise.config.kinds import Fault
    from stackwise.config.schema import Settings


class ParallelConfig(Section):
    """The processes (ranks) that train each stage together; `stackwise run --engine torchrun`, torchrun, srun, mpirun.

    Their number is the product of data, shard, tensor and pipeline. With data alone the same weights come out at any
    number of ranks, unless `deterministic` is off; of a stage that is divided, the same to rounding.
    """

    data: Small = Field(1, description="ranks that hold the whole stage, each with its share of every step's rows")
    shard: Small = Field(
        1, description="ranks that each copy of a stage is divided over; each has its share of the rows too. See zero"
    )
    zero: Literal[1, 2, 3] = Field(
        3,
        description="how shard divides, as ZeRO's stages. 3: weights are gathered for each pass of a block; 2: once "
        "for both passes; 1: as 2, and gradients are divided once a step",
    )
    offload: bool = Field(
        False,
        description="with shard, on GPUs: weights, gradients and moments wait in the host's memory, and steps are "
        "taken there; a block's weights come up for its passes",
    )
    tensor: Small = Field(
        1, description="ranks that the matrices of a block are split over, by columns and rows; they share their rows"
    )
    sequence: bool = Field(
        False, description="with tensor: between its matrices a block's positions are divided over the same ranks"
    )
    pipeline: Small = Field(
        1,
        description="ranks that the blocks of a stage are divided over; microbatches go through them one after another",
    )
    schedule: Literal["gpipe", "1f1b", "interleaved"] = Field(
        "1f1b",
        description="with pipeline, the order of passes. gpipe: forward passes first; 1f1b: backward ones as soon as "
        "may be, which keeps fewer activations; interleaved: so, and each rank has two parts of the stage",
    )
    deterministic: bool = Field(
        True,
        description="gradients are added up in the order of microbatches, as one process does; false: as is fastest, "
        "and weights depend on the number of ranks",
    )
    compression: Literal["none", "fp16", "bf16", "powersgd"] = Field(
        "none",
        description="how gradients travel between ranks: as they are, rounded to 16 bits, or each matrix as two of low "
        "rank (PowerSGD); needs deterministic: false",
    )
    compression_rank: Small = Field(4, description="with powersgd: how many columns those two have")
    divided: bool = Field(
        False,
        description="weights are those of one process to rounding alone, and of a recipe of their own: true by itself "
        "where a stage is divided, and stays so in a run that goes on with fewer ranks",
    )
    timeout: Positive = Field(
        600.0, description="seconds after which a rank that does not answer is given up, and its group with it"
    )
    port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        None, description="TCP port at which ranks meet, on the host of rank 0; null: a free one"
    )

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.data * self.shard * self.tensor * self.pipeline

    @property
    def shares(self) -> int:
        """Over how many of them a step's rows are divided."""
        return self.data * self.shard

    @property
    def compressed(self) -> dict[str, str | int]:
        """How gradients are compressed, for recipes; empty: they are not."""
        if self.compression == "none":
            return {}
        kind: dict[str, str | int] = {"compression": self.compression}
        return kind | ({"compression_rank": self.compression_rank} if self.compression == "powersgd" else {})

    @property
    def divides(self) -> bool:
        """Whether a rank holds less than a whole stage."""
        return self.ranks > self.data


def parallel_faults(config: Settings) -> Iterator[Fault]:
    """What a stage that is divided over ranks cannot have."""
    parallel, training, model = config.parallel, config.training, config.model
    if model.stream.columns > 1 and (parallel.divides or parallel.divided):
        yield "parallel", "columns are not divided over ranks: take parallel.data alone"
        return
    if parallel.compression != "none" and parallel.deterministic and not parallel.divides:
        text = f"{parallel.compression}: what ranks add up of rounded gradients depends on their number"
        yield "parallel.compression", f"{text}: set parallel.deterministic: false too"
    if parallel.compression != "none" and parallel.divides:
        text = f"{parallel.compression}: gradients of a stage that is divided over ranks travel as they are"
        yield "parallel.compression", f"{text}: take parallel.data alone"
    yield from _splitting(config)
    if parallel.offload and parallel.shard == 1:
        yield "parallel.offload", "what is divided waits in the host's memory: set parallel.shard too, or training.swap"
    if not parallel.divides:
        return
    if parallel.pipeline > 1 and model.dropout:
        yield "parallel.pipeline", "dropout draws in one row for all blocks: set model.dropout: 0, or parallel.shard"
    divided = "a stage that is divided over ranks (parallel)"
    stages = [config.stage_training(depth) for depth in range(config.n_stages)]
    for settings in stages:
        if not settings.optimizer.divides:
            yield "training.optimizer", f"{settings.optimizer.name} needs more than a slice of a parameter: take adamw"
            break
    if any(settings.ema for settings in stages):
        yield "training.ema", f"{divided} keeps no mean of its weights"
    if any(settings.quantization is not None for settings in stages):
        yield "training.quantization", f"{divided} is not trained for integers"
    if any(settings.products != "full" for settings in stages):
        yield "training.products", f"{divided} multiplies in the run's precision: leave it out"
    if training.meta is not None:
        yield "training.meta", f"{divided} takes no inner steps"
    if training.continual.measures:
        yield "training.continual", f"{training.continual.name}: {divided} has no rank that measures whole weights"
    if training.compile:
        yield "training.compile", f"{divided} is not compiled"
    if training.adapters is not None:
        yield "training.adapters", f"{divided} has no adapters: frozen weights are packed"
    if training.progressive.enabled or any(overrides.precision is not None for overrides in config.stages.values()):
        yield "training.progressive.enabled", f"{divided} has all of its blocks in the run's precision"
    if isinstance(training.fusion, AdaptiveFusion):
        yield "training.fusion", f"adaptive tries stages, and {divided} cannot be copied"
    if any(not model.at(block).ffn.divides for block in range(model.n_blocks)):
        for key in ("shard", "pipeline"):  # of `tensor` each kind has said it itself
            if getattr(parallel, key) > 1:
                yield f"parallel.{key}", f"experts are not divided over ranks: set parallel.{key}: 1"
    if config.precision not in ("auto", "fp32", "fp64", "bf16"):
        yield "precision", f"{config.precision}: {divided} computes in fp32, bf16 or fp64"


def _splitting(config: Settings) -> Iterator[Fault]:
    """What ranks cannot split (`parallel.tensor`)."""
    model, ranks, counts = config.model, config.parallel.tensor, dict[str, int]()
    if ranks == 1:
        if config.parallel.sequence:
            yield "parallel.sequence", "positions are divided over the ranks of parallel.tensor: set that too"
        return
    for block in range(model.n_blocks):
        here = model.at(block)
        for key, kind in (("model.attention", here.attention), ("model.ffn", here.ffn)):
            plan = kind.tensor_plan(here)
            if plan is None:
                yield key, f"{kind.name} is not split over ranks: set parallel.tensor: 1, or take another kind"
                return
            counts |= plan.counts
    if config.parallel.sequence:
        counts["training.seq_len"] = config.row_positions
        if model.dropout:
            yield "parallel.sequence", "dropout draws for whole rows: set model.dropout: 0, or parallel.sequence: false"
    amiss = [f"{key} {count}" for key, count in counts.items() if count % ranks]
    if amiss:
        together = math.gcd(*counts.values())
        near = [n for n in range(1, together + 1) if together % n == 0]
        below, above = max(n for n in near if n < ranks), min((n for n in near if n > ranks), default=None)
        nearest = f"{below}" if above is None else f"{below} and {above}"
        yield "parallel.tensor", f"{ranks} does not divide {', '.join(amiss)}; nearest that do: {nearest}"
