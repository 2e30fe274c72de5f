"""Masked-diffusion sampling by blocks, at random, leaving early; caches that change nothing but the work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stackwise.config.model import ArchitectureConfig, BlockCausal, ModelConfig
from stackwise.errors import UsageError
from stackwise.inference import FillStep, StageModules
from stackwise.model import Caches, Rack, build_rack
from tests.conftest import raises_naming
from tests.inference.by_keyword import fill, logits_at, sample_causal

V, L, MASK = 31, 24, 30
KINDS: dict[str, dict[str, object]] = {
    "gqa": {"attention": {"kind": "gqa", "kv_heads": 2}},
    "learned": {"positions": "learned"},
    "mla": {"attention": "mla"},
    "elu": {"attention": "linear"},
    "performer": {"attention": {"kind": "linear", "feature_map": "performer"}},
    "time": {"time_embedding": "sinusoidal"},
}


def rack(kind: str = "gqa", dtype: torch.dtype = torch.float64) -> Rack:
    architecture = ArchitectureConfig(n_stacks=3, blocks_per_stack=1)
    config = ModelConfig(d_model=32, n_heads=4, init_std=0.3, architecture=architecture, **KINDS[kind])  # type: ignore[arg-type]
    return build_rack(config, V, 0, L, dtype=dtype)


def ids(batch: int = 2) -> Tensor:
    return torch.randint(0, 25, (batch, L), generator=torch.Generator().manual_seed(0))


def staged(model: Rack, direction: BlockCausal | bool = False) -> Callable[[], list[StageModules]]:
    return lambda: [StageModules(d, list(s.blocks), model.head, direction) for d, s in enumerate(model.stacks)]


def opened(model: Rack, holes: Tensor, **settings: object) -> list[Tensor]:
    """What is open after each step."""
    steps: list[FillStep] = []
    fill(model.front, model, ids(), holes, mask_token_id=MASK, callback=steps.append, **settings)  # type: ignore[arg-type]
    return [step.open for step in steps]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_continuation_is_the_uncached_one(kind: str) -> None:
    model = rack(kind)
    whole = sample_causal(model.front, model, ids()[:, :5], 19, cache=False, temperature=0.7)
    assert torch.equal(sample_causal(model.front, model, ids()[:, :5], 19, temperature=0.7), whole)
    assert torch.equal(sample_causal(model.front, staged(model, True), ids()[:, :5], 19, temperature=0.7), whole)
    prompt, none = ids()[:, :9], torch.zeros(2)
    caches, last = Caches(), torch.tensor([0, 1])
    logits_at(model.front, model, prompt[:, :8], last[:0], causal=True, caches=caches, time=none)
    cached = logits_at(model.front, model, prompt[:, 8:], last, causal=True, caches=caches, time=none)
    plain = logits_at(model.front, model, prompt, torch.tensor([8, 17]), causal=True, time=none)
    torch.testing.assert_close(cached, plain, rtol=1e-5, atol=1e-6)


def test_beyond_the_models_length_nothing_is_kept() -> None:
    model = rack()
    want = sample_causal(model.front, model, ids()[:, -6:], 30, cache=False)
    assert torch.equal(sample_causal(model.front, model, ids()[:, -6:], 30), want)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_through_a_cache_are_blocks_without_one(kind: str) -> None:
    model, size = rack(kind), 8
    direction = BlockCausal(size)
    holes = torch.zeros(2, 21, dtype=torch.bool)
    holes[0, 5:7] = holes[1, 4] = holes[:, 10:] = True
    steps: list[FillStep] = []
    made = fill(
        model.front,
        staged(model, BlockCausal(size, paired=True)),
        ids()[:, :21],
        holes,
        mask_token_id=MASK,
        steps=8,
        direction=direction,
        callback=steps.append,
    )
    # The same by hand: whole canvases, nothing kept, the positions behind a block as good as any.
    canvas = torch.cat((ids()[:, :21], torch.full((2, 3), 7)), 1).masked_fill(
        torch.nn.functional.pad(holes, (0, 3), value=True), MASK
    )
    done = made.clone()
    assert (done != MASK).all()
    assert torch.equal(done[~holes], ids()[:, :21][~holes])
    for number, step in enumerate(steps):
        before = steps[number - 1].ids if number else canvas[:, :21]
        was = steps[number - 1].open if number else holes
        closed = was & ~step.open
        if not closed.any():
            continue
        block = int(closed.nonzero()[0, 1]) // size
        assert not was[:, : block * size].any(), "a block was begun before the one in front of it was done"
        shown = torch.cat((before, canvas[:, 21:]), 1)
        masked = torch.cat((was, torch.ones(2, 3, dtype=torch.bool)), 1)
        share = masked.float().view(2, 3, size).mean(2).repeat_interleave(size, 1)
        logits = model(shown, causal=direction, time=share)
        logits[..., MASK] = -torch.inf
        if block < 2:  # the last one is worked on beyond the canvas, which a step does not show
            assert torch.equal(step.ids[closed], logits.argmax(-1)[:, :21][closed])


def test_blocks_of_holes_are_finished_from_the_left() -> None:
    model = rack(dtype=torch.float32)
    holes = torch.zeros(2, L, dtype=torch.bool)
    holes[0, 2:14] = holes[1, 3:20:2] = True
    states = opened(model, holes, block=4, steps=6)
    assert len(states) == 6
    for state in states:
        for row in range(2):
            places = holes[row].nonzero().squeeze(1)
            left = state[row, places]
            begun = (~left).nonzero()
            if len(begun):
                first = int(begun.max()) // 4 * 4
                assert not left[:first].any(), "a block was begun before the one in front of it was done"
    assert not states[-1].any()
    assert len(opened(model, holes, block=4, steps=1)) == 3, "a block takes at least one step"
    alone = fill(model.front, model, ids(), holes, mask_token_id=MASK, steps=12, block=100)
    assert torch.equal(alone, fill(model.front, model, ids(), holes, mask_token_id=MASK, steps=12))


def test_random_unmasking_follows_the_seed_and_not_the_model() -> None:
    holes = torch.ones(2, L, dtype=torch.bool)
    first = opened(rack(dtype=torch.float32), holes, order="random", steps=6, seed=1)
    other = opened(rack("mla", torch.float32), holes, order="random", steps=6, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert [int(state.sum()) for state in first] == [40, 32, 24, 16, 8, 0]
    assert not torch.equal(first[0], opened(rack(dtype=torch.float32), holes, order="random", steps=6, seed=2)[0])
    assert not torch.equal(first[0], opened(rack(dtype=torch.float32), holes, steps=6, seed=1)[0])


def test_a_front_is_told_what_is_still_masked() -> None:
    model = rack("time", torch.float32)
    told: list[Tensor] = []
    assert model.front.time is not None
    model.front.time.register_forward_pre_hook(lambda _, given: told.append(given[0].clone()))
    holes = torch.zeros(1, L, dtype=torch.bool)
    holes[0, :12] = True
    fill(model.front, model, ids(1), holes, mask_token_id=MASK, steps=3)
    assert [share.tolist() for share in told] == [pytest.approx([s / L]) for s in (12, 8, 4)]
    told.clear()
    fill(model.front, model, ids(1), holes, mask_token_id=MASK, steps=2, direction=BlockCausal(12))
    assert [share[0, 0].item() for share in told] == pytest.approx([1.0, 0.5])


def test_leaving_early_is_the_head_of_that_stage() -> None:
    model = rack(dtype=torch.float32)
    stages, index = staged(model)(), torch.tensor([3, 30])
    x = model.front(ids())
    for depth, stage in enumerate(stages):
        x = stage.forward(x)
        want = model.head(x).flatten(0, 1)[index]
        got = logits_at(model.front, stages, ids(), index, causal=False, exit_depth=depth)
        torch.testing.assert_close(got, want)
    own = rack("gqa", torch.float32)
    stages[1] = StageModules(1, stages[1].blocks, model.head, front=own.front, beyond=own.blocks[:1])
    want = model.head(own.blocks[0](stages[1].blocks[0](own.front(ids())))).flatten(0, 1)[index]
    for way in (stages, lambda: stages):
        torch.testing.assert_close(logits_at(model.front, way, ids(), index, causal=False, exit_depth=1), want)
    asked: list[float] = []

    def exit_at(share: float) -> int:
        asked.append(share)
        return 0

    holes = torch.zeros(2, L, dtype=torch.bool)
    holes[:, :6] = True
    fill(model.front, staged(model), ids(), holes, mask_token_id=MASK, steps=2, exit_at=exit_at)
    assert asked == pytest.approx([0.25, 0.125])


def test_refusals() -> None:
    model, holes = rack(), torch.ones(2, L, dtype=torch.bool)
    blocks = staged(model, BlockCausal(8, paired=True))
    with raises_naming(UsageError, "blocks of 8"):
        fill(model.front, blocks, ids(), holes, mask_token_id=MASK)
    with raises_naming(UsageError, "blocks of 8", "blocks of 4"):
        fill(model.front, blocks, ids(), holes, mask_token_id=MASK, direction=BlockCausal(4))
    with raises_naming(UsageError, "training.adaptation"):
        sample_causal(model.front, blocks, ids(), 1)
    with pytest.raises(UsageError):
        fill(model.front, blocks, ids(), holes, mask_token_id=MASK, direction=BlockCausal(8), segments=ids())
    with raises_naming(UsageError, 0):
        fill(model.front, model, ids(), holes, mask_token_id=MASK, block=0)
    with raises_naming(UsageError, L, "model.max_seq_len"):
        fill(model.front, model, ids(), holes, mask_token_id=MASK, direction=BlockCausal(17))
