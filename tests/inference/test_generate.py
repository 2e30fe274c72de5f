"""Filling holes and continuing prompts: on models whose right answers are known."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from stackwise.config.model import ArchitectureConfig, ModelConfig
from stackwise.errors import UsageError
from stackwise.inference import FillStep, StageModules
from stackwise.model import Rack, build_rack
from tests.conftest import raises_naming
from tests.inference.by_keyword import fill, logits_at, sample_causal

V, L, MASK = 31, 16, 30
CONFIG = ModelConfig(d_model=32, n_heads=4, architecture=ArchitectureConfig(n_stacks=2, blocks_per_stack=1))


def rack() -> Rack:
    return build_rack(CONFIG, V, 0, L)


def ids(batch: int = 3) -> Tensor:
    return torch.randint(0, 25, (batch, L), generator=torch.Generator().manual_seed(0))


def holes(batch: int = 3) -> Tensor:
    mask = torch.zeros(batch, L, dtype=torch.bool)
    for b in range(batch):
        mask[b, 2 : 5 + 3 * b] = True
    return mask


class Oracle(nn.Module):
    """A head that is surest of position 0 and less with each one on, and always says position + 1."""

    causal_calls = 0

    def __init__(self, shown: list[Tensor] | None = None) -> None:
        super().__init__()
        self.weight = torch.empty(V, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), V)
        position = x[:, 0].long()
        logits[torch.arange(len(x)), (position + 1) % V] = 10.0 - 0.5 * position
        return logits


class Positions(nn.Module):
    """A front that gives each token its position."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, ids_BS: Tensor) -> Tensor:
        self.seen.append(ids_BS.clone())
        return torch.arange(ids_BS.shape[1]).float().expand(ids_BS.shape)[..., None]


def oracle() -> list[StageModules]:
    return [StageModules(0, [], Oracle())]  # type: ignore[arg-type]


def test_most_confident_first_in_even_shares() -> None:
    front, steps = Positions(), []
    result = fill(front, oracle(), ids(), holes(), mask_token_id=MASK, steps=3, callback=steps.append)
    want = torch.arange(1, L + 1).expand(3, L)
    assert torch.equal(result[holes()], want[holes()])
    assert torch.equal(result[~holes()], ids()[~holes()])
    # 3, 6 and 9 holes in three steps: 1, 2 and 3 at a time, from the left, where the oracle is surest.
    assert [step.open.sum(1).tolist() for step in steps] == [[2, 4, 6], [1, 2, 3], [0, 0, 0]]
    for step in steps:
        for b in range(3):
            still = step.open[b].nonzero().squeeze(1)
            closed = (holes()[b] & ~step.open[b]).nonzero().squeeze(1)
            assert not len(still) or closed.max() < still.min()
        assert (step.ids[step.open] == MASK).all()
    # What the model was shown: the mask token at holes, never what stood there.
    assert (front.seen[0][holes()] == MASK).all()
    assert torch.equal(front.seen[1], steps[0].ids)


def test_never_more_steps_than_holes_and_none_without() -> None:
    front = Positions()
    fill(front, oracle(), ids(1), holes(1), mask_token_id=MASK, steps=50)
    assert len(front.seen) == 3
    untouched = fill(front, oracle(), ids(1), torch.zeros(1, L, dtype=torch.bool), mask_token_id=MASK)
    assert torch.equal(untouched, ids(1))
    assert len(front.seen) == 3


def test_one_row_is_a_batch_of_one() -> None:
    model = rack()
    one = fill(model.front, model, ids()[1], holes()[1], mask_token_id=MASK, steps=4)
    assert one.shape == (L,)
    assert torch.equal(one, fill(model.front, model, ids()[1:2], holes()[1:2], mask_token_id=MASK, steps=4)[0])


def test_specials_are_never_produced() -> None:
    model = rack()
    with torch.no_grad():
        model.front.embedding.weight[MASK] = model.front.embedding.weight[MASK] * 50  # it would win everywhere
    everything = torch.ones(4, L, dtype=torch.bool)
    plain = model(torch.full((4, L), MASK)).argmax(-1)
    assert (plain == MASK).any()
    for temperature in (0.0, 1.0, 5.0):
        result = fill(
            model.front,
            model,
            torch.zeros(4, L, dtype=torch.int64),
            everything,
            mask_token_id=MASK,
            forbidden=range(3, MASK),
            temperature=temperature,
            steps=4,
        )
        assert result.max() <= 2


