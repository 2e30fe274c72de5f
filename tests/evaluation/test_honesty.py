"""What a system of this kind must not fake: learning that is real, depth that counts, and no learning from noise."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from stackwise.batch import Batch
from stackwise.config.model import ArchitectureConfig, ModelConfig
from stackwise.config.training import TrainingConfig
from stackwise.evaluation import StageModules
from stackwise.model import Rack, build_rack
from stackwise.objectives import FixedMaskAssigner, MaskScheduler, Objective, make_objective
from stackwise.objectives.objective import Outputs
from tests.evaluation.by_keyword import evaluate

V, L, MASK, SEPARATOR = 18, 16, 17, 16
CONFIG = ModelConfig(
    d_model=48, n_heads=4, architecture=ArchitectureConfig(n_stacks=3, blocks_per_stack=1), tie_embeddings=False
)


def learnable(n: int, seed: int) -> np.ndarray:
    """Counting in steps of 1, 3 or 5 modulo 16, from anywhere: one masked token follows from any two others."""
    rng = np.random.default_rng(seed)
    start, step = rng.integers(0, 16, (n, 1)), rng.choice([1, 3, 5], (n, 1))
    return (start + step * np.arange(L)) % 16


def noise(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V - 2, (n, L))


def train(data: np.ndarray, objective: Objective, steps: int) -> tuple[Rack, list[torch.nn.Module]]:
    """Stage by stage: each stage learns on the activations that the frozen ones below it give."""
    torch.manual_seed(0)
    model = build_rack(CONFIG, V, 0, L)
    plan = FixedMaskAssigner(MaskScheduler(), L)
    # Rows that happen to be equal count as samples of their own here, each under a mask of its own.
    ids = np.random.default_rng(7).integers(0, 256, (len(data), 16), dtype=np.uint8)
    masks = torch.from_numpy(plan.masks(ids))
    tokens = torch.from_numpy(data)
    heads: list[torch.nn.Module] = []
    whole = Batch(np.arange(len(data)), ids, {"tokens": tokens, "masks": masks})
    shown = objective.shown(whole)
    x: Tensor | None = None
    for depth, block in enumerate(model.blocks):
        head = build_rack(CONFIG, V, depth, L).head
        trained = [*block.parameters(), *head.parameters(), *(model.front.parameters() if x is None else [])]
        optimizer = torch.optim.AdamW(trained, lr=3e-3)
        order = np.random.default_rng(depth)
        for _ in range(steps):
            rows = torch.from_numpy(order.choice(len(data), 64, replace=False))
            entering = model.front(shown[rows]) if x is None else x[rows]
            leaving = block(entering, causal=objective.causal)
            given = Batch(rows.numpy(), ids[rows.numpy()], {"tokens": tokens[rows], "masks": masks[rows]})
            (term,) = objective.loss(Outputs(leaving, head), given).values()
            optimizer.zero_grad()
            (term.sum / term.count).backward()
            optimizer.step()
        with torch.no_grad():
            x = block(model.front(shown) if x is None else x, causal=objective.causal)
        heads.append(head)
    model.head = heads[-1]  # type: ignore[assignment]
    return model, heads


@cache
def trained(name: str) -> tuple[Rack, list[torch.nn.Module], Objective]:
    objective = make_objective(TrainingConfig(objective=name), MASK, V, 0)  # type: ignore[arg-type]
    model, heads = train(learnable(4000, 0), objective, steps=250)
    return model, heads, objective


def held_out(
    model: Rack, blocks: list[torch.nn.Module], heads: list[torch.nn.Module], data: np.ndarray, objective: Objective
) -> dict[str, object]:
    stages = [
        StageModules(depth, [block], head, objective.causal)  # type: ignore[arg-type]
        for depth, (block, head) in enumerate(zip(blocks, heads, strict=True))
    ]
    counts = np.bincount(learnable(4000, 0).ravel(), minlength=V)
    return evaluate(
        model.front,
        stages,
        data,
        np.full(len(data), L),
        objective=objective,
        separator_id=SEPARATOR,
        unigram_counts=counts,
        vocab_size=V,
    )


@pytest.mark.parametrize("name", ["mask_diffusion", "mlm", "clm"])
def test_learnable_data_is_learnt_and_beats_the_unigram_clearly(name: str) -> None:
    model, heads, objective = trained(name)
    result = held_out(model, model.blocks, heads, learnable(200, 99), objective)
    base = result["baselines"]["unigram"]  # type: ignore[index]
    assert result["loss"]["0.5"] < 0.5 * base["loss"]["0.5"]  # type: ignore[index]
    assert result["bits_per_byte"] < 0.75 * base["bits_per_byte"]  # type: ignore[operator]
    assert result["accuracy"]["0.5"] > 0.7  # type: ignore[index]


def test_swapping_two_blocks_makes_it_worse() -> None:
    model, heads, objective = trained("mask_diffusion")
    data = learnable(200, 99)
    right = held_out(model, model.blocks, heads, data, objective)
    first, second, third = model.blocks
    for order in ([second, first, third], [first, third, second]):
        wrong = held_out(model, order, heads, data, objective)
        assert wrong["loss"]["0.5"] > 1.5 * right["loss"]["0.5"]  # type: ignore[index]


def test_depth_pays() -> None:
    model, heads, objective = trained("mask_diffusion")
    result = held_out(model, model.blocks, heads, learnable(200, 99), objective)
    losses = [stage["loss"]["0.5"] for stage in result["stages"]]  # type: ignore[attr-defined]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["mask_diffusion", "mlm", "clm"])
def test_nothing_is_learnt_from_noise(name: str) -> None:
    objective = make_objective(TrainingConfig(objective=name), MASK, V, 0)  # type: ignore[arg-type]
    model, heads = train(noise(4000, 1), objective, steps=60)
    result = held_out(model, model.blocks, heads, noise(300, 2), objective)
    floor = math.log(V - 2)  # two ids never occur
    for figures in result["stages"]:  # type: ignore[attr-defined]
        for loss in figures["loss"].values():
            assert loss > floor - 0.05, "held-out noise was predicted: the answer leaks"
        assert figures["loss"]["0.5"] < floor + 0.25
        # Held-out tokens by pure chance: the rate of right guesses is no better.
        assert figures["accuracy"]["0.5"] < 1 / (V - 2) + 0.03
