"""One pass over a schedule with layers of anyone's: each stage trained, or taken as it is committed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from stackwise.config import StackWiseConfig
from stackwise.config.loading import dump
from stackwise.errors import UsageError
from stackwise.model import Front, Head, build_head, part_digest
from stackwise.objectives import Objective
from stackwise.pipeline.build import parts_of
from stackwise.pipeline.job import Source, StageJob
from stackwise.pipeline.library.samples import LoadedSamples
from stackwise.pipeline.recipe import codec_name, forward_specification, recipe_id, stage_recipe, stage_span, trunk_id
from stackwise.pipeline.rows import choose_samples, put_rows
from stackwise.pipeline.schedule import HEAD, Stage, schedule
from stackwise.pipeline.worker.boundary import write_above
from stackwise.pipeline.worker.training import train_stage
from stackwise.store import ActivationStore, CommittedStage
from stackwise.training.feed import Feed
from stackwise.training.stage import StageModel


@dataclass(frozen=True)
class StageResult:
    """How a stage ended: its loss over the last steps in nats, and whether it was trained or found committed."""

    depth: int
    blocks: tuple[int, int]
    loss: float
    steps: int
    reused: bool
    recipe: str


class StagesInProcess:
    """One pass over the schedule.

    Args:
        config: With every `auto` settled.
        data: The samples.
        store: Where boundaries and committed stages go.
        objective: Of every stage.
        vocab_size: Token ids there are.
        mask_token: The id that stands for a masked token.
        device: What computes.
        observe: Told every event.
    """

    def __init__(
        self,
        config: StackWiseConfig,
        data: LoadedSamples,
        store: ActivationStore,
        objective: Objective,
        vocab_size: int,
        mask_token: int,
        device: torch.device,
        observe: Callable[[dict[str, Any]], None],
    ) -> None:
        self.config, self.data, self.store, self.objective = config, data, store, objective
        self.vocab_size, self.mask_token, self.device, self.observe = vocab_size, mask_token, device, observe
        self.digests: dict[str, str] = {}

    def stage(self, stage: Stage, front: nn.Module, layers: Sequence[nn.Module], heads: list[Head]) -> StageResult:
        """Train one stage, or take its committed weights; then write the boundary above it."""
        config = self.config
        if stage.held:
            raise UsageError(
                f"stage {stage.depth}: layers of your own train in their own precision, without adapters",
                hint="set trunk_strategy: frozen, cache_activations: true and new_stack_precision: full",
            )
        model = self._model(stage, front, layers, heads)
        parts = parts_of(model, stage)
        rowset, rows = put_rows(config, self.data, self.store, stage.rowset)
        initial = {name: part_digest(module) for name, module in parts.items()}
        below, through = self._forward(layers[: stage.first], front), self._forward(layers[: stage.last + 1], front)
        trunk = trunk_id(below, [self.digests[p] for p in stage.trunk], {}) if stage.reads_boundary else None
        span = stage_span(config, stage, rows)
        recipe = stage_recipe(
            config,
            stage,
            forward=through,
            rows=rows,
            rowset=rowset,
            span=span,
            initial=initial,
            trunk=trunk,
            targets=self.data.targets_digest() if config.objective == "custom" else None,
        )
        job = StageJob(
            config=dump(config),
            stage=stage,
            store=str(self.store.path),
            data="",
            vocab_size=self.vocab_size,
            mask_token=self.mask_token,
            device=str(self.device),
            checkpoints=str(self.store.path.parent / "checkpoints" / recipe_id(recipe)),
            recipe=recipe,
            recipe_id=recipe_id(recipe),
            forward=through,
            rows=rows,
            rowset=rowset,
            rowset_number=stage.rowset,
            span=span,
            initial={name: Source() for name in parts},
            embedding=None,
            trunk_digests=[self.digests[part] for part in stage.trunk],
            train=True,
            reads=None,
            writes=False,
        )
        committed = self.store.stage(job.recipe_id)
        reused = committed is not None
        model.to(self.device)
        with self._feed(stage, rowset, trunk) as feed:
            if committed is None:
                train_stage(job, config, model, feed, self.store, self.device, self.observe, lambda: False)
                committed = self.store.stage(job.recipe_id)
                assert committed is not None
            else:
                self.observe({"event": "reused", "stage": stage.depth, "recipe": job.recipe_id})
                for name in stage.trains:
                    parts[name].load_state_dict(load_file(committed.path(name)))
            self.digests |= committed.record["parts"]
            self._hand_on(job, model, feed)
        return _result(stage, committed, reused)

    def _forward(self, layers: Sequence[nn.Module], front: nn.Module) -> dict[str, Any]:
        """The forward specification of a trunk: anyone's layers are told apart by class and printed form."""
        code = [f"{type(m).__module__}.{type(m).__qualname__}: {m}" for m in (front, *layers)]
        return {**forward_specification(self.config, self.vocab_size, self.mask_token), "layers": code}

    def _model(self, stage: Stage, front: nn.Module, layers: Sequence[nn.Module], heads: list[Head]) -> StageModel:
        config = self.config
        tied = config.model.tie_embeddings and isinstance(front, Front)
        embedding = front.embedding.weight if tied and isinstance(front, Front) else None
        reads = stage.reads_boundary
        head = build_head(
            config.model,
            self.vocab_size,
            config.seed,
            embedding.detach().clone() if embedding is not None and reads else embedding,
        )
        if reads and config.training.tied_head == "copy":
            head.untie()
        if heads:
            below = heads[-1].state_dict()
            head.load_state_dict({**head.state_dict(), **below})
        heads.append(head)
        blocks = [layers[index] for index in range(stage.first, stage.last + 1)]
        model = StageModel(None if reads else front, blocks, head, self.objective, config.precision)
        for name, module in parts_of(model, stage).items():
            module.requires_grad_(name in stage.trains)
        return model

    @contextlib.contextmanager
    def _feed(self, stage: Stage, rowset: str, trunk: str | None) -> Iterator[Feed]:
        with contextlib.ExitStack() as stack:
            reader = None
            if trunk is not None:
                info = self.store.find(trunk=trunk, rowset=rowset, codec=codec_name(self.config.store))
                assert info is not None, "the stage below has written its boundary"
                reader = stack.enter_context(self.store.reader(info.id))
            yield Feed(
                self.data,
                self.config.training.seq_len,
                choose_samples(self.config, self.data, stage.rowset),
                self.store,
                self.store.rowset(rowset),
                reader,
                targets=self.config.objective == "custom",
            )

    def _hand_on(self, job: StageJob, model: StageModel, feed: Feed) -> None:
        """The boundary above, where a stage follows that reads it."""
        stages = schedule(self.config)
        above = job.stage.depth + 1
        if above < len(stages) and stages[above].reads_boundary:
            digests = [self.digests[name] for name in parts_of(model, job.stage) if name != HEAD]
            write_above(job, self.config, [model], feed, self.store, digests, self.device, self.observe, lambda: False)
        model.to("cpu")


def _result(stage: Stage, committed: CommittedStage, reused: bool) -> StageResult:
    losses = [loss for loss in committed.record["losses"][-20:] if loss is not None]
    loss = sum(losses) / max(len(losses), 1)
    return StageResult(
        stage.depth, (stage.first, stage.last), loss, committed.record["steps"], reused, committed.recipe
    )
