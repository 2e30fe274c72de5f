"""The mixture of experts: grouped and looped products, what its bits depend on, what its facts say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stackwise.batch import Batch
from stackwise.config.model import ModelConfig
from stackwise.config.translations import read_model
from stackwise.model import build_block
from stackwise.model.experts import MixtureFeedForward
from stackwise.model.moe import MoE
from stackwise.training.optim import Steered


def model(**ffn: Any) -> ModelConfig:
    settings = {"kind": "moe", "experts": 4, "top_k": 2, "expert_dim": 24, **ffn}
    return read_model({"d_model": 16, "n_heads": 2, "max_seq_len": 64, "init_std": 0.3, "ffn": settings})


def layer(**ffn: Any) -> MixtureFeedForward:
    made = build_block(model(**ffn), 0, 0).ffn
    assert isinstance(made, MixtureFeedForward)
    return made


def naive(made: MixtureFeedForward, x_TD: Tensor) -> Tensor:
    """Token by token, as the paper writes it."""
    kind, rows = made.kind, []
    for x in x_TD:
        shares = F.linear(x, made.router.weight).softmax(-1)
        chosen = shares.topk(kind.top_k).indices
        weights = shares[chosen] / (shares[chosen].sum() if kind.normalizes else 1.0)
        rows.append(sum(w * made.experts[int(e)](x[None])[0] for w, e in zip(weights, chosen, strict=True)))
    return torch.stack(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, {"top_k": 1}, {"top_k": 3, "normalize": False}])
def test_it_computes_what_the_paper_says(settings: dict[str, Any]) -> None:
    made, x = layer(**settings).double(), torch.randn(12, 16, dtype=torch.float64, requires_grad=True)
    y, reference = made(x), naive(made, x)
    torch.testing.assert_close(y, reference)
    slope = torch.randn_like(y)
    wanted = torch.autograd.grad(reference, [x, *made.parameters()], slope, allow_unused=True)
    for ours, theirs in zip(torch.autograd.grad(y, [x, *made.parameters()], slope), wanted, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)
    assert torch.autograd.gradcheck(lambda x: made(x), [x.detach()[:3].requires_grad_()])


def test_grouped_products_are_the_loop() -> None:
    made = layer().bfloat16()
    x_ND, counts = torch.randn(40, 16).bfloat16(), [7, 0, 13, 20]
    products = made.stacked(x_ND)
    assert products is not None
    gate, up, down = (tensor.transpose(1, 2) for tensor in products)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    hidden = F.silu(F.grouped_mm(x_ND, gate, offs=ends)) * F.grouped_mm(x_ND, up, offs=ends)
    torch.testing.assert_close(F.grouped_mm(hidden, down, offs=ends), made.looped(x_ND, counts), rtol=0.02, atol=0.02)


def test_what_trains_nothing_has_the_same_bits_whatever_the_batch() -> None:
    made = layer(capacity_factor=0.25, noise=1.0, experts=8).eval()
    x_BSD = torch.randn(24, 32, 16)
    with torch.no_grad():
        whole = made(x_BSD)
        for rows in (slice(0, 1), slice(3, 5), slice(5, 24)):
            assert torch.equal(made(x_BSD[rows]), whole[rows])
        order = torch.randperm(24)
        assert torch.equal(made(x_BSD[order]), whole[order])
        assert torch.equal(made(x_BSD[:1, :3]), whole[:1, :3]), "one token to an expert"


def test_capacity_drops_in_training_alone() -> None:
    made = layer(capacity_factor=0.5, top_k=1, experts=2)
    x = torch.randn(64, 16)
    made.train()
    y = made(x)
    usage = made.terms["experts.0"].sum
    assert usage[:2].sum() == 64
    assert usage[2] == (usage[:2] - 16).clamp(min=0).sum() > 0
    assert (y == 0).all(-1).sum() == usage[2]
    made.eval()
    assert not (made(x) == 0).all(-1).any()


def test_the_balance_loss_is_one_where_all_are_even() -> None:
    made = layer(router_z=0.1)
    torch.nn.init.zeros_(made.router.weight)
    made(torch.randn(32, 16))
    balance, z = made.terms["balance"], made.terms["router_z"]
    assert balance.sum.item() / balance.count == pytest.approx(1.0)
    assert z.sum.item() / z.count == pytest.approx(torch.log(torch.tensor(4.0)).square().item())


def test_a_bias_moves_by_the_loads_of_the_whole_step() -> None:
    """The same rows in one microbatch or in four: the same bias, by one step of its rate."""
    made = layer(balance="bias", balance_rate=0.01, top_k=1)
    torch.nn.init.zeros_(made.balance)
    x = torch.randn(64, 16)
    moved = []
    for parts in (1, 4):
        optimizer = Steered(torch.optim.AdamW([made.router.weight], lr=0.0), [(made.balance, 0.01)])
        for rows in x.chunk(parts):
            made(rows)
            term = made.terms["balance"]
            (term.sum * (term.weight / 64)).backward()
        optimizer.step()
        moved.append(made.balance.detach().clone())
        optimizer.zero_grad()
        torch.nn.init.zeros_(made.balance)
    made(x)
    load = made.terms["experts.0"].sum[:4]
    assert torch.equal(moved[0], moved[1])
    assert torch.equal(moved[0], 0.01 * torch.sign(16 - load))


def test_temperature_is_a_function_of_the_passes() -> None:
    made = layer(temperature={"start": 2.0, "end": 0.5, "epochs": 3})
    for passes, expected in ((0.0, 2.0), (1.5, 1.25), (3.0, 0.5), (9.0, 0.5), (None, 0.5)):
        made.prepare(Batch(torch.zeros(0).numpy(), None, {}, passes=passes))
        assert made.temperature == pytest.approx(expected)


@pytest.mark.parametrize(
    "settings",
    [{}, {"balance": "bias"}, {"shared_experts": 2, "shared_gate": True}, {"shared_experts": 1, "shared_dim": 40}],
)
def test_its_facts_are_those_of_the_module(settings: dict[str, Any]) -> None:
    config = model(**settings)
    block = build_block(config, 0, 0)
    assert sum(p.numel() for p in block.parameters()) == config.at(0).block_parameters
    idle = sum(p.numel() for expert in list(block.ffn.experts)[:2] for p in expert.parameters())  # type: ignore
    assert config.at(0).active_parameters == config.at(0).block_parameters - idle
    std = {name: p.std().item() for name, p in block.named_parameters() if ".1." in name}
    assert std["ffn.experts.1.down.weight"] == pytest.approx(std["ffn.experts.1.up.weight"] / 2**0.5, rel=0.25)


def test_blocks_that_are_left_out_are_dense() -> None:
    config = read_model(model(at=[1]).model_dump() | {"architecture": {"n_stacks": 3}})
    assert [isinstance(config.at(block).ffn, MoE) for block in range(3)] == [False, True, False]
    assert config.at(0).active_parameters == config.at(0).block_parameters
