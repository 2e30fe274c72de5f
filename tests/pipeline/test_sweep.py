"""Sweeps: the grid, what its runs share, interruption, a combination that fails, the table; runs compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stackwise.errors import ConfigError, NotFound, UsageError
from stackwise.pipeline.batch.grid import combinations, label, parse_axes
from stackwise.pipeline.batch.sweep import Sweep, sources
from stackwise.pipeline.run import RunDirectory
from stackwise.report.compare import Entry, compare, markdown
from tests.conftest import Micro, raises_naming


@pytest.mark.parametrize(
    ("item", "values"),
    [
        ("a=1e-3,3e-3", [1e-3, 3e-3]),
        ("a=2", [2]),
        ("a=x,y", ["x", "y"]),
        ("a=[1,2],[3]", [[1, 2], [3]]),
        ("a='1,2'", ["1,2"]),
        ("a=true,null", [True, None]),
        ("a=", [None]),
        ("a=/data/x,/data/y", ["/data/x", "/data/y"]),
    ],
)
def test_values_of_an_axis(item: str, values: list[Any]) -> None:
    assert parse_axes([item]) == {"a": values}


def test_the_grid(micro: Micro) -> None:
    axes = {"training.steps": [5], "training.learning_rate": [1e-3, 3e-3], "stages.1.training.weight_decay": [0, 0.1]}
    found = combinations(axes, lambda overrides: micro(**overrides))
    assert [c.name for c in found] == [
        "learning_rate-0.001_stage1.weight_decay-0",
        "learning_rate-0.001_stage1.weight_decay-0.1",
        "learning_rate-0.003_stage1.weight_decay-0",
        "learning_rate-0.003_stage1.weight_decay-0.1",
    ]
    assert found[1].values == {"training.learning_rate": 1e-3, "stages.1.training.weight_decay": 0.1}
    assert all(c.config.training.steps == 5 for c in found)
    assert len(combinations({"training.learning_rate": [1e-3, 0.001, 2e-3]}, lambda o: micro(**o))) == 2
    (odd, _) = combinations({"data.paths": [["/a/b c"], ["/d"]]}, lambda o: micro(**o))
    assert "/" not in odd.name
    assert " " not in odd.name
    assert label("stages.3.training.grad_clip") == "stage3.grad_clip"
    with pytest.raises(UsageError):
        combinations({"training.steps": [5]}, lambda o: micro(**o))
    with pytest.raises(ConfigError, match="learning_rate"):
        combinations({"training.learning_rate": [1e-3, -1.0]}, lambda o: micro(**o))
    with raises_naming(UsageError, "training.steps"):
        parse_axes(["training.steps"])


def test_what_a_sweep_would_share_is_known_before_and_nothing_is_written(micro: Micro, tmp_path: Path) -> None:
    axes = {"model.architecture.n_stacks": [3], "stages.2.training.weight_decay": [0.0, 0.1], "seed": [0, 1]}
    sweep = Sweep(combinations(axes, lambda o: micro(**o)), tmp_path / "sweep", "again")
    order = sweep.preview()
    names = [member.combination.name for member in order]
    assert names == [
        "stage2.weight_decay-0_seed-0",
        "stage2.weight_decay-0.1_seed-0",
        "stage2.weight_decay-0_seed-1",
        "stage2.weight_decay-0.1_seed-1",
    ], "runs that share stages follow each other"
    assert list(sources(order).values()) == [
        ["train", "train", "train"],
        [names[0], names[0], "train"],
        ["train", "train", "train"],
        [names[2], names[2], "train"],
    ]
    assert not (tmp_path / "sweep").exists()


def test_no_combination_that_can_run(micro: Micro, tmp_path: Path) -> None:
    found = combinations({"training.learning_rate": [1e-3, 2e-3]}, lambda o: micro(model__vocab_size=100, **o))
    with raises_naming(UsageError, "model.vocab_size", 100):
        Sweep(found, tmp_path / "sweep", "again").preview()


def test_a_run_that_is_not_there_is_pending_in_a_sweep_and_missing_elsewhere(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "none")
    value = compare([Entry(run, "a|b", {"seed": 1})])
    assert value["runs"][0]["state"] == "pending"
    assert "a¦b" in markdown(value, "Sweep")
    with pytest.raises(NotFound):
        compare([Entry(run)])
