"""Rows in groups: the same weights however many ranks keep them, each on a disk of its own; and groups that move."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stackwise.cli.app import main
from stackwise.config import StackWiseConfig
from stackwise.errors import UsageError
from stackwise.pipeline.division import divide
from stackwise.store import ActivationStore, sibling_stores
from tests.conftest import Micro, run
from tests.pipeline.test_run import named, weights

GROUPS = 4
SETTINGS: dict[str, Any] = {
    "training__batch_size": 4,
    "training__accumulation": 4,
    "training__steps": 6,
    "training__row_groups": GROUPS,
    "evaluation__samples": 4,
}


@pytest.fixture(scope="module")
def alone(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, over one store."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    run(micro(**SETTINGS), directory)
    return directory


def apart(micro: Micro, directory: Path, ranks: int, **settings: Any) -> StackWiseConfig:
    path = str(directory / "stores" / "{rank}")
    return micro(**{**SETTINGS, "parallel__data": ranks, "store__path": path, **settings})


def held(store: Path) -> dict[str, int]:
    """The groups in a sound store, and the bytes of their activations."""
    with ActivationStore(store, create=False) as opened:
        report = opened.verify()
        assert (report["damaged"], report["orphans"]) == ([], [])
        assert {info.state for info in opened.boundaries()} <= {"complete"}
        return {info.id: info.disk_bytes for info in opened.boundaries()}


def test_each_rank_keeps_the_rows_of_its_batches(micro: Micro, alone: Path, tmp_path: Path) -> None:
    run(apart(micro, tmp_path, 2), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(alone)
    whole, parts = held(alone / "store"), [held(tmp_path / "stores" / str(rank)) for rank in (0, 1)]
    assert not parts[0].keys() & parts[1].keys()
    assert parts[0] | parts[1] == whole
    assert [sum(part.values()) for part in parts] == [sum(whole.values()) // 2] * 2


@pytest.mark.stress
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {"store__fuse_passes": True},
        {"store__every": 2},
        {"training__windows": 2, "training__eval_every": 3},
        {"store__codec": "int8-zstd", "training__accumulation": 8},
        {"training__mode": "fused", "training__fresh_masks": True},
    ],
)
def test_other_ways_of_boundaries(micro: Micro, tmp_path: Path, ranks: int, settings: dict[str, Any]) -> None:
    run(micro(**(SETTINGS | settings)), tmp_path / "alone")
    run(apart(micro, tmp_path, ranks, **settings), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(tmp_path / "alone")
    parts = [held(path) for path in sibling_stores(str(tmp_path / "stores" / "{rank}")).values()]
    whole = held(tmp_path / "alone" / "store")
    everywhere = set.intersection(*(set(part) for part in parts))  # held-out rows
    assert sorted(key for part in parts for key in part if key not in everywhere) == sorted(
        key for key in whole if key not in everywhere
    )


def test_who_says_how_many_groups_there_are(micro: Micro) -> None:
    own = {"store__path": "stores/{rank}", "training__accumulation": 20}

    def settled(earlier: StackWiseConfig | None = None, **settings: Any) -> tuple[StackWiseConfig, list[str]]:
        config = micro(**{**own, **settings})
        lines = divide(config, earlier)
        return config, lines

    first = settled(parallel__data=4)[0]
    assert first.training.row_groups == 24
    assert settled(first, parallel__data=2)[0].training.row_groups == 24
    assert settled(parallel__data=5)[0].training.row_groups == 120
    assert settled(parallel__data=2, store__path="store")[0].training.row_groups is None
    with pytest.raises(UsageError, match="5 ranks with stores of their own") as raised:
        settled(first, parallel__data=5)
    assert "nearest that do: 4 and 6" in str(raised.value.hint)
    curriculum = {"training__curriculum": {"by": "length"}, "parallel__data": 2}
    config, lines = settled(**curriculum)
    assert config.training.row_groups is None
    assert any("training.curriculum" in line for line in lines)
    with pytest.raises(UsageError, match=r"training\.row_groups"):
        settled(**curriculum, training__row_groups=4)


@pytest.mark.stress
def test_a_damaged_group_is_made_again(micro: Micro, alone: Path, tmp_path: Path) -> None:
    run(apart(micro, tmp_path, 2), tmp_path / "run", only=0)
    for rank in (0, 1):
        for chunk in (tmp_path / "stores" / str(rank)).glob("boundaries/*/activations/c/0/0/0"):
            chunk.write_bytes(bytes(chunk.stat().st_size))
    done = CliRunner().invoke(main, ["cache", "repair", "--run", str(tmp_path / "run"), "--json"])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.output)["repaired"]) == GROUPS // 2  # in rank 0's store; the other's the run finds
    events = run(apart(micro, tmp_path, 2), tmp_path / "run")
    assert named(events, "warning")
    assert weights(tmp_path / "run") == weights(alone)
    for rank in (0, 1):
        held(tmp_path / "stores" / str(rank))


def test_rows_move_to_other_ranks(micro: Micro, alone: Path, tmp_path: Path) -> None:
    """By the command, and by the run; what was on a disk that is lost is computed again, and the rest is not."""
    run(apart(micro, tmp_path, 2), tmp_path / "run", only=0)
    template = str(tmp_path / "stores" / "{rank}")
    whole = {boundary for rank in (0, 1) for boundary in held(tmp_path / "stores" / str(rank))}
    done = CliRunner().invoke(main, ["cache", "reshard", "--run", str(tmp_path / "run"), "--ranks", "4", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["moved"] == GROUPS // 2
    parts = [held(path) for path in sibling_stores(template).values()]
    assert [len(part) for part in parts] == [1] * 4
    assert set().union(*parts) == whole
    shutil.rmtree(tmp_path / "stores" / "3")
    events = run(apart(micro, tmp_path, 1), tmp_path / "run")
    assert any("lacks rows" in event["text"] for event in named(events, "warning"))
    assert named(events, "reused")
    assert weights(tmp_path / "run") == weights(alone)
    assert [len(held(path)) for path in sibling_stores(template).values()] == [len(held(alone / "store")), 0, 0]
