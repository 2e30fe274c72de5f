"""A bidirectional rack made causal: what is seen, shown and scored on the way, and that what was learnt is of use."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from stackwise.batch import Batch
from stackwise.config import StageTraining
from stackwise.config.direction import Annealed
from stackwise.config.model import ArchitectureConfig, ModelConfig
from stackwise.errors import UsageError
from stackwise.inference import LoadedModel, StageModules, sample_causal
from stackwise.model import Rack, build_rack
from stackwise.objectives import AdaptationObjective, CLMObjective, MaskDiffusionObjective, RuntimeObjective
from stackwise.training.engine import ResidentEngine
from stackwise.training.stage import StageModel
from stackwise.training.trainer import Trainer
from tests.conftest import raises_naming

V, L, MASK = 18, 16, 17


def batch(rows: int, seed: int) -> Batch:
    """Counting in steps of 1, 3 or 5 modulo 16, half of it masked."""
    rng = np.random.default_rng(seed)
    tokens = (rng.integers(0, 16, (rows, 1)) + rng.choice([1, 3, 5], (rows, 1)) * np.arange(L)) % 16
    masks = rng.random((rows, L)) < rng.uniform(0.15, 0.9, (rows, 1))
    ids = np.zeros((rows, 16), dtype=np.uint8)
    return Batch(np.arange(rows), ids, {"tokens": torch.from_numpy(tokens), "masks": torch.from_numpy(masks)})


def train(rack: Rack, objective: RuntimeObjective, steps: int, first_seed: int) -> Rack:
    model = StageModel(rack.front, rack.blocks, rack.head, objective, "fp32")
    settings = StageTraining(learning_rate=3e-3, steps=steps)
    engine = ResidentEngine(model, settings, seed=(0, 0), device=torch.device("cpu"))
    trainer = Trainer(engine, settings, steps=steps)
    for step in range(steps):
        trainer.train_step([batch(32, first_seed + step)])
    engine.settle()
    return rack


def causal_loss(rack: Rack) -> float:
    held_out = batch(256, 10**6)
    model = StageModel(rack.front, rack.blocks, rack.head, CLMObjective(), "fp32").eval()
    with torch.no_grad():
        (term,) = model(held_out).values()
    return float(term.sum) / term.count


def test_steps_lead_from_both_ways_to_one() -> None:
    objective = AdaptationObjective(MASK, anneal_steps=4, seed=3)
    directions = [objective.at(step).causal for step in range(6)]
    shares = [direction.visible for direction in directions if isinstance(direction, Annealed)]
    assert shares == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert directions[4:] == [True, True]
    assert objective.at(None) is objective
    assert objective.at(2).causal == AdaptationObjective(MASK, 4, 3).at(2).causal != objective.at(1).causal
    assert AdaptationObjective(MASK, 0).at(0).causal is True
    with raises_naming(UsageError, -1):
        AdaptationObjective(MASK, -1)


def test_nothing_that_is_to_be_said_is_shown() -> None:
    rows = batch(8, 0)
    on_the_way = AdaptationObjective(MASK, 10).at(0)
    shown = on_the_way.shown(rows)
    scored, targets = on_the_way.select(rows)
    assert not scored[:, -1].any()
    after = scored.roll(1, 1)
    assert (shown[after] == MASK).all()
    assert torch.equal(rows.tokens_BS[after], targets)
    done = AdaptationObjective(MASK, 10)
    assert torch.equal(done.shown(rows), rows.tokens_BS)
    assert (done.times(rows) == 0).all()


def test_a_short_stage_makes_a_bidirectional_rack_causal() -> None:
    config = ModelConfig(d_model=48, n_heads=4, architecture=ArchitectureConfig(n_stacks=2), tie_embeddings=False)
    rack = train(build_rack(config, V, 0, L), MaskDiffusionObjective(MASK), 200, 0)
    before = causal_loss(rack)
    adapted = train(copy.deepcopy(rack), AdaptationObjective(MASK, 15), 60, 1000)
    scratch = train(build_rack(config, V, 0, L), CLMObjective(), 60, 1000)
    assert causal_loss(adapted) < 0.8 * causal_loss(scratch)
    assert causal_loss(adapted) < 0.5 * before
    stages = [StageModules(0, adapted.blocks, adapted.head, True)]
    counted = sample_causal(LoadedModel(adapted.front, stages, True), torch.tensor([[2, 3, 4, 5], [1, 4, 7, 10]]), 4)
    assert counted[:, 4:].tolist() == [[6, 7, 8, 9], [13, 0, 3, 6]]
