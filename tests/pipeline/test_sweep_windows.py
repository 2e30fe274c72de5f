"""Sweeps in windows: what runs have in common is trained once, also where a later window's weights took its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stackwise.pipeline.batch import sweep as room
from stackwise.pipeline.batch.grid import combinations
from stackwise.pipeline.batch.sweep import Member, Sweep, no_room
from stackwise.pipeline.run import RunDirectory
from stackwise.store import ActivationStore
from tests.conftest import Micro
from tests.pipeline.test_passes import run_stages
from tests.pipeline.test_run import named, weights
from tests.pipeline.test_windows import SMALL

RATE = "stages.2.training.learning_rate"
TWO = {**SMALL, "training.windows": 2, "training.steps": 4}


class Quick:
    """A runner whose workers' jobs are done in this process."""

    events: dict[str, list[dict[str, Any]]]

    def __init__(self, config: Any, run: RunDirectory, observe: Any, **values: Any) -> None:
        self._config, self._run, self._observe = config, run, observe

    def run(self) -> None:
        self.events[self._run.path.name] = run_stages(self._config, self._run.path, self._observe)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    monkeypatch.setattr(room, "Runner", Quick)
    Quick.events = {}
    return Quick.events


def made(micro: Micro, directory: Path, rates: list[float], **more: Any) -> Sweep:
    axes = {key: [value] for key, value in {**TWO, **more}.items()} | {RATE: rates}
    return Sweep(combinations(axes, lambda overrides: micro(**overrides)), directory, "again")


def carried_out(sweep: Sweep, look: Any = lambda event: None) -> dict[str, list[int]]:
    """Run it; the places of the schedule that each run trained, by its name."""
    import contextlib

    members = sweep.run(lambda combination: contextlib.nullcontext(look), lambda event: None)
    assert [member.failure for member in members] == [None] * len(members)
    return {name: [e["stage"] for e in named(events, "training")] for name, events in Quick.events.items()}


def files(store: Path) -> dict[str, set[str]]:
    return {path.name: {file.stem for file in path.glob("*.safetensors")} for path in (store / "stages").iterdir()}


def lower(member: Member) -> list[str]:
    """The recipes of the lower two stages in the first window."""
    (directory,) = {Path(member.combination.config.store.path or "").parent}
    rows = RunDirectory(directory / member.combination.name).manifest()["stages"]
    return [rows[place]["recipe"] for place in (0, 1)]


def test_nothing_is_trained_twice(micro: Micro, tmp_path: Path) -> None:
    directory = tmp_path / "sweep"
    sweep = made(micro, directory, [1e-3, 2e-3, 3e-3])
    order = sweep.preview()
    first, second, third = (member.combination.name for member in order)
    shared = [first, first, "train", first, first, "train"]
    assert list(sweep.sources(order).values()) == [["train"] * 6, shared, shared]
    between: list[dict[str, set[str]]] = []
    claims: list[bool] = []

    def look(event: dict[str, Any]) -> None:
        if event["event"] == "start":
            between.append(files(directory / "store") if between else {})
        if event["event"] == "training":
            with ActivationStore(directory / "store", create=False) as store:
                claims.append(str(directory) in store.runs())
                assert store.gc(dry_run=True)["missing_runs"] == []

    trained = carried_out(sweep, look)
    assert trained == {first: [0, 1, 2, 3, 4, 5], second: [2, 5], third: [2, 5]}
    assert not [event for events in Quick.events.values() for event in named(events, "warning")]
    held = lower(order[0])
    for kept in between[1:]:  # the weights that the next run needs, and no optimizer's state
        assert [kept[recipe] for recipe in held] == [{"front", "block.0", "head"}, {"block.1", "head"}]
    assert claims[5] is True
    assert claims[-1] is False
    left = files(directory / "store")
    assert [left[recipe] for recipe in held] == [set(), set()], "the last run that needed them has taken them"
    with ActivationStore(directory / "store", create=False) as store:
        assert str(directory) not in store.runs()
        assert store.verify()["damaged"] == []
        assert store.gc()["stages"] == []
    alone = order[2].combination.config.model_copy(deep=True)
    alone.store.path = None
    run_stages(alone, tmp_path / "alone")
    assert weights(directory / third) == weights(tmp_path / "alone")

    # A value more: what was removed is trained again, once, and that is said before.
    Quick.events = {}
    sweep = made(micro, directory, [1e-3, 2e-3, 3e-3, 4e-3, 5e-3])
    found = sweep.sources(order := sweep.preview())
    fourth, fifth = (member.combination.name for member in order[3:])
    assert found[first] == ["store"] * 6
    assert found[fourth] == ["again", "again", "train", "store", "store", "train"]
    assert found[fifth] == [fourth, fourth, "train", "store", "store", "train"]
    trained = carried_out(sweep)
    assert (trained[fourth], trained[fifth]) == ([0, 1, 2, 5], [2, 5])


def test_values_of_until_cost_one_shallow_phase(micro: Micro, tmp_path: Path) -> None:
    untils = [0.4, 0.6, 0.8]
    phases = [[{"blocks": 1, "until": until, "commit": 0.2}] for until in untils]
    shape = SMALL | {"training.growth": phases, "training.steps": [20]}
    axes = {key: value if isinstance(value, list) else [value] for key, value in shape.items()}
    carried_out(Sweep(combinations(axes, lambda overrides: micro(**overrides)), tmp_path, "again"))
    assert not [event for events in Quick.events.values() for event in named(events, "warning")]
    # Each trains its own deep phase, and of the shallow one what no run before it did: 0.8 of the steps in all.
    runs = Quick.events.values()
    assert [[event["steps"] for event in named(events, "training")] for events in runs] == [[4, 4, 12], [4, 8], [4, 4]]
    assert [len(named(events, "reused")) for events in runs] == [0, 2, 3]


def test_where_there_is_no_room_it_is_said_before_what_is_trained_again(micro: Micro, tmp_path: Path) -> None:
    roomy = made(micro, tmp_path / "roomy", [1e-3, 2e-3], **{"store.max_bytes": 1 << 40})
    order = roomy.preview()
    assert roomy.no_room is None
    assert no_room(order) is None
    last = [decision.bytes for decision in order[0].decisions if not decision.stage.states_out]
    budget = sum(last) + 2 * max(last) + order[0].boundaries  # enough for the runs, not for what they would keep
    sweep = made(micro, tmp_path / "sweep", [1e-3, 2e-3], **{"store.max_bytes": budget})
    order = sweep.preview()
    first, second = (member.combination.name for member in order)
    assert sweep.no_room is not None
    assert "has no room" in sweep.no_room
    assert list(sweep.sources(order).values()) == [["train"] * 6, ["again", "again", "train", first, first, "train"]]
    trained = carried_out(sweep)
    assert trained == {first: [0, 1, 2, 3, 4, 5], second: [0, 1, 2, 5]}
    left = files(tmp_path / "sweep" / "store")
    assert [left[recipe] for recipe in lower(order[0])] == [set(), set()]
