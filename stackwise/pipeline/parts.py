"""From files to modules: the parts of a stage, with the weights that its job names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from stackwise.config import StackWiseConfig
from stackwise.config.continual import LwF
from stackwise.config.precision import FP8_PRODUCTS, weight_format
from stackwise.config.schema import DistillationConfig
from stackwise.errors import DamageError
from stackwise.identity import derive_seed
from stackwise.model import Block, Front, Head, build_block, build_front, build_head, fp8, part_digest
from stackwise.model.block import COMPUTE
from stackwise.model.build import allocate, build_match, on_meta, rebuild_tables
from stackwise.model.columns import learn_column
from stackwise.model.projections import (
    LEARNED,
    PACKED,
    SPAN,
    adapter_parameters,
    adapter_state,
    base_state,
    load_adapters,
    multiply_by,
    projections,
    put_adapters,
    quantize,
    train_scales,
)
from stackwise.objectives import AdaptationObjective, RuntimeObjective, make_objective
from stackwise.objectives.distillation import DistillationObjective
from stackwise.pipeline.job import Frozen, Source, StageJob
from stackwise.pipeline.schedule import ADAPTER, FRONT, HEAD, PLAIN, BlockFormat, Stage, adapter_part, block_number
from stackwise.pretrained.adapters import merge, read_pairs
from stackwise.pretrained.reading import read_part
from stackwise.store import CommittedStage
from stackwise.training.checkpoint import reason
from stackwise.training.stage import StageModel
from stackwise.training.tensor_files import TensorFile

M = TypeVar("M", bound=nn.Module)

MATCH = "match.weight"
"""What a head's layer towards a teacher is called in its file."""

RETRAINED = "run again: its stage is retrained"
ELSEWHERE = "check that the file is that of the model which the configuration describes"


def load_part(
    source: Source, vocab_size: int | None = None, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor] | None:
    """A part's tensors, checked against their digest; None where it is fresh.

    Only the tensors that the source names are read: of a checkpoint with a whole model in it, no more than the part.

    Args:
        vocab_size: Of a front or a head: ids of the model. Where a checkpoint has fewer, rows are added to it, each
            the mean of the others.
        dtype: Of a checkpoint's tensors, as they are wanted; None: as they are. What was committed stays as it is.

    Raises:
        DamageError: A file is missing, broken or not what was committed.
        UsageError: A checkpoint's file is missing or cut off, lacks a tensor, or has values that are no numbers.
    """
    if source.path is None:
        return None
    if source.upcycled:
        return mean_of([load_part(one, vocab_size, dtype) or {} for one in source.upcycled])
    if source.merged:
        weights = load_part(source.merged[0]) or {}
        for addition in source.merged[1:]:
            merge(weights, load_part(addition) or {})
        for name in weights:  # one after another: never are all of them in memory in both dtypes
            weights[name] = weights[name] if dtype is None else weights[name].to(dtype)
        return weights
    if source.pairs is not None:
        now, tensors = read_pairs(Path(source.path), source.pairs)
        if source.digest not in (None, now):
            raise DamageError(f"{source.path} was changed since it was hashed", hint="run again")
        return tensors
    if source.names is None:
        tensors = _read(Path(source.path))
        if source.digest is not None and part_digest(tensors) != source.digest:
            raise DamageError(f"{source.path} is not what was committed", hint=RETRAINED)
        return tensors
    sizes = {} if vocab_size is None else dict.fromkeys(VOCABULARY, vocab_size)
    tensors, digest = read_part(source.path, source.names, dtype, sizes)
    if source.digest not in (None, digest):
        # Its digest is remembered by the files' times, which a change in place may leave.
        raise DamageError(f"{source.path} was changed since it was hashed", hint="touch its files, and run again")
    return tensors


