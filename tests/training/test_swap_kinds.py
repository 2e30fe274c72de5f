"""Swapped training of other kinds of rack: pairs of copies, latent and linear attention, time, a changing objective."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from stackwise.config.kinds import Attention
from stackwise.config.model import TimeEmbedding
from stackwise.objectives import AdaptationObjective, BlockDiffusionObjective, RuntimeObjective
from stackwise.training.optim import learning_rate
from stackwise.training.stage import StageModel
from tests.training.swapping import MASK, Plain, RackParts, engine, microbatches

PERFORMER = Attention.of({"kind": "linear", "feature_map": "performer"})


class Kind(RackParts):
    """Parts of another kind, with an objective of their own."""

    def __init__(self, objective: RuntimeObjective, **model: object) -> None:
        super().__init__(3)
        self.config = self.config.model_copy(update=model)
        self.objective = objective

    def model(self, parts: Mapping[str, nn.Module]) -> StageModel:
        made = super().model(parts)
        made.objective = self.objective
        return made


KINDS = {
    "blocks": lambda: Kind(
        BlockDiffusionObjective(MASK, 4), attention=Attention.of("mla"), time_embedding=TimeEmbedding.of("learned")
    ),
    "adaptation": lambda: Kind(AdaptationObjective(), time_embedding=TimeEmbedding.of("sinusoidal")),
    "linear": lambda: Kind(BlockDiffusionObjective(MASK, 3, True), attention=PERFORMER),
}


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_is_plain_bit_for_bit(tmp_path: Path, kind: str) -> None:
    plain, swapped = Plain(KINDS[kind]()), engine(KINDS[kind](), tmp_path)
    for step in range(3):
        batches = microbatches(step, 3)
        assert float(swapped.step(batches, step, learning_rate(swapped.settings, step, 3)).loss) == plain.step(
            batches, step, 3
        )
    swapped.settle()
    parts = KINDS[kind]()
    for part, tensors in plain.weights(parts.names).items():
        for key, value in swapped.weights(part).items():
            assert torch.equal(value, tensors[key]), f"{part} {key}"
