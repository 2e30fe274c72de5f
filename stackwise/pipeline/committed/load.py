"""A run's committed weights, part by part and stage by stage: what evaluation, generation and export start from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from stackwise.config import StackWiseConfig
from stackwise.config.loading import build
from stackwise.data import PreparedData, Tokenizer
from stackwise.data.tokenizer import bytes_tokenizer
from stackwise.evaluation import StageModules
from stackwise.model import Front, Head
from stackwise.model.columns import learn_column
from stackwise.objectives import RuntimeObjective
from stackwise.pipeline.device import describe
from stackwise.pipeline.initial import initial_sources, settle_mask, tokenizer_limit, with_checkpoint
from stackwise.pipeline.job import Source, Versions, committed_stages, pruned
from stackwise.pipeline.parts import dtype_of, load_part, make_block, make_front, make_head, task_of
from stackwise.pipeline.rows import assigner
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.schedule import FRONT, HEAD, Stage, block_parts, schedule
from stackwise.training.stage import NARROW


@dataclass(frozen=True)
class CommittedRack:
    """The weights of the stages that a run has committed, from the bottom up without a gap; of the last window."""

    config: StackWiseConfig
    data: PreparedData
    vocab_size: int
    mask_token: int
    stages: list[Stage]
    parts: Versions  # the newest weights of each part
    versions: list[Versions]  # the same as each stage left them
    device: torch.device

    @property
    def objective(self) -> RuntimeObjective:
        """The objective that the finished rack was trained with: that of the last stage."""
        return self.objective_of(self.stages[-1])

    def objective_of(self, stage: Stage) -> RuntimeObjective:
        """The objective that a stage was trained with."""
        return task_of(self.config, self.mask_token, self.vocab_size, stage)

    def up_to(self, stage: Stage) -> CommittedRack:
        """The rack as it was when a stage had been committed."""
        count = self.stages.index(stage) + 1
        versions = self.versions[:count]
        return dataclasses.replace(self, stages=self.stages[:count], parts=versions[-1], versions=versions)

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype that matrices are multiplied in; None: float32."""
        return NARROW.get(self.config.precision)

    def front(self, parts: Versions | None = None) -> Front:
        """The front, of the newest weights or of others."""
        front = make_front(self.config, self.vocab_size, (parts or self.parts)[FRONT])
        if (column := self.stages[-1].column) is not None:
            learn_column(front, column, trains=False)
        return front.to(self.device).eval()

    def head(self, parts: Versions | None = None, *, scores: bool = False) -> Head:
        """The head, of the newest weights or of others; `scores`: with the layer beside its logits."""
        parts, match = parts or self.parts, self.config.objective.score_width if scores else None
        embedding = None
        if self.config.model.tie_embeddings:
            dtype = dtype_of(self.config)
            tensors = load_part(parts[FRONT], self.vocab_size, dtype)
            embedding = None if tensors is None else tensors["embedding.weight"].to(dtype)
        head = make_head(self.config, self.vocab_size, parts[HEAD], embedding, projects=False, match=match)
        return head.to(self.device).eval()

    def modules(self) -> Iterator[StageModules]:
        """The finished rack, section by section, each loaded when it is asked for; every one has the last head."""
        yield from self._standing()
        head = self.head()
        holders = {part: stage for stage in self.stages for part in (*stage.trunk_above, *stage.lookahead)}
        for depth, (first, last) in enumerate(self.config.partition):
            parts = block_parts(first, last)
            if all(part in self.parts for part in parts):
                blocks = self._blocks(parts, self.parts, holders[parts[-1]])
                yield StageModules(depth, blocks, head, self.objective.causal)

    def whole(self) -> Iterator[StageModules]:
        """The finished rack, section by section as `modules`; the last alone has the head."""
        yield from self._standing()
        for depth, (first, last) in enumerate(self.config.partition):
            blocks = self._blocks(block_parts(first, last), self.parts, self.stages[depth])
            head = self.head() if depth + 1 == self.config.n_sections else None
            yield StageModules(depth, blocks, head, self.objective.causal)
            del blocks

    def _standing(self) -> Iterator[StageModules]:
        """The blocks below every section, one by one."""
        for part in block_parts(0, self.config.bottom - 1):
            yield StageModules(-1, self._blocks((part,), self.parts, self.stages[0]), None, self.objective.causal)

    def exit_of(self, counts_N: np.ndarray) -> np.ndarray:
        """Where time is depth: of numbers of masked positions, the depth of the stage that trained on them."""
        return assigner(self.config, 0).stage_of(counts_N, self.config.n_sections)

    def exits(self, stages: Sequence[Stage] | None = None) -> Iterator[StageModules]:
        """The rack as it left at each stage, with that stage's head, one stage loaded at a time.

        A stage that reads what the one before it wrote starts there; any other brings all blocks below it, from
        its own front.

        Args:
            stages: Those to leave at, neighbours in the schedule; None: all.
        """
        left: list[Source] | None = None
        for stage, versions in zip(self.stages, self.versions, strict=True):
            if stages is not None and stage not in stages:
                continue
            below = [versions[part] for part in stage.trunk]
            goes_on = left is not None and stage.reads_boundary and below == left
            first = stage.first if goes_on or not stage.reads_boundary else 0
            yield StageModules(
                stage.depth,
                self._blocks(block_parts(first, stage.last), versions, stage),
                self.head(versions),
                self.objective_of(stage).causal,
                front=None if goes_on else self.front(versions),
                beyond=self._blocks(stage.lookahead, versions, stage),
            )
            left = [*below, *(versions[part] for part in stage.forward_parts)]

    def _blocks(self, parts: Iterable[str], versions: Versions, holder: Stage) -> list[nn.Module]:
        blocks = (make_block(self.config, part, versions, holder.format(part), packed=True) for part in parts)
        return [block.to(self.device).eval() for block in blocks]