def mean_of(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the tensors of several parts alike, in their order."""
    return {name: sum((one[name] for one in states[1:]), states[0][name]) / len(states) for name in states[0]}


def open_part(source: Source) -> Mapping[str, Tensor]:
    """A committed part, checked as a whole, a tensor at a time; its tensors are read when they are asked for.

    Raises:
        DamageError: The file is missing, broken or not what was committed.
    """
    path = Path(source.path or "")
    try:
        tensors = TensorFile(path)
        now = part_digest(tensors)
    except (OSError, ValueError) as error:
        raise DamageError(f"{path} cannot be read: {reason(error)}", hint=RETRAINED) from error
    if source.digest not in (None, now):
        raise DamageError(f"{path} is not what was committed", hint=RETRAINED)
    return tensors


VOCABULARY = frozenset({"embedding.weight", "projection", "bias"})
"""Tensors of a front and a head that have a row for each id."""


def _read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a committed part."""
    try:
        return dict(TensorFile(path))
    except (OSError, ValueError) as error:
        raise DamageError(f"{path} cannot be read: {reason(error)}", hint=RETRAINED) from error


def _hint(source: Source) -> str:
    return RETRAINED if source.names is None else ELSEWHERE


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], source: Source) -> None:
    """Let a module have the weights of its source."""
    hint = _hint(source)
    state = module.state_dict()
    for name in sorted({*state, *tensors}):
        if name not in tensors or name not in state:
            what = "lacks" if name in state else "has beside the weights of its part"
            raise DamageError(f"{source.path} {what} {name}", hint=hint)
        tensor, expected = tensors[name], state[name]
        if tensor.shape != expected.shape:
            shapes = f"{list(tensor.shape)}, not {list(expected.shape)}"
            raise DamageError(f"{source.path}: {name} is {shapes}", hint=hint)
        if tensor.dtype != expected.dtype:
            raise DamageError(f"{source.path}: {name} is {tensor.dtype}, not {expected.dtype}", hint=hint)
    # A checkpoint's tensors were read in the module's dtype, and may be its own: a part is never in memory twice.
    module.load_state_dict(tensors, assign=source.names is not None)


def dtype_of(config: StackWiseConfig) -> torch.dtype:
    """The dtype of weights in training, whatever that of a checkpoint is."""
    return torch.float64 if config.precision == "fp64" else torch.float32


def make_front(config: StackWiseConfig, vocab_size: int, source: Source) -> Front:
    """The front, with a part's weights or fresh ones."""
    model, seq_len = config.model, config.training.seq_len
    if source.path is None:
        return build_front(model, vocab_size, config.seed, seq_len).to(dtype_of(config))
    make: Callable[[], Front] = partial(model.stream.front, model, vocab_size, seq_len)
    return _loaded(make, source, dtype=dtype_of(config), vocab_size=vocab_size)


def make_block(
    config: StackWiseConfig, part: str, sources: Mapping[str, Source], how: BlockFormat = PLAIN, *, packed: bool = False
) -> nn.Module:
    """A block of the rack, or of an auxiliary head, with its part's weights or fresh ones.

    Args:
        how: The precision it is held in, and the adapters on it.
        packed: Pack weights in a narrow format, which freezes them.
    """
    source, form = sources[part], weight_format(how.precision)
    if source.path is None:
        kind, *numbers = part.split(".")
        # An auxiliary block is drawn apart from those of the rack: nothing of it stays in the model.
        seed = config.seed if kind == "block" else derive_seed(config.seed, part)
        block = build_block(config.model, int(numbers[-1]), seed, silent=source.silent).to(dtype_of(config))
    elif source.upcycled:
        block = _upcycled(config, part, source)
    else:
        model = config.model.at(block_number(part))
        block = _loaded(lambda: Block(model), source, form, dtype=dtype_of(config))
    if form is not None:
        quantize(block, form, pack=packed)
    if how.precision == FP8_PRODUCTS:
        multiply_by(block, fp8.linear)
    block.compute = COMPUTE.get(how.precision)
    adapters = load_part(sources.get(adapter_part(part), Source())) or {}
    for size in how.adapters:
        by_key = {key: _in_dtype(config, key, tensor) for key, tensor in adapters.items() if f".{size.name}." in key}
        if by_key:
            load_adapters(block, by_key, size.dropout)
        else:
            put_adapters(block, size, config.seed, part)
    return block


FEED_FORWARD = "ffn."
"""What the names of a feed-forward's tensors begin with in its block."""


