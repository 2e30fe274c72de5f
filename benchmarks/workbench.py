"""One stage of any preset that reads a real boundary: a temporary store, random samples under real masks, the model.

What a stage worker builds from a run, this builds from a preset alone, out of the same parts.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.setting import Setting
from stackwise.batch import MASKS, SEGMENTS, TOKENS, Batch
from stackwise.config import StackWiseConfig
from stackwise.identity import content_id, generator
from stackwise.model import Block, Head, fp8
from stackwise.model.projections import multiply_by
from stackwise.pipeline.device import make_deterministic
from stackwise.pipeline.parts import objective_of
from stackwise.pipeline.recipe import SHUFFLED_CHUNKS, boundary_chunk_rows, codec_name, order_rows
from stackwise.pipeline.rows import choose_samples, put_rows
from stackwise.store import ActivationStore, Prefetcher, RowOrder
from stackwise.training.engine import ResidentEngine
from stackwise.training.feed import Feed
from stackwise.training.stage import MeanLoss, StageModel, compile_blocks
from stackwise.training.trainer import Progress, Trainer

QUEUE = 4
"""Batches that may lie ready when a round begins: so many are trained on before its clock starts."""


class RandomSamples:
    """Samples of random tokens, all of them but the mask token, in memory."""

    def __init__(self, samples: int, seq_len: int, vocab_size: int, seed: int) -> None:
        draw = generator(seed, "benchmark", "tokens")
        self._tokens_NS = draw.integers(0, vocab_size - 1, (samples, seq_len), dtype=np.int64)
        self._ids_N16 = draw.integers(0, 256, (samples, 16), dtype=np.uint8)

    def n_samples(self, seq_len: int) -> int:
        """How many there are."""
        return len(self._tokens_NS)

    def samples(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """Their tokens."""
        found: np.ndarray = self._tokens_NS[indices]
        return found

    def sample_ids(self, seq_len: int) -> np.ndarray:
        """Their ids."""
        return self._ids_N16

    def segments(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """Each is one document."""
        return np.zeros((len(indices), seq_len), dtype=np.int32)

    def column(self, name: str, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """Whatever is asked for: the tokens themselves."""
        values: np.ndarray = self._tokens_NS[indices]
        return values

    def column_digest(self, name: str) -> str:
        """That of a column of random values."""
        return content_id("benchmark", {"column": name})


@dataclass(frozen=True)
class Bench:
    """A store with a boundary that a stage reads.

    Args:
        setting: The stage.
        store: The store.
        rowset: Id of the rows.
        rows: How many there are.
        boundary: Id of the boundary that enters the stage.
        split: The samples.
        order: The order of the stage's rows.
        scored_R: Positions that the loss scores in each row.
    """

    setting: Setting
    store: ActivationStore
    rowset: str
    rows: int
    boundary: str
    split: RandomSamples
    order: RowOrder
    scored_R: np.ndarray

    @contextlib.contextmanager
    def feed(self) -> Iterator[Feed]:
        """What enters the stage, with a reader that was just opened."""
        config = self.setting.config
        with self.store.reader(self.boundary) as reader:
            objective = objective_of(config, self.setting.vocab_size - 1, self.setting.vocab_size, self.setting.stage)
            yield Feed.stored(
                self.store,
                self.store.rowset(self.rowset),
                self.split,
                choose_samples(config, self.split, 0),
                config.training.seq_len,
                columns=(*([SEGMENTS] if config.data.within_documents else []), *objective.inputs),
                reader=reader,
            )

    def scored(self, first: int, count: int) -> int:
        """Scored positions of `count` batches in order, from batch number `first` on."""
        size = self.setting.config.training.batch_size
        return int(self.scored_R[self.order.at(first * size, (first + count) * size)].sum())


@contextlib.contextmanager
def workbench(setting: Setting, directory: Path) -> Iterator[Bench]:
    """Make a store in `directory` with a boundary of the setting's shape, through the writer that stages use.

    The activations are normal values of the scale that a residual stream has after a few blocks.
    """
    config = setting.config
    config.training.rows = setting.rows
    split = RandomSamples(setting.rows, config.training.seq_len, setting.vocab_size, config.seed)
    if config.deterministic and setting.device.type == "cuda":
        make_deterministic()
    with ActivationStore(directory / "store") as store:
        rowset, rows = put_rows(config, split, store, 0)
        boundary = _write_random(setting, store, rowset)
        order = RowOrder(
            rows,
            seed=(config.seed, setting.stage.depth, "order"),
            chunk_rows=order_rows(config, rows),
            window_chunks=SHUFFLED_CHUNKS,
        )
        objective = objective_of(config, setting.vocab_size - 1, setting.vocab_size, setting.stage)
        masks_RS = torch.from_numpy(store.masks(store.rowset(rowset).mask_ids, config.training.seq_len))
        tokens_RS = torch.from_numpy(split.samples(choose_samples(config, split, 0), config.training.seq_len))
        tensors = {TOKENS: tokens_RS, MASKS: masks_RS} | dict.fromkeys(objective.inputs, tokens_RS)
        scored_R = objective.positions(Batch(np.arange(rows), None, tensors)).sum(1).numpy()
        yield Bench(setting, store, rowset, rows, boundary, split, order, scored_R)


def _write_random(setting: Setting, store: ActivationStore, rowset: str) -> str:
    config, rows = setting.config, setting.rows
    draw = torch.Generator(setting.device).manual_seed(config.seed)
    with store.writer(
        trunk=content_id("benchmark", {"what": "random activations", "seed": config.seed}),
        rowset=rowset,
        depth=setting.stage.depth,
        seq_len=config.training.seq_len,
        d_model=config.model.d_model,
        codec=codec_name(config.store),
        chunk_rows=boundary_chunk_rows(config, rows),
    ) as writer:
        for chunk in writer.missing:
            first, last = writer.chunk_rows_of(chunk)
            shape = (last - first, config.training.seq_len, config.model.d_model)
            writer.write_chunk(chunk, torch.randn(shape, device=setting.device, generator=draw))
        return writer.finish().id


def fresh_model(setting: Setting) -> StageModel:
    """The stage on its device, with random weights of the configuration's scale, drawn there: that takes a moment."""
    config, device = setting.config, setting.device
    draw = torch.Generator(device).manual_seed(config.seed)
    with torch.device("meta"):
        blocks = [Block(config.model) for _ in range(setting.blocks)]
        head = Head(config.model, setting.vocab_size)
    for part in (*blocks, head):
        part.to_empty(device=device)
        for name, parameter in part.named_parameters():
            with torch.no_grad():
                if parameter.ndim >= 2:
                    parameter.normal_(0.0, config.model.init_std, generator=draw)
                else:
                    parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    if not trains_projection(config):
        assert head.projection is not None
        head.projection.requires_grad_(False)
    if config.stage_training(setting.stage.depth).products == "fp8":
        for block in blocks:
            multiply_by(block, fp8.linear)
    objective = objective_of(config, setting.vocab_size - 1, setting.vocab_size, setting.stage)
    model = StageModel(None, blocks, head, objective, config.precision)
    if config.training.compile:
        compile_blocks(model.blocks)
    return model


