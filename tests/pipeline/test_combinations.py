"""Settings of different corners together: fusion, adaptation and generation over QLoRA trunks, swapped stages with
lookahead, adapters and evaluations, time as depth beside held-out rows, memory by kind of attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stackwise.config import StackWiseConfig
from stackwise.model import build_block
from stackwise.pipeline.committed.generate import Sampling, generate
from stackwise.pipeline.committed.load import load_rack
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.schedule import schedule
from stackwise.store import ActivationStore
from tests.conftest import Micro, run
from tests.pipeline.test_modes import committed
from tests.pipeline.test_run import named, weights

QLORA: dict[str, Any] = {
    "training__steps": 4,
    "training__progressive__enabled": True,
    "training__progressive__trunk_strategy": "qlora",
    "training__progressive__qlora_enabled": True,
    "training__progressive__qlora_rank": 2,
    "evaluation__samples": 4,
}
ADAPTERS = {"adapter.block.0", "adapter.block.1"}


@pytest.fixture(scope="module")
def over_qlora(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stacks, a QLoRA trunk, the whole fused over it, then made causal."""
    directory = tmp_path_factory.mktemp("over-qlora") / "run"
    run(micro(**QLORA, training__fusion__strategy="trainable", training__adaptation="causal"), directory)
    return directory


def test_fusion_over_a_qlora_trunk_trains_adapters(over_qlora: Path) -> None:
    stages = committed(over_qlora)
    assert set(stages[2].record["parts"]) == {"front", *ADAPTERS, "head"}
    held = stages[2].record["recipe"]["stage"]["formats"]
    assert {held[block]["precision"] for block in ("block.0", "block.1")} == {"qlora"}
    below = stages[0].record["parts"] | stages[1].record["parts"]
    assert stages[2].record["recipe"]["initial"] == below
    assert all(stages[2].record["parts"][part] != below[part] for part in ADAPTERS)


def test_a_qlora_rack_generates(over_qlora: Path, micro: Micro, tmp_path: Path) -> None:
    rack = load_rack(RunDirectory(over_qlora), torch.device("cpu"))
    assert set(committed(over_qlora)[3].record["parts"]) == {"front", *ADAPTERS, "head"}
    assert generate(rack, "import", Sampling(length=3))["after"].startswith("import")
    whole = rack.up_to(rack.stages[1])
    filled = generate(whole, "import [MASK*4] as", Sampling(steps=2))
    assert filled["after"].startswith("import ")
    assert filled["after"].endswith(" as")
    assert "[MASK]" not in filled["after"]


@pytest.mark.parametrize(
    "settings",
    [
        {"training__lookahead": "auxiliary", "training__eval_every": 2},
        QLORA | {"training__eval_every": 2},
        pytest.param({"training__lookahead": "tail", "model__architecture__n_stacks": 3}, marks=pytest.mark.stress),
        pytest.param(QLORA | {"training__fusion__strategy": "hierarchical"}, marks=pytest.mark.stress),
        pytest.param({"training__eval_every": 2, "model__attention": "mla"}, marks=pytest.mark.stress),
    ],
    ids=str,
)
def test_swapped_stages_come_to_the_same(micro: Micro, tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"training__steps": 4, "model__dropout": 0.1, "evaluation__samples": 4} | settings
    resident = run(micro(**settings, training__swap="never"), tmp_path / "resident")
    swapped = run(micro(**settings, training__swap="always", training__swap_parts=2), tmp_path / "swapped")
    assert any("is swapped" in event["text"] for event in named(swapped, "note"))
    assert weights(tmp_path / "swapped") == weights(tmp_path / "resident")
    losses = [[(e["stage"], e["step"], e["nats"]) for e in named(events, "held_out")] for events in (resident, swapped)]
    assert losses[0] == losses[1]
    assert bool(losses[0]) == ("training__eval_every" in settings)


def test_with_time_as_depth_every_stage_is_evaluated_at_all_fractions(micro: Micro, tmp_path: Path) -> None:
    fractions = [0.25, 0.5, 0.75]
    config = micro(
        training__steps=4,
        training__mask_schedule_over="depth",
        training__eval_every=2,
        evaluation__fractions=fractions,
        evaluation__samples=6,
    )
    events = run(config, tmp_path / "run")
    rowset = next(key for key in RunDirectory(tmp_path / "run").manifest()["rowsets"].values() if key[1] == 18)
    with ActivationStore(tmp_path / "run" / "store", create=False) as store:
        masks = store.masks(store.rowset(rowset[0]).mask_ids, 32)
    assert sorted(np.unique(masks.sum(1))) == [round(32 * fraction) for fraction in fractions]
    assert {event["stage"] for event in named(events, "held_out")} == {0, 1}


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"attention": "gqa", "n_kv_heads": 2},
        {"attention": "mla"},
        {"attention": "mla", "kv_rank": 32},
        {"attention": "mla", "q_rank": 64, "rope_head_dim": 16},
        {"attention": "linear"},
        {"attention": "linear", "feature_map": "performer"},
        {"ffn": "gelu"},
    ],
    ids=str,
)
def test_what_a_block_keeps_for_its_backward_pass_is_known(model: dict[str, Any]) -> None:
    """The bytes of a row in the estimate are those that autograd saves, within 10%."""
    shape = {"precision": "fp32", "model.d_model": 256, "model.n_heads": 8, "training.seq_len": 128}
    config = StackWiseConfig.from_preset("micro", shape | {f"model.{key}": value for key, value in model.items()})
    block, rows = build_block(config.model, 0, 0), 4
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x = block(torch.randn(rows, 128, 256, requires_grad=True), causal=False, segments_BS=None)
    taken = sum(tensor.untyped_storage().nbytes() for at, tensor in saved.items() if at not in own)
    assert x.shape == (rows, 128, 256)
    kept = config.row_positions * Estimate(config, 258, schedule(config)[1]).kept_bytes(config.model)
    assert kept == pytest.approx(taken / rows, rel=0.1)
