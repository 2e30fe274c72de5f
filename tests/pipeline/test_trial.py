"""`batch_size: auto`: found by a real trial, kept, and afterwards as if it had been given."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.batch import Batch
from stackwise.config import AUTO, StackWiseConfig
from stackwise.config.loading import build
from stackwise.config.yaml_files import dump, parse_yaml
from stackwise.errors import ConfigError
from stackwise.pipeline.job import from_plain
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.runner.auto import settle, wanted
from stackwise.pipeline.schedule import schedule
from stackwise.pipeline.trial import TrialJob, run_trial
from stackwise.training.engine import ResidentEngine, Stepped
from tests.conftest import Micro, run


def noted(events: list[dict[str, Any]]) -> list[str]:
    texts = [event["text"] for event in events if event["event"] == "note"]
    return [text for text in texts if text.startswith("training.")]


def test_what_is_found_is_kept_and_is_as_if_given(micro: Micro, tmp_path: Path) -> None:
    small = {"data__max_bytes": 40_000, "training__steps": 2, "training__checkpoint_steps": 1}
    events = run(micro(**small, training__batch_size="auto"), tmp_path / "run", only=0)
    (text,) = noted(events)
    assert text.startswith("training.batch_size: auto is ")
    assert "found by trial" in text
    found = RunDirectory(tmp_path / "run").config().training.batch_size
    samples = next(event for event in events if event["event"] == "data")["tokens"] // 32
    assert 16 < found <= samples
    assert text.startswith(f"training.batch_size: auto is {found}, ")
    again = run(micro(**small, training__batch_size="auto"), tmp_path / "run", only=0)
    assert noted(again) == [f"training.batch_size: auto is {found}, as found before"]
    assert [event["event"] for event in again if event["event"] in ("reused", "training")] == ["reused"]
    given = run(
        micro(**small, training__batch_size=found, store__path=str(tmp_path / "run/store")), tmp_path / "b", only=0
    )
    assert [event["event"] for event in given if event["event"] in ("reused", "training")] == ["reused"]
    first, other = (status(RunDirectory(tmp_path / name))["stages"][0] for name in ("run", "b"))
    assert first["weights"] == other["weights"]


def test_auto_is_read_and_written_and_a_wrong_number_is_not(micro: Micro) -> None:
    config = micro(training__batch_size="auto", stages={1: {"training": {"batch_size": "auto"}}})
    assert config.training.batch_size == AUTO
    assert build(StackWiseConfig, parse_yaml(dump(config), "x")) == config
    assert "batch_size: auto" in dump(config)
    keys = wanted(config)
    assert {key: stage.depth for key, stage in keys.items()} == {
        "training.batch_size": 0,
        "stages.1.training.batch_size": 1,
    }
    for key in keys:
        settle(config, key, 24)
    assert wanted(config) == {}
    assert config.stage_training(1).batch_size == config.training.batch_size == 24
    for wrong in (0, -1, "many", 1.5):
        with pytest.raises(ConfigError, match=r"training\.batch_size"):
            micro(training__batch_size=wrong)


def test_a_job_is_plain_data(micro: Micro) -> None:
    config = micro(training__batch_size="auto")
    job = TrialJob(dump(config), schedule(config)[1], 258, 257, 100)
    assert from_plain(TrialJob, json.loads(json.dumps(asdict(job)))) == job


@pytest.mark.parametrize(("accumulation", "microbatches"), [(1, 1), (4, 2)])
def test_a_trial_has_the_gradients_of_a_microbatch_beside_the_next(
    micro: Micro, monkeypatch: pytest.MonkeyPatch, accumulation: int, microbatches: int
) -> None:
    config, step = micro(training__batch_size="auto", training__accumulation=accumulation), ResidentEngine.step
    beside = list[bool]()

    def watched(engine: ResidentEngine, batches: Iterable[Batch], *arguments: Any) -> Stepped:
        def each() -> Iterator[Batch]:
            for batch in batches:
                beside.append(any(p.grad is not None for p in engine.parameters.values()))
                yield batch

        return step(engine, each(), *arguments)

    monkeypatch.setattr(ResidentEngine, "step", watched)
    assert run_trial(TrialJob(dump(config), schedule(config)[1], 258, 257, 2), torch.device("cpu"))["rows"] == 2
    assert beside[:4] == [False, True, False, True] if microbatches == 2 else not any(beside)
