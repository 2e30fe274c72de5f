"""Whole runs on the micro preset: reuse, resume after any end, damage, honesty of what is stored and learnt."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stackwise.batch import Batch
from stackwise.config import StackWiseConfig
from stackwise.config.unused import unused_settings
from stackwise.errors import BusyError, NoSpaceError, UsageError
from stackwise.pipeline.committed.load import CommittedRack, load_rack
from stackwise.pipeline.recipe import codec_name
from stackwise.pipeline.rows import choose_samples
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.runner.runner import Runner
from stackwise.store import ActivationStore
from stackwise.training.forward import forward_rows
from tests.conftest import Micro, raises_naming, run


def weights(directory: Path) -> list[str]:
    return [stage["weights"] for stage in status(RunDirectory(directory))["stages"]]


def named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == name]


@pytest.fixture(scope="module")
def finished(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> tuple[StackWiseConfig, Path]:
    """A finished run of two stages, in float32 throughout."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    config = micro(store__codec="fp32")
    run(config, directory)
    return config, directory


@pytest.fixture
def copy(finished: tuple[StackWiseConfig, Path], tmp_path: Path) -> tuple[StackWiseConfig, Path]:
    """A copy of it to spoil: a run directory can be moved."""
    shutil.copytree(finished[1], tmp_path / "run")
    return finished[0], tmp_path / "run"


def test_a_finished_run_says_so(finished: tuple[StackWiseConfig, Path]) -> None:
    shown = status(RunDirectory(finished[1]))
    assert shown["state"] == "done"
    assert [s["state"] for s in shown["stages"]] == ["done", "done"]
    assert [s["blocks"] for s in shown["stages"]] == [[0, 0], [1, 1]]
    assert shown["stages"][0]["trunk"] is None
    assert len(shown["stages"][1]["trunk"]) == 32
    assert all(s["step"] == s["steps"] == 20 for s in shown["stages"])
    assert all(0 <= s["wait_fraction"] < 1 and s["peak_memory_bytes"] > 0 for s in shown["stages"])


def test_the_event_log_has_a_loss_for_every_step(finished: tuple[StackWiseConfig, Path]) -> None:
    lines = [json.loads(line) for line in (finished[1] / "events.jsonl").read_text().splitlines()]
    for depth in (0, 1):
        losses = [loss for e in lines if e["event"] == "step" and e["stage"] == depth for loss in e["losses"]]
        assert len(losses) == 20
        assert losses[-1] < losses[0]


def test_running_again_reuses_every_stage_and_says_why(copy: tuple[StackWiseConfig, Path]) -> None:
    before = weights(copy[1])
    events = run(*copy)
    assert [e["reason"] for e in named(events, "reused")] == ["committed: the recipe is the same"] * 2
    assert not named(events, "training")
    assert named(events, "evaluation")[0]["reused"]
    assert weights(copy[1]) == before


def test_a_change_of_one_stage_trains_that_stage_alone(copy: tuple[StackWiseConfig, Path]) -> None:
    config, directory = copy
    before = weights(directory)
    changed = config.model_copy(deep=True)
    changed.stages = {1: {"training": {"learning_rate": 1e-3}}}  # type: ignore[dict-item]
    events = run(changed, directory)
    assert [e["stage"] for e in named(events, "reused")] == [0]
    (trained,) = named(events, "training")
    assert trained["stage"] == 1
    assert trained["reason"] == "changed: stages.1.training.learning_rate: 0.003 → 0.001"
    assert weights(directory)[0] == before[0]
    assert weights(directory)[1] != before[1]
    assert not named(events, "recomputing"), "the boundary was kept"
    # and back: what was committed before is still there
    assert not named(run(config, directory), "training")
    assert weights(directory) == before


