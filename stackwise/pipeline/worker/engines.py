"""The engine of a stage: in memory, swapped where it does not fit, or divided over ranks; fixed ranges of layers.

Engines that never hold all parts of a stage have them made one at a time (`JobParts`).
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from stackwise.model import Block, build_block, part_digest
from stackwise.model.build import allocate, allocate_some, on_meta
from stackwise.model.projections import QuantizedLinear, projections
from stackwise.model.rounding import Observer, observer
from stackwise.pipeline.device import describe
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.job import Source, StageJob
from stackwise.pipeline.parts import (
    dtype_of,
    embedding_of,
    make_block,
    make_front,
    make_head,
    objective_of,
    open_part,
    owns_projection,
    parts_of,
    require_gradients,
    set_spans,
    stage_model,
)
from stackwise.pipeline.run import store_place
from stackwise.pipeline.schedule import ADAPTER, FRONT, HEAD, adapter_part, block_number
from stackwise.pipeline.worker.anchoring import anchor_part
from stackwise.pipeline.worker.order import row_order
from stackwise.training.checkpoint import UNREADABLE
from stackwise.training.engine import Engine, ResidentEngine
from stackwise.training.feed import Order
from stackwise.training.optim import Rising
from stackwise.training.stage import StageModel, compile_blocks
from stackwise.training.swap import SwappedEngine
from stackwise.training.swap_parts import SwapSpace
from stackwise.training.tensor_files import TensorFile

if TYPE_CHECKING:
    from stackwise.pipeline.worker.training import StageContext


class JobParts:
    """The parts of a job's stage (see `training.swap_parts.Parts`)."""

    def __init__(
        self,
        job: StageJob,
        config: StackWiseConfig,
        sources: Mapping[str, Source],
        spans: Mapping[str, Tensor] | None = None,
        attach: Callable[[str, nn.Module], None] = lambda name, part: None,
    ) -> None:
        self._job, self._config, self._sources, self._spans = job, config, sources, spans or {}
        self._attach = attach  # what a part in training has beside its values
        stage = job.stage
        held = [part for part in stage.holds if part in sources and not part.startswith(ADAPTER)]
        self.names: Sequence[str] = held
        self.order: Sequence[str] = sorted(held, key=lambda part: part in stage.lookahead)
        self.trains: Sequence[str] = [part for part in held if {part, adapter_part(part)} & {*stage.trains}]
        in_half = any(stage.format(part).precision == "fp16" for part in held)
        self.precision: str = "fp16" if in_half else config.precision
        self._owns = owns_projection(config, stage)
        self.tied = config.model.tie_embeddings and not self._owns and FRONT in held and HEAD in held
        self._objective = objective_of(config, job.mask_token, job.vocab_size, stage)
        self._empty: dict[str, nn.Module] = {}
        self._checked: dict[str, Mapping[str, Tensor]] = {}  # files of parts that are read in pieces

    def pieces(self, name: str) -> Sequence[str]:
        """The pieces of a part (see `Parts.pieces`): its weights are fresh, or one committed file."""
        source = self._sources[name]
        foreign = source.names is not None or source.merged or source.upcycled or source.pairs is not None
        return () if foreign else self._job.stage.pieces(self._config, name)

    def piece(self, name: str, path: str) -> dict[str, Tensor]:
        """The parameters of a piece as it starts (see `Parts.piece`)."""
        block = self._some(name, lambda key: key.startswith(f"{path}."))
        return {f"{path}.{key}": p.detach() for key, p in block.get_submodule(path).named_parameters()}

    def _some(self, name: str, held: Callable[[str], bool], trained: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A block of which some parameters, by their names, have values; `trained`: these, not those of its source."""
        source, dtype = self._sources[name], dtype_of(self._config)
        if source.path is None and trained is None:
            seed, number = self._config.seed, block_number(name)
            return build_block(self._config.model, number, seed, dtype=dtype, silent=source.silent, held=held)
        with on_meta():
            block = Block(self._config.model.at(block_number(name))).to(dtype)
        allocate_some(block, held, "cpu")
        if trained is None:
            trained = self._checked.get(name) or self._checked.setdefault(name, open_part(source))
        with torch.no_grad():
            for key, parameter in block.named_parameters():
                if held(key):
                    parameter.copy_(trained[key])
        return block

    def make(
        self,
        name: str,
        trained: Mapping[str, Tensor] | None,
        embedding_VD: Tensor | None = None,
        *,
        whole: bool = True,
    ) -> nn.Module:
        """A part on the CPU (see `Parts.make`)."""
        if not whole:
            apart = tuple(f"{path}." for path in self.pieces(name))
            part = self._some(name, lambda key: not key.startswith(apart), trained)
            set_spans(part, name, self._spans)
            require_gradients(name, part, self._job.stage)
            return part
        part = self._with_values(name, trained, embedding_VD)
        self._attach(name, part)
        return part

    def _with_values(self, name: str, trained: Mapping[str, Tensor] | None, embedding_VD: Tensor | None) -> nn.Module:
        if trained is not None and name in self._empty:
            # Made without values: drawing fresh weights only to overwrite them takes seconds for a large block.
            part = copy.deepcopy(self._empty[name])
            part.load_state_dict(trained, assign=True)  # these values themselves, not a copy
            return allocate(part, "cpu")
        part = self._made(name, embedding_VD)
        set_spans(part, name, self._spans)
        require_gradients(name, part, self._job.stage)
        if trained is not None:
            with torch.no_grad():
                for key, value in trained.items():
                    part.get_parameter(key).copy_(value)
        if embedding_VD is None and _made_by_its_values(part):
            self._empty.setdefault(name, _empty_twin(part))
        return part

    def outline(self, name: str) -> nn.Module:
        """A part on the meta device (see `training.sharding.DividedParts`)."""
        if name not in (FRONT, HEAD):
            with on_meta():
                block = Block(self._config.model.at(block_number(name))).to(dtype_of(self._config))
            require_gradients(name, block, self._job.stage)
            return block
        shape = self._job.vocab_size, self._config.model.d_model
        empty = torch.empty(shape, dtype=dtype_of(self._config), device="meta")
        return _empty_twin(self._made(name, nn.Parameter(empty) if self.tied and name == HEAD else None))

    def model(self, parts: Mapping[str, nn.Module]) -> StageModel:
        """Some neighbouring parts as the model of a stage, in training mode."""
        blocks = [module for name, module in parts.items() if name not in (FRONT, HEAD)]
        if self._config.training.compile:
            compile_blocks(blocks)
        front, head = parts.get(FRONT), parts.get(HEAD)
        return StageModel(front, blocks, head, self._objective, self._config.precision).train()

    def digest(self, name: str) -> str:
        """The digest of a part as it starts."""
        return self._sources[name].digest or part_digest(self.make(name, None))

    def _made(self, name: str, embedding_VD: Tensor | None) -> nn.Module:
        job, config, source = self._job, self._config, self._sources[name]
        if name == FRONT:
            return make_front(config, job.vocab_size, source)
        if name != HEAD:
            stage = job.stage
            return make_block(config, name, self._sources, stage.format(name), packed=stage.packs(name))
        if not self.tied and config.model.tie_embeddings:
            front = self._sources.get(FRONT)
            embedding_VD = (
                embedding_of(job, config)
                if front is None
                else make_front(config, job.vocab_size, front).embedding.weight.detach()
            )
        return make_head(config, job.vocab_size, source, embedding_VD, projects=self._owns, match=job.match)


def _made_by_its_values(part: nn.Module) -> bool:
    """Whether the values of what trains make the whole part: no frozen tensor, no table that it cannot make anew."""
    trained, held = {name for name, p in part.named_parameters() if p.requires_grad}, part.state_dict()
    tables = (
        module
        for prefix, module in part.named_modules()
        for name, buffer in module.named_buffers(prefix, recurse=False)
        if buffer is not None and name not in held and not hasattr(module, "rebuild")
    )
    return trained == set(held) and next(tables, None) is None


def _empty_twin(part: nn.Module) -> nn.Module:
    """The same part without values."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in part.parameters()
    }
    return copy.deepcopy(part, memo).to("meta")


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
            direct=swap.direct,
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
