"""The trainer: what is given is checked and made fit, then each stage is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from stackwise.config import StackWiseConfig
from stackwise.config.fields import changed
from stackwise.errors import UsageError
from stackwise.model import Head, build_front
from stackwise.pipeline.build import objective_of
from stackwise.pipeline.device import describe, resolve_device
from stackwise.pipeline.library.samples import Batches, LoadedSamples
from stackwise.pipeline.library.stages import StageResult, StagesInProcess
from stackwise.pipeline.schedule import schedule
from stackwise.store import ActivationStore


class UnifiedTrainer:
    """Trains layers stage by stage through a store, by `config.training.mode` and `block_size`.

    Args:
        config: `model.vocab_size` and `model.d_model` describe the front and the head; the layers are yours.
        store: The store's directory; None: `store.path` (or `training.cache_dir`), else runs/<name>/store.
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
            layers: Any modules from [batch, seq, d_model] to the same.

        Returns:
            A result for each stage. A stage whose recipe is committed is not trained again.

        Raises:
            UsageError: Data, layers and configuration do not fit each other.
        """
        config, self.heads = self._sized(len(layers)), []
        if any(config.stage_training(depth).eval_every for depth in range(config.n_stages)):
            raise UsageError(
                "training.eval_every: a data loader brings no held-out rows",
                hint="leave it out here; `stackwise run` evaluates inside its stages",
            )
        self._check_schedule(config)
        data = LoadedSamples.from_batches(dataloader)
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
        with ActivationStore(self.store_path) as store:
            run = StagesInProcess(config, data, store, objective, vocab_size, mask_token, device, self._observe)
            return [run.stage(stage, front, layers, self.heads) for stage in schedule(config)]

    def _check_schedule(self, config: StackWiseConfig) -> None:
        """Refuse schedules that need more than layers one above the other; say which settings are unused here."""
        training, hint = config.training, "leave it out here; `stackwise run` has it"
        stages = schedule(config)
        if any(stage.beyond for stage in stages):
            raise UsageError(f"training.lookahead: {training.lookahead} is not for layers of your own", hint=hint)
        if training.windows != 1 and config.has_windows:
            raise UsageError(f"training.windows: {training.windows or 'auto'} is not for layers of your own", hint=hint)
        if config.fusions:
            raise UsageError(f"training.fusion: {training.fusion.strategy} is not for layers of your own", hint=hint)
        if config.finds_block_size:
            raise UsageError("training.block_size: auto is not for layers of your own", hint="give a number")
        if config.adapts:
            raise UsageError("training.adaptation: layers of your own are told no direction of attention", hint=hint)
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
        if config.objective != "clm" and (tokens == mask).any():
            raise UsageError(
                f"the mask token {mask} occurs in the data",
                hint="set training.mask_token_id to an id that the data cannot contain (raise model.vocab_size by one)",
            )
        return size, mask
