"""Schedules beyond the plain ones, run whole on the micro preset: what each stage starts from, commits and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stackwise.config import StackWiseConfig
from stackwise.config.loading import build
from stackwise.pipeline.committed.load import CommittedRack, load_rack
from stackwise.pipeline.committed.use import evaluate_rack
from stackwise.pipeline.run import RunDirectory, status
from stackwise.store import ActivationStore, CommittedStage
from tests.conftest import Micro, run

THREE = {"model__architecture__n_stacks": 3, "training__steps": 8, "training__mode": "layerwise"}


def committed(directory: Path) -> list[CommittedStage]:
    """A run's committed stages, lowest first."""
    with ActivationStore(directory / "store", create=False) as store:
        stages = status(RunDirectory(directory))["stages"]
        found = [store.stage(stage["recipe"]) for stage in stages if stage["recipe"] is not None]
    assert all(stage is not None for stage in found)
    return [stage for stage in found if stage is not None]


def rack_of(directory: Path) -> CommittedRack:
    return load_rack(RunDirectory(directory), torch.device("cpu"))


@pytest.fixture(scope="module")
def ran(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run of three stages with a setting, made once for each."""
    made: dict[str, Path] = {}

    def make(**setting: Any) -> Path:
        key = str(setting)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("modes") / "run"
            run(micro(**{**THREE, **setting}), made[key])
        return made[key]

    return make


def test_a_shared_tail_trains_along_with_every_stage(ran: Any) -> None:
    stages = committed(ran(training__lookahead="tail"))
    assert [set(stage.record["parts"]) for stage in stages] == [
        {"front", "block.0", "block.2", "head"},
        {"block.1", "block.2", "head"},
        {"block.2", "head"},
    ]
    digests = [stage.record["parts"]["block.2"] for stage in stages]
    assert len(set(digests)) == 3
    assert [stage.record["recipe"]["initial"]["block.2"] for stage in stages] == [None, *digests[:2]]


def test_an_auxiliary_head_stays_with_its_stage(ran: Any, tmp_path: Path) -> None:
    from stackwise.pipeline.committed.use import export_rack

    directory = ran(training__lookahead="auxiliary", training__lookahead_blocks=2)
    stages = committed(directory)
    assert {"auxiliary.0.0", "auxiliary.0.1"} < set(stages[0].record["parts"])
    assert set(stages[2].record["parts"]) == {"block.2", "head"}
    names = load_file(
        export_rack(load_rack(RunDirectory(directory), torch.device("cpu")), tmp_path / "out").directory
        / "model.safetensors"
    )
    assert not any("auxiliary" in name for name in names)


def test_an_exit_goes_through_what_its_stage_trained_with(ran: Any) -> None:
    """The loss of a stage's exit is that of its own blocks, those beyond and its head, composed by hand."""
    rack = rack_of(ran(training__lookahead="tail"))
    held_out = rack.data.held_out
    tokens = torch.from_numpy(held_out.samples(np.arange(4), 32))
    with torch.no_grad():
        exits = list(rack.exits())
        assert exits[0].front is not None
        assert exits[1].front is None
        x = exits[0].forward(exits[0].front(tokens))
        logits = exits[1].head(exits[1].features(exits[1].forward(x)))
        parts = rack.versions[1]
        block = {name: load_file(str(parts[name].path)) for name in ("block.0", "block.1", "block.2")}
        from stackwise.model import Block

        y = rack.front(parts)(tokens)
        for weights in block.values():
            module = Block(rack.config.model)
            module.load_state_dict(weights)
            y = module.eval()(y, causal=False, segments_BS=None)
        assert torch.equal(rack.head(parts)(y), logits)


def test_independent_stages_stand_on_the_first_ones_front_alone(ran: Any) -> None:
    directory = ran(training__mode="independent", training__block_size=1)
    stages = committed(directory)
    front = stages[0].record["parts"]["front"]
    for stage in stages[1:]:
        recipe = stage.record["recipe"]
        assert recipe["reads"] is None
        assert recipe["initial"]["front"] == front
        assert recipe["initial"]["head"] is None
        assert "front" not in stage.record["parts"]
    rack = rack_of(directory)
    result = evaluate_rack(rack, rack.data.held_out)
    by_depth = result["stages"]
    # A fraction is answered by the stage whose window holds it.
    for fraction, depth in zip(("0.15", "0.5", "0.9"), rack.exit_of(np.array([5, 16, 29])), strict=True):
        assert result["loss"][fraction] == by_depth[depth]["loss"][fraction]
    assert rack.exit_of(np.array([5, 16, 29])).tolist() == [0, 1, 2]


def test_prepended_stacks_train_below_those_that_stand_still(micro: Micro, tmp_path: Path) -> None:
    config = micro(
        training__steps=8,
        training__progressive__enabled=True,
        training__progressive__building_mode="prepend",
        model__architecture__n_stacks=3,
    )
    run(config, tmp_path / "run")
    stages = committed(tmp_path / "run")
    assert [stage.record["blocks"] for stage in stages] == [[2, 2], [1, 2], [0, 2]]
    assert [set(stage.record["parts"]) for stage in stages] == [{"front", "block.2", "head"}, {"block.1"}, {"block.0"}]
    assert stages[2].record["recipe"]["initial"]["block.2"] == stages[0].record["parts"]["block.2"]
    rack = rack_of(tmp_path / "run")
    assert [len(stage.blocks) for stage in rack.exits()] == [1, 2, 3]


@pytest.mark.stress
def test_fresh_masks_give_every_stage_rows_of_its_own(ran: Any) -> None:
    stages = committed(ran(training__fresh_masks=True))
    assert len({stage.record["recipe"]["rowset"] for stage in stages}) == 3


def test_fusion_starts_from_what_the_sections_came_to(micro: Micro, tmp_path: Path) -> None:
    config = micro(
        **{**THREE, "model__architecture__n_stacks": 4, "training__steps": 4},
        training__fusion__strategy="hierarchical",
        store__keep="none",
    )
    run(config, tmp_path / "run")
    stages = committed(tmp_path / "run")
    assert [stage.record["blocks"] for stage in stages[4:]] == [[0, 1], [2, 3], [0, 3]]
    pair = stages[5].record["recipe"]
    assert pair["initial"]["block.2"] == stages[2].record["parts"]["block.2"]
    assert pair["reads"]["trunk"] != stages[2].record["recipe"]["reads"]["trunk"], "the pair below was fused first"
    assert stages[6].record["recipe"]["initial"]["block.1"] == stages[4].record["parts"]["block.1"]
    rack = rack_of(tmp_path / "run")
    assert [(len(stage.blocks), stage.front is None) for stage in rack.exits()] == [
        *((1, False), (1, True), (1, True), (1, True)),  # up the rack
        *((2, False), (2, True), (4, False)),  # each pair, then the whole
    ]
    assert len(evaluate_rack(rack, rack.data.held_out)["stages"]) == 7


def test_fraction_windows_may_overlap(micro: Micro, tmp_path: Path) -> None:
    windows = [[0.15, 0.6], [0.4, 0.9]]
    config = micro(training__mask_schedule_over="depth", training__mask_windows=windows)
    run(config, tmp_path / "run")
    recipes = [stage.record["recipe"] for stage in committed(tmp_path / "run")]
    assert [recipe["settings"]["training"]["mask_windows"] for recipe in recipes] == [windows, windows]


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"mode": "independent", "objective": "clm"}, "clm masks nothing"),
        (
            {"progressive": {"enabled": True, "time_interpretation": "depth"}, "objective": "clm"},
            "clm masks nothing: there are no fractions to spread over depth",
        ),
        ({"mask_schedule_over": "depth", "mask_windows": [[0.15, 0.3], [0.5, 0.9]]}, "just above 0.3"),
        ({"mask_schedule_over": "depth", "mask_windows": [[0.15, 0.9]]}, "1 window for 2 stages: give"),
        ({"mask_schedule_over": "depth", "mask_windows": [[0.9, 0.15], [0.15, 0.9]]}, "does not run upwards"),
        ({"mode": "independent", "fusion": {"strategy": "trainable"}}, "do not stand on each other"),
        (
            {"progressive": {"enabled": True, "time_interpretation": "depth", "stack_time_mapping": "custom"}},
            "custom needs training.mask_windows",
        ),
    ],
)
def test_schedules_that_cannot_be_are_refused_in_a_line(training: dict[str, Any], said: str) -> None:
    from stackwise.errors import ConfigError

    shape = {"architecture": {"n_stacks": 2}}
    with pytest.raises(ConfigError, match=said):
        build(StackWiseConfig, {"model": shape, "training": {"mode": "layerwise", **training}})