def trains_projection(config: StackWiseConfig) -> bool:
    """Whether a stage above the front trains its head's projection."""
    return not config.model.tie_embeddings or config.training.tied_head == "copy"


def trainer_of(setting: Setting, model: StageModel, steps: int) -> Trainer:
    """The trainer of a stage as a worker makes it."""
    settings, seed = setting.config.stage_training(setting.stage.depth), (setting.config.seed, setting.stage.depth)
    return Trainer(ResidentEngine(model, settings, seed=seed, device=setting.device), settings, steps=steps)


class _Until:
    """Hooks that end a trainer's loop at a step; nothing is saved."""

    def __init__(self, trainer: Trainer, last: int) -> None:
        self.trainer, self.last = trainer, last
        self.losses: list[float] = []

    def report(self, progress: Progress) -> None:
        self.losses += [loss for loss in progress.losses if loss is not None]

    def checkpoint_due(self, step: int) -> bool:
        return False

    def save(self, *, wait: bool) -> None:
        return

    def evaluate(self) -> MeanLoss:
        return MeanLoss(math.nan)

    def diverged(self, told: Mapping[str, Any]) -> None:
        return

    def stop(self) -> bool:
        return self.trainer.step >= self.last


@dataclass(frozen=True)
class Timed:
    """Some steps: how long they took, how much of it was waiting for data, and their losses."""

    seconds: float
    waited: float
    losses: list[float]


def train(trainer: Trainer, batches: Iterator[Batch], steps: int) -> Timed:
    """Let the one trainer's loop take `steps` steps; it ends with the losses read, so with an idle device."""
    hooks = _Until(trainer, trainer.step + steps)

    def waited() -> float:
        return batches.waited if isinstance(batches, Prefetcher) else 0.0

    before, begun = waited(), time.perf_counter()
    trainer.fit(batches, waited=waited, hooks=hooks)
    return Timed(time.perf_counter() - begun, waited() - before, hooks.losses)


def settle_steps(config: StackWiseConfig) -> int:
    """Steps that use up the batches which lay ready before a clock starts."""
    return -(-QUEUE // config.training.accumulation)


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a module's weights, to start from again."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
