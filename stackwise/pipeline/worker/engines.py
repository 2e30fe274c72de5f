"""The engine of a stage: in memory, swapped where it does not fit, or divided over ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stackwise.config import StackWiseConfig
from stackwise.host import host_total
from stackwise.pipeline.device import describe
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.job import StageJob
from stackwise.pipeline.parts import JobParts, parts_of, set_spans, stage_model
from stackwise.pipeline.schedule import block_number
from stackwise.pipeline.worker.anchoring import anchor_part
from stackwise.pipeline.worker.ranges import measured_spans, unmeasured
from stackwise.training.engine import Engine, ResidentEngine
from stackwise.training.optim import Rising
from stackwise.training.stage import StageModel
from stackwise.training.swap import SwappedEngine, SwapSpace

if TYPE_CHECKING:
    from stackwise.pipeline.worker.training import StageContext


@contextlib.contextmanager
def engine_of(context: StageContext) -> Iterator[Engine]:
    """The engine of the job's stage: divided over ranks, swapped where it does not fit, or in memory."""
    job, config = context.job, context.config
    if config.parallel.divides:
        yield _divided(context)
        return
    swap = Estimate(config, job.vocab_size, job.stage, context.device.type).swap(
        int(describe(context.device)["memory"]), host_total()
    )
    if swap is None:
        yield resident(context, stage_model(job, config).to(context.device))
        return
    engine = SwappedEngine(
        _parts(context),
        context.settings,
        SwapSpace(
            Path(job.checkpoints) / "swap",
            swap.groups,
            swap.boundaries,
            context.warn,
            swap.pieces,
            passes=swap.passes,
            ahead=swap.alive > 1,
        ),
        seed=job.seed(config),
        device=context.device,
        before=job.span.first,
        rising=rising(job),
    )
    with contextlib.closing(engine):
        yield engine


def resident(context: StageContext, model: StageModel) -> ResidentEngine:
    """The engine of a stage that is in memory."""
    if context.config.training.compile:
        for block in (*model.blocks, *model.beyond):
            block.compile()
    parts = parts_of(model, context.stage)
    for part, module in parts.items():
        anchor_part(context.job, context.config, part, module)
    if any(unmeasured(module) for module in parts.values()):
        from stackwise.pipeline.worker.training import row_order

        spans = measured_spans(context, partial(row_order, context))
        for part, module in parts.items():
            set_spans(module, part, spans)
    return ResidentEngine(
        model,
        context.settings,
        seed=context.job.seed(context.config),
        device=context.device,
        parts=parts,
        ranks=context.ranks,
        rising=rising(context.job),
    )


def _divided(context: StageContext) -> ResidentEngine:
    # FSDP takes a second to import.
    from stackwise.training.pipelining import PipelinedEngine
    from stackwise.training.sharding import Division, ShardedEngine

    job, config, parallel = context.job, context.config, context.config.parallel
    parts = _parts(context)
    blocks = [part for part in parts.order if part in (*job.stage.blocks, *job.stage.lookahead)]
    division = Division(
        shard=parallel.shard,
        zero=parallel.zero,
        offload=parallel.offload,
        tensor=parallel.tensor,
        plans=[_split(config, part) for part in blocks] if parallel.tensor > 1 else [],
        sequence=parallel.sequence,
        pipeline=parallel.pipeline,
        schedule=parallel.schedule,
    )
    kind = PipelinedEngine if parallel.pipeline > 1 else ShardedEngine
    return kind(
        parts,
        context.settings,
        division=division,
        seed=job.seed(config),
        device=context.device,
        ranks=context.ranks,
        rising=rising(job),
    )


def _parts(context: StageContext) -> JobParts:
    from stackwise.pipeline.worker.training import row_order

    job, config = context.job, context.config
    spans = measured_spans(context, partial(row_order, context))
    return JobParts(job, config, job.initial, spans, partial(anchor_part, job, config))


def _split(config: StackWiseConfig, part: str) -> dict[str, Mapping[str, str]]:
    """How ranks split the layers of a block, by the module that they are in."""
    model = config.model.at(block_number(part))
    plans = {"attention": model.attention.tensor_plan(model), "ffn": model.ffn.tensor_plan(model)}
    return {name: plan.layers for name, plan in plans.items() if plan is not None}


def rising(job: StageJob) -> Rising | None:
    """The new blocks of a rack that has grown, whose rate is still to rise."""
    rise, steps = job.stage.rises, job.span.steps
    if rise is None:
        return None
    return Rising(frozenset(rise.blocks), round(steps * rise.first), max(1, round(steps * rise.warmup)))
