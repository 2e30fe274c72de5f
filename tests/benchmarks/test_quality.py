"""The quality benchmark: what it compares is comparable."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality.__main__ import BASE, main
from benchmarks.quality.page import body, write_plots
from benchmarks.quality.rows import BUDGETS, PLAIN, ROWS, Budget, Row, configuration, flops, updated
from stackwise.pipeline.schedule import schedule

TRIALS = [(row, budget) for row in ROWS for budget in row.budgets]


@pytest.mark.parametrize(("row", "budget"), TRIALS, ids=lambda one: one if isinstance(one, str) else one.name)
def test_every_row_spends_as_many_block_updates(row: Row, budget: Budget) -> None:
    config = configuration(BASE, row, budget, steps=300, rate=1e-3, seed=1)
    stages = schedule(config)
    steps = config.training.steps
    assert steps is not None
    spent = sum(updated(stage) * steps for stage in stages)
    assert spent == pytest.approx(300 * 8, rel=0.01)
    assert {stage.rowset for stage in stages} == (set(range(len(stages))) if config.fresh_masks else {0})
    if budget == "rows":
        assert config.training.rows == 300 * config.training.batch_size


def test_operations_of_end_to_end_training_are_six_a_parameter_and_token() -> None:
    config = configuration(BASE, ROWS[1], "rows", steps=10, rate=1e-3, seed=0)
    tokens = 10 * config.training.batch_size * config.training.seq_len
    blocks = 8 * config.model.block_parameters
    assert flops(config, 0) == pytest.approx(6 * blocks * tokens)
    head = 512 * config.model.d_model * 0.525
    assert flops(config, 512) == pytest.approx(6 * (blocks + head) * tokens)


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
            "memory": 10**8,
            "runs": [run, {**run, "flops": 2e12}],
        }
        for row, budget in TRIALS
    ]
    shown = body("quality", found)
    assert all(row.name in shown for row in ROWS)
    assert shown.count(PLAIN) == 2
    write_plots(tmp_path, "quality", found)
    assert len(list(tmp_path.glob("*.svg"))) == 2 * len(BUDGETS)


def test_a_directory_that_is_not_there_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rows", "end to end", "--rates", "1e-3", "--seeds", "1", "--steps", "4"]
    assert main([*arguments, "--results", str(tmp_path / "r.json"), "--dir", str(tmp_path / "nowhere")]) == 1
    assert f"No such file or directory: {tmp_path / 'nowhere'}" in capsys.readouterr().err
