"""Every kind of attention beside a reference written out position by position, in float64; and with a cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise.config.kinds import Attention, RopeScaling
from stackwise.config.model import ArchitectureConfig, BlockCausal, Direction, ModelConfig
from stackwise.errors import UsageError
from stackwise.model import Block, Cache, build_block, build_rack, part_digest
from stackwise.model.attention import AttentionPattern, flex
from stackwise.model.layers import RMSNorm, Rotary
from stackwise.model.linear_attention import LinearAttention, projection
from tests.conftest import raises_naming

D, H, E = 32, 4, 8
KINDS: dict[str, dict[str, object]] = {
    "mha": {},
    "gqa": {"attention": {"kind": "gqa", "kv_heads": 2}, "bias": True},
    "learned": {"positions": "learned"},
    "mla": {"attention": "mla"},
    "mla-q": {"attention": {"kind": "mla", "kv_rank": 12, "q_rank": 20, "rope_head_dim": 6}, "bias": True},
    "mla-learned": {"attention": "mla", "positions": "learned"},
    "elu": {"attention": "linear"},
    "relu": {"attention": {"kind": "linear", "feature_map": "relu", "kv_heads": 2}},
    "performer": {"attention": {"kind": "linear", "feature_map": "performer", "random_features": 12}},
    "window": {"attention": {"kind": "gqa", "kv_heads": 2, "window": 5, "qk_norm": True, "bias": "qkv"}},
    "wide-heads": {"attention": {"kind": "mha", "bias": "all"}, "head_size": 12, "norm_place": "post"},
    "local": {"attention": {"kind": "mha", "window": 5, "window_sides": "both", "window_rope_theta": 50.0}},
    "mla-window": {"attention": {"kind": "mla", "window": 6}, "head_size": 12},
    "elu-norm": {"attention": {"kind": "linear", "qk_norm": True, "bias": "qkv"}, "head_size": 6},
}
DIRECTIONS: dict[str, Direction] = {
    "both": False,
    "causal": True,
    "blocks": BlockCausal(4),
    "wide": BlockCausal(100),
    "paired": BlockCausal(4, paired=True),
}


def config(kind: str) -> ModelConfig:
    architecture = ArchitectureConfig(n_stacks=2, blocks_per_stack=1)
    return ModelConfig(d_model=D, n_heads=H, d_ff=16, architecture=architecture, **KINDS[kind])  # type: ignore[arg-type]


def block(kind: str) -> Block:
    made = build_block(config(kind), 0, 3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    for parameter in made.parameters():  # biases too, and weights large enough to tell positions apart
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return made


def stream(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def documents(length: int) -> Tensor:
    edges = torch.tensor([[length // 3, length // 2], [3, length - 5]])
    return (torch.arange(length)[None, :, None] >= edges[:, None]).sum(-1)


def visible(direction: Direction, q: int, k: int, length: int, window: int | None, both: bool = False) -> bool:
    """Which position sees which, said again in other words."""
    if both and window is not None:
        places = length // 2 if isinstance(direction, BlockCausal) and direction.paired else length
        return abs(q % places - k % places) < window and visible(direction, q, k, length, None)
    if direction is False:
        return True
    back = length if window is None else window
    if direction is True:
        return q - back < k <= q
    assert isinstance(direction, BlockCausal)
    half = length // 2 if direction.paired else length
    q_clean, k_clean = q >= half, k >= half
    q, k = q - half * q_clean, k - half * k_clean
    if q // direction.size == k // direction.size:
        return q_clean == k_clean
    return (k_clean or not direction.paired) and q - back < k < q


def turned(rotary: Rotary, x_BSHE: Tensor, position: int, at: int) -> Tensor:
    """Head vectors [B, H, E] of one position, rotated pair by pair."""
    x, half = x_BSHE[:, position], rotary.width // 2
    waves = [1.0 / rotary.theta ** (2 * i / rotary.width) for i in range(half)]
    angles = at * torch.tensor(waves, dtype=torch.float32)
    cos, sin = angles.cos().double(), angles.sin().double()
    low, high = x[..., :half], x[..., half:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def normed(norm: RMSNorm, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def reference(module: Any, x: Tensor, direction: Direction, segments: Tensor | None) -> Tensor:
    """Attention by loops over rows and positions; the weights of a head from its scores one by one."""
    B, S, _ = x.shape
    paired = isinstance(direction, BlockCausal) and direction.paired
    places = [s % (S // 2) if paired else s for s in range(S)]
    a, E = module, module.width
    latent = hasattr(a, "kv_down")
    if latent:
        c = normed(a.kv_norm, x @ a.kv_down.weight.T)
        cq = x if a.q_down is None else normed(a.q_norm, x @ a.q_down.weight.T)
        q, k, v = (y.view(B, S, H, E) for y in (cq @ a.q_up.weight.T, c @ a.k_up.weight.T, c @ a.v_up.weight.T))
        if a.rotary is not None:
            qr, kr = (cq @ a.q_rotary.weight.T).view(B, S, H, -1), (x @ a.k_rotary.weight.T).view(B, S, 1, -1)
            qr, kr = (
                torch.stack([turned(a.rotary, r, s, places[s]) for s in range(S)], 1).expand(B, S, H, -1)
                for r in (qr, kr)
            )
            q, k = torch.cat((q, qr), -1), torch.cat((k, kr), -1)
    else:
        q, k, v = (layer(x).view(B, S, -1, E) for layer in (a.q, a.k, a.v))
        if a.q_norm is not None:
            q, k = normed(a.q_norm, q), normed(a.k_norm, k)
        if a.rotary is not None:
            q, k = (torch.stack([turned(a.rotary, r, s, places[s]) for s in range(S)], 1) for r in (q, k))
        k, v = (y.repeat_interleave(H // y.shape[2], 2) for y in (k, v))
    rows = []
    for b in range(B):
        for i in range(S):
            seen = [
                j
                for j in range(S)
                if visible(direction, i, j, S, a.window, getattr(a, "both_sides", False))
                and (segments is None or segments[b, i] == segments[b, j])
            ]
            if isinstance(a, LinearAttention):
                phi_q, phi_k = features(a, q[b, i], True), features(a, k[b, seen], False)
                weights = torch.einsum("hf,jhf->hj", phi_q, phi_k)
                weights = weights / weights.sum(-1, keepdim=True)
            else:
                weights = (torch.einsum("he,jhe->hj", q[b, i], k[b, seen]) / math.sqrt(q.shape[-1])).softmax(-1)
            rows.append(torch.einsum("hj,jhe->he", weights, v[b, seen]).flatten())
    y: Tensor = a.o(torch.stack(rows).view(B, S, -1))
    return y


def features(a: LinearAttention, x: Tensor, query: bool) -> Tensor:
    if a.feature_map == "elu":
        return torch.where(x > 0, x + 1, x.exp())
    if a.feature_map == "relu":
        return x.clamp(min=0) + 1e-3
    x = x / E**0.25
    exponent = x @ projection(E, 12).double() - x.square().sum(-1, keepdim=True) / 2
    return (exponent - (exponent.amax(-1, keepdim=True) if query else E / 4)).exp() + 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["both", "causal", "blocks", "wide", "paired"])
@pytest.mark.parametrize("segmented", [False, True])
def test_attention_is_the_reference_and_so_are_its_gradients(kind: str, way: str, segmented: bool) -> None:
    module, direction = block(kind).attention, DIRECTIONS[way]
    # Longer than a chunk of linear attention, where that matters; a length that no chunk divides.
    length = 70 if kind in ("elu", "performer") and way in ("both", "causal") else 22
    x = stream(length, 2 if segmented else 1).requires_grad_()
    segments = None
    if segmented:
        segments = documents(length // 2).repeat(1, 2) if way == "paired" else documents(length)
    want = reference(module, x, direction, segments)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = [x, *module.parameters()]
    slopes = torch.autograd.grad((want * weights).sum(), inputs)
    got = module(x, causal=direction, segments_BS=segments)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)  # the tables are float32
    for mine, theirs in zip(torch.autograd.grad((got * weights).sum(), inputs), slopes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", [True, BlockCausal(4)])
def test_a_cache_gives_what_the_whole_gives(kind: str, direction: Direction) -> None:
    made = block(kind)
    length = 132 if kind == "elu" else 28
    x = stream(length)
    with torch.no_grad():
        whole = made(x, causal=direction)
        cache, parts = Cache(), list[Tensor]()
        steps = [12, 4, 4, 4] if direction is not True else [9, 1, 1, 1, 4]
        for step in [*steps, length - sum(steps)]:
            new = x[:, cache.length : cache.length + step]
            parts += [made(new, causal=direction, cache=cache)]
    assert cache.length == length
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-6, atol=1e-8)


def test_a_row_whose_length_turns_it_has_no_cache() -> None:
    scaling = RopeScaling.of({"kind": "dynamic", "factor": 4.0, "original_max_position_embeddings": 8})
    made = build_block(ModelConfig(d_model=D, n_heads=H, rope_scaling=scaling), 0, 0)
    assert not made.keeps_cache
    with raises_naming(UsageError, "cache=False"):
        made(stream(6).float(), causal=True, cache=Cache())


def test_a_frozen_cache_is_read_and_stays() -> None:
    for kind in ("mha", "mla", "elu"):
        made, x, cache = block(kind), stream(12), Cache()
        with torch.no_grad():
            made(x[:, :8], causal=BlockCausal(4), cache=cache)
            cache.frozen = True
            made(-x[:, 8:], causal=BlockCausal(4), cache=cache)
            cache.frozen = False
            last = made(x[:, 8:], causal=BlockCausal(4), cache=cache)
            torch.testing.assert_close(last, made(x, causal=BlockCausal(4))[:, 8:])


def test_the_latent_cache_holds_the_latent_alone() -> None:
    made, cache = block("mla-q"), Cache()
    with torch.no_grad():
        made(stream(10), causal=True, cache=cache)
    assert sum(t.shape[1] * t.shape[-1] for t in cache.kept) == 12 + 6
    cache = Cache()
    with torch.no_grad():
        block("elu")(stream(10), causal=True, cache=cache)
    assert [list(t.shape) for t in cache.kept] == [[2, H, E, E + 1]], "a state, whatever the length"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("way", ["causal", "blocks", "paired"])
def test_flex_attention_follows_the_same_rule(way: str, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 32, 16, generator=generator) for heads in (4, 2, 2))
    sight = AttentionPattern(DIRECTIONS[way], documents(32), window=window)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=sight.mask(32, q.device), enable_gqa=True
    )
    torch.testing.assert_close(flex(q, k, v, sight), want, rtol=1e-4, atol=1e-5)


def test_random_features_come_near_the_softmax() -> None:
    features = Attention.of({"kind": "linear", "feature_map": "performer", "random_features": 4096})
    wide = ModelConfig(d_model=D, n_heads=H, attention=features)
    near, exact = build_block(wide, 0, 1).attention, build_block(config("mha"), 0, 1).attention
    near.load_state_dict(exact.state_dict())
    x = stream(16).float() * 4
    torch.testing.assert_close(near(x), exact(x), rtol=0.1, atol=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_seeds_and_narrow_streams(kind: str) -> None:
    c = config(kind)
    made = build_block(c, 1, 0)
    assert sum(p.numel() for p in made.parameters()) == c.block_parameters
    assert part_digest(build_block(c, 1, 0)) == part_digest(made)
    norms = [p for name, p in made.named_parameters() if name.endswith("norm.weight")]
    assert all(bool((p == 1).all()) for p in norms)
    x = stream(9).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x.bfloat16())
        cached = [made(x[:, s : s + 3].bfloat16(), causal=True, cache=c) for c in [Cache()] for s in (0, 3, 6)]
        torch.testing.assert_close(torch.cat(cached, 1), made(x.bfloat16(), causal=True), rtol=0.05, atol=0.05)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), made(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "kind",
    [
        "mla",
        "elu",
        pytest.param("performer", marks=pytest.mark.stress),
        pytest.param("window", marks=pytest.mark.stress),
    ],
)
def test_kinds_compile_without_breaks(kind: str) -> None:
    torch._dynamo.reset()
    made = build_block(config(kind), 0, 0)
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    x, segments = stream(12).float(), documents(12)
    for direction in (False, True, BlockCausal(4)):
        torch.testing.assert_close(compiled(x, causal=direction), made(x, causal=direction))
        torch.testing.assert_close(
            compiled(x, causal=direction, segments_BS=segments), made(x, causal=direction, segments_BS=segments)
        )


def test_a_cache_serves_what_looks_back() -> None:
    for settings in ({"causal": False}, {"causal": True, "segments_BS": documents(6)}):
        with raises_naming(UsageError, "cache"):
            block("mha")(stream(6), cache=Cache(), **settings)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_time_is_an_input(kind: str) -> None:
    c = ModelConfig(d_model=D, n_heads=H, time_embedding={"kind": kind, "width": 20})  # type: ignore[arg-type]
    rack = build_rack(c, 50, 0, 16)
    ids = torch.arange(16).view(1, 16).expand(3, 16)
    shares = torch.tensor([0.25, 0.5, 1.0])
    entered = rack.front(ids, shares)
    assert not torch.allclose(entered[0], entered[1])
    torch.testing.assert_close(rack.front(ids[:1], shares[:1]), entered[:1])
    torch.testing.assert_close(rack.front(ids, shares[:, None].expand(3, 16)), entered)
    plain = build_rack(ModelConfig(d_model=D, n_heads=H), 50, 0, 16)
    torch.testing.assert_close(plain.front(ids, shares), plain.front(ids))
    assert sum(p.numel() for p in rack.front.parameters()) == c.front_parameters(50, 8)
    assert rack(ids, time=shares).shape == (3, 16, 50)
    rack(ids, time=shares).sum().backward()
    assert all(p.grad is not None for p in rack.front.parameters())
    with raises_naming(UsageError, "time"):
        rack(ids)


def test_what_is_left_open_has_the_identity_of_what_it_is_resolved_to() -> None:
    def of(attention: object) -> dict[str, object]:
        return ModelConfig(d_model=D, n_heads=H, attention=Attention.of(attention)).specification()

    assert ModelConfig(d_model=D, n_heads=H).specification() == {
        **{"d_model": D, "n_heads": H, "norm": "rmsnorm", "norm_eps": 1e-5, "positions": "rope", "rope_theta": 1e4},
        **{"bias": False, "d_ff": 96, "time_embedding": {"kind": "none"}},
        **{"attention": {"kind": "softmax", "kv_heads": H}, "ffn": {"kind": "swiglu"}},
    }, "recipes of what was trained before further settings came stay"
    plain = ModelConfig(d_model=D, n_heads=H).specification()
    assert of("mha") == of({"kind": "gqa", "kv_heads": H}) == plain != of({"kind": "gqa", "kv_heads": 1})
    assert of({"kind": "linear", "random_features": 9}) == of("linear") != plain
    assert of({"kind": "mha", "bias": "none", "window_blocks": [1]}) == plain, "what has no effect is left out"
    assert of({"kind": "mha", "window": 4}) != of({"kind": "mha", "window": 4, "window_blocks": [1]}) != plain
    assert of("mla") == of({"kind": "mla", "kv_rank": 32, "rope_head_dim": 4}) != plain
