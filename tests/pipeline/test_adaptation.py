"""A last stage that makes the rack causal: what it starts from, how the rack counts afterwards, and what cannot be."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.cli.tables import listing
from stackwise.config import StackWiseConfig
from stackwise.errors import ConfigError, StackWiseError, UsageError
from stackwise.evaluation import HeldOut, evaluate
from stackwise.objectives import CLMObjective
from stackwise.pipeline.committed.generate import Sampling, generate
from stackwise.pipeline.committed.load import load_rack
from stackwise.pipeline.committed.use import export_rack, held_out_samples, recomputer
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.schedule import schedule
from stackwise.pretrained import load_rack as load_export
from stackwise.report import write
from stackwise.store import ActivationStore
from tests.conftest import Micro, raises_naming, run
from tests.pipeline.test_modes import committed
from tests.pipeline.test_run import named, weights

PLAIN: dict[str, Any] = {"training__steps": 12, "model__dropout": 0.1}
CAUSAL = PLAIN | {"training__adaptation": "causal", "training__adaptation_steps": 10}


@pytest.fixture(scope="module")
def adapted(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without the stage, then the same with it."""
    directory = tmp_path_factory.mktemp("adapted") / "run"
    run(micro(**PLAIN), directory)
    events = run(micro(**CAUSAL), directory)
    assert [event["stage"] for event in named(events, "reused")] == [0, 1]
    return directory


def test_it_starts_from_what_the_stages_came_to_and_trains_all_of_it(adapted: Path) -> None:
    *below, last = committed(adapted)
    parts: dict[str, str] = {}
    for stage in below:
        parts |= stage.record["parts"]
    assert last.record["recipe"]["initial"] == parts
    assert set(last.record["parts"]) == set(parts)
    assert not set(last.record["parts"].values()) & set(parts.values())
    assert last.record["recipe"]["stage"]["causal_from"] == 0
    assert last.record["steps"] == 10
    assert below[1].record["recipe"]["stage"]["causal_from"] is None


def test_the_rack_then_counts_as_causal(adapted: Path, tmp_path: Path) -> None:
    rack = load_rack(RunDirectory(adapted), torch.device("cpu"))
    result = json.loads((adapted / "evaluation.json").read_text())
    assert [stage["likelihood"] for stage in result["stages"]] == ["bound", "bound", "exact"]
    assert result["likelihood"] == "exact"
    out = export_rack(load_rack(RunDirectory(adapted), torch.device("cpu")), tmp_path / "out").directory
    assert json.loads((out / "config.json").read_text())["stackwise"]["causal"] is True
    whole = load_export(out)
    indices, split = held_out_samples(rack, rack.data.held_out), rack.data.held_out
    tokens, sizes = split.samples(indices, 32), split.sample_bytes(indices, 32)
    samples = HeldOut(tokens, sizes, separator_id=rack.data.tokenizer.separator_id)
    exact = evaluate(whole.front, list(rack.modules()), samples, CLMObjective())
    assert result["bits_per_byte"] == pytest.approx(exact["bits_per_byte"])
    assert result["stages"][2]["bits_per_byte"] == result["bits_per_byte"]
    said = generate(rack, "import", Sampling(length=4, causal=True))
    assert said["after"].startswith("import")
    with raises_naming(UsageError, "training.objective"):
        generate(rack, "import [MASK*3]")
    page = write(RunDirectory(adapted)).read_text()
    assert "then causal" in page
    assert "before the rack was made causal, an upper bound" in page


def test_a_boundary_below_it_is_repaired_as_it_was_written(adapted: Path, tmp_path: Path) -> None:
    shutil.copytree(adapted, tmp_path / "run")
    with ActivationStore(tmp_path / "run" / "store", create=False) as store:
        (info,) = store.boundaries()
        chunk = next((tmp_path / "run" / "store" / "boundaries" / info.id / "activations").glob("c/*/0/0"))
        before = chunk.read_bytes()
        chunk.unlink()
        assert store.repair(recomputer(RunDirectory(tmp_path / "run"), store))["gone"] == []
    assert chunk.read_bytes() == before


@pytest.mark.parametrize("swapped", [False, True])
def test_killed_in_it_and_swapped_the_weights_are_the_same(
    micro: Micro, adapted: Path, tmp_path: Path, swapped: bool
) -> None:
    directory, expected = tmp_path / "run", weights(adapted)
    shutil.copytree(adapted, directory)
    shutil.rmtree(directory / "store" / "stages" / committed(adapted)[2].recipe)
    config = micro(**CAUSAL, training__swap="always" if swapped else "auto", training__log_every=1)
    events: list[dict[str, Any]] = []

    def kill(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "checkpoint" or (swapped and event["event"] == "step" and event["step"] >= 2):
            os.kill(next(seen["pid"] for seen in reversed(events) if "pid" in seen), signal.SIGKILL)

    with contextlib.suppress(StackWiseError):  # the worker may have been done before it was killed
        Runner(config, RunDirectory(directory), kill).run()
    run(config, directory)
    assert weights(directory) == expected


def test_its_settings_can_be_overridden_and_are_shown(micro: Micro) -> None:
    config = micro(**CAUSAL, stages__2__training__learning_rate=1e-4, stages__2__training__steps=7)
    row = listing(config)[2]
    assert (row["blocks"], row["reads"], row["steps"], row["learning_rate"]) == ([0, 1], "tokens", 7, 1e-4)
    assert row["causal"]
    fused = micro(**CAUSAL, training__fusion__strategy="trainable", training__fusion__steps=9)
    assert [fused.stage_training(stage.depth).steps for stage in schedule(fused)] == [12, 12, 9, 10]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"training": {"objective": "clm"}}, "causal from the start"),
        ({"training": {"objective": "custom"}}, "does not say tokens"),
        ({"training": {"objective": {"name": "mask_diffusion", "block": 8}}}, "with a cache as it is"),
        ({"training": {"mode": "independent"}}, "do not stand on each other"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(settings: dict[str, Any], said: str) -> None:
    training = {"adaptation": "causal", **settings.get("training", {})}
    with pytest.raises(ConfigError, match=said):
        StackWiseConfig(model=settings.get("model", {}), training=training).validate()