class TextFormat:
    """What stands for the data of a model that brings none: its tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer


def load_model(weights: str, device: torch.device, report: Callable[[str], None]) -> CommittedRack:
    """A pretrained model as it stands: a directory of Hugging Face's layout, an export, or a finished run.

    Its blocks are sections of their own, so that one is in memory at a time; its data is its tokenizer alone.

    Args:
        report: Called with a line on what the model lacks.

    Raises:
        NotFound: There is nothing there.
        UsageError: It is no model, one that cannot be taken up exactly, or one without a tokenizer of its ids.
    """
    values = {"init.weights": weights, "training.mode": "layerwise", "device": device.type}
    config = with_checkpoint(build(StackWiseConfig, {}, values))
    config.precision = describe(device)["precision"]
    tokenizer_limit(config)
    tokenizer = bytes_tokenizer() if config.data.tokenizer == "bytes" else Tokenizer.load(Path(config.data.tokenizer))
    if (line := settle_mask(config, tokenizer)) is not None:
        report(line)
    mask = tokenizer.mask_id if config.training.mask_token_id is None else config.training.mask_token_id
    size = max(config.model.vocab_size or 0, tokenizer.separator_id + 1, mask + 1 if config.objective.masks else 0)
    stages, parts = schedule(config), initial_sources(config, hashed=False)
    parts.setdefault(HEAD, Source())
    data = cast(PreparedData, TextFormat(tokenizer))
    return CommittedRack(config, data, size, mask, stages, parts, [parts] * len(stages), device)


def load_rack(run: RunDirectory, device: torch.device, *, whole: bool = True) -> CommittedRack:
    """What a run has committed.

    Args:
        whole: Refuse a run whose last stage is not committed.

    Raises:
        NotFound: There is no run here.
        UsageError: No stage, or (with `whole`) not every stage is committed.
        DamageError: A committed file is not what it was.
    """
    config, manifest = run.config(), run.manifest()
    config.device = device.type
    standing_still = initial_sources(config) if config.training.adapters is not None else {}
    left = committed_stages(run, config, manifest, whole=whole, sources=standing_still)
    newest = {stage.depth: (stage, versions) for stage, versions in left}
    # Between two windows, a stage whose weights were pruned cannot be used.
    standing = [
        (stage, versions)
        for stage, versions in newest.values()
        if config.windows == 1 or not pruned(versions[part] for part in stage.trunk_above)
    ]
    vocabulary = manifest["vocabulary"]
    return CommittedRack(
        config,
        PreparedData.open(Path(manifest["data"]["directory"])),
        vocabulary["size"],
        vocabulary["mask"],
        [stage for stage, _ in standing],
        left[-1][1],
        # What a stage held and no stage had trained yet was as it is drawn.
        [dict.fromkeys(stage.forward_parts, Source()) | versions for stage, versions in standing],
        device,
    )
