"""Weights and activations as integers: their grids, their gradients, packed as in training, learned scales."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stackwise.config import StackWiseConfig
from stackwise.config.training import Quantization
from stackwise.errors import ConfigError
from stackwise.model.formats import Integers, bits_per_weight, format_named
from stackwise.model.projections import QuantizedLinear, plain_layers

NAMES = ["int4-channel", "int2-g7", "int3-g16-asym", "int8-tensor-asym", "int7-tensor", "int5-g10-asym-learned-a8"]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(name: str) -> Integers:
    form = format_named(name)
    assert isinstance(form, Integers)
    return form


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(33, 50), (8, 64), (1, 1)])
def test_packed_codes_stand_for_the_affine_grid(name: str, shape: tuple[int, int]) -> None:
    form, weight = integers(name), draw(*shape)
    packed = form.pack(weight)
    assert {key: (tuple(t.shape), t.dtype) for key, t in packed.items()} == form.layout(*shape)
    scales, zeros = form.scales(weight)
    place = form.grouped(weight) / scales[:, None]
    grid = ((place.round() + zeros[:, None]).clamp(form.low, form.high) - zeros[:, None]) * scales[:, None]
    stored = form.unpack(packed, *shape, torch.float32)
    assert torch.equal(stored, grid.view(shape[0], -1)[:, : shape[1]])
    # Half a step, and where zero is the middle another half for the one code that the positive side lacks.
    assert ((stored - weight).abs() <= scales.max() * (0.5 if not form.settings.symmetric else 1.0) + 1e-6).all()
    zero = torch.zeros(shape)
    assert torch.equal(form.unpack(form.pack(zero), *shape, torch.float32), zero)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_its_settings(name: str) -> None:
    settings = Quantization.named(name)
    assert settings is not None
    assert settings.name == name
    assert Quantization.named(f"{name}!") is None


def test_bits() -> None:
    assert bits_per_weight("int4-g64", 512, 1024) == 4 + 32 / 64
    assert bits_per_weight("int3-g128-asym", 512, 1024) == 3 + 40 / 128
    settings = Quantization.named("int3-g128-asym")
    assert settings is not None
    assert settings.bits_per_weight == 3 + 40 / 128


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_grid_is_that_of_compressed_tensors(bits: int, symmetric: bool) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    weight = draw(32, 64)
    args = quantization.QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=16)
    groups = weight.view(32, 4, 16)
    expected = forward.fake_quantize(weight, *utils.calculate_qparams(groups.amin(-1), groups.amax(-1), args), args)
    form = integers(f"int{bits}-g16{'' if symmetric else '-asym'}")
    assert torch.equal(form.unpack(form.pack(weight), 32, 64, torch.float32), expected)


def layer(name: str, inputs: int = 24, outputs: int = 10) -> QuantizedLinear:
    base = nn.Linear(inputs, outputs)
    with torch.no_grad():
        base.weight.copy_(draw(outputs, inputs, seed=1))
        base.bias.copy_(draw(outputs, seed=2))
    return QuantizedLinear(base, name)


@pytest.mark.parametrize("name", ["int4-g8", "int4-g8-a8", "int3-channel-asym-a4s"])
def test_the_gradient_passes_straight_through(name: str) -> None:
    quantized, x, towards = layer(name), draw(5, 24, seed=3).requires_grad_(), draw(5, 10, seed=4)
    y = quantized(x)
    y.backward(towards)
    seen = x.detach()
    activations = Quantization.named(name).activations  # type: ignore[union-attr]
    if activations:
        form = integers(f"int{activations}-channel{'' if name.endswith('s') else '-asym'}")
        seen = form.unpack(form.pack(seen), *seen.shape, torch.float32)
        assert not torch.equal(seen, x)
    weight = quantized.effective(torch.float32).detach()
    torch.testing.assert_close(y, F.linear(seen, weight, quantized.bias))
    # By definition: the forward pass is of the rounded, the backward pass as if nothing were rounded.
    torch.testing.assert_close(quantized.weight.grad, towards.T @ seen)
    torch.testing.assert_close(x.grad, towards @ weight)


@pytest.mark.parametrize("name", ["int3-g8-learned", "int3-g8-asym-learned", "int2-tensor-asym-learned"])
def test_learned_scales_get_the_gradient_of_their_definition(name: str) -> None:
    quantized, form = layer(name).double(), integers(name)
    assert quantized.steps is not None
    with torch.no_grad():
        quantized.steps.mul_(0.6)  # so that some weights are clipped
        if quantized.offsets is not None:
            quantized.offsets.add_(0.3)
    towards = draw(10, 24, seed=5)
    quantized.effective(torch.float32).backward(towards)
    # The same by autograd, rounding replaced by itself plus what rounding changes, which has no gradient.
    weight = quantized.weight.detach().clone().requires_grad_()
    steps = quantized.steps.detach().clone().requires_grad_()
    zeros = None if quantized.offsets is None else quantized.offsets.detach().clone().requires_grad_()
    place = form.grouped(weight) / steps[:, None]
    shift = 0.0 if zeros is None else (zeros + (zeros.round() - zeros).detach())[:, None]
    codes = (place + (place.round() - place).detach() + shift).clamp(form.low, form.high)
    made = ((codes - shift) * steps[:, None]).view(10, -1)[:, :24]
    torch.testing.assert_close(quantized.effective(torch.float32), made, check_dtype=False, rtol=1e-5, atol=1e-6)
    made.backward(towards.double())
    factor = (form.grouped(weight).shape[1] * form.high) ** -0.5
    clipped = (quantized.weight.grad == 0).float().mean()
    assert 0 < clipped < 0.9
    torch.testing.assert_close(quantized.weight.grad, weight.grad, check_dtype=False)
    assert quantized.steps.grad is not None
    assert steps.grad is not None
    torch.testing.assert_close(quantized.steps.grad, steps.grad * factor, check_dtype=False, rtol=1e-5, atol=1e-5)
    if zeros is not None:
        assert quantized.offsets is not None
        torch.testing.assert_close(quantized.offsets.grad, zeros.grad, check_dtype=False, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*NAMES, "int3-g8-asym-learned"])
def test_packed_it_computes_what_it_computed_in_training(name: str) -> None:
    quantized, x = layer(name), draw(5, 24, seed=3)
    if quantized.steps is not None:
        with torch.no_grad():
            quantized.steps.mul_(0.9)
    before = quantized(x)
    quantized.pack()
    assert not [n for n, _ in quantized.named_parameters() if n != "bias"]
    assert torch.equal(quantized(x), before)
    if "-a" not in name.replace("-asym", ""):
        holder = nn.Sequential(quantized)
        torch.testing.assert_close(plain_layers(holder)(x), before)


@pytest.mark.parametrize(
    "settings",
    [{"bits": 1}, {"bits": 9}, {"group": 0}, {"group": "row"}, {"scale": "guess"}, {"activations": 16}],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        StackWiseConfig.from_preset("micro", {"training.quantization": settings})


def test_two_formats_for_one_stage_are_refused() -> None:
    with pytest.raises(ConfigError):
        StackWiseConfig.from_preset(
            "micro", {"training.quantization": {"bits": 4}, "stages": {1: {"precision": "fp8"}}}
        )