def test_what_does_not_shape_a_result_is_not_in_a_recipe(copy: tuple[StackWiseConfig, Path]) -> None:
    config, directory = copy
    changed = config.model_copy(deep=True)
    changed.training.log_every, changed.training.checkpoint_steps, changed.store.keep = 3, 7, "none"
    changed.name = "other"
    assert not named(run(changed, directory), "training")


def test_runs_that_share_a_store_share_stages(finished: tuple[StackWiseConfig, Path], tmp_path: Path) -> None:
    config = finished[0].model_copy(deep=True)
    shutil.copytree(finished[1] / "store", tmp_path / "store")
    config.store.path = str(tmp_path / "store")
    events = run(config, tmp_path / "another")
    assert not named(events, "training")
    with ActivationStore(tmp_path / "store", create=False) as store:
        assert str((tmp_path / "another").resolve()) in store.runs()


def test_a_committed_stage_whose_record_was_altered_is_retrained(copy: tuple[StackWiseConfig, Path]) -> None:
    config, directory = copy
    before = weights(directory)
    recipe = status(RunDirectory(directory))["stages"][0]["recipe"]
    (directory / "store" / "stages" / recipe / "stage.json").write_text("{}")
    events = run(config, directory)
    assert [e["stage"] for e in named(events, "training")] == [0]
    assert "stage.json" in named(events, "warning")[0]["text"]
    assert weights(directory) == before


def test_gc_beside_a_run_takes_nothing_of_it(finished: tuple[StackWiseConfig, Path], tmp_path: Path) -> None:
    config, directory = finished
    seen = []

    def collect(event: dict[str, Any]) -> None:
        if event["event"] in ("training", "checkpoint", "committed", "writing", "written", "reused"):
            with ActivationStore(tmp_path / "run" / "store", create=False) as store:
                seen.append(store.gc())

    Runner(config, RunDirectory(tmp_path / "run"), collect).run()
    assert len(seen) > 8
    assert not any(found["stages"] or found["boundaries"] for found in seen)
    assert weights(tmp_path / "run") == weights(directory)


def test_a_saved_configuration_says_nothing_is_unused(finished: tuple[StackWiseConfig, Path]) -> None:
    assert unused_settings(RunDirectory(finished[1]).config()) == []


@pytest.mark.parametrize("harm", ["delete", "alter"])
def test_a_committed_file_that_was_touched_is_retrained_from_its_upstream(
    copy: tuple[StackWiseConfig, Path], harm: str
) -> None:
    config, directory = copy
    before = weights(directory)
    (file,) = (directory / "store" / "stages").glob("*/block.0.safetensors")
    if harm == "delete":
        file.unlink()
    else:
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    events = run(config, directory)
    (warning,) = named(events, "warning")
    assert "block.0.safetensors" in warning["text"]
    assert [e["stage"] for e in named(events, "training")] == [0]
    assert weights(directory) == before


def test_a_damaged_boundary_is_never_trained_on(copy: tuple[StackWiseConfig, Path], micro: Micro) -> None:
    config, directory = copy
    (chunk,) = (directory / "store" / "boundaries").glob("*/activations/c/0/0/0")
    raw = bytearray(chunk.read_bytes())
    raw[1000] ^= 16
    chunk.write_bytes(raw)
    changed = config.model_copy(deep=True)
    changed.stages = {1: {"training": {"learning_rate": 1e-3}}}  # type: ignore[dict-item]
    events = run(changed, directory)
    assert "chunk" in named(events, "warning")[0]["text"]
    assert named(events, "recomputing")
    clean = run(
        micro(store__codec="fp32", **{"stages": {1: {"training": {"learning_rate": 1e-3}}}}), directory.parent / "b"
    )
    assert weights(directory) == weights(directory.parent / "b")
    assert not named(clean, "warning")


