"""Stage-by-stage training of anyone's layers, through the same store and recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stackwise import StackWiseConfig, UnifiedTrainer
from stackwise.config.loading import build
from stackwise.errors import UsageError
from stackwise.store import ActivationStore


def config(**training: Any) -> StackWiseConfig:
    return build(
        StackWiseConfig,
        {
            "model": {"vocab_size": 41, "d_model": 32, "n_heads": 2, "init_std": 0.1},
            "training": {
                "block_size": 1,
                "seq_len": 16,
                "steps": 80,
                "batch_size": 32,
                "learning_rate": 1e-2,
                **training,
            },
        },
    )


def layers(count: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True) for _ in range(count)]


@pytest.fixture(scope="module")
def data() -> torch.Tensor:
    """Counting up from anywhere: each token follows from its neighbours."""
    start = torch.randint(0, 40, (1500, 1), generator=torch.Generator().manual_seed(0))
    return (start + torch.arange(16)) % 40


def test_anyones_layers_learn_stage_by_stage(data: torch.Tensor, tmp_path: Path) -> None:
    mine = layers()
    before = mine[2].linear1.weight.detach().clone()  # type: ignore[union-attr]
    results = UnifiedTrainer(config(), store=tmp_path / "store").train_all_layers(data.split(100), mine)
    assert [r.depth for r in results] == [0, 1, 2]
    assert not any(r.reused for r in results)
    assert results[-1].loss < results[0].loss < 3.6, "ln 40 is 3.69"
    assert not torch.equal(mine[2].linear1.weight, before)  # type: ignore[arg-type]
    with ActivationStore(tmp_path / "store", create=False) as store:
        assert [info.depth for info in store.boundaries()] == [1, 2]
        assert store.verify()["damaged"] == []


def test_a_second_time_nothing_is_trained_and_the_layers_hold_the_weights(data: torch.Tensor, tmp_path: Path) -> None:
    first, second = layers(), layers()
    batches = [{"input_ids": part} for part in data.split(100)]
    UnifiedTrainer(config(steps=5), store=tmp_path / "store").train_all_layers(batches, first)
    results = UnifiedTrainer(config(steps=5), store=tmp_path / "store").train_all_layers(batches, second)
    assert all(r.reused for r in results)
    for a, b in zip(first, second, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q)


def test_block_size_groups_layers_into_stages(data: torch.Tensor, tmp_path: Path) -> None:
    results = UnifiedTrainer(config(steps=3, block_size=2), store=tmp_path).train_all_layers([data], layers(3))
    assert [r.blocks for r in results] == [(0, 1), (2, 2)]


def test_layers_of_another_kind_are_another_trunk(data: torch.Tensor, tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor, self.linear = factor, nn.Linear(32, 32, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.factor * self.linear(x)

        def extra_repr(self) -> str:
            return f"factor={self.factor}"

    for factor in (1.0, 2.0):
        torch.manual_seed(0)
        made: list[nn.Module] = [Scaled(factor), Scaled(factor)]
        results = UnifiedTrainer(config(steps=2), store=tmp_path).train_all_layers([data], made)
        assert not any(r.reused for r in results)


def test_custom_targets(data: torch.Tensor, tmp_path: Path) -> None:
    batches = [{"input_ids": part, "targets": 39 - part} for part in data.split(100)]
    results = UnifiedTrainer(config(objective="custom"), store=tmp_path).train_all_layers(batches, layers(1))
    assert results[0].loss < 1.0, "a target that follows from the token itself is learnt"
    with pytest.raises(UsageError, match="targets"):
        UnifiedTrainer(config(objective="custom"), store=tmp_path).train_all_layers([data], layers(1))


@pytest.mark.parametrize(
    ("batch", "line"),
    [
        (torch.zeros(4, 8, dtype=torch.long), "samples of 8 tokens, but training.seq_len is 16"),
        (torch.full((4, 16), 40), "the mask token 40 occurs in the data"),
        (torch.full((4, 16), 99), "does not fit the data, which has token 99"),
        (torch.zeros(4, 16), "a batch must be token ids"),
        ({"ids": torch.zeros(4, 16)}, "a batch needs `input_ids`"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(batch: Any, line: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=line):
        UnifiedTrainer(config(), store=tmp_path / "s").train_all_layers([batch], layers(1))
    with pytest.raises(UsageError):
        UnifiedTrainer(config(), store=tmp_path / "s").train_all_layers([batch], [])


@pytest.mark.parametrize(
    ("training", "line"),
    [
        ({"lookahead": "tail"}, "training.lookahead: tail is not for layers of your own"),
        ({"fusion": {"strategy": "trainable"}}, "training.fusion: trainable is not"),
        ({"mode": "independent"}, "independent and prepended stages are not"),
        ({"progressive": {"enabled": True, "building_mode": "prepend"}}, "independent and prepended stages are not"),
    ],
)
def test_schedules_beyond_plain_stacking_are_refused(training: dict[str, Any], line: str, data: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=line):
        UnifiedTrainer(config(**training)).train_all_layers(data.split(100), layers())


def test_a_setting_of_the_store_that_is_not_used_is_said(data: torch.Tensor, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    own = config(steps=2)
    own.store.fuse_passes = True
    UnifiedTrainer(own, store=tmp_path / "store", observe=told.append).train_all_layers(data[:64].split(32), layers(2))
    assert any("store.fuse_passes is unused" in event.get("text", "") for event in told)
