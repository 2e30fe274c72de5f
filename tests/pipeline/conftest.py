"""Checkpoints of transformers that runs begin from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.pretrained.models import make


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
