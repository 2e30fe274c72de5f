"""The engine of a stage: in memory, swapped where it does not fit, or divided over ranks; fixed ranges of layers."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stackwise import durable
from stackwise.config import StackWiseConfig
from stackwise.config.precision import weight_format
from stackwise.config.training import Quantization
from stackwise.host import host_total
from stackwise.model.observers import Observer, observer
from stackwise.model.projections import QuantizedLinear, projections
from stackwise.pipeline.device import describe
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.job import StageJob
from stackwise.pipeline.parts import parts_of, set_spans, stage_model
from stackwise.pipeline.run import store_place
from stackwise.pipeline.schedule import HEAD, block_number
from stackwise.pipeline.worker.anchoring import anchor_part
from stackwise.pipeline.worker.job_parts import JobParts
from stackwise.pipeline.worker.order import row_order
from stackwise.training.checkpoint import UNREADABLE, TensorFile
from stackwise.training.engine import Engine, ResidentEngine
from stackwise.training.feed import Order
from stackwise.training.optim import Rising
from stackwise.training.stage import StageModel, compile_blocks
from stackwise.training.swap import SwappedEngine
from stackwise.training.swap_parts import SwapSpace

if TYPE_CHECKING:
    from stackwise.pipeline.worker.training import StageContext

FILE = "ranges.safetensors"


@contextlib.contextmanager
def engine_of(context: StageContext) -> Iterator[Engine]:
    """The engine of the job's stage: divided over ranks, swapped where it does not fit, or in memory."""
    job, config = context.job, context.config
    if config.parallel.divides:
        yield _divided(context)
        return
    memory, host = memory_of(context)
    swap = Estimate(config, job.vocab_size, job.stage, context.device.type).swap(memory, host)
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
            kept=swap.kept,
            ranks=context.ranks,
            place=partial(_share_place, job, config),
        ),
        seed=job.seed(config),
        device=context.device,
        before=job.span.first,
        rising=rising(job),
    )
    with contextlib.closing(engine):
        yield engine


def memory_of(context: StageContext) -> tuple[int, int]:
    """Bytes of the device and of its host: of several ranks what the one with least has, so that all decide alike."""
    mine = [int(describe(context.device)["memory"]), host_total()]
    every = context.ranks.gathered(mine)
    return min(memory for memory, _ in every), min(host for _, host in every)


def _share_place(job: StageJob, config: StackWiseConfig, rank: int) -> Path:
    """Where a rank has its share of a swapped stage: beside its store, where that is on a disk of its own."""
    template = config.store.path or ""
    if "{" not in template:
        return Path(job.checkpoints) / "swap"
    store = store_place(template, rank)
    return store.with_name(f"{store.name}.swap") / job.recipe_id


def resident(context: StageContext, model: StageModel) -> ResidentEngine:
    """The engine of a stage that is in memory."""
    if context.config.training.compile:
        compile_blocks((*model.blocks, *model.beyond))
    parts = parts_of(model, context.stage)
    for part, module in parts.items():
        anchor_part(context.job, context.config, part, module)
    if any(unmeasured(module) for module in parts.values()):
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


def unmeasured(module: nn.Module) -> dict[str, QuantizedLinear]:
    """The layers of a part whose range is to be fixed and was not measured yet, by path."""
    layers = {path: layer for path, layer in projections(module).items() if isinstance(layer, QuantizedLinear)}
    return {path: layer for path, layer in layers.items() if layer.span is not None and not layer.span.any()}


def measured_spans(context: StageContext, order: Callable[[], Order]) -> dict[str, Tensor]:
    """The ranges of a stage's layers that were not measured in an earlier stage: [2] each, "block.3/attention.q".

    One part is in memory at a time, whatever engine trains the stage, so that all engines train with the same ranges.
    They are kept beside the stage's checkpoints, and committed among its weights.

    Args:
        context: The stage; its feed gives the batches.
        order: Gives the order of its rows, where that is needed.
    """
    job, config, path = context.job, context.config, Path(context.job.checkpoints) / FILE
    fixed = {part: settings for part in job.stage.holds if (settings := _fixed(context, part)) is not None}
    if not fixed:
        return {}
    with contextlib.suppress(*UNREADABLE, FileNotFoundError):  # a damaged file is measured again, to the same ranges
        file = TensorFile(path)
        return {key: file[key] for key in file}
    parts = JobParts(job, config, job.initial)
    count = max(settings.calibration for settings in fixed.values())
    start = job.rows_begin * context.settings.accumulation
    shuffled = context.feed.shuffled(order(), context.settings.batch_size, start, 1)
    batches = list(itertools.islice(shuffled, count))
    spans: dict[str, Tensor] = {}
    names = [name for name in parts.names if name != HEAD]
    for name in names[: max(names.index(part) for part in fixed) + 1]:
        module = parts.make(name, None)
        observers = _observed(module, fixed.get(name))
        model = parts.model({name: module.to(context.device)}).eval()
        for number, batch in enumerate(batches):
            with torch.no_grad(), model.numerics(context.device):
                batches[number] = batch.above(model.activations(batch.to(context.device)).cpu())
        spans |= {f"{name}/{layer}": measured.span().cpu() for layer, measured in observers.items()}
    if context.ranks.main:
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_durably(path, lambda temporary: save_file(spans, temporary))
    context.event("measured", layers=len(spans), batches=len(batches))
    return spans


def _fixed(context: StageContext, part: str) -> Quantization | None:
    form = weight_format(context.stage.format(part).precision)
    settings = Quantization.named(form) if form else None
    return settings if settings and settings.activations and settings.activations_range != "token" else None


def _observed(module: nn.Module, settings: Quantization | None) -> Mapping[str, Observer]:
    observers: dict[str, Observer] = {}
    for path, layer in unmeasured(module).items() if settings is not None else ():
        assert settings is not None
        layer.observer = observers[path] = observer(settings)
    return observers
