"""A bidirectional rack made causal: what is seen, shown and scored, and that what was learnt is of use."""

from __future__ import annotations

import copy

import numpy as np
import torch

from stackwise.batch import Batch
from stackwise.config import StageTraining
from stackwise.config.model import ArchitectureConfig, ModelConfig
from stackwise.inference import LoadedModel, StageModules, sample_causal
from stackwise.model import Rack, build_rack
from stackwise.objectives import AdaptationObjective, CLMObjective, MaskDiffusionObjective, RuntimeObjective
from stackwise.training.engine import ResidentEngine
from stackwise.training.stage import StageModel
from stackwise.training.trainer import Trainer

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


def test_nothing_is_masked_and_every_position_says_the_next_token() -> None:
    rows, objective = batch(8, 0), AdaptationObjective()
    scored, targets = objective.select(rows)
    assert objective.causal is True
    assert torch.equal(objective.shown(rows), rows.tokens_BS)
    assert (objective.times(rows) == 0).all()
    assert scored[:, :-1].all()
    assert not scored[:, -1].any()
    assert torch.equal(targets, rows.tokens_BS[:, 1:].flatten())


def test_a_short_stage_makes_a_bidirectional_rack_causal() -> None:
    config = ModelConfig(d_model=48, n_heads=4, architecture=ArchitectureConfig(n_stacks=2), tie_embeddings=False)
    rack = train(build_rack(config, V, 0, L), MaskDiffusionObjective(MASK), 200, 0)
    before = causal_loss(rack)
    adapted = train(copy.deepcopy(rack), AdaptationObjective(), 60, 1000)
    scratch = train(build_rack(config, V, 0, L), CLMObjective(), 60, 1000)
    assert causal_loss(adapted) < 0.8 * causal_loss(scratch)
    assert causal_loss(adapted) < 0.5 * before
    stages = [StageModules(0, adapted.blocks, adapted.head, True)]
    counted = sample_causal(LoadedModel(adapted.front, stages, True), torch.tensor([[2, 3, 4, 5], [1, 4, 7, 10]]), 4)
    assert counted[:, 4:].tolist() == [[6, 7, 8, 9], [13, 0, 3, 6]]
