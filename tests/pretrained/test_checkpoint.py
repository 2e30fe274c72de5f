"""Checkpoints of transformers: what is read from them, and what is refused, before any weight is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stackwise.model import part_digest
from stackwise.pretrained.checkpoint import Checkpoint, load_rack
from stackwise.pretrained.reading import read_part
from tests.pretrained.models import FAMILIES, make


@pytest.mark.parametrize("name", FAMILIES)
def test_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model", str(tmp_path / "cache"))
    ids = torch.randint(0, 99, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = load_rack(checkpoint)(ids, causal=checkpoint.description.causal)
        torch.testing.assert_close(ours, model(ids).logits, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_digests_are_those_of_the_parts_and_remembered(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model", str(tmp_path / "cache"))
    digests = {part: checkpoint.digest(part) for part in checkpoint.parts}
    assert digests == {part: part_digest(checkpoint.load(part)) for part in checkpoint.parts}
    again = Checkpoint(tmp_path / "model", str(tmp_path / "cache"))
    again._reader = None  # type: ignore[assignment] - nothing may be read
    assert {part: again.digest(part) for part in again.parts} == digests


@pytest.mark.parametrize("name", ["llama-biases", "gpt2", "bert"])
def test_a_part_is_read_in_another_dtype_with_rows_added(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / "model", dtype=torch.bfloat16)
    checkpoint = Checkpoint(tmp_path / "model", str(tmp_path / "cache"))
    for part in checkpoint.parts:
        refs, plain = checkpoint.names(part), checkpoint.load(part)
        tensors, digest = read_part(checkpoint.directory, refs, torch.float32, {"embedding.weight": 101})
        assert digest == checkpoint.digest(part) == part_digest(plain)
        assert tensors.keys() == plain.keys()
        for key, tensor in tensors.items():
            expected = plain[key].float()
            if key == "embedding.weight":
                mean = plain[key].double().mean(0).bfloat16().float()
                expected = torch.cat([expected, mean.expand(2, -1)])
            assert torch.equal(tensor, expected), key


def test_opening_imports_no_torch(tmp_path: Path) -> None:
    make("llama", tmp_path / "model")
    code = (
        "import sys; from stackwise.pretrained.checkpoint import Checkpoint\n"
        f"k = Checkpoint({str(tmp_path / 'model')!r}, {str(tmp_path / 'cache')!r}); k.digest('block.1')\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
