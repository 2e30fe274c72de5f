"""Narrow formats: their grids, their bytes, their errors; layers in them, their gradients, their memory."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from stackwise.config.model import ModelConfig
from stackwise.errors import UsageError
from stackwise.model import Block, add_adapters, build_block, part_digest
from stackwise.model.formats import FORMATS, NF4, NVFP4, bits_per_weight, nf4_kernel
from stackwise.model.projections import (
    AdaptedLinear,
    QuantizedLinear,
    adapter_parameters,
    adapter_state,
    base_state,
    load_adapters,
    plain_layers,
    quantize,
)
from tests.conftest import raises_naming

NAMES = sorted(FORMATS)


def draw(*shape: int, std: float = 0.02, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def stored(name: str, weight: torch.Tensor) -> torch.Tensor:
    form = FORMATS[name]
    return form.unpack(form.pack(weight), *weight.shape, torch.float32)  # type: ignore[call-arg]


def block(**settings: object) -> nn.Module:
    return build_block(ModelConfig(**{"d_model": 32, "n_heads": 4, "d_ff": 48} | settings), 0, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(64, 128), (33, 50), (1, 1), (3, 16)])
def test_what_is_packed_has_the_layout_and_zeros_stay_zeros(name: str, shape: tuple[int, int]) -> None:
    form = FORMATS[name]
    packed = form.pack(draw(*shape))
    assert {key: (tuple(t.shape), t.dtype) for key, t in packed.items()} == form.layout(*shape)
    assert stored(name, draw(*shape)).shape == shape
    assert torch.equal(stored(name, torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "bits", "error"),
    # Relative root mean square error on normal weights; 4.127 bits is the figure of the QLoRA paper.
    [("fp8", 8 + 32 / 1024, 0.0275), ("nvfp4", 4.5, 0.0965), ("nf4", 4.127, 0.0935)],
)
def test_bits_and_errors(name: str, bits: float, error: float) -> None:
    weight = draw(512, 1024)
    assert bits_per_weight(name, 512, 1024) == pytest.approx(bits, abs=1e-3)
    packed = FORMATS[name].pack(weight)
    assert sum(t.nbytes for t in packed.values()) * 8 / weight.numel() == pytest.approx(bits, abs=1e-3)
    found = ((stored(name, weight) - weight).norm() / weight.norm()).item()
    assert 0.9 * error < found < error


def test_fp8_rounds_to_the_nearest_of_e4m3_and_keeps_each_rows_largest() -> None:
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 … 448
    weight = torch.linspace(-448, 448, 10_001)[None]
    nearest = (weight.abs()[..., None] - grid).abs().min(-1).values
    assert torch.equal((stored("fp8", weight) - weight).abs(), nearest)
    rows = torch.tensor([[1.0, -3.0, 0.1], [1e-6, 2e-6, -5e-7]])
    kept = stored("fp8", rows)
    torch.testing.assert_close(kept.abs().amax(1), rows.abs().amax(1))
    assert ((kept - rows).abs() <= rows.abs() / 16 + 1e-12).all(), "half a unit of three mantissa bits"


def test_nvfp4_rounds_to_even_in_blocks_of_sixteen() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    weight = torch.cat((ties, -ties))[None] * 448  # the block's scale is then 448, the matrix's 1
    assert torch.equal(stored("nvfp4", weight), torch.cat((even, -even))[None] * 448)
    packed = NVFP4().pack(weight)
    assert packed["scale"] == 1
    assert packed["codes"].tolist()[0][:4] == [0x20, 0x42, 0x64, 0x76], "the earlier weight in the low half"
    uneven = torch.cat((draw(4, 16), draw(4, 16) * 100), 1)
    error = (stored("nvfp4", uneven) - uneven).view(4, 2, 16).norm(dim=2) / uneven.view(4, 2, 16).norm(dim=2)
    assert (error < 0.2).all(), "a block of small weights suffers from its neighbour"


def test_nf4_is_the_published_code_book() -> None:
    assert len(NF4.VALUES) == 16
    # Appendix E of the paper: quantiles of the normal distribution, eight below zero, nine from zero on.
    normal, edge = torch.distributions.Normal(0, 1), 0.9677083
    upper = normal.icdf(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    lower = -normal.icdf(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    expected = torch.cat((lower, torch.zeros(1), upper)).sort().values / upper.max()
    torch.testing.assert_close(torch.tensor(NF4.VALUES, dtype=torch.float64), expected, atol=1e-6, rtol=0)
    # Blocks of one largest value: the scales have no error then, and the book's own values survive.
    weight = torch.tensor(NF4.VALUES).repeat(4).repeat(3, 1)
    assert torch.equal(stored("nf4", weight), weight)
    gap = (1 - 0.6961928) / 2
    assert (stored("nf4", draw(64, 64)) - draw(64, 64)).abs().max() < draw(64, 64).abs().max() * (gap + 0.03)


def test_nf4_has_the_bytes_of_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = draw(64, 320)
    codes, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    form, packed = NF4(), NF4().pack(weight)
    assert torch.equal(codes.flatten(), packed["codes"])
    torch.testing.assert_close(form.scales(packed), state.absmax, rtol=0.04, atol=0)
    kernel = nf4_kernel()
    assert kernel is not None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        fast = kernel(packed["codes"], form.scales(packed), (64, 320), dtype)
        assert torch.equal(fast, form.unpack(packed, 64, 320, dtype))


@pytest.mark.parametrize("name", NAMES)
def test_packing_is_a_pure_function_and_survives_a_file(name: str, tmp_path: Path) -> None:
    one, again = block(), block()
    threads = torch.get_num_threads()
    quantize(one, name, pack=True)
    torch.set_num_threads(2)
    quantize(again, name, pack=True)
    torch.set_num_threads(threads)
    assert part_digest(one) == part_digest(again)
    assert not [key for key in one.state_dict() if key.endswith(("q.weight", "up.weight"))]
    save_file(one.state_dict(), tmp_path / "part.safetensors")
    with torch.device("meta"):
        empty = quantize(block_like(), name, pack=True)
    empty.to_empty(device="cpu")
    empty.load_state_dict(load_file(tmp_path / "part.safetensors"))
    assert part_digest(empty) == part_digest(one)
    x = draw(2, 5, 32, std=1.0)
    assert torch.equal(empty(x), one(x))
    assert torch.equal(copy.deepcopy(one).to(torch.bfloat16).attention.q.codes, one.attention.q.codes)  # type: ignore[union-attr, operator, call-overload]


def block_like() -> nn.Module:
    return Block(ModelConfig(d_model=32, n_heads=4, d_ff=48))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("autocast", [False, True])
def test_packed_computes_what_training_saw(name: str, autocast: bool) -> None:
    module, x = block(bias=True), draw(2, 5, 32, std=1.0)
    torch.compiler.reset()  # the compiler counts every block ever compiled
    quantize(module, name, pack=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        seen = module(x)
        quantize(module, name, pack=True)
        assert torch.equal(module(x), seen)
        assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), seen)
    if not autocast:
        torch.testing.assert_close(plain_layers(module)(x), seen, atol=1e-6, rtol=1e-6)
        assert not any(isinstance(child, QuantizedLinear) for child in module.modules())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_written_by_hand(name: str) -> None:
    base = nn.Linear(48, 24)
    x, grad = draw(3, 5, 48, std=1.0).requires_grad_(), draw(3, 5, 24, std=1.0, seed=1)
    training = QuantizedLinear(base, name)
    training(x).backward(grad)
    effective = stored(name, base.weight.detach())
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grad @ effective)
    # Straight through: the gradient of the full weight is that of the weight as stored.
    torch.testing.assert_close(base.weight.grad, grad.flatten(0, 1).T @ x.detach().flatten(0, 1))
    holder = nn.Sequential(training)
    quantize(holder, name, pack=True)
    add_adapters(holder, 4, 12.0, 0, "block.0")
    adapted = holder[0]
    assert isinstance(adapted, AdaptedLinear)
    adapter = adapted.adapters["stack"]
    with torch.no_grad():
        adapter.b.copy_(draw(24, 4, seed=2))
    x.grad, base.bias.grad = None, None
    adapted(x).backward(grad)
    flat_x, flat_grad, a, b = x.detach().flatten(0, 1), grad.flatten(0, 1), adapter.a.detach(), adapter.b.detach()
    torch.testing.assert_close(adapter.a.grad, 3.0 * b.T @ flat_grad.T @ flat_x)
    torch.testing.assert_close(adapter.b.grad, 3.0 * flat_grad.T @ flat_x @ a.T)
    torch.testing.assert_close(x.grad, grad @ (effective + 3.0 * b @ a))
    torch.testing.assert_close(base.bias.grad, flat_grad.sum(0))


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_trunk_stays_and_its_adapters_learn(name: str) -> None:
    module = quantize(block().requires_grad_(False), name, pack=True)
    add_adapters(module, 4, 8.0, 0, "block.0")
    before = part_digest(base_state(module.state_dict()))
    x, target = draw(2, 8, 32, std=1.0), draw(2, 8, 32, std=1.0, seed=1)
    optimizer = torch.optim.AdamW(adapter_parameters(module), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(module(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert part_digest(base_state(module.state_dict())) == before
    other = quantize(block(), name, pack=True)
    load_adapters(other, adapter_state(module.state_dict()))
    assert part_digest(other) == part_digest(module)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("name", NAMES)
def test_the_way_back_keeps_no_unpacked_weight(name: str) -> None:
    layer = QuantizedLinear(nn.Linear(64, 64, bias=False), name)
    layer.pack()
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(draw(2, 64).requires_grad_()).sum().backward()
    assert max(kept, default=0) < 64 * 64
    assert not math.isnan(layer(draw(2, 64)).sum().item())
    assert not list(layer.parameters())


def test_a_block_computes_in_its_own_precision_within_another() -> None:
    module, x = block(), draw(2, 5, 32, std=1.0)
    plain = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = module(x)
    assert isinstance(module, Block)
    for compute, expected, around in ((torch.bfloat16, narrow, False), (torch.float32, plain, True)):
        module.compute = compute
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            assert torch.equal(module(x), expected)
            assert module(x).dtype == torch.float32, "the residual stream keeps its dtype"
    module.compute = torch.float16
    assert 0 < (module(x) - plain).abs().max() < (narrow - plain).abs().max()
    module(x).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_unknown_format() -> None:
    with raises_naming(UsageError, "'int3'", "bf16, fp8, nvfp4, nf4"):
        QuantizedLinear(nn.Linear(4, 4), "int3")
