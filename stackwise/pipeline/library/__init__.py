"""Training of layers of one's own, stage by stage and in this process: trainer, store and recipes of `stackwise run`.

```python
trainer = UnifiedTrainer(config)
trainer.train_all_layers(dataloader, layers)
```
"""

from __future__ import annotations

import contextlib
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from stackwise.config import StackWiseConfig
from stackwise.config.fields import changed
from stackwise.config.yaml_files import dump
from stackwise.data import sample_ids
from stackwise.errors import UsageError
from stackwise.identity import digest
from stackwise.model import Front, Head, build_front, build_head, part_digest
from stackwise.objectives import RuntimeObjective
from stackwise.pipeline.device import describe, resolve_device
from stackwise.pipeline.job import Source, StageJob
from stackwise.pipeline.library.layers import Undescribed, check_layers, identity, named, probe
from stackwise.pipeline.parts import objective_of, parts_of
from stackwise.pipeline.recipe import (
    Reads,
    codec_name,
    forward_specification,
    recipe_id,
    stage_recipe,
    stage_span,
    trunk_id,
)
from stackwise.pipeline.rows import choose_samples, put_rows
from stackwise.pipeline.run import recent_loss
from stackwise.pipeline.schedule import HEAD, Stage, schedule
from stackwise.pipeline.worker.boundaries import write_above
from stackwise.pipeline.worker.stores import Place, Stores
from stackwise.pipeline.worker.training import StageContext, train_stage
from stackwise.store import ActivationStore
from stackwise.training.feed import Feed
from stackwise.training.stage import NARROW, StageModel

Batch = torch.Tensor | Mapping[str, torch.Tensor] | Sequence[torch.Tensor]
Batches = Iterable[Batch]


