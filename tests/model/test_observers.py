"""Fixed ranges of activations, and torchao's rounding beside ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from stackwise.config import StackWiseConfig
from stackwise.config.training import Quantization
from stackwise.errors import ConfigError
from stackwise.model.formats import Integers
from stackwise.model.projections import QuantizedLinear
from stackwise.model.rounding import observer, rounded_in_range

BATCHES = [torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(k)) * (k + 1) for k in range(4)]
VALUES = np.stack([batch.numpy().ravel() for batch in BATCHES])
AVERAGE = VALUES[0].min(), VALUES[0].max()
for batch in VALUES[1:]:
    AVERAGE = tuple(0.7 * old + 0.3 * new for old, new in zip(AVERAGE, (batch.min(), batch.max()), strict=True))
EXPECTED = {
    "minmax": (VALUES.min(), VALUES.max()),
    "moving_average": AVERAGE,
    "percentile": (np.percentile(VALUES, 4.0), np.percentile(VALUES, 96.0)),
}


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_observer_measures_its_range(kind: str, symmetric: bool) -> None:
    about = {"moving_average": {"averaging": 0.3}, "percentile": {"percentile": 96.0}}.get(kind, {})
    settings = Quantization.model_validate(
        {"bits": 4, "activations": 8, "activations_range": kind, "activations_symmetric": symmetric}
        | {"calibration": len(BATCHES)}
        | about
    )
    assert Quantization.named(settings.name) == settings
    measured = observer(settings)
    for batch in BATCHES:
        measured.add(batch)
    np.testing.assert_allclose(measured.span().numpy(), EXPECTED[kind], rtol=1e-6)
    # The grid that spans it, by its definition; what is outside is clipped, and gets no gradient.
    low, high = (min(0.0, float(measured.span()[0])), max(0.0, float(measured.span()[1])))
    scale = (2 * max(-low, high) if symmetric else high - low) / 255
    zero = 0 if symmetric else np.clip(-128 - np.round(low / scale), -128, 127)
    x = BATCHES[3].clone().requires_grad_()
    rounded = rounded_in_range(x, measured.span(), Integers(Quantization(bits=8, symmetric=symmetric)))
    codes = np.round(VALUES[3] / scale) + zero
    np.testing.assert_allclose(rounded.detach().numpy().ravel(), (np.clip(codes, -128, 127) - zero) * scale, atol=1e-5)
    rounded.sum().backward()
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy().ravel() == 1, (codes >= -128) & (codes <= 127))


def test_the_range_is_that_of_torchaos_observer() -> None:
    observers = pytest.importorskip("torchao.quantization.observer")
    quantization = pytest.importorskip("torchao.quantization")
    theirs = observers.AffineQuantizedMinMaxObserver(
        quantization.MappingType.ASYMMETRIC, torch.int8, quantization.PerTensor(), scale_dtype=torch.float32
    )
    ours = observer(Quantization(bits=8, activations=8, activations_range="minmax"))
    for batch in BATCHES:
        theirs(batch)
        ours.add(batch)
    scale, zero = theirs.calculate_qparams()
    span = ours.span()
    scales, zeros = Integers(Quantization(bits=8, symmetric=False)).spanning(span[:1], span[1:])
    torch.testing.assert_close(scales, scale.view(1))
    assert int(zeros) == int(zero)


@pytest.mark.parametrize("name", ["int4-g8", "int3-channel", "int2-g8", "int8-channel"])
def test_torchao_rounds_as_we_do(name: str) -> None:
    pytest.importorskip("torchao")
    towards = torch.randn(10, 24, generator=torch.Generator().manual_seed(1))
    ours, theirs = (QuantizedLinear(nn.Linear(24, 10), form) for form in (name, f"{name}-torchao"))
    theirs.load_state_dict(ours.state_dict())
    seen = {layer: layer.effective(torch.float32) for layer in (ours, theirs)}
    for weight in seen.values():
        weight.backward(towards)
    form = ours.codec
    assert isinstance(form, Integers)
    scales = form.scales(ours.weight.detach())[0][:, None]
    place = (form.grouped(ours.weight.detach()) / scales).view(10, 24)
    # The scales are the same; a weight halfway between two codes may get the other one (a group's largest is such).
    halfway = ((place - place.floor()) - 0.5).abs() < 1e-4
    assert torch.equal(seen[ours][~halfway], seen[theirs][~halfway])
    step = scales.expand_as(form.grouped(ours.weight)).reshape(10, 24)
    assert ((seen[ours] - seen[theirs]).abs() <= step * 1.001).all()
    # Straight through both; where torchao clips, it passes nothing.
    clipped = place.round() > form.high
    torch.testing.assert_close(ours.weight.grad, towards)
    assert ours.weight.grad is not None
    torch.testing.assert_close(theirs.weight.grad[~halfway], torch.where(clipped, 0.0, towards)[~halfway])  # type: ignore[index]
    # What is packed is what trained.
    theirs.pack()
    assert torch.equal(theirs.effective(torch.float32), seen[theirs])


@pytest.mark.parametrize(
    "settings",
    [
        {"provider": "torchao", "scale": "learned"},
        {"provider": "torchao", "symmetric": False},
        {"provider": "torchao", "group": "tensor"},
        {"provider": "torchao", "group": 7},
        {"activations": 8, "activations_range": "percentile", "percentile": 50},
        {"activations": 8, "activations_range": "histogram"},
        {"activations": 8, "activations_range": "minmax", "calibration": 0},
        {"activations_range": "minmax"},
    ],
)
def test_what_a_provider_or_an_observer_cannot_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        StackWiseConfig.from_preset("micro", {"training.quantization": settings})