def _upcycled(config: StackWiseConfig, part: str, source: Source) -> Block:
    """A block that begins as the same block of dense models; what they have not, a router, is drawn from the seed."""
    number, dtype = block_number(part), dtype_of(config)
    model = config.model.at(number)
    if not model.ffn.upcycles:
        return _loaded(lambda: Block(model), source, dtype=dtype)
    states = [load_part(one, dtype=dtype) or {} for one in source.upcycled]
    inner = [{k.removeprefix(FEED_FORWARD): v for k, v in one.items() if k.startswith(FEED_FORWARD)} for one in states]
    outer = mean_of([{k: v for k, v in one.items() if not k.startswith(FEED_FORWARD)} for one in states])
    state = outer | {f"{FEED_FORWARD}{name}": tensor for name, tensor in model.ffn.upcycled(model, inner).items()}
    block = build_block(config.model, number, config.seed).to(dtype)
    _fill(block, block.state_dict() | {name: tensor.to(dtype) for name, tensor in state.items()}, source)
    return block


def _in_dtype(config: StackWiseConfig, key: str, tensor: Tensor) -> Tensor:
    return tensor if key.endswith(".scale") else tensor.to(dtype_of(config))


def make_head(
    config: StackWiseConfig,
    vocab_size: int,
    source: Source,
    embedding_VD: torch.Tensor | None,
    *,
    projects: bool,
    match: int | None = None,
) -> Head:
    """A head.

    Args:
        source: Its weights; those of a tied head hold no projection.
        embedding_VD: What a tied head projects with: the front's parameter (shared), or a plain tensor.
        own: Give a tied head a projection of its own that starts as a copy.
        match: The teacher's width, where a layer is to match it; None: there is no such layer.
    """
    dtype = dtype_of(config)
    tensors = load_part(source, vocab_size, dtype)
    if tensors is not None and "projection" in tensors:
        embedding_VD, projects = None, False
    if source.names is None:
        head = build_head(config.model, vocab_size, config.seed, embedding_VD).to(dtype)
    else:  # without values: the checkpoint has them all
        with on_meta():
            head = config.model.head.build(config.model, vocab_size, embedding_VD).to(dtype=dtype)
        rebuild_tables(head, "cpu")
    if tensors is not None:
        if match is None:
            tensors.pop(MATCH, None)  # of the stage that was drawn to a teacher, and of no use without
        elif MATCH in tensors:
            head.match = build_match(match, config.model.d_model, config.seed)
        _fill(head, tensors, source)
    if match is not None and head.match is None:
        head.match = build_match(match, config.model.d_model, config.seed)
    if projects and embedding_VD is not None:
        head.untie()
    return head


def stage_model(job: StageJob, config: StackWiseConfig) -> StageModel:
    """The stage of a job, on the CPU, with gradients required for what it trains."""
    stage = job.stage
    front = None if stage.reads_boundary else make_front(config, job.vocab_size, job.initial[FRONT])
    blocks, beyond = (
        [
            make_block(config, part, job.initial, stage.format(part), packed=stage.packs(part))
            for part in parts
            if part in job.initial  # what only hands on has nothing beyond
        ]
        for parts in (stage.blocks, stage.lookahead)
    )
    head = None
    if HEAD in job.initial:
        embedding: torch.Tensor | None = None
        if config.model.tie_embeddings:
            embedding = front.embedding.weight if front is not None else embedding_of(job, config)
        projects = owns_projection(config, stage)
        head = make_head(config, job.vocab_size, job.initial[HEAD], embedding, projects=projects, match=job.match)
    objective = objective_of(config, job.mask_token, job.vocab_size, stage)
    model = StageModel(front, blocks, head, objective, config.precision, beyond)
    for part, module in parts_of(model, job.stage).items():
        if not part.startswith(ADAPTER):
            require_gradients(part, module, job.stage)
    return model


def require_gradients(part: str, module: nn.Module, stage: Stage) -> None:
    """Let a part require gradients where the stage trains it, and its adapters where it trains these."""
    if stage.scales_alone and part in stage.trains:
        train_scales(module)
    else:
        module.requires_grad_(part in stage.trains)
    for parameter in adapter_parameters(module):
        parameter.requires_grad_(adapter_part(part) in stage.trains)
    if stage.column is not None:
        learn_column(module, stage.column, trains=part in stage.trains)


def set_spans(module: nn.Module, part: str, spans: Mapping[str, Tensor]) -> None:
    """Fix the ranges of what enters a part's layers: [2] each, by part and layer, "block.3/attention.q"."""
    for path, layer in projections(module).items():
        if (span := spans.get(f"{part}/{path}")) is not None:
            layer.span.copy_(span)


