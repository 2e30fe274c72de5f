"""A stage that does not fit, as a worker holds it: parts made one at a time from their seeds or files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from stackwise.config import StackWiseConfig
from stackwise.model import part_digest
from stackwise.pipeline.build import (
    embedding_of,
    make_block,
    make_front,
    make_head,
    objective_of,
    owns_projection,
    require_gradients,
)
from stackwise.pipeline.fit import Swap
from stackwise.pipeline.job import Source, StageJob
from stackwise.pipeline.schedule import ADAPTER, FRONT, HEAD, adapter_part
from stackwise.store import CommittedStage
from stackwise.training.stage import StageModel
from stackwise.training.swap import SwappedEngine


class JobParts:
    """The parts of a job's stage (see `training.parts.Parts`).

    Args:
        job: The job.
        config: Its configuration.
        sources: Where each part's weights come from.
    """

    def __init__(self, job: StageJob, config: StackWiseConfig, sources: Mapping[str, Source]) -> None:
        self._job, self._config, self._sources = job, config, sources
        stage = job.stage
        held = [part for part in stage.holds if part in sources and not part.startswith(ADAPTER)]
        self.names: Sequence[str] = held
        self.order: Sequence[str] = sorted(held, key=lambda part: part in stage.lookahead)
        self.trains: Sequence[str] = [part for part in held if {part, adapter_part(part)} & {*stage.trains}]
        in_half = any(stage.format(part).precision == "fp16" for part in held)
        self.precision: str = "fp16" if in_half else config.precision
        self._own = owns_projection(config, stage)
        self.tied = config.model.tie_embeddings and not self._own and FRONT in held and HEAD in held
        self._objective = objective_of(config, job.mask_token, job.vocab_size, stage)
        self._empty: dict[str, nn.Module] = {}

    def make(self, name: str, trained: Mapping[str, Tensor] | None, embedding_VD: Tensor | None = None) -> nn.Module:
        """A part on the CPU (see `Parts.make`).

        Raises:
            DamageError: Its file is missing, broken or not what was committed.
        """
        if trained is not None and name in self._empty:
            # Made without values: drawing fresh weights only to overwrite them takes seconds for a large block.
            part = copy.deepcopy(self._empty[name]).to_empty(device="cpu")
            part.load_state_dict(trained)
            return part
        part = self._made(name, embedding_VD)
        if trained is not None:
            with torch.no_grad():
                for key, value in trained.items():
                    part.get_parameter(key).copy_(value)
        require_gradients(name, part, self._job.stage)
        if embedding_VD is None and _made_by_its_values(part):
            self._empty.setdefault(name, _empty_twin(part))
        return part

    def model(self, parts: Mapping[str, nn.Module]) -> StageModel:
        """Some neighbouring parts as the model of a stage, in training mode."""
        blocks = [module for name, module in parts.items() if name not in (FRONT, HEAD)]
        if self._config.training.compile:
            for block in blocks:
                block.compile()
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
            packed = name not in stage.trains
            return make_block(config, name, self._sources, stage.format(name), packed=packed)
        if not self.tied and config.model.tie_embeddings:
            front = self._sources.get(FRONT)
            embedding_VD = (
                embedding_of(job)
                if front is None
                else make_front(config, job.vocab_size, front).embedding.weight.detach()
            )
        return make_head(config, job.vocab_size, source, embedding_VD, own=self._own)


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


def swapped_engine(
    job: StageJob, config: StackWiseConfig, swap: Swap, device: torch.device, warn: Callable[[str], None]
) -> SwappedEngine:
    """The engine that trains a job's stage group by group."""
    return SwappedEngine(
        JobParts(job, config, job.initial),
        config.stage_training(job.stage.depth),
        seed=job.seed(config),
        device=device,
        directory=Path(job.checkpoints) / "swap",
        groups=swap.groups,
        memory=swap.boundaries,
        warn=warn,
        before=job.span.first,
    )


def record_directory(job: StageJob) -> Path:
    """Where the checkpoints of a swapped stage go, which hold no weights: its engine's directory."""
    return Path(job.checkpoints) / "swap" / "record"


def committed_sources(job: StageJob, committed: CommittedStage | None) -> dict[str, Source]:
    """Where the parts that a stage hands on are once it is committed."""
    sources = {part: source for part, source in job.initial.items() if part in job.stage.forward_parts}
    if committed is not None:
        for part, digest in committed.record["parts"].items():
            if part in sources:
                sources[part] = Source(str(committed.path(part)), digest, committed.recipe)
    return sources
