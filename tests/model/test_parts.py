"""Parts by themselves: shapes, seeds, dtypes, directions of attention, refusals."""

from __future__ import annotations

import copy

import pytest
import torch

from stackwise.config.model import ArchitectureConfig, ModelConfig
from stackwise.errors import UsageError
from stackwise.model import Block, Head, Rack, build_block, build_front, build_head, build_rack, part_digest
from tests.conftest import raises_naming

VOCAB = 61


def config(**settings: object) -> ModelConfig:
    values: dict[str, object] = {"d_model": 32, "n_heads": 4, "d_ff": 48}
    values["architecture"] = ArchitectureConfig(n_stacks=2, blocks_per_stack=2)
    return ModelConfig(**(values | settings))  # type: ignore[arg-type]


SHAPES = [
    {},
    {"norm": "layernorm", "ffn": "gelu", "positions": "learned", "bias": True},
    {"attention": {"kind": "gqa", "kv_heads": 2}},
    {"attention": {"kind": "gqa", "kv_heads": 1}, "bias": True, "tie_embeddings": False},
]


def ids(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("settings", SHAPES)
def test_rack_is_its_parts(settings: dict[str, object]) -> None:
    c = config(**settings)
    rack = build_rack(c, VOCAB, 7, 16)
    front = build_front(c, VOCAB, 7, 16)
    head = build_head(c, VOCAB, 7, front.embedding.weight if c.tie_embeddings else None)
    x = front(ids())
    for i in range(4):
        x = build_block(c, i, 7)(x)
    assert torch.equal(head(x), rack(ids()))
    assert rack(ids()).shape == (2, 12, VOCAB)
    assert sum(p.numel() for p in rack.blocks[0].parameters()) == c.block_parameters


def test_fresh_weights_follow_from_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first = build_block(config(), 3, 5)
    torch.manual_seed(123)
    assert part_digest(build_block(config(), 3, 5)) == part_digest(first)
    assert part_digest(build_block(config(), 2, 5)) != part_digest(first)
    assert part_digest(build_block(config(), 3, 6)) != part_digest(first)
    torch.set_rng_state(state)
    build_rack(config(), VOCAB, 0, 16)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was drawn from"


def test_large_parts_are_drawn_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    one = part_digest(build_block(config(), 0, 1))
    monkeypatch.setattr("stackwise.model.build.LARGE", 1)
    assert part_digest(build_block(config(), 0, 1)) == one


def test_residual_matrices_shrink_with_depth() -> None:
    c = config(d_model=256, d_ff=512, architecture=ArchitectureConfig(n_stacks=8, blocks_per_stack=1))
    block = build_block(c, 7, 0)
    for name, std in {"attention.q": 0.02, "attention.o": 0.02 / 4, "ffn.up": 0.02, "ffn.down": 0.02 / 4}.items():
        assert block.get_parameter(f"{name}.weight").std().item() == pytest.approx(std, rel=0.03)


def test_a_blocks_fresh_weights_do_not_depend_on_what_is_stacked_above() -> None:
    taller = config(architecture=ArchitectureConfig(n_stacks=12, blocks_per_stack=2))
    assert part_digest(build_block(config(), 1, 0)) == part_digest(build_block(taller, 1, 0))


def test_direction_and_segments() -> None:
    block = build_block(config(), 0, 0)
    x = torch.randn(1, 8, 32)
    later = x.clone()
    later[:, 5:] += 1.0
    assert torch.equal(block(x, causal=True)[:, :5], block(later, causal=True)[:, :5])
    assert not torch.allclose(block(x)[:, :5], block(later)[:, :5])
    segments = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    both = block(x, segments_BS=segments)
    # Rotary positions are relative, so a document alone is what it is behind another.
    torch.testing.assert_close(both[:, :5], block(x[:, :5]))
    torch.testing.assert_close(both[:, 5:], block(x[:, 5:]))
    both = block(x, causal=True, segments_BS=segments)
    torch.testing.assert_close(both[:, 5:], block(x[:, 5:], causal=True))


def test_grouped_query_is_attention_with_repeated_heads() -> None:
    grouped, full = build_block(config(attention={"kind": "gqa", "kv_heads": 2}), 0, 0), build_block(config(), 0, 0)
    full.load_state_dict(
        {
            name: w.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32) if name in KEYS else w
            for name, w in grouped.state_dict().items()
        }
    )
    x = torch.randn(2, 6, 32)
    torch.testing.assert_close(grouped(x), full(x))
    segments = torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    torch.testing.assert_close(grouped(x, segments_BS=segments), full(x, segments_BS=segments))


KEYS = ("attention.k.weight", "attention.v.weight")