def test_drawing_follows_the_seed_and_the_distribution() -> None:
    class Coin(nn.Module):
        weight = torch.empty(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([0.0, 1.0, -100.0]).expand(len(x), 3)

    stages = [StageModules(0, [], Coin())]  # type: ignore[arg-type]
    blank, open_ = torch.zeros(1, 4000, dtype=torch.int64), torch.ones(1, 4000, dtype=torch.bool)

    def drawn(seed: int, temperature: float = 1.0) -> Tensor:
        return fill(
            Positions(), stages, blank, open_, mask_token_id=2, steps=1, temperature=temperature, seed=seed
        ).float()

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert drawn(1).mean().item() == pytest.approx(0.731, abs=0.03)
    assert drawn(1, 0.5).mean().item() == pytest.approx(0.881, abs=0.03)
    assert drawn(1, 0.0).mean().item() == 1.0


def test_stages_may_take_turns_in_memory() -> None:
    model = rack()

    def lazily() -> Iterator[StageModules]:
        for depth, stack in enumerate(model.stacks):
            yield StageModules(depth, list(stack.blocks), model.head)

    whole = fill(model.front, model, ids(), holes(), mask_token_id=MASK, steps=4, temperature=1.0, seed=5)
    assert torch.equal(
        fill(model.front, lazily, ids(), holes(), mask_token_id=MASK, steps=4, temperature=1.0, seed=5), whole
    )
    index = torch.tensor([3, 20])
    torch.testing.assert_close(
        logits_at(model.front, lazily, ids(), index, causal=False), model(ids()).flatten(0, 1)[index]
    )


def test_modes_come_back() -> None:
    model = rack()
    model.blocks[0].eval()
    fill(model.front, model, ids(), holes(), mask_token_id=MASK, steps=2)
    assert model.training
    assert model.blocks[1].training
    assert not model.blocks[0].training


def by_hand(model: Rack, prompt: Tensor, new: int) -> Tensor:
    for _ in range(new):
        logits = model(prompt[:, -L:], causal=True)
        prompt = torch.cat((prompt, logits[:, -1].argmax(-1, keepdim=True)), 1)
    return prompt


def test_continuing_is_the_likeliest_token_again_and_again() -> None:
    model = rack()
    assert torch.equal(sample_causal(model.front, model, ids()[:, :4], 6), by_hand(model, ids()[:, :4], 6))
    long = sample_causal(model.front, model, ids()[0], 5)
    assert torch.equal(long, by_hand(model, ids()[:1], 5)[0]), "beyond the model's length the latest tokens count"


def test_continuing_draws_by_seed_top_k_and_stops() -> None:
    model = rack()
    prompt = ids()[:, :4]

    def go(**settings: object) -> Tensor:
        return sample_causal(model.front, model, prompt, 8, **settings)  # type: ignore[arg-type]

    assert torch.equal(go(temperature=1.0, seed=1), go(temperature=1.0, seed=1))
    assert not torch.equal(go(temperature=1.0, seed=1), go(temperature=1.0, seed=2))
    assert torch.equal(go(temperature=3.0, top_k=1), go())
    top = go(temperature=50.0, top_k=3)
    likely = model(prompt, causal=True)[:, -1].topk(3).indices
    assert (top[:, 4:5] == likely).any(1).all()
    first = int(go()[0, 4])
    stopped = sample_causal(model.front, model, prompt[:1], 8, stop_token_id=first)
    assert stopped.shape == (1, 5)
    assert first not in go(forbidden=[first])[0, 4:]
    assert sample_causal(model.front, model, prompt, 0).shape == prompt.shape


def test_refusals() -> None:
    model = rack()
    with raises_naming(UsageError, list(ids().shape), list(holes(2).shape)):
        fill(model.front, model, ids(), holes(2), mask_token_id=MASK)
    with raises_naming(UsageError, "0 steps"):
        fill(model.front, model, ids(), holes(), mask_token_id=MASK, steps=0)
    with raises_naming(UsageError, -1.0):
        fill(model.front, model, ids(), holes(), mask_token_id=MASK, temperature=-1.0)
    with pytest.raises(UsageError):
        fill(model.front, model, ids(), holes(), mask_token_id=MASK, forbidden=range(V))
    with pytest.raises(UsageError):
        fill(model.front, [], ids(), holes(), mask_token_id=MASK)
    with raises_naming(UsageError, "training.objective"):
        fill(model.front, [StageModules(0, model.blocks, model.head, True)], ids(), holes(), mask_token_id=MASK)
    with raises_naming(UsageError, "training.adaptation"):
        sample_causal(model.front, [StageModules(0, model.blocks, model.head)], ids(), 1)
    with pytest.raises(UsageError):
        sample_causal(model.front, model, torch.zeros(0, dtype=torch.int64), 1)
    with pytest.raises(UsageError, match="top_k 0"):
        sample_causal(model.front, model, ids(), 1, top_k=0)


def test_step_is_frozen() -> None:
    step = FillStep(1, 2, ids(), holes())
    with pytest.raises(AttributeError):
        step.step = 2  # type: ignore[misc]
