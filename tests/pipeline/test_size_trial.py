"""`block_size: auto`: bounded by memory, chosen by measured gain, kept, and afterwards as if it had been given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stackwise.cli.commands.run import list_stages
from stackwise.config import StackWiseConfig
from stackwise.config.loading import build
from stackwise.config.unused import unused_settings
from stackwise.config.yaml_files import dump, parse_yaml
from stackwise.errors import ConfigError
from stackwise.pipeline.estimate import SHARE, Estimate
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.runner.auto import largest_fitting, sizes, try_sizes
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.schedule import schedule
from tests.conftest import Micro, run
from tests.pipeline.test_run import named, weights

SMALL: dict[str, Any] = {
    "data__max_bytes": 40_000,
    "training__steps": 4,
    "training__trial_steps": 6,
    "evaluation__samples": 4,
}
AUTO = SMALL | {"training__block_size": "auto"}


@pytest.fixture(scope="module")
def found(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("sizes") / "run"
    return directory, run(micro(**AUTO), directory)


def on_sizes(events: list[dict[str, Any]]) -> list[str]:
    return [event["text"] for event in named(events, "note") if event["text"].startswith("training.block_size")]


def test_the_size_that_measures_best_is_taken_and_kept(found: tuple[Path, list[dict[str, Any]]], micro: Micro) -> None:
    directory, events = found
    known = RunDirectory(directory).manifest()["auto"]["training.block_size"]
    assert set(known["losses"]) == {"1", "2"}
    best = min((1, 2), key=lambda size: known["losses"][str(size)])
    assert known["blocks"] == best == RunDirectory(directory).config().training.block_size
    (text,) = on_sizes(events)
    assert text.startswith(
        f"training.block_size: auto is {best}: lowest held-out loss after 6 steps of each block (1: "
    )
    assert "at most 2 of 2 blocks fit" in text
    assert {event["phase"] for event in named(events, "preparing")} >= {
        "trying stages of 1 block, 1 of 2 sizes",
        "trying stages of 2 blocks, 2 of 2 sizes",
    }
    assert len(status(RunDirectory(directory))["stages"]) == 2 // best
    assert not (directory / "logs" / "trial").exists()
    again = run(micro(**AUTO), directory)
    assert on_sizes(again) == [f"training.block_size: auto is {best}, as found before"]
    assert not named(again, "training")


def test_it_is_then_as_if_given(found: tuple[Path, list[dict[str, Any]]], micro: Micro, tmp_path: Path) -> None:
    directory, _ = found
    size, store = RunDirectory(directory).config().training.block_size, str(directory / "store")
    given = SMALL | {"training__block_size": size, "store__path": store}
    del given["training__trial_steps"]
    events = run(micro(**given), tmp_path / "run")
    assert not named(events, "training")
    assert weights(tmp_path / "run") == weights(directory)


@pytest.mark.stress
def test_a_small_run_that_is_finished_is_not_done_again(micro: Micro, tmp_path: Path) -> None:
    config = micro(**AUTO, precision="fp32")
    tried, told = sizes(config, 258, "data", "cpu", 1 << 40), list[str]()

    def small_run(small: StackWiseConfig, name: str, observe: Any) -> dict[str, Any]:
        def note(event: dict[str, Any]) -> None:
            told.append(event["event"])
            observe(event)

        return Runner(small, RunDirectory(tmp_path / name), note).run()

    first = try_sizes(config, tried, small_run, lambda event, **values: None)
    assert "training" in told
    told.clear()
    assert try_sizes(config, tried, small_run, lambda event, **values: None) == first
    assert "training" not in told


def test_memory_bounds_the_sizes(micro: Micro) -> None:
    config = micro(**AUTO, model__architecture__n_stacks=12, model__d_model=512)
    given = micro(**SMALL, training__block_size=5, model__architecture__n_stacks=12, model__d_model=512)
    taken = max(Estimate(given, 258, stage).memory for stage in schedule(given))
    memory = round(taken / SHARE) + 1
    assert largest_fitting(config, 258, memory) == 5
    assert sizes(config, 258, "data", "cpu", memory).candidates == [1, 2, 4, 5]
    assert sizes(config, 258, "data", "cpu", 1 << 50).candidates == [1, 2, 4, 8, 12]
    assert sizes(config, 258, "data", "cpu", 1).candidates == [1]
    config.training.memory = memory
    assert sizes(config, 258, "data", "cpu", 1 << 50).most == 5


def test_it_is_read_written_and_listed_once_found(
    found: tuple[Path, list[dict[str, Any]]], micro: Micro, tmp_path: Path
) -> None:
    config = micro(**AUTO)
    assert "block_size: auto" in dump(config)
    assert build(StackWiseConfig, parse_yaml(dump(config), "x")) == config
    (tmp_path / "c.yaml").write_text(dump(config))
    arguments = [str(tmp_path / "c.yaml"), "--json", "--run"]
    refused = CliRunner().invoke(list_stages, [*arguments, str(tmp_path / "none")])
    assert "no run has found it yet" in str(refused.exception)
    assert CliRunner().invoke(list_stages, [*arguments, str(found[0])]).exit_code == 0
    assert "training.mode.trial_steps is unused: training.mode.block_size is a number" in unused_settings(
        micro(training__trial_steps=5)
    )


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"mode": "independent"}, "do not stand on each other"),
        ({"mode": "fused", "fusion_mode": "trainable"}, "whatever the size"),
        ({"batch_size": "auto"}, "batch_size is auto as well"),
        ({"mask_schedule_over": "depth", "mask_windows": [[0.15, 0.9]]}, "a known number of stages"),
    ],
)
def test_where_it_means_nothing_it_is_refused_in_a_line(training: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        StackWiseConfig.from_preset(
            "micro", {"training.block_size": "auto"} | {f"training.{key}": value for key, value in training.items()}
        )