class LoadedSamples:
    """Samples of equal length in memory or memory-mapped, in the shape that training reads a split in.

    Args:
        columns: What the data brings beside them by name, a value a token: "targets", -100 where there is none.
    """

    def __init__(self, tokens_NS: np.ndarray, columns: Mapping[str, np.ndarray] | None = None) -> None:
        self._tokens_NS, self._columns = tokens_NS, dict(columns or {})
        self._ids: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Tokens in a sample."""
        return int(self._tokens_NS.shape[1])

    def n_samples(self, seq_len: int) -> int:
        """How many samples there are."""
        self._check(seq_len)
        return len(self._tokens_NS)

    def samples(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """Token ids int64 [n, seq_len]."""
        self._check(seq_len)
        return np.asarray(self._tokens_NS[indices], dtype=np.int64)

    def sample_ids(self, seq_len: int) -> np.ndarray:
        """Ids uint8 [N, 16]."""
        self._check(seq_len)
        if self._ids is None:
            self._ids = sample_ids(self._tokens_NS)
        return self._ids

    def segments(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """Each sample is one document: zeros int32 [n, seq_len]."""
        return np.zeros((len(indices), seq_len), dtype=np.int32)

    def column(self, name: str, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """A column that the data brings, int64 or float32 [n, seq_len]."""
        values: np.ndarray = self._column(name)[indices]
        return values

    def column_digest(self, name: str) -> str:
        """Digest of a column."""
        return digest(np.ascontiguousarray(self._column(name)))

    def _column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            raise UsageError(f"the batches have no {name}", hint=f"give each batch a `{name}` tensor [B, S]")
        return self._columns[name]

    @classmethod
    def from_batches(cls, batches: Batches, columns: Sequence[str] = ()) -> LoadedSamples:
        """Gather a data loader's batches: tensors of ids [B, S], or mappings with `input_ids` and named columns.

        Args:
            batches: The batches; of a sequence in place of a mapping the second tensor is the first of `columns`.

        Raises:
            UsageError: A batch is of another shape or lacks a column, or there is none.
        """
        tokens: list[np.ndarray] = []
        gathered: dict[str, list[np.ndarray]] = {name: [] for name in columns}
        for batch in batches:
            ids, values = _ids_and_columns(batch, columns)
            if ids.ndim != 2 or ids.is_floating_point() or (tokens and ids.shape[1] != tokens[0].shape[1]):
                raise UsageError(f"a batch must be token ids [batch, seq] of one length, not {tuple(ids.shape)}")
            tokens.append(ids.cpu().numpy().astype(np.uint32))
            for name, column in values.items():
                if column.shape != ids.shape:
                    shapes = f"{list(column.shape)} do not match the tokens {list(ids.shape)}"
                    raise UsageError(f"{name} {shapes}", hint="give one value a token")
                kind = torch.float32 if column.is_floating_point() else torch.int64
                gathered[name].append(column.to("cpu", kind).numpy())
        if not tokens:
            raise UsageError("the data loader gave no batch")
        return cls(np.concatenate(tokens), {name: np.concatenate(parts) for name, parts in gathered.items()})

    def _check(self, seq_len: int) -> None:
        if self._tokens_NS.shape[1] != seq_len:
            raise UsageError(f"samples of {self._tokens_NS.shape[1]} tokens, but training.seq_len is {seq_len}")


def _ids_and_columns(batch: Batch, columns: Sequence[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    if isinstance(batch, torch.Tensor):
        batch = [batch]
    if isinstance(batch, Mapping):
        for name in ("input_ids", *columns):
            if name not in batch:
                raise UsageError(f"a batch needs `{name}`; it has {', '.join(map(str, batch))}")
        return batch["input_ids"], {name: batch[name] for name in columns}
    if not isinstance(batch, list | tuple) or not batch:
        raise UsageError(f"a batch must be token ids or a mapping with `input_ids`, not {type(batch).__name__}")
    if len(batch) <= len(columns):
        raise UsageError(f"a batch of {len(batch)} tensors lacks {columns[len(batch) - 1]}", hint="give mappings")
    return batch[0], dict(zip(columns, batch[1:], strict=False))


@dataclass(frozen=True)
class StageResult:
    """How a stage ended: its loss over the last steps in nats, and whether it was trained or found committed."""

    depth: int
    blocks: tuple[int, int]
    loss: float
    steps: int
    reused: bool
    recipe: str


@dataclass
class _Stages:
    """One pass over the schedule."""

    config: StackWiseConfig
    data: LoadedSamples
    store: ActivationStore
    objective: RuntimeObjective
    vocabulary: tuple[int, int]  # token ids there are, and the id that stands for a masked token
    device: torch.device
    observe: Callable[[dict[str, Any]], None]
    front: nn.Module
    layers: Sequence[nn.Module]
    code: list[str]  # what identifies the front and each layer, the front first
    heads: list[Head]
    digests: dict[str, str] = field(default_factory=dict)

    def train(self, stage: Stage) -> StageResult:
        """Train one stage, or take its committed weights; then write the boundary above it."""
        config = self.config
        if stage.formats:
            raise UsageError(
                f"stage {stage.depth}: layers of your own train in their own precision, without adapters",
                hint="set trunk_strategy: frozen, cache_activations: true and new_stack_precision: full",
            )
        model = self._model(stage)
        parts = parts_of(model, stage)
        rowset, rows = put_rows(config, self.data, self.store, stage.rowset)
        initial = {name: part_digest(module) for name, module in parts.items()}
        below, through = self._forward(stage.first), self._forward(stage.last + 1)
        trunk = trunk_id(below, [self.digests[p] for p in stage.trunk], {}) if stage.reads_boundary else None
        span = stage_span(config, stage, rows)
        columns = {name: self.data.column_digest(name) for name in config.objective.inputs}
        recipe = stage_recipe(config, stage, through, span, Reads(rowset, rows, initial, trunk, columns))
        job = StageJob(
            config=dump(config),
            stage=stage,
            store=str(self.store.path),
            data="",  # the samples are in this process
            vocab_size=self.vocabulary[0],
            mask_token=self.vocabulary[1],
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
            stores = Stores(self.store, Place(self.store.path))
            context = StageContext(
                job, config, self.store, self.device, self.observe, lambda: False, feed, stores=stores
            )
            if committed is None:
                train_stage(context, model)
                committed = self.store.stage(job.recipe_id)
                assert committed is not None, "a stage that was trained is committed"
            else:
                self.observe({"event": "reused", "stage": stage.depth, "recipe": job.recipe_id})
                for name in stage.trains:
                    parts[name].load_state_dict(load_file(committed.path(name)))
            self.digests |= committed.record["parts"]
            stages = schedule(config)
            above = stages[stage.depth + 1] if stage.depth + 1 < len(stages) else None
            if above is not None and above.reads_boundary:
                write_above(context, [model], [self.digests[name] for name in parts if name != HEAD])
        model.to("cpu")
        loss, blocks = recent_loss(committed.record["losses"]) or 0.0, (stage.first, stage.last)
        return StageResult(stage.depth, blocks, loss, committed.record["steps"], reused, committed.recipe)

    def _forward(self, layers: int) -> dict[str, Any]:
        """The forward specification of the front and so many layers, each by what identifies it."""
        return {**forward_specification(self.config, *self.vocabulary, ""), "layers": self.code[: layers + 1]}

    def _model(self, stage: Stage) -> StageModel:
        config, front = self.config, self.front
        embedding = front.embedding.weight if config.model.tie_embeddings and isinstance(front, Front) else None
        reads = stage.reads_boundary
        head = build_head(
            config.model,
            self.vocabulary[0],
            config.seed,
            embedding.detach().clone() if embedding is not None and reads else embedding,
        )
        if reads and config.training.tied_head == "copy":
            head.untie()
        if self.heads:  # a stage goes on with the head of the one below
            head.load_state_dict({**head.state_dict(), **self.heads[-1].state_dict()})
        self.heads.append(head)
        blocks = [self.layers[index] for index in range(stage.first, stage.last + 1)]
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
            yield Feed.stored(
                self.store,
                self.store.rowset(rowset),
                self.data,
                choose_samples(self.config, self.data, stage.rowset),
                self.config.training.seq_len,
                columns=self.objective.inputs,
                reader=reader,
            )


class UnifiedTrainer:
    """Trains layers stage by stage through a store, by `config.training.mode` and `block_size`.

    Args:
        config: `model.vocab_size` and `model.d_model` describe the front and the head; the layers are yours.
        store: The store's directory; None: `store.path` , else runs/<name>/store.
        front: Token ids [B, S] to [B, S, d_model]; None: one by the configuration.
        observe: Told every event, as `stackwise run --json` prints them.

    Raises:
        ConfigError: The configuration contradicts itself.
    """

    def __init__(
        self,
        config: StackWiseConfig,
        *,
        store: str | Path | None = None,
        front: nn.Module | None = None,
        observe: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.config = config.model_copy(deep=True).validate()
        self.front = front
        self.heads: list[Head] = []
        home = Path("runs") / self.config.name
        self.store_path = Path(store or self.config.store.path or home / "store")
        self._observe = observe or (lambda event: None)

    def train_all_layers(self, dataloader: Batches, layers: Sequence[nn.Module]) -> list[StageResult]:
        """Train the layers, lowest stage first; afterwards they hold the trained weights.

        Args:
            dataloader: Batches of token ids [B, S], or mappings with `input_ids` (and, for custom, `targets`).
            layers: Any modules from [batch, seq, d_model] to the same. They are identified by their code and all that
                it reaches (`layers.identity`): a stage is taken from the store only where its layers are the same.

        Returns:
            A result for each stage. A stage whose recipe is committed is not trained again.

        Raises:
            UsageError: Data, layers and configuration do not fit each other.
        """
        config, self.heads = self._sized(len(layers)), []
        stages = [config.stage_training(depth) for depth in range(config.n_stages)]
        if key := next((k for k in ("eval_every", "meta") for stage in stages if getattr(stage, k) is not None), None):
            raise UsageError(
                f"training.{key}: a data loader brings no held-out rows",
                hint="leave it out here; `stackwise run` evaluates inside its stages",
            )
        self._check_schedule(config)
        data = LoadedSamples.from_batches(dataloader, self.config.objective.inputs)
        if "seq_len" not in config.training.model_fields_set:
            config.training.seq_len = data.length
            config.validate()
        vocab_size, mask_token = self._vocabulary(config, data)
        device = resolve_device(config.device)
        if config.precision == "auto":
            config.precision = describe(device)["precision"]
        front = self.front or build_front(config.model, vocab_size, config.seed, config.training.seq_len)
        self.front = front
        objective = objective_of(config, mask_token, vocab_size, schedule(config)[0])
        code = self._identities(config, layers, data, device)
        with ActivationStore(self.store_path) as store:
            run = _Stages(
                config, data, store, objective, (vocab_size, mask_token), device, self._observe, front, layers, code,
                self.heads,
            )  # fmt: skip
            return [run.train(stage) for stage in schedule(config)]

    def _identities(
        self, config: StackWiseConfig, layers: Sequence[nn.Module], data: LoadedSamples, device: torch.device
    ) -> list[str]:
        """What identifies the front and each layer; for one without an identity something that never comes again."""
        front = self.front
        assert front is not None
        check_layers(front, layers)
        rows = torch.from_numpy(data.samples(np.arange(min(2, data.n_samples(data.length))), data.length))
        changing = probe(front, layers, rows, (device, NARROW.get(config.precision)))
        code, unknown = [], []
        for index, module in enumerate((front, *layers), -1):
            try:
                if index in changing:
                    raise Undescribed("it changes attributes that no state dict holds")
                code.append(identity(module))
            except Undescribed as reason:
                unknown.append(f"{'the front' if index < 0 else named(layers, index)}: {reason}")
                code.append(secrets.token_hex(16))
        if unknown:
            more = f", and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            text = f"what this computes does not follow from its code, so nothing is reused later: {unknown[0]}{more}"
            self._observe({"event": "warning", "text": text})
            warnings.warn(text, stacklevel=3)
        return code

    def _check_schedule(self, config: StackWiseConfig) -> None:
        """Refuse schedules that need more than layers one above the other; say which settings are unused here."""
        training, hint = config.training, "leave it out here; `stackwise run` has it"
        stages = schedule(config)
        if any(stage.lookahead for stage in stages):
            raise UsageError(f"training.lookahead: {training.lookahead.name} is not for layers of your own", hint=hint)
        if training.windows != 1 and config.has_windows:
            raise UsageError(f"training.windows: {training.windows or 'auto'} is not for layers of your own", hint=hint)
        if config.fusions:
            raise UsageError(f"training.fusion: {training.fusion.name} is not for layers of your own", hint=hint)
        if config.finds_block_size:
            raise UsageError("training.block_size: auto is not for layers of your own", hint="give a number")
        if config.adapts:
            raise UsageError("training.adaptation: your own layers get no direction of attention", hint=hint)
        # A stage above tokens must hold all blocks from the lowest on, and train them.
        if any(not (s.reads_boundary or (s.first == 0 and set(s.holds) == set(s.trains))) for s in stages):
            raise UsageError("independent and prepended stages are not for layers of your own", hint=hint)
        for key in ("fuse_passes", "every"):
            if key in changed(config.store):
                self._observe({"event": "note", "text": f"store.{key} is unused: boundaries are stored as stages end"})

    def _sized(self, n_layers: int) -> StackWiseConfig:
        if not n_layers:
            raise UsageError("there are no layers to train")
        config = self.config.model_copy(deep=True)
        config.model.architecture.n_stacks, config.model.architecture.blocks_per_stack = n_layers, 1
        return config.validate()

    def _vocabulary(self, config: StackWiseConfig, data: LoadedSamples) -> tuple[int, int]:
        tokens = data.samples(np.arange(data.n_samples(config.training.seq_len)), config.training.seq_len)
        size = config.model.vocab_size
        if size is None:
            raise UsageError("model.vocab_size: a data loader says no vocabulary, so the configuration must")
        if tokens.max() >= size:
            raise UsageError(f"model.vocab_size {size} does not fit the data, which has token {tokens.max()}")
        mask = size - 1 if config.training.mask_token_id is None else config.training.mask_token_id
        if config.objective.masks and (tokens == mask).any():
            raise UsageError(
                f"the mask token {mask} occurs in the data",
                hint="set training.mask_token_id to an id that the data cannot contain (raise model.vocab_size by one)",
            )
        return size, mask
