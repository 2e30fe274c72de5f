"""Precision by stack and adapters over the trunk, run whole on the micro preset."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stackwise.errors import StackWiseError
from stackwise.evaluation import StageModules
from stackwise.model.projections import Adapter, QuantizedLinear
from stackwise.pipeline.committed.load import CommittedRack, load_rack
from stackwise.pipeline.committed.use import evaluate_rack, export_rack, recomputer
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.runner.runner import Runner
from stackwise.pretrained import load_rack as load_export
from stackwise.store import ActivationStore, CommittedStage
from tests.conftest import Micro, run

THREE = {"model__architecture__n_stacks": 3, "training__steps": 8, "training__progressive__enabled": True}


def progressive(**settings: Any) -> dict[str, Any]:
    return THREE | {f"training__progressive__{name}": value for name, value in settings.items()}


def committed(directory: Path) -> list[CommittedStage]:
    """A run's committed stages, lowest first."""
    with ActivationStore(directory / "store", create=False) as store:
        found = [store.stage(stage["recipe"]) for stage in status(RunDirectory(directory))["stages"]]
    assert all(stage is not None for stage in found)
    return [stage for stage in found if stage is not None]


def rack_of(directory: Path) -> CommittedRack:
    return load_rack(RunDirectory(directory), torch.device("cpu"))


def formats(stage: StageModules) -> set[str | None]:
    layers = [child for block in stage.blocks for child in block.modules() if isinstance(child, torch.nn.Linear)]
    return {layer.form if isinstance(layer, QuantizedLinear) else None for layer in layers}


QLORA = {"trunk_strategy": "qlora", "qlora_enabled": True, "qlora_rank": 4, "progressive_qlora": True,
         "progressive_qlora_rank": 2, "cache_activations": True}  # fmt: skip