@pytest.mark.parametrize("settings", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residual_stream_keeps_its_dtype(settings: dict[str, object], dtype: torch.dtype) -> None:
    x = torch.randn(2, 6, 32)
    full, narrow = build_block(config(**settings), 0, 0), build_block(config(**settings), 0, 0, dtype=dtype)
    assert narrow(x).dtype == torch.float32
    assert narrow(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(narrow(x), full(x), atol=0.05, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        y = full(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, full(x), atol=0.05, rtol=0.05)


def test_rotary_tables_survive_casts_and_the_meta_device() -> None:
    block = build_block(config(max_seq_len=32), 0, 0)
    tables = block.attention.rotary.cos.clone()  # type: ignore[union-attr]
    half = copy.deepcopy(block).to(torch.bfloat16)
    assert torch.equal(half.attention.rotary.cos, tables)  # type: ignore[union-attr]
    with torch.device("meta"):
        empty = Block(config(max_seq_len=32))
    empty.to_empty(device="cpu")
    assert torch.equal(empty.attention.rotary.cos, tables)  # type: ignore[union-attr]


def test_rotary_is_relative_and_grows() -> None:
    block = build_block(config(), 0, 0)
    assert block(torch.randn(1, 700, 32)).shape == (1, 700, 32)


def test_dropout_in_training_alone() -> None:
    block = build_block(config(dropout=0.5), 0, 0)
    x = torch.randn(1, 4, 32)
    assert not torch.equal(block(x), block(x))
    torch.manual_seed(3)
    first = block(x)
    torch.manual_seed(3)
    assert torch.equal(block(x), first)
    block.eval()
    assert torch.equal(block(x), block(x))


def test_tied_head_has_no_second_copy() -> None:
    rack = build_rack(config(), VOCAB, 0, 16)
    assert rack.head.tied
    assert rack.head.weight is rack.front.embedding.weight
    assert [name for name, _ in rack.head.named_parameters()] == ["norm.weight"]
    assert part_digest(rack.head) == part_digest({"norm.weight": torch.ones(32)})
    rack(ids()).sum().backward()
    assert rack.front.embedding.weight.grad is not None
    clone = copy.deepcopy(rack)
    assert clone.head.weight is clone.front.embedding.weight
    assert clone.head.weight is not rack.head.weight
    clone.to(torch.float64)
    assert clone.head.weight.dtype == torch.float64
    torch.testing.assert_close(clone(ids()).float(), rack(ids()))


def test_head_with_a_fixed_embedding_and_untied() -> None:
    table = torch.randn(VOCAB, 32)
    head = build_head(config(), VOCAB, 0, table)
    assert torch.equal(head.weight, table)
    assert not head.weight.requires_grad
    assert list(head.state_dict()) == ["norm.weight"]
    head.untie()
    assert not head.tied
    assert sorted(head.state_dict()) == ["norm.weight", "projection"]
    assert torch.equal(head.weight, table)
    assert head.weight is not table


def test_digest_sees_names_values_dtypes_shapes() -> None:
    a = {"x": torch.arange(4.0), "y": torch.zeros(2)}
    same = {"y": torch.zeros(2), "x": torch.arange(4.0)}
    assert part_digest(a) == part_digest(same)
    for changed in (
        {"x": torch.arange(4.0), "z": torch.zeros(2)},
        {"x": torch.arange(4.0).view(2, 2), "y": torch.zeros(2)},
        {"x": torch.arange(4.0), "y": torch.zeros(2, dtype=torch.int32)},
        {"x": torch.arange(4.0), "y": torch.tensor([0.0, -0.0])},
    ):
        assert part_digest(changed) != part_digest(a)
    assert part_digest({"x": torch.arange(6.0).view(2, 3).T}) == part_digest(
        {"x": torch.arange(6.0).view(2, 3).T.clone()}
    )


def test_refusals() -> None:
    with raises_naming(UsageError, "model.n_heads 5", "model.d_model 32"):
        build_block(config(n_heads=5), 0, 0)
    with raises_naming(UsageError, "model.attention.kv_heads 3", "model.n_heads 4"):
        build_block(config(attention={"kind": "gqa", "kv_heads": 3}), 0, 0)
    with raises_naming(UsageError, 3):
        build_block(config(d_model=36, n_heads=12), 0, 0)
    with raises_naming(UsageError, 9, 8, "model.max_seq_len"):
        build_rack(config(), VOCAB, 0, 8)(ids(1, 9))
    with raises_naming(UsageError, 9, 8, "model.max_seq_len"):
        build_block(config(max_seq_len=8), 0, 0)(torch.randn(1, 9, 32))
    with raises_naming(UsageError, "(3, 32)"):
        Head(config(), VOCAB, torch.zeros(3, 32))
    with pytest.raises(UsageError, match="vocabulary"):
        build_rack(config(), 0, 0, 8)


def test_rack_takes_any_integer_ids() -> None:
    rack: Rack = build_rack(config(), VOCAB, 0, 16)
    for dtype in (torch.int32, torch.uint8, torch.int16):
        assert torch.equal(rack(ids().to(dtype)), rack(ids()))


def test_blocks_compile_without_breaks() -> None:
    torch._dynamo.reset()  # what other tests compiled counts against the limit of recompilations
    block = build_block(config(attention={"kind": "gqa", "kv_heads": 2}, dropout=0.1), 0, 0)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    x = torch.randn(2, 8, 32)
    block.eval()
    torch.testing.assert_close(compiled(x), block(x))
    segments = torch.zeros(2, 8, dtype=torch.int64)
    torch.testing.assert_close(compiled(x, causal=True, segments_BS=segments), block(x, causal=True))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), block(x))
    fresh = torch.compile(build_block(config(), 0, 0), backend="eager", fullgraph=True)
    long = torch.randn(1, 600, 32)
    torch.testing.assert_close(fresh(long), build_block(config(), 0, 0)(long), msg="the rotary tables did not grow")
