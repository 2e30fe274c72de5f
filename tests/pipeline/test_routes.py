"""Rows by the experts that they go to: what is said of them beforehand, and an order that no engine changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stackwise.config import StackWiseConfig
from stackwise.errors import UsageError
from stackwise.model import build_block
from stackwise.pipeline.run import RunDirectory, status
from stackwise.store import RowOrder
from stackwise.training.curriculum import RouteCounts, RouteOrder, Routes, grouped
from tests.conftest import Micro, run
from tests.pipeline.storm import killed
from tests.pipeline.test_run import named, weights

FFN = {"kind": "moe", "experts": 32, "expert_dim": 8, "at": [1], "balance": "bias", "shared_experts": 1, "top_k": 2}
SMALL = {"training__steps": 12, "training__batch_size": 2, "training__accumulation": 2, "training__seq_len": 8}
SMALL |= {"evaluation__samples": 8, "training__rows": 64, "training__checkpoint_steps": 4, "store__codec": "fp32"}


def mixture(micro: Micro, **more: Any) -> StackWiseConfig:
    values = {**SMALL, "model__ffn": FFN | {"capacity_factor": 2.0}, "training__swap": "always", **more}
    return micro(**values)


@pytest.fixture(scope="module")
def swapped(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> tuple[StackWiseConfig, Path, list[Any]]:
    """A swapped run whose upper stage orders its rows by its experts."""
    directory = tmp_path_factory.mktemp("routes") / "run"
    config = mixture(micro, training__routes="order", training__swap_experts=4)
    return config, directory, run(config, directory)


def test_what_a_step_reads_is_said_before_the_stage_begins(swapped: Any) -> None:
    _, directory, events = swapped
    (said,) = named(events, "routes")
    first = next(event for event in events if event["event"] == "step" and event["stage"] == 1)
    assert events.index(said) < events.index(first)
    assert (said["stage"], said["of"]) == (1, 32)
    assert 0 < said["reached"] < said["by_chance"] < 32
    stages = status(RunDirectory(directory))["stages"]
    assert "routes" not in stages[0]
    assert stages[1]["routes"]["reached"] == said["reached"]
    # Known, as nothing has trained yet; a report may be of several steps.
    assert first["step"] > 1 or first["pieces"]["reached"] == said["first"]
    of_one = 3 * 3 * 32 * 8 * 4  # weights and two moments of three matrices of 32 by 8
    assert said["bytes"] == pytest.approx(said["reached"] * of_one, rel=0.01)
    assert stages[1]["pieces"]["bytes"] > of_one


def test_swapped_in_memory_and_killed_are_the_same(swapped: Any, micro: Micro, tmp_path: Path) -> None:
    config, directory, _ = swapped
    events = run(mixture(micro, training__routes="order", training__swap="never"), tmp_path / "resident")
    assert weights(tmp_path / "resident") == weights(directory)
    assert named(events, "routes")[0]["bytes"] is None, "nothing is read"
    killed(config, tmp_path / "killed", 1)
    assert weights(tmp_path / "killed") == weights(directory)


def test_to_count_changes_nothing(micro: Micro, tmp_path: Path) -> None:
    values = {"store__path": str(tmp_path / "store"), "training__swap": "never"}
    run(mixture(micro, **values), tmp_path / "plain")
    events = run(mixture(micro, **values, training__routes="count"), tmp_path / "counted")
    assert not named(events, "training"), "the recipes are the same"


def test_steps_reach_fewer_pieces_and_epochs_have_every_row() -> None:
    generator = np.random.default_rng(0)
    kinds_N = generator.integers(0, 8, 96)
    reached_NR = np.zeros((96, 32), bool)
    for row, kind in enumerate(kinds_N):  # rows of a kind go to its four pieces
        reached_NR[row, 4 * kind + generator.integers(0, 4, 3)] = True
    plain = RowOrder(96, seed=(3, "order"), chunk_rows=8, window_chunks=4)
    routes = Routes(lambda rows: reached_NR[rows], 32)
    order = RouteOrder(plain, routes, 5)
    whole = order.at(0, 192)
    for epoch in (whole[:96], whole[96:]):
        assert sorted(epoch) == list(range(96))
    again = RouteOrder(plain, routes, 5)
    np.testing.assert_array_equal(np.concatenate([again.at(n, n + 3) for n in range(189, -1, -3)][::-1]), whole)
    assert sum(routes.of_steps(order, 0, 38, 5)) < 0.6 * sum(routes.of_steps(plain, 0, 38, 5))
    rows, end = order.window_rows(40)
    assert set(whole[40:end]) <= set(rows)
    assert sorted(grouped(reached_NR, 5, 2)) == list(range(96))


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"model__ffn": "swiglu"}, "training.routes: no block has experts"),
        ({"training__curriculum": {"by": "rarity"}}, "training.routes: order, but training.curriculum orders rows too"),
        ({"training__routes": "sort"}, "training.routes"),
    ],
)
def test_bad_input_is_a_line(more: dict[str, Any], fault: str, micro: Micro) -> None:
    with pytest.raises(UsageError, match=fault):
        mixture(micro, **{"training__routes": "order", **more})


def test_routes_are_those_of_the_router(micro: Micro) -> None:
    config = mixture(micro)
    block = build_block(config.model, 1, 0).eval()
    counts = RouteCounts({1: 32})
    block.ffn.routed = counts.note
    x_BSD = torch.randn(3, 8, config.model.d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        block(x_BSD, causal=False, segments_BS=None)
    counts_BR = counts(x_BSD)[:, 0]
    assert torch.equal(counts_BR.sum(1), torch.full((3,), 16.0)), "two choices a token"