def test_one_stage_at_a_time_gives_the_same_weights(finished: tuple[StackWiseConfig, Path], tmp_path: Path) -> None:
    config, directory = finished
    with raises_naming(UsageError, "stage 0", "stage 1"):
        run(config, tmp_path / "run", only=1)
    run(config, tmp_path / "run", only=0)
    assert status(RunDirectory(tmp_path / "run"))["state"] == "pending"
    run(config, tmp_path / "run", only=1)
    assert weights(tmp_path / "run") == weights(directory)
    with raises_naming(UsageError, "stage 2"):
        run(config, tmp_path / "run", only=2)


def test_keep_none_leaves_no_boundary_and_changes_no_weight(
    finished: tuple[StackWiseConfig, Path], tmp_path: Path
) -> None:
    config = finished[0].model_copy(deep=True)
    config.store.keep = "none"
    events = run(config, tmp_path / "run")
    assert weights(tmp_path / "run") == weights(finished[1])
    assert [e["stage"] for e in named(events, "dropped")] == [1]
    assert not list((tmp_path / "run" / "store" / "boundaries").iterdir())
    config.stages = {1: {"training": {"learning_rate": 1e-3}}}  # type: ignore[dict-item]
    assert "made by forward passes" in named(run(config, tmp_path / "run"), "recomputing")[0]["text"]


def test_two_runners_on_one_run_directory(copy: tuple[StackWiseConfig, Path]) -> None:
    with RunDirectory(copy[1]).lock(), raises_naming(BusyError, os.getpid()):
        run(*copy)


def test_a_quota_that_cannot_hold_two_boundaries_is_refused(micro: Micro, tmp_path: Path) -> None:
    with raises_naming(NoSpaceError, "store.max_bytes"):
        run(micro(store__max_bytes=100_000, **{"model.architecture.n_stacks": 3}), tmp_path / "run")


def rack_of(directory: Path) -> CommittedRack:
    return load_rack(RunDirectory(directory), torch.device("cpu"))


def test_a_stored_activation_is_the_trunks_own_bit_for_bit(finished: tuple[StackWiseConfig, Path]) -> None:
    config, directory = finished
    rack = rack_of(directory)
    samples = choose_samples(config, rack.data.train, 0)
    with ActivationStore(directory / "store", create=False) as store:
        (info,) = store.boundaries()
        assert info.codec == codec_name(config.store) == "fp32"
        rowset = store.rowset(info.rowset)
        masks = store.masks(rowset.mask_ids, config.training.seq_len)
        tokens = rack.data.train.samples(samples, config.training.seq_len)
        assert (rowset.sample_ids == rack.data.train.sample_ids(config.training.seq_len)[samples]).all()
        stage = next(rack.modules())
        rows = forward_rows(config.training.seq_len)
        with torch.no_grad(), store.reader(info.id) as reader:
            for first in range(0, info.rows, rows):
                part = slice(first, first + rows)
                tensors = {"tokens": torch.from_numpy(tokens[part]), "masks": torch.from_numpy(masks[part])}
                ids = rack.objective.shown(Batch(np.arange(len(tokens[part])), None, tensors))
                expected = stage.forward(rack.front()(ids), None)
                stored = reader.read(np.arange(first, min(first + rows, info.rows)))
                assert torch.equal(stored, expected)


def test_masks_hit_the_schedule_and_differ_between_samples(finished: tuple[StackWiseConfig, Path]) -> None:
    with ActivationStore(finished[1] / "store", create=False) as store:
        (info,) = store.boundaries()
        masks = store.masks(store.rowset(info.rowset).mask_ids, 32)
    fractions = masks.mean(axis=1)
    assert fractions.min() >= 0.14
    assert fractions.max() <= 0.91
    assert abs(fractions.mean() - 0.525) < 0.03
    assert len(np.unique(masks, axis=0)) > 0.99 * len(masks)


def test_depth_as_time_gives_each_stage_its_own_fractions(micro: Micro, tmp_path: Path) -> None:
    events = run(micro(training__mask_schedule_over="depth"), tmp_path / "run")
    assert len(named(events, "committed")) == 2
