"""The quality benchmark: what it compares is comparable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality.__main__ import DOCS, main
from benchmarks.quality.page import Gap, body, gaps, write_gaps, write_plots
from benchmarks.quality.rates import Size, grids, settled, steps_apart
from benchmarks.quality.rows import BASE, BUDGETS, PLAIN, ROWS, Budget, Row, configuration, flops, updates, whole_share
from stackwise.pipeline.schedule import schedule

TRIALS = [(row, budget) for row in ROWS for budget in row.budgets]


@pytest.mark.parametrize(("row", "budget"), TRIALS, ids=lambda one: one if isinstance(one, str) else one.name)
def test_every_row_spends_as_many_block_updates(row: Row, budget: Budget) -> None:
    config = configuration(BASE, row, budget, steps=300, rate=1e-3, seed=1)
    stages = schedule(config)
    if budget == "steps":
        assert config.training.steps == 300
        assert updates(config) <= 300 * 8
    else:
        assert updates(config) == pytest.approx(300 * (4 if budget == "half" else 8), rel=0.01)
    assert {stage.rowset for stage in stages} == (set(range(len(stages))) if config.fresh_masks else {0})
    if budget != "fresh":
        assert config.training.rows == 300 * config.training.batch_size


def test_operations_of_end_to_end_training_are_six_a_parameter_and_token() -> None:
    config = configuration(BASE, ROWS[1], "rows", steps=10, rate=1e-3, seed=0)
    tokens = 10 * config.training.batch_size * config.training.seq_len
    blocks = 8 * config.model.block_parameters
    assert flops(config, 0) == pytest.approx(6 * blocks * tokens)
    head = 512 * config.model.d_model * 0.525
    assert flops(config, 512) == pytest.approx(6 * (blocks + head) * tokens)


def test_the_share_with_the_whole_rack_in_memory_is_of_operations() -> None:
    def share(name: str, budget: Budget = "rows") -> float:
        row = next(row for row in ROWS if row.name == name)
        return whole_share(configuration(BASE, row, budget, steps=100, rate=1e-3, seed=0), 0)

    assert share("end to end") == 1.0
    assert share("end to end, swapped") == share("stages of 4") == 0.0
    assert share("grown from 2 at 0.8", "steps") == pytest.approx(0.2 * 8 / (0.8 * 2 + 0.2 * 8))


def test_tables_and_plots_name_every_row(tmp_path: Path) -> None:
    run = {
        "loss": {"0.15": 1.0, "0.5": 2.0, "0.9": 3.0},
        "bits_per_byte": 2.5,
        "updates": 2400,
        "rows": 100,
        "flops": 1e12,
        "written": 0,
        "read": 0,
    }
    found = [
        {
            "name": row.name,
            "budget": budget,
            "rate": 1e-3,
            "grid": {},
            "memory": [10**8],
            "whole": 0.5,
            "runs": [run, {**run, "flops": 2e12}],
        }
        for row, budget in TRIALS
    ]
    shown = body("quality", found)
    assert all(row.name in shown for row in ROWS)
    assert shown.count(PLAIN) == len(BUDGETS)
    write_plots(tmp_path, "quality", found)
    assert len(list(tmp_path.glob("*.svg"))) == 2 * len(BUDGETS)


def test_gaps_are_of_rows_that_are_measured_at_several_lengths(tmp_path: Path) -> None:
    for steps, loss in ((10, 2.0), (40, 1.5)):
        runs = {
            f"{name} | rows | 0.001 | 0": {"loss": {"0.5": of}, "flops": 1e9 * steps}
            for name, of in ((PLAIN, 1.0), ("grown", loss))
        }
        runs["once | rows | 0.001 | 0"] = {"loss": {"0.5": 1.0}} if steps == 10 else runs[f"{PLAIN} | rows | 0.001 | 0"]
        runs = {key: run for key, run in runs.items() if steps == 10 or not key.startswith("once")}
        setting = {"base": BASE, "steps": steps}
        (tmp_path / f"{steps}.json").write_text(json.dumps({"setting": setting, "runs": runs}))
    shallow = {"base": BASE | {"model.architecture.n_stacks": 2}, "steps": 40}
    (tmp_path / "shallow.json").write_text(json.dumps({"setting": shallow, "runs": runs}))
    found = gaps(sorted(tmp_path.glob("*.json")))
    grown = [Gap("grown", "96", steps, 1e9 * steps, apart) for steps, apart in ((10, 1.0), (40, 0.5))]
    assert [gap for gap in found if gap.name != PLAIN] == grown
    write_gaps(tmp_path, found)
    assert all("grown" in path.read_text() for path in tmp_path.glob("quality-gap*.svg"))
    assert {path.name for path in tmp_path.glob("*.svg")} == {"quality-gap-96.svg", "quality-gap-compute-96.svg"}


def test_best_rates_are_compared_by_their_places_in_the_grid() -> None:
    grid = [7.5e-4, 1.5e-3, 3e-3]
    assert steps_apart(grid, {7.5e-4: 2.0, 1.5e-3: 1.0}, {1.5e-3: 1.0, 3e-3: 2.0}) == 0
    assert steps_apart(grid, {7.5e-4: 1.0, 1.5e-3: 2.0}, {1.5e-3: 2.0, 3e-3: 1.0}) == 2


def test_the_best_rate_of_two_blocks_is_that_of_eight_within_a_step_of_the_grid() -> None:
    rates = [7.5e-4, 1.5e-3, 3e-3, 6e-3]
    by_depth = grids(DOCS, Size(96, 800), (2, 8), rates)["AdamW"]
    assert list(by_depth[2]) == list(by_depth[8]) == rates, "all of them are measured"
    assert steps_apart(rates, by_depth[2], by_depth[8]) <= 1
    assert settled(rates, by_depth[2])
    assert settled(rates, by_depth[8])
    assert not settled([*rates, 1.2e-2], {3e-3: 2.0, 6e-3: 1.0}), "the best may lie beyond"


def test_a_directory_that_is_not_there_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rows", "end to end", "--rates", "1e-3", "--seeds", "1", "--steps", "4"]
    assert main([*arguments, "--results", str(tmp_path / "r.json"), "--dir", str(tmp_path / "nowhere")]) == 1
    assert f"No such file or directory: {tmp_path / 'nowhere'}" in capsys.readouterr().err
