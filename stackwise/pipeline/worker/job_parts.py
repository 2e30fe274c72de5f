"""The parts of a job's stage, made one at a time: for engines that never hold all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from stackwise.config import StackWiseConfig
from stackwise.model import Block, build_block, part_digest
from stackwise.model.build import allocate, allocate_some, on_meta
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
    require_gradients,
    set_spans,
)
from stackwise.pipeline.schedule import ADAPTER, FRONT, HEAD, adapter_part, block_number
from stackwise.training.stage import StageModel, compile_blocks


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
