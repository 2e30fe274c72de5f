"""Products in 8 bits: torchao's are the oracle; no row depends on another; and they are a stage's own precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from stackwise.config import StackWiseConfig
from stackwise.errors import ConfigError
from stackwise.model import Block, fp8
from stackwise.model.projections import QuantizedLinear, multiply_by, projections
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.planning import forecast, machines
from stackwise.pipeline.schedule import schedule

torchao = pytest.importorskip("torchao.float8")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_output_and_gradients_are_those_of_torchao(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(torchao.Float8LinearConfig.from_recipe_name("rowwise"), emulate=True)
    theirs = nn.Sequential(nn.Linear(48, 32, dtype=dtype))
    weight, bias = (p.detach().clone().requires_grad_() for p in theirs.parameters())
    theirs = torchao.convert_to_float8_training(theirs, config=config)
    x = (3 * torch.randn(2, 7, 48)).to(dtype)
    x[0, 3] = 0.0  # a row without any scale
    one, other = (x.clone().requires_grad_() for _ in range(2))
    y, z = fp8.linear(one, weight, bias), theirs(other)
    slope = torch.randn_like(y)
    y.backward(slope)
    z.backward(slope)
    wanted = (z, other.grad, *(p.grad for p in theirs.parameters()))
    for mine, reference in zip((y, one.grad, weight.grad, bias.grad), wanted, strict=True):
        assert mine is not None
        assert torch.equal(mine, reference)


def test_no_row_depends_on_others_and_weights_stay_wide() -> None:
    torch.manual_seed(0)
    config = StackWiseConfig.from_preset("micro").model
    block = multiply_by(Block(config), fp8.linear)
    assert block.state_dict().keys() == Block(config).state_dict().keys()
    assert all(isinstance(layer, QuantizedLinear) for layer in projections(block).values())
    x = torch.randn(4, 8, config.d_model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, alone = block(x), block(x[2:3])
    assert torch.equal(whole[2:3], alone)
    whole.float().square().sum().backward()
    gradients: list[Tensor | None] = [p.grad for p in block.parameters()]
    assert all(g is not None and g.dtype is torch.float32 and g.isfinite().all() for g in gradients)


def test_an_expert_that_no_row_reaches_has_gradients_of_zero() -> None:
    """Rows may all go to other experts: no output, and a gradient of the weight that is there for the optimizer."""
    x, weight = torch.randn(0, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    y = fp8.linear(x, weight, None)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert y.shape == (0, 16)
    assert x.grad is not None
    assert x.grad.shape == (0, 32)
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(16, 32))


def test_a_stage_in_8_bits_is_another_stage_and_a_quicker_one_where_the_card_multiplies_so() -> None:
    plain = StackWiseConfig.from_preset("micro", {"precision": "bf16"})
    one = StackWiseConfig.from_preset("micro", {"precision": "bf16", "stages.1.training.products": "fp8"})
    assert schedule(plain)[0] == schedule(one)[0]
    assert [stage.format(part).precision for stage in schedule(one)[:2] for part in stage.blocks] == [
        "full",
        "fp8-products",
    ]
    stage = schedule(one)[1]
    estimate = Estimate(one, 300, stage, "cuda")
    quick, slow = machines.MACHINES["h200"], machines.MACHINES["a100-80"]
    assert forecast.products_of_a_row(estimate, quick, 0)[0] < forecast.products_of_a_row(estimate, slow, 0)[0]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"training.quantization": {"bits": 4}}, "training.quantization exclude"),
        ({"stages": {1: {"precision": "nvfp4"}}}, "the precision nvfp4 exclude"),
        ({"parallel.shard": 2}, "multiplies in the run's precision"),
        ({"training.products": "fp4"}, "full.*fp8"),
    ],
)
def test_what_cannot_be_is_said(settings: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        StackWiseConfig.from_preset("micro", {"training.products": "fp8", **settings})


@pytest.mark.cuda
def test_the_kernel_multiplies_what_the_emulation_does() -> None:
    """One rounding to bfloat16 apart at most: the order of sums differs."""
    card = torch.device("cuda")
    if not fp8.by_kernel(card):
        pytest.skip("this card does not multiply e4m3")
    torch.manual_seed(0)
    a, b = torch.randn(64, 256, dtype=torch.bfloat16), torch.randn(48, 256)
    here, there = fp8.product(a, b, torch.bfloat16), fp8.product(a.to(card), b.to(card), torch.bfloat16).cpu()
    torch.testing.assert_close(here, there, rtol=2**-7, atol=1e-2)