@pytest.fixture(scope="module")
def qlora(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qlora") / "run"
    run(micro(**progressive(**QLORA)), directory)
    return directory


def test_a_qlora_trunk_stands_still_and_its_adapters_train_with_each_stack(qlora: Path) -> None:
    stages = committed(qlora)
    assert [set(stage.record["parts"]) for stage in stages] == [
        {"front", "block.0", "adapter.block.0", "head"},
        {"adapter.block.0", "block.1", "adapter.block.1", "head"},
        {"adapter.block.0", "adapter.block.1", "block.2", "adapter.block.2", "head"},
    ]
    recipes = [stage.record["recipe"] for stage in stages]
    assert all(recipe["reads"] is None for recipe in recipes)
    for below, above in zip(stages, recipes[1:], strict=False):
        assert {part: above["initial"][part] for part in below.record["parts"]} == below.record["parts"]
    assert recipes[2]["stage"]["formats"]["block.0"]["precision"] == "qlora"
    with ActivationStore(qlora / "store", create=False) as store:
        assert not list(store.boundaries()), "the trunk changes: nothing of it is worth storing"
    tensors = load_file(str(stages[2].path("adapter.block.0")))
    assert {key.split(".")[-2] for key in tensors} == {"stack", "trunk_1", "trunk_2"}
    assert all(tensors[key].abs().max() > 0 for key in tensors if key.endswith(".b")), "an adapter has not learnt"
    early = load_file(str(stages[1].path("adapter.block.0")))
    key = "attention.q.adapters.stack.b"
    assert not torch.equal(early[key], tensors[key])


def test_depths_of_a_qlora_rack_are_evaluated_as_each_stage_left_them(qlora: Path) -> None:
    rack = rack_of(qlora)
    exits = list(rack.exits())
    assert [len(stage.blocks) for stage in exits] == [1, 2, 3]
    assert [formats(stage) for stage in exits] == [{None}, {None, "nf4"}, {None, "nf4"}]
    adapters = [sum(isinstance(child, Adapter) for child in stage.blocks[0].modules()) for stage in exits]
    assert adapters == [7, 14, 21]
    result = evaluate_rack(rack, rack.data.held_out)
    assert [stage["depth"] for stage in result["stages"]] == [0, 1, 2]
    assert result["loss"] == pytest.approx(result["stages"][2]["loss"])
    assert max(result["stages"][2]["loss"].values()) < math.log(rack.vocab_size)


def test_the_export_of_a_qlora_rack_has_adapters_merged_and_equal_logits(qlora: Path, tmp_path: Path) -> None:
    out = export_rack(load_rack(RunDirectory(qlora), torch.device("cpu")), tmp_path / "out").directory
    names = load_file(out / "model.safetensors")
    assert not [name for name in names if "adapter" in name or "codes" in name]
    whole, rack = load_export(out), rack_of(qlora)
    tokens = torch.arange(64).view(2, 32)
    with torch.no_grad():
        x = rack.front()(tokens)
        for stage in rack.modules():
            x = stage.forward(x)
        torch.testing.assert_close(whole.eval()(tokens), stage.head(x), atol=1e-4, rtol=1e-4)


def test_a_killed_qlora_stage_ends_with_the_same_weights(micro: Micro, qlora: Path, tmp_path: Path) -> None:
    expected = [stage.record["parts"] for stage in committed(qlora)]
    directory = tmp_path / "run"
    shutil.copytree(qlora, directory)
    shutil.rmtree(directory / "store" / "stages" / committed(qlora)[2].recipe)
    events: list[dict[str, Any]] = []

    def kill_after_the_checkpoint(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "checkpoint":
            os.kill(next(seen["pid"] for seen in reversed(events) if "pid" in seen), signal.SIGKILL)

    with contextlib.suppress(StackWiseError):  # the worker may have been done before it was killed
        Runner(micro(**progressive(**QLORA)), RunDirectory(directory), kill_after_the_checkpoint).run()
    assert [event["stage"] for event in events if event["event"] == "checkpoint"] == [2]
    run(micro(**progressive(**QLORA)), directory)
    assert [stage.record["parts"] for stage in committed(directory)] == expected


def test_a_swapped_qlora_stage_has_the_weights_of_a_resident_one(micro: Micro, qlora: Path, tmp_path: Path) -> None:
    expected = [stage.record["parts"] for stage in committed(qlora)]
    directory = tmp_path / "run"
    shutil.copytree(qlora, directory)
    shutil.rmtree(directory / "store" / "stages" / committed(qlora)[2].recipe)
    run(micro(**progressive(**QLORA), training__swap="always"), directory)
    assert [stage.record["parts"] for stage in committed(directory)] == expected


def test_stacks_of_many_precisions_hand_on_through_the_store(micro: Micro, tmp_path: Path) -> None:
    """The first as nvfp4 sees it, the second packed with adapters, the third in half with loss scaling."""
    stages = {0: {"precision": "fp4"}, 1: {"precision": "qlora"}, 2: {"precision": "half"}}
    directory = tmp_path / "run"
    run(micro(**progressive(qlora_rank=4), stages=stages, precision="fp32", store__codec="fp32"), directory)
    found = committed(directory)
    assert [set(stage.record["parts"]) for stage in found] == [
        {"front", "block.0", "head"},
        {"block.1", "adapter.block.1", "head"},
        {"block.2", "head"},
    ]
    packed = load_file(str(found[1].path("block.1")))
    assert packed["attention.q.codes"].dtype == torch.uint8
    assert all(stage.record["losses"][-1] < stage.record["losses"][0] for stage in found)
    rack = rack_of(directory)
    assert [formats(stage) for stage in rack.exits()] == [{"nvfp4"}, {"nf4"}, {None}]
    assert [stage.blocks[0].compute for stage in rack.exits()] == [None, None, torch.float16]
    with ActivationStore(directory / "store", create=False) as store:
        assert sorted(info.depth for info in store.boundaries()) == [1, 2]
        for info in store.boundaries():
            (chunk,) = (directory / "store" / "boundaries" / info.id / "activations").glob("c/0/0/0")
            before = chunk.read_bytes()
            chunk.unlink()
            assert store.repair(recomputer(RunDirectory(directory), store))["gone"] == []
            assert chunk.read_bytes() == before, "packed blocks made another boundary than training ones"


def test_a_trunk_in_another_format_and_above_the_new_stack(micro: Micro, tmp_path: Path) -> None:
    settings = progressive(building_mode="prepend", trunk_precision="fp8") | {"model__architecture__n_stacks": 2}
    run(micro(**settings), tmp_path / "run")
    stages = committed(tmp_path / "run")
    assert [set(stage.record["parts"]) for stage in stages] == [{"front", "block.1", "head"}, {"block.0"}]
    assert stages[1].record["recipe"]["stage"]["formats"] == {"block.1": {"precision": "fp8", "adapters": []}}
    assert [formats(stage) for stage in rack_of(tmp_path / "run").modules()] == [{None}, {"fp8"}]
