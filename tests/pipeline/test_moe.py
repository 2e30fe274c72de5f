"""Racks with a mixture of experts: every engine, killed and resumed, adapters, narrow formats, what is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.config import StackWiseConfig
from stackwise.config.unused import unused_settings
from stackwise.errors import UsageError
from stackwise.model import build_block
from stackwise.model.block import evaluating
from stackwise.pipeline.committed.load import load_rack
from stackwise.pipeline.committed.use import export_rack
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.schedule import schedule
from stackwise.pretrained import load_rack as load_export
from tests.conftest import Micro, run
from tests.pipeline.storm import killed
from tests.pipeline.test_run import named, weights

FFN = {"kind": "moe", "experts": 4, "top_k": 2, "expert_dim": 32, "at": [1]}
MIXED = FFN | {"balance": "bias", "balance_rate": 0.01, "noise": 0.1, "capacity_factor": 1.0, "router_z": 0.001}
SMALL = {"training__steps": 24, "training__checkpoint_steps": 4, "training__eval_every": 12, "evaluation__samples": 8}


@pytest.fixture(scope="module")
def staged(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> tuple[StackWiseConfig, Path, list[Any]]:
    """A run in stages that nothing disturbed: its upper block has experts."""
    directory = tmp_path_factory.mktemp("moe")
    temperature = {"start": 2.0, "end": 1.0, "epochs": 1}
    config = micro(**SMALL, model__ffn=MIXED | {"temperature": temperature}, training__accumulation=2)
    return config, directory / "run", run(config, directory / "run")


def test_a_killed_run_ends_with_the_same_weights(staged: Any, tmp_path: Path) -> None:
    killed(staged[0], tmp_path / "run", 1)
    assert weights(tmp_path / "run") == weights(staged[1])


def test_swapped_and_resident_are_the_same(micro: Micro, tmp_path: Path) -> None:
    """A bias moves once a step, from both microbatches, though a swapped stage goes over its rows twice."""
    values = {**SMALL, "model__ffn": MIXED | {"at": None}, "training__accumulation": 2, "model__dropout": 0.1}
    values["training__steps"] = 6
    run(micro(**values, training__swap="never"), tmp_path / "resident")
    events = run(micro(**values, training__swap="always", training__swap_experts=1), tmp_path / "swapped")
    assert any("is swapped" in event["text"] for event in named(events, "note"))
    assert weights(tmp_path / "swapped") == weights(tmp_path / "resident"), "of stages, and so of what they read"
    stages = load_rack(RunDirectory(tmp_path / "swapped"), torch.device("cpu")).modules()
    blocks = [block for stage in stages for block in stage.blocks]
    bias = {name: p.detach() for block in blocks for name, p in block.named_parameters()}
    moved = next(value for name, value in bias.items() if name.endswith("ffn.balance")) / 0.01
    assert moved.abs().max() > 0
    torch.testing.assert_close(moved, moved.round(), atol=1e-3, rtol=0)  # whole steps of its rate


def test_experts_are_in_the_log(staged: Any) -> None:
    _, directory, events = staged
    by_stage = {event["stage"]: event for event in named(events, "held_out")}
    assert "experts" not in by_stage[0]
    used = by_stage[1]["experts"]["1"]
    assert sum(used["shares"]) == pytest.approx(1.0)
    assert (used["least"], used["most"]) == (min(used["shares"]), max(used["shares"]))
    assert 0 < used["entropy"] <= 1
    assert used["dropped"] == 0, "nothing is dropped where nothing trains"
    steps = [event for event in named(events, "step") if event["stage"] == 1]
    assert any(event["experts"]["1"]["dropped"] > 0 for event in steps)
    assert {"cross_entropy", "balance", "router_z"} >= set(steps[-1]["terms"]) >= {"balance", "router_z"}
    stages = status(RunDirectory(directory))["stages"]
    assert stages[1]["experts"]["1"]["most"] == used["most"]


def test_an_export_computes_the_same(staged: Any, tmp_path: Path) -> None:
    config, directory, _ = staged
    rack = load_rack(RunDirectory(directory), torch.device("cpu"))
    out = export_rack(rack, tmp_path / "out").directory
    assert json.loads((out / "config.json").read_text())["model_type"] == "stackwise"
    ids = torch.randint(0, 200, (2, config.training.seq_len), generator=torch.Generator().manual_seed(0))
    x, back = rack.front()(ids), load_export(out)
    for section in rack.modules():
        with evaluating(*section.blocks):
            x = section.forward(x)
        head = section.head
    with evaluating(back):
        assert torch.equal(back(ids), head(x))


@pytest.mark.parametrize(
    "more",
    [
        {"training__progressive__enabled": True, "training__progressive__trunk_strategy": "qlora"},
        {"training__progressive__enabled": True, "training__progressive__trunk_precision": "nvfp4"},
        {"precision": "bf16", "training__optimizer": "muon", "training__mode": "end_to_end"},
        pytest.param(
            {"training__compile": True, "training__mode": "end_to_end", "training__steps": 3}, marks=pytest.mark.stress
        ),
    ],
    ids=["adapters", "nvfp4", "muon", "compiled"],
)
def test_other_ways_to_train(more: dict[str, Any], micro: Micro, tmp_path: Path) -> None:
    values = {"training__steps": 6, "evaluation__samples": 8, "model__ffn": FFN, **more}
    events = run(micro(**values), tmp_path / "run")
    assert all(stage["state"] == "done" for stage in status(RunDirectory(tmp_path / "run"))["stages"]), events[-1]


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_estimate_is_what_it_keeps(micro: Micro, top_k: int) -> None:
    shape = {"precision": "fp32", "model.d_model": 256, "model.n_heads": 8, "training.seq_len": 128}
    experts = {"kind": "moe", "experts": 8, "top_k": top_k, "expert_dim": 256, "shared_experts": 1}
    config = StackWiseConfig.from_preset("micro", shape | {"model.ffn": experts})
    block, rows = build_block(config.model, 0, 0), 4
    fixed = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), *block.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(torch.randn(rows, 128, 256, requires_grad=True), causal=False, segments_BS=None)
    taken = sum(tensor.untyped_storage().nbytes() for at, tensor in saved.items() if at not in fixed)
    kept = config.row_positions * Estimate(config, 258, schedule(config)[1]).kept_bytes(config.model)
    assert kept == pytest.approx(taken / rows, rel=0.15)


@pytest.mark.parametrize("key", ["tensor", "shard", "pipeline"])
def test_ranks_that_would_divide_experts_are_refused_by_their_key(key: str, micro: Micro) -> None:
    with pytest.raises(UsageError) as refused:
        micro(model__ffn=FFN, model__dropout=0.0, **{f"parallel__{key}": 2})
    (line,) = [line for line in str(refused.value).splitlines() if "experts" in line or "moe" in line]
    assert f"parallel.{key}: 1" in line


@pytest.mark.parametrize(
    ("ffn", "fault"),
    [
        ({"top_k": 5}, "model.ffn.top_k"),
        ({"capacity_factor": 1e-4}, "model.ffn.capacity_factor"),
        ({"at": [7]}, "model.ffn.at"),
        ({"at": []}, "model.ffn.at"),
        ({"temperature": 0}, "model.ffn.temperature"),
        ({"temperature": {"start": 0.0, "end": 1.0, "epochs": 1}}, "model.ffn.temperature"),
        ({"temperature": {"start": 1.0, "end": 1.0, "epochs": 0}}, "model.ffn.temperature"),
        ({"shared_gate": True}, "model.ffn.shared_gate"),
        ({"experts": 0}, "model.ffn.experts"),
    ],
)
def test_bad_input_is_a_line(ffn: dict[str, Any], fault: str, micro: Micro) -> None:
    with pytest.raises(UsageError) as refused:
        micro(model__ffn=FFN | ffn)
    (line,) = [line for line in str(refused.value).splitlines() if fault in line]
    assert len(line) < 200


def test_what_balances_otherwise_is_named_as_unused(micro: Micro) -> None:
    lines = "\n".join(unused_settings(micro(model__ffn=FFN | {"balance": "bias", "aux_weight": 0.1})))
    assert "model.ffn.aux_weight " in lines
    assert not [line for line in unused_settings(micro(model__ffn=FFN)) if "ffn" in line]


def test_what_shapes_training_alone_keeps_what_is_stored(micro: Micro) -> None:
    first, other = (micro(model__ffn=FFN | {"aux_weight": weight}) for weight in (0.01, 0.02))
    assert first.model.specification() == other.model.specification()


def test_experts_take_turns_where_not_even_a_block_fits() -> None:
    shape = {"model.d_model": 256, "model.n_heads": 8, "training.mode": "end_to_end"}
    experts = {"kind": "moe", "experts": 64, "expert_dim": 1024}
    config = StackWiseConfig.from_preset("micro", shape | {"model.ffn": experts})
    (stage,) = schedule(config)
    estimate, sizes = Estimate(config, 256, stage), list[int]()
    for memory in (10**12, 2 * 10**9, 5 * 10**8):
        config.training.swap = "always"
        swap = estimate.swap(memory)
        assert swap is not None
        assert swap.memory <= memory
        sizes.append(swap.pieces or 64)
    assert sizes[0] == 64 > sizes[1] > sizes[2]
    config.training.swap_experts = 3
    assert estimate.swap(10**12) is not None
    assert estimate.swap(10**12).pieces == 3  # type: ignore[union-attr]
