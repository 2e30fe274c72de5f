"""Racks grown stack by stack, their precisions, adapters and freezing."""

from __future__ import annotations

import pytest
import torch

from stackwise.config import ModelConfig, ProgressiveConfig, StackWiseConfig, TrainingConfig
from stackwise.config.model import ArchitectureConfig
from stackwise.config.precision import adapter_sizes
from stackwise.errors import NotFound, UsageError
from stackwise.model import ProgressiveRackBuilder, build_block, create_stack_from_config, merge_adapters, part_digest
from stackwise.model.projections import QuantizedLinear, adapter_parameters, add_adapters
from tests.conftest import raises_naming


def config(**progressive: object) -> StackWiseConfig:
    return StackWiseConfig(
        model=ModelConfig(
            vocab_size=50,
            d_model=32,
            n_heads=4,
            d_ff=64,
            architecture=ArchitectureConfig(n_stacks=3, blocks_per_stack=2),
        ),
        training=TrainingConfig(seq_len=16, progressive=ProgressiveConfig(**progressive)),  # type: ignore[arg-type]
        seed=4,
    )


def ids() -> torch.Tensor:
    return torch.arange(24).view(2, 12)


def test_append_and_prepend() -> None:
    builder = ProgressiveRackBuilder(config=config(), building_mode="append", default_precision="full")
    low = builder.append_stack(n_blocks=4, precision="full")
    high = builder.append_stack(n_blocks=2, precision="half")
    lowest = builder.prepend_stack()
    assert [len(stack) for stack in builder.stacks] == [2, 4, 2]
    assert builder.stacks == [lowest, low, high]
    rack = builder.build_rack()
    assert len(rack.blocks) == 8
    assert len({part_digest(block) for block in rack.blocks}) == 8, "two blocks began alike"
    assert next(high.parameters()).dtype == torch.float16
    assert rack(ids()).shape == (2, 12, 50)
    assert rack(ids()).dtype == torch.float32
    x = rack.front(ids())
    for stack in (lowest, low, high):
        x = stack(x)
    assert torch.equal(rack.head(x), rack(ids()))


def test_building_mode_decides_where_a_stack_goes() -> None:
    builder = ProgressiveRackBuilder(config=config(building_mode="prepend"))
    first, second = builder.add_stack(), builder.add_stack()
    assert builder.stacks == [second, first]


def test_plain_keywords() -> None:
    builder = ProgressiveRackBuilder(vocab_size=50, d_model=32, d_ff=64, n_heads=4)
    builder.append_stack(n_blocks=1)
    assert builder.build_rack()(ids()).shape == (2, 12, 50)


def test_same_seed_same_rack_and_stack_from_config() -> None:
    one, two = (ProgressiveRackBuilder(config()) for _ in range(2))
    assert part_digest(one.append_stack(2)) == part_digest(two.append_stack(2))
    assert part_digest(create_stack_from_config(0, 2, config())) == part_digest(one.stacks[0])
    assert part_digest(create_stack_from_config(1, 2, config()).blocks[0]) == part_digest(
        build_block(config().model, 2, 4)
    )


def test_freezing() -> None:
    builder = ProgressiveRackBuilder(config(qlora_enabled=True, qlora_rank=4))
    for _ in range(3):
        builder.append_stack(1)
    builder.freeze_trunk([0])
    builder.freeze_all_but_qlora([1])
    frozen, adapted, new = builder.stacks
    assert not any(p.requires_grad for p in frozen.parameters())
    trained = {id(p) for p in adapted.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapter_parameters(adapted)}
    assert trained
    assert all(p.requires_grad for p in new.parameters())
    assert len(builder.trainable()) == len(trained) + len(list(new.parameters()))
    with raises_naming(NotFound, "stack 3"):
        builder.freeze_trunk([3])


def test_adapters_start_as_nothing_learn_and_merge() -> None:
    plain = create_stack_from_config(0, 2, config())
    stack = create_stack_from_config(0, 2, config(qlora_enabled=True, qlora_rank=4, qlora_alpha=8.0))
    x = torch.randn(2, 6, 32)
    assert torch.equal(stack(x), plain(x))
    assert set(plain.state_dict()) < set(stack.state_dict()), "a weight lost its name"
    stack.requires_grad_(False)
    trained = adapter_parameters(stack)
    for p in trained:
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(trained, lr=20.0)
    for _ in range(3):
        optimizer.zero_grad()
        stack(x).square().mean().backward()
        optimizer.step()
    learnt = stack(x)
    assert (learnt - plain(x)).abs().max() > 1e-3
    merge_adapters(stack)
    torch.testing.assert_close(stack(x), learnt, atol=1e-5, rtol=1e-5)
    assert set(stack.state_dict()) == set(plain.state_dict())
    w = stack.get_parameter("blocks.0.attention.q.weight") - plain.get_parameter("blocks.0.attention.q.weight")
    assert torch.linalg.matrix_rank(w.detach(), atol=1e-6) <= 4


