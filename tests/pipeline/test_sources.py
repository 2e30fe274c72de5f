"""Weights that come from somewhere: only what is named is read, and what does not fit is one line."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stackwise.config import StackWiseConfig
from stackwise.errors import DamageError, UsageError
from stackwise.model import part_digest
from stackwise.pipeline.job import Source, from_plain
from stackwise.pipeline.parts import load_part, make_block, make_head, save_part
from stackwise.pretrained.families import TensorRef
from tests.conftest import raises_naming

CONFIG = StackWiseConfig.from_preset("micro")


def block(file: Path, **how: object) -> torch.nn.Module:
    return make_block(CONFIG, "block.1", {"block.1": Source(str(file), **how)})  # type: ignore[arg-type]


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return make_block(CONFIG, "block.1", {"block.1": Source()}).state_dict()


def test_a_part_of_a_larger_file_is_read_by_its_names_alone(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    file = "model.safetensors"
    names = {name: TensorRef(file, f"model.layers.1.{name}") for name in state}
    others = {"model.layers.0.x": torch.randn(64, 64)}
    save_file(others | {names[name].name: tensor.bfloat16() for name, tensor in state.items()}, tmp_path / file)
    narrow = {name: tensor.bfloat16() for name, tensor in state.items()}
    source = Source(str(tmp_path), part_digest(narrow), names=names)
    tensors = load_part(source)
    assert tensors is not None
    assert tensors.keys() == state.keys()
    assert from_plain(Source, json.loads(json.dumps(asdict(source)))) == source
    made = block(tmp_path, digest=part_digest(narrow), names=names).state_dict()
    assert all(torch.equal(made[name], narrow[name].float()) for name in state)
    with raises_naming(UsageError, "model.layers.7.x"):
        load_part(Source(str(tmp_path), names=names | {"x": TensorRef(file, "model.layers.7.x")}))


def test_rows_that_a_checkpoint_lacks_are_the_mean_of_the_others(tmp_path: Path) -> None:
    embedding = torch.randn(60, 4).bfloat16()
    save_file({"embed": embedding}, tmp_path / "model.safetensors")
    refs = {"embedding.weight": TensorRef("model.safetensors", "embed")}
    tensors = load_part(Source(str(tmp_path), part_digest({"embedding.weight": embedding}), names=refs), 62)
    assert tensors is not None
    assert torch.equal(tensors["embedding.weight"][:60], embedding)
    mean = embedding.double().mean(0).bfloat16()
    assert torch.equal(tensors["embedding.weight"][60:], mean.expand(2, 4))


@pytest.mark.parametrize("harm", ["shape", "dtype", "lacking", "more", "cut", "FIFO", "link", "digest", "gone"])
def test_what_does_not_fit_is_one_line(tmp_path: Path, state: dict[str, torch.Tensor], harm: str) -> None:
    file, name = tmp_path / "part", next(name for name in state if name.endswith("q.weight"))
    digest, wanted = None, name
    match harm:
        case "shape":
            state[name] = state[name][:3].clone()
            wanted = r"q\.weight is \[3, \d+\], not \[\d+, \d+\]"
        case "dtype":
            state[name] = state[name].double()
            wanted = "torch.float64, not torch.float32"
        case "lacking":
            del state[name]
        case "more":
            state["other"] = torch.zeros(1)
            wanted = "other"
    save_part(state, file)
    match harm:
        case "cut":
            os.truncate(file, file.stat().st_size - 1)
            wanted = "cut off"
        case "FIFO":
            file.unlink()
            os.mkfifo(file)
            wanted = "FIFO"
        case "link":
            file.rename(tmp_path / "other")
            file.symlink_to("other")
            wanted = "link"
        case "digest":
            digest, wanted = "00" * 16, "not what was committed"
        case "gone":
            file.unlink()
            wanted = "No such file"
    with pytest.raises(DamageError, match=wanted) as caught:
        block(file, digest=digest)
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 3


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_part({"norm.weight": torch.ones(3), "projection": torch.zeros(5, 3)}, tmp_path / "head")
    with pytest.raises(DamageError, match="is"):
        make_head(CONFIG, 64, Source(str(tmp_path / "head")), None, projects=False)
