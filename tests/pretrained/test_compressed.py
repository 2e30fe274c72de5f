"""Blocks trained for integers, exported: compressed-tensors and transformers see what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stackwise.config.model import ModelConfig
from stackwise.errors import UsageError
from stackwise.model import build_rack
from stackwise.model.projections import QuantizedLinear, quantize
from stackwise.model.rack import Rack, stages_of
from stackwise.pretrained.writing import ExportOptions, export
from tests.conftest import raises_naming

MODEL = ModelConfig.model_validate(
    {
        "d_model": 32,
        "n_heads": 4,
        "d_ff": 96,
        "architecture": {"n_stacks": 2},
        "attention": {"kind": "gqa", "kv_heads": 2},
    }
)
ACTIVATIONS = ["int8-channel-a8", "int4-g16-a8-minmax8", "int4-channel-a8s-percentile4x99.9"]
SYMMETRIC = ["int4-g16", "int8-channel", "int2-channel", "int5-tensor", "int4-g32-learned", *ACTIVATIONS]
# Not loaded by transformers 5.23, which makes room for zero points that are not packed.
ASYMMETRIC = ["int3-g8-asym", "int2-channel-asym", "int4-g32-asym-learned"]


def exported(form: str, directory: Path) -> Rack:
    rack = build_rack(MODEL, 99, 0, 64)
    for block in rack.blocks:
        quantize(block, form, pack=True)
        for layer in block.modules():
            if isinstance(layer, QuantizedLinear) and layer.span is not None:
                layer.span.copy_(torch.tensor([-1.5, 2.25]))  # as if it had been measured; it clips
    export(directory, rack.front, stages_of(rack, True), MODEL, ExportOptions(compressed=True))
    return rack


@pytest.mark.parametrize("form", SYMMETRIC)
def test_transformers_loads_the_same_model(form: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    rack = exported(form, tmp_path / "out")
    ids = torch.arange(40).view(2, 20)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, rack(ids, True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [*SYMMETRIC, *ASYMMETRIC])
def test_compressed_tensors_unpacks_the_same_weights(form: str, tmp_path: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    rack = exported(form, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    scheme = quantization.QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    tensors = load_file(tmp_path / "out/model.safetensors")
    for ours, theirs in (("attention.k", "self_attn.k_proj"), ("ffn.down", "mlp.down_proj")):
        prefix = f"model.layers.1.{theirs}."
        held = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        weight = compressors.PackedQuantizationCompressor.decompress(held, scheme)["weight"]
        layer = rack.blocks[1].get_submodule(ours)
        assert isinstance(layer, QuantizedLinear)
        assert torch.equal(weight, layer.effective(torch.float32))
        assert sum(tensor.nbytes for tensor in held.values()) < 4 * weight.numel() * 0.7


def test_what_the_format_does_not_hold_is_refused(tmp_path: Path) -> None:
    with raises_naming(UsageError, "block.0 attention.q", 20, 32):
        exported("int4-g20", tmp_path / "out")
    rack = build_rack(MODEL, 99, 0, 64)
    with pytest.raises(UsageError):
        export(tmp_path / "out", rack.front, stages_of(rack, True), MODEL, ExportOptions(compressed=True))
    assert not list(tmp_path.iterdir())