@pytest.mark.parametrize(("precision", "form"), [("fp8", "fp8"), ("nvfp4", "nvfp4"), ("fp4", "nvfp4")])
def test_a_stack_trains_as_its_format_sees_it_and_is_packed_in_the_trunk(precision: str, form: str) -> None:
    builder = ProgressiveRackBuilder(config())
    plain, stack = create_stack_from_config(0, 2, config()), builder.append_stack(2, precision)
    assert part_digest(stack) == part_digest(plain), "the weights in training are the full ones"
    x = torch.randn(2, 6, 32)
    y = stack(x)
    assert not torch.equal(y, plain(x))
    builder.freeze_trunk([0])
    assert torch.equal(stack(x), y), "packing changed what the stack computes"
    assert not any(p.requires_grad for p in stack.parameters())
    layers = [child for child in stack.modules() if isinstance(child, QuantizedLinear)]
    assert len(layers) == 14
    assert all(layer.packed and layer.form == form for layer in layers)


def test_a_qlora_stack_and_a_qlora_trunk() -> None:
    builder = ProgressiveRackBuilder(config(qlora_rank=4, progressive_qlora=True, progressive_qlora_rank=2))
    first, second, third = builder.append_stack(1), builder.append_stack(1, "qlora"), builder.append_stack(1)
    names = [sorted(stack.blocks[0].ffn.up.adapters) for stack in (first, second)]  # type: ignore[union-attr, operator]
    assert names == [["trunk_1", "trunk_2"], ["stack", "trunk_2"]]
    assert not adapter_parameters(third)
    assert {id(p) for p in second.parameters() if p.requires_grad} == {id(p) for p in adapter_parameters(second)}
    builder.freeze_all_but_qlora([0, 1], "qlora")
    packed = [layer for stack in (first, second) for layer in stack.modules() if isinstance(layer, QuantizedLinear)]
    assert [layer.form for layer in packed] == ["nf4"] * 14
    assert builder.build_rack()(ids()).shape == (2, 12, 50)
    before = builder.build_rack()(ids())
    builder.merge()
    torch.testing.assert_close(builder.build_rack()(ids()), before, atol=1e-5, rtol=1e-5)
    with raises_naming(UsageError, "bf16", "fp8", "nvfp4", "qlora"):
        builder.freeze_trunk([2], "bf16")
    builder.freeze_trunk([2], "fp8")
    with raises_naming(UsageError, "fp8"):
        builder.freeze_trunk([2], "qlora")


def test_two_adapters_on_one_layer() -> None:
    block = build_block(config().model, 0, 0)
    add_adapters(block, 4, 8.0, 0, "block.0")
    add_adapters(block, 2, 4.0, 0, "block.0", name="trunk")
    with torch.no_grad():
        for p in adapter_parameters(block):
            p.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    x = torch.randn(1, 5, 32)
    before = block(x)
    torch.testing.assert_close(merge_adapters(block)(x), before, atol=1e-5, rtol=1e-5)
    with raises_naming(UsageError, "block.0"):
        add_adapters(add(block), 4, 8.0, 0, "block.0")
    with raises_naming(UsageError, 33, "block.0"):
        add_adapters(build_block(config().model, 0, 0), 33, 8.0, 0, "block.0")


def add(block: torch.nn.Module) -> torch.nn.Module:
    add_adapters(block, 4, 8.0, 0, "block.0")
    return block


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({}, [16, 16, 16]),
        ({"qlora_strategy": "progressive", "qlora_rank_pattern": "increasing"}, [16, 32, 64]),
        ({"qlora_strategy": "progressive", "qlora_rank_pattern": "decreasing"}, [16, 8, 4]),
        ({"qlora_strategy": "progressive", "qlora_rank_pattern": "linear"}, [16, 32, 48]),
        ({"qlora_strategy": "progressive"}, [16, 16, 16]),
    ],
)
def test_rank_patterns(settings: dict[str, object], ranks: list[int]) -> None:
    progressive = ProgressiveConfig(**settings)  # type: ignore[arg-type]
    assert [adapter_sizes(progressive, k, 3)[0] for k in range(3)] == ranks
    assert [adapter_sizes(progressive, k, 3)[1] for k in range(3)] == [32.0] * 3


def test_ranks_stack_by_stack() -> None:
    progressive = ProgressiveConfig.model_validate(
        {"qlora_strategy": "variable", "qlora_configs": {0: {"rank": 8, "alpha": 16.0}, 1: {"rank": 4, "alpha": 8.0}}}
    )
    assert [adapter_sizes(progressive, k, 2) for k in range(2)] == [(8, 16.0), (4, 8.0)]
    with raises_naming(UsageError, "stack 2"):
        adapter_sizes(progressive, 2, 3)


def test_refusals() -> None:
    with raises_naming(UsageError, "'double'"):
        ProgressiveRackBuilder(config(), default_precision="double")
    with raises_naming(UsageError, "building_mode 'sideways'"):
        ProgressiveRackBuilder(config(), building_mode="sideways")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="vocab_size"):
        ProgressiveRackBuilder(d_model=32)
    with pytest.raises(UsageError):
        ProgressiveRackBuilder(config()).build_rack()
    with pytest.raises(UsageError):
        ProgressiveRackBuilder(config()).append_stack(0)
    builder = ProgressiveRackBuilder(config(max_stacks=1))
    builder.append_stack()
    with raises_naming(UsageError, 1, "training.progressive.max_stacks"):
        builder.append_stack()
    with raises_naming(UsageError, "stack 0", "training.progressive.qlora_enabled"):
        builder.freeze_all_but_qlora([0])
