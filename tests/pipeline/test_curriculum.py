"""Curricula: an order of rows that follows from seed and content, in runs that are swapped and killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stackwise.batch import TOKENS
from stackwise.config.training import Curriculum
from stackwise.errors import UsageError
from stackwise.store import RowOrder
from stackwise.training.curriculum import CurriculumOrder, difficulties
from stackwise.training.feed import Feed, RowSource
from tests.conftest import Micro, run
from tests.pipeline.storm import kill_worker
from tests.pipeline.test_run import named, weights


def order(**settings: Any) -> CurriculumOrder:
    plain = RowOrder(40, seed=(7, "order"), chunk_rows=4, window_chunks=2, select=np.arange(0, 40, 2))
    hard_N = np.arange(20, dtype=np.float64)[::-1]  # the last rows are the easiest
    return CurriculumOrder(plain, hard_N, Curriculum(**settings), step_rows=4, steps=20)


@pytest.mark.parametrize("competence", ["sqrt", "linear"])
def test_the_order_follows_from_the_seed(competence: str) -> None:
    whole = order(competence=competence, start=0.2, until=0.5).at(0, 200)
    again = order(competence=competence, start=0.2, until=0.5)
    np.testing.assert_array_equal(np.concatenate([again.batch(number, 2) for number in range(99, -1, -1)][::-1]), whole)
    assert set(whole[:4]) <= {32, 34, 36, 38}, "a fifth of 20 rows"
    for step in range(10):
        power = 1 if competence == "linear" else 2
        share = (step / 10 * (1 - 0.2**power) + 0.2**power) ** (1 / power)  # equations 4 and 7
        assert again.competence(step) == pytest.approx(share)
        assert whole[step * 4 : step * 4 + 4].min() >= 40 - 2 * np.ceil(20 * share)
    plain = RowOrder(40, seed=(7, "order"), chunk_rows=4, window_chunks=2, select=np.arange(0, 40, 2))
    np.testing.assert_array_equal(whole[40:], plain.at(0, 160))
    position = 0
    while position < 200:  # what a reader asks for ahead is what comes
        rows, end = again.window_rows(position)
        assert set(whole[position:end]) <= set(rows)
        position = end


def test_difficulties_follow_from_tokens() -> None:
    tokens = torch.tensor([[1, 1, 1, 1], [1, 2, 1, 2], [3, 4, 5, 6]]).repeat_interleave(16, dim=1)
    tokens[1] = torch.tensor([1, 2] * 32)
    feed = Feed(None, 64, {TOKENS: RowSource("", lambda rows: tokens[rows])})  # type: ignore[arg-type]
    for by in ("rarity", "compression"):
        hard = difficulties(feed, np.arange(3), by, 0)
        assert hard[0] < hard[1] < hard[2]
        np.testing.assert_array_equal(np.argsort(difficulties(feed, np.array([0, 2]), by, 0)), [0, 1])
    tokens = torch.tensor([[5, 0, 5, 5, 5, 0], [5, 5, 5, 5, 5, 5], [0, 5, 0, 0, 5, 0], [0, 0, 0, 0, 0, 0]])
    feed = Feed(None, 6, {TOKENS: RowSource("", lambda rows: tokens[rows])})  # type: ignore[arg-type]
    assert difficulties(feed, np.arange(4), "length", 0).tolist() == [2.0, 6.0, 1.0, 0.0]


def test_swapped_killed_and_resumed(micro: Micro, tmp_path: Path) -> None:
    values: dict[str, Any] = {"training__steps": 30, "training__curriculum": {"by": "compression"}}
    resident = run(micro(**values, training__swap="never"), tmp_path / "resident")
    kill_worker(micro(**values, training__swap="always"), tmp_path / "killed", 1, 4)
    run(micro(**values, training__swap="always"), tmp_path / "killed")
    assert weights(tmp_path / "killed") == weights(tmp_path / "resident")
    again = run(micro(**values, training__swap="never"), tmp_path / "resident")
    assert not named(again, "committed"), "what is committed is not trained again"
    del values["training__curriculum"]
    random = run(micro(**values), tmp_path / "random")
    recipes = [{event["recipe"] for event in named(events, "committed")} for events in (random, resident)]
    assert recipes[0].isdisjoint(recipes[1])


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"training__curriculum": {"by": "mood"}}, r"training\.curriculum\.by"),
        ({"training__curriculum": {"start": 0}}, r"training\.curriculum\.start"),
        ({"training__curriculum": {"until": 2}}, r"training\.curriculum\.until"),
        ({"training__curriculum": {}, "training__windows": 2}, r"training\.curriculum: its easy rows"),
    ],
)
def test_refused(micro: Micro, values: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        micro(**values)
