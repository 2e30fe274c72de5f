"""Runs from pretrained models: what follows from a checkpoint, and that training goes on from its weights exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from stackwise.config import StackWiseConfig
from stackwise.config.loading import build
from stackwise.data import PreparedData
from stackwise.pipeline.initial import with_checkpoint
from stackwise.pipeline.recipe import SHUFFLED_CHUNKS, order_rows
from stackwise.pipeline.rows import choose_samples
from stackwise.pipeline.run import RunDirectory
from stackwise.store import RowOrder
from stackwise.training.trainer import learning_rate
from tests.conftest import run
from tests.pretrained.models import make

SETTINGS: dict[str, Any] = {
    "training.mode": "end_to_end",
    "training.steps": 20,
    "training.seq_len": 24,
    "training.batch_size": 2,
    "training.accumulation": 2,
    "training.learning_rate": 3e-3,
    "training.grad_clip": 0.5,
    "evaluation.samples": 4,
}


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A byte-level tokenizer of 300 ids with a separator and no mask token."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([path.read_text() for path in sorted(text.iterdir())], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: Path) -> Any:
    """Makes a checkpoint by the name of its kind and settings, once; returns its directory."""
    made: dict[str, Path] = {}

    def checkpoint(name: str, **settings: Any) -> Path:
        key = json.dumps([name, settings], default=str)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name) / "model"
            make(name, made[key], **({"vocab_size": 300, "num_hidden_layers": 3} | settings))
            shutil.copy(tokenizer_json, made[key] / "tokenizer.json")
        return made[key]

    return checkpoint


def configuration(weights: Path, text: Path, **more: Any) -> StackWiseConfig:
    """A run from a checkpoint on some text."""
    values = SETTINGS | {"init.weights": str(weights), "data.paths": [str(text)]} | more
    return with_checkpoint(build(StackWiseConfig, {}, values))


def rows_of(directory: RunDirectory, config: StackWiseConfig) -> Any:
    """The microbatches of a finished run of one stage, as token ids and masks, in order."""
    manifest = directory.manifest()
    data = PreparedData.open(Path(manifest["data"]["directory"]))
    rowset, rows = next(iter(manifest["rowsets"].values()))
    samples_RS = data.train.samples(choose_samples(config, data.train, 0), config.training.seq_len)
    with directory.open_store(config) as store:
        masks_RS = store.masks(store.rowset(rowset).mask_ids, config.training.seq_len)
    order = RowOrder(
        rows, seed=(config.seed, 0, "order"), chunk_rows=order_rows(config, rows), window_chunks=SHUFFLED_CHUNKS
    )
    number = 0
    while True:
        rows_B = order.batch(number, config.training.batch_size)
        yield torch.from_numpy(samples_RS[rows_B].astype(np.int64)), torch.from_numpy(masks_RS[rows_B])
        number += 1


def losses_of(directory: RunDirectory) -> list[float]:
    """The loss of every step of a run of one stage."""
    events = [json.loads(line) for line in directory.events_file.read_text().splitlines()]
    return [loss for event in events if event["event"] == "step" for loss in event["losses"]]


def wide_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The norm of transformers without its rounding to float32."""
    scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (hidden_states * scale)


def loop_of_transformers(weights: Path, directory: RunDirectory, config: StackWiseConfig) -> tuple[Any, list[float]]:
    """The same rows through a plain loop: AdamW, clipping, the same rates. The model in the end, and its losses."""
    from transformers import AutoModelForCausalLM

    settings, steps = config.stage_training(0), config.training.steps or 0
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float64).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(settings.optimizer.beta1, settings.optimizer.beta2),  # type: ignore[attr-defined]
        eps=settings.optimizer.eps,  # type: ignore[attr-defined]
    )
    rows, losses = rows_of(directory, config), []
    for step in range(steps):
        total = torch.zeros((), dtype=torch.float64)
        for _ in range(settings.accumulation):
            ids_BS, masks_BS = next(rows)
            if config.objective.causal:
                total = total + F.cross_entropy(model(ids_BS).logits[:, :-1].transpose(1, 2), ids_BS[:, 1:])
            else:
                raise NotImplementedError(masks_BS)
        loss = total / settings.accumulation
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def weights_of(directory: RunDirectory) -> dict[str, dict[str, torch.Tensor]]:
    """The committed parts of a run's last stage."""
    from safetensors.torch import load_file

    config, manifest = directory.config(), directory.manifest()
    with directory.open_store(config) as store:
        stage = store.stage(manifest["stages"][-1]["recipe"])
        assert stage is not None
        return {part: load_file(stage.path(part)) for part in stage.record["parts"]}


@pytest.mark.parametrize(("name", "swap"), [("llama", "never"), ("llama", "always"), ("llama-biases", "always")])
def test_it_stays_with_a_loop_of_transformers(
    name: str, swap: str, tmp_path: Path, text: Path, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", wide_norm)
    weights = checkpoints(name)
    more = {"training.swap_parts": 2} if swap == "always" else {}
    config = configuration(weights, text, precision="fp64", **{"training.swap": swap} | more)
    run(config, tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    model, losses = loop_of_transformers(weights, directory, directory.config())
    np.testing.assert_allclose(losses_of(directory), losses, rtol=1e-6)  # which are logged in float32
    theirs, ours = model.state_dict(), weights_of(directory)
    for part, there, here in (
        ("front", "model.embed_tokens.weight", "embedding.weight"),
        ("block.1", "model.layers.1.self_attn.k_proj.weight", "attention.k.weight"),
        ("block.2", "model.layers.2.mlp.down_proj.weight", "ffn.down.weight"),
        ("block.0", "model.layers.0.post_attention_layernorm.weight", "ffn_norm.weight"),
        ("head", "model.norm.weight", "norm.weight"),
    ):
        torch.testing.assert_close(ours[part][here], theirs[there], rtol=1e-9, atol=1e-11)