def frozen_stage(below: Frozen, job: StageJob, config: StackWiseConfig) -> StageModel:
    """A committed stage below a job's, on the CPU, without its head: in evaluation mode, nothing requires gradients."""
    stage = below.stage
    front = None if stage.reads_boundary else make_front(config, job.vocab_size, below.initial[FRONT])
    blocks = [make_block(config, part, below.initial, stage.format(part), packed=True) for part in stage.blocks]
    objective = objective_of(config, job.mask_token, job.vocab_size, stage)
    model = StageModel(front, blocks, None, objective, config.precision)
    if stage.column is not None:
        learn_column(model, stage.column, trains=False)
    return model.requires_grad_(False).eval()


def owns_projection(config: StackWiseConfig, stage: Stage) -> bool:
    """Whether a tied head gets a copy of the embedding to train: where it trains, and the embedding does not."""
    return {FRONT, HEAD} & set(stage.trains) == {HEAD} and config.training.tied_head == "copy"


def objective_of(config: StackWiseConfig, mask_token: int, vocab_size: int, stage: Stage) -> RuntimeObjective:
    """The objective that a stage trains: what it is asked for, and its teacher beside that."""
    task, past = task_of(config, mask_token, vocab_size, stage), config.training.continual
    if isinstance(past, LwF) and stage.window:
        settings = DistillationConfig(task_weight=1.0, temperature=past.temperature)
        return DistillationObjective(task, settings, past.weight)
    if config.distillation.teacher is None or stage.causal:
        return task
    return DistillationObjective(task, config.distillation)


def task_of(config: StackWiseConfig, mask_token: int, vocab_size: int, stage: Stage) -> RuntimeObjective:
    """What a stage is asked for, by which it is scored."""
    if stage.causal:
        return AdaptationObjective()
    return make_objective(config.training, mask_token, vocab_size, config.seed)


def parts_of(model: StageModel, stage: Stage) -> dict[str, nn.Module]:
    """A stage's modules by part name, in forward order; a block's adapters are in the block (see `part_state`)."""
    modules: dict[str, nn.Module] = {}
    if model.front is not None:
        modules[FRONT] = model.front
    # None is beyond where the stage only hands on.
    for part, block in (
        *zip(stage.blocks, model.blocks, strict=True),
        *zip(stage.lookahead, model.beyond, strict=False),
    ):
        modules |= dict.fromkeys(stage.with_adapters((part,)), block)
    if model.head is not None:
        modules[HEAD] = model.head
    return modules


def part_state(part: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A part's own tensors, of the state dict of the module that it is in."""
    return adapter_state(state) if part.startswith(ADAPTER) else base_state(state)


def _loaded(
    make: Callable[[], M],
    source: Source,
    form: str | None = None,
    *,
    dtype: torch.dtype,
    vocab_size: int | None = None,
) -> M:
    # Made without values: drawing fresh weights only to overwrite them takes seconds for a large block.
    with on_meta():
        module = make().to(dtype)
    tensors = load_part(source, vocab_size, dtype)
    assert tensors is not None
    if form is not None and any(name.endswith(PACKED) for name in tensors):
        quantize(module, form, pack=True)
    elif form is not None and any(name.endswith((LEARNED, SPAN)) for name in tensors):
        quantize(module, form, pack=False)
    if source.names is None:
        allocate(module, "cpu")
        _fill(module, tensors, source)
    else:
        _fill(module, tensors, source)
        rebuild_tables(module, "cpu")
    return module


def embedding_of(job: StageJob, config: StackWiseConfig) -> torch.Tensor | None:
    """The embedding that a tied head above the front projects with, where the job names one."""
    if job.embedding is None:
        return None
    tensors = load_part(job.embedding, job.vocab_size, dtype_of(config))
    return None if tensors is None else tensors["embedding.weight"].to(dtype_of(config))


def save_part(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a part's weights (its state dict) as safetensors."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)


def committed_sources(job: StageJob, committed: CommittedStage | None) -> dict[str, Source]:
    """Where the parts that a stage hands on are once it is committed."""
    sources = {part: source for part, source in job.initial.items() if part in job.stage.forward_parts}
    if committed is not None:
        for part, digest in committed.record["parts"].items():
            if part in sources:
                sources[part] = Source(str(committed.path(part)), digest, committed.recipe)
    return sources
