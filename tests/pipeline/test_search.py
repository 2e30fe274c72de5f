"""Searches without training: ranges, spaces, what is drawn, what a key changes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stackwise.config.tune import Choices, Interval, SearchedKey, parse_range
from stackwise.errors import ConfigError, StackWiseError, UsageError
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.search.begin import Typed, begin
from stackwise.pipeline.search.record import StudyRecord, Trial, objective
from stackwise.pipeline.search.samplers import Past, Sampling
from stackwise.pipeline.search.space import Space, merged, outlook, space_of
from tests.conftest import Micro, raises_naming

RATE, DECAY, STEPS = "training.learning_rate", "stages.1.training.weight_decay", "training.steps"


def space(*items: str, **when: dict[str, Any]) -> Space:
    found = merged(items, {})
    return space_of(
        {key: SearchedKey(range=one.range, when=when.get(key.split(".")[-1], {})) for key, one in found.items()}
    )


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("1e-4..1e-2:log", Interval(1e-4, 1e-2, True)),
        ("-1..1.5", Interval(-1.0, 1.5)),
        ("1..8", Interval(1, 8)),
        ([0, 0.1, 0], Choices((0, 0.1))),
        ([True, 1], Choices((True, 1))),
    ],
)
def test_ranges(text: Any, meant: Any) -> None:
    assert parse_range(text) == meant


@pytest.mark.parametrize(
    "items",
    [
        [f"{RATE}=1e-2..1e-4"],
        [f"{RATE}=1..1"],
        [f"{RATE}=0..1:log"],
        [f"{RATE}=1e-3..1e999"],
        [f"{RATE}=1..2:sqrt"],
        [f"{RATE}=a..b"],
        [f"{RATE}="],
        [RATE],
        [f"{RATE}=.inf,1"],
        [f"{RATE}=1,1"],
        [f"{RATE}=1,2", f"{RATE}=3,4"],
        ["name=a,b"],
        ["store.path=a,b"],
        ["training.optimizer=adamw,sgd", "training.optimizer.name=adamw,sgd"],
        ["..=1,2"],
        [],
    ],
)
def test_impossible_spaces_are_refused_in_a_line(items: list[str]) -> None:
    with pytest.raises(UsageError) as refused:
        space_of(merged(items, {}))
    assert "\n" not in refused.value.message


def test_conditions_are_met_or_refused() -> None:
    found = space("a.kind=x,y", "a.low=1,2", "b=1..3", low={"a.kind": "y"})
    assert found.grid() == [
        *({"a.kind": "x", "b": b} for b in (1, 2, 3)),
        *({"a.kind": "y", "a.low": low, "b": b} for low in (1, 2) for b in (1, 2, 3)),
    ]
    assert found.with_value("a.low", 2) == {"a.kind": "y", "a.low": 2, "b": 1}
    for when in ({"c": 1}, {"a.kind": "z"}, {"a.low": 1}):
        with pytest.raises(UsageError):
            space("a.kind=x,y", "a.low=1,2", low=when)


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "gp-ucb"])
def test_what_is_drawn_follows_from_the_seed_and_the_trials_before(sampler: str) -> None:
    found = space(f"{RATE}=1e-4..1e-2:log", f"{STEPS}=1..8", "a.kind=x,y", "a.low=1,2", low={"a.kind": "y"})
    sampling = Sampling(found, sampler, "none", seed=3)
    past: list[Past] = []
    for _ in range(13):
        settings = sampling.suggest(past)
        assert 1e-4 <= settings[RATE] <= 1e-2
        assert 1 <= settings[STEPS] <= 8
        assert ("a.low" in settings) == (settings["a.kind"] == "y")
        past.append(Past(settings, "done", [abs(settings[RATE] - 1e-3) + settings[STEPS]]))
    past[-1] = Past(past[-1].settings, "running")
    again = Sampling(found, sampler, "none", seed=3)
    assert [again.suggest(past[:n]) for n in (0, 5, 12, 13)] == [sampling.suggest(past[:n]) for n in (0, 5, 12, 13)]
    assert Sampling(found, sampler, "none", seed=4).suggest([]) != past[0].settings
    if sampler == "tpe":  # the best value of the whole number is soon known
        assert sampling.importance(past[:-1])[STEPS] > 0


def test_a_trial_that_is_behind_is_ended_early() -> None:
    sampling = Sampling(space(f"{RATE}=1..2"), "tpe", "median", seed=0, first=5, last=20)
    past = [Past({RATE: 1}, "done", [2.0], {5: 3.0, 10: 2.0 + n / 10}) for n in range(5)]
    behind = Past({RATE: 2}, "running", None, {5: 2.9, 10: 3.0})
    assert sampling.prunes(past, behind)
    assert not sampling.prunes(past, Past({RATE: 2}, "running", None, {5: 2.9, 10: 2.0}))
    assert not sampling.prunes(past[:4], behind), "too few are over"
    assert not replace(sampling, warmup=11).prunes(past, behind), "it has only begun"


@pytest.mark.parametrize(("value", "said"), [("'good'", "str 'good'"), ("float('nan')", "float nan"), ("[]", "list")])
def test_a_function_that_returns_no_number_is_named_with_what_it_returned(
    value: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "judging.py").write_text(f"def verdict(run):\n    return {value}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "judging", raising=False)
    measured = objective("judging:verdict")
    with pytest.raises(StackWiseError, match=f"judging:verdict .*{said}"):
        measured(RunDirectory(tmp_path))


def test_what_each_key_changes_is_known_before(micro: Micro, tmp_path: Path) -> None:
    def make(settings: dict[str, Any]) -> Any:
        return micro(**settings)

    ahead = outlook(space(f"{RATE}=1e-4..1e-2:log", f"{DECAY}=0,0.1", "training.log_every=1,2"), make, tmp_path / "new")
    assert [(one.key, one.stage) for one in ahead.effects] == [(RATE, 0), (DECAY, 1), ("training.log_every", None)]
    assert [round(one.share, 3) for one in ahead.effects] == [1.0, 0.5, 0.0]
    assert ahead.shared == 0
    assert ahead.order is not None
    assert ahead.order.startswith(f"search {DECAY} first")
    assert not (tmp_path / "new").exists()
    with raises_naming(ConfigError, RATE):
        outlook(space("training.learnin_rate=1,2"), make, tmp_path)
    with raises_naming(ConfigError, RATE):
        outlook(space(f"{RATE}=-1..1"), make, tmp_path)


def test_a_directory_of_something_else_and_trials_of_another_space_are_refused(micro: Micro, tmp_path: Path) -> None:
    def make(settings: dict[str, Any]) -> Any:
        return micro(**settings)

    typed = Typed([f"{DECAY}=0,0.1"], "grid")
    study, _ = begin(make, typed, tmp_path / "new", "again")
    assert [point[DECAY] for point in study.search.plan or ()] == [0, 0.1]
    for settings, values in (({"store.path": "/"}, [1.0]), ({DECAY: 0.5}, [1.0]), ({DECAY: 0}, [1.0, 2.0]), ({}, None)):
        study.record.trials = [Trial(0, settings, "done", values)]
        study.record.save()
        with raises_naming(UsageError, tmp_path / "new" / "study.json"):
            begin(make, typed, tmp_path / "new", "again")
    (tmp_path / "run.json").write_text("{}")
    with raises_naming(UsageError, tmp_path, "run.json"):
        begin(make, typed, tmp_path, "again")


def test_a_record_of_another_search_or_a_broken_one_is_refused(tmp_path: Path) -> None:
    record = StudyRecord(tmp_path, {"space": {"a": 1}, "library": "optuna 5.0.0"})
    record.trials.append(Trial(0, {"a": 1}, "done", [1.0], steps=[(5, 2.0)]))
    record.save()
    assert StudyRecord(tmp_path, {"space": {"a": 1}, "library": "optuna 5.1.0"}).trials[0].values == [1.0]
    with raises_naming(UsageError, tmp_path):
        StudyRecord(tmp_path, {"space": {"a": 2}})
    record.path.write_text(record.path.read_text().replace('"number": 0', '"number": 3'))
    with raises_naming(UsageError, record.path, 0):
        StudyRecord(tmp_path, {"space": {"a": 1}})
    record.path.write_text("{")
    with raises_naming(UsageError, record.path):
        StudyRecord(tmp_path, {})


def test_the_live_view_has_every_figure_of_a_search(micro: Micro, tmp_path: Path) -> None:
    from rich.console import Console

    from stackwise.cli.commands.tune import Live

    study, _ = begin(
        lambda settings: micro(**settings), Typed([f"{DECAY}=0,0.1,0.2"], "grid"), tmp_path / "new", "again"
    )
    with (tmp_path / "screen").open("w") as screen:
        view = Live(study, Console(file=screen, width=120))
        trials = [Trial(0, {DECAY: 0}), Trial(1, {DECAY: 0.1})]
        study.record.trials = trials
        for trial in trials:
            view(trial, {"event": "trial_begun"})
        view(trials[1], {"event": "reused", "stage": 0, "recipe": "a", "reason": "it is there"})
        view(trials[1], {"event": "step", "stage": 1, "step": 7, "steps": 20, "loss": 3.0})
        trials[0].state, trials[0].values, trials[0].trained = "done", [5.25], 2
        view(trials[0], {"event": "trial_ended"})
        first, *rows, _, summary = view.render().plain.splitlines()[1:]
        assert first.split() == ["trial", "state", "bits_per_byte", "step", "trained", "shared", "settings"]
        assert rows[0].split() == ["0", "done", "5.2500", "2", "0", "stage1.weight_decay", "0"]
        assert rows[1].split() == ["1", "running", "stage", "1", "7/20", "0", "1", "stage1.weight_decay", "0.1"]
        assert summary.startswith("1 of 3 trials  2 stages trained, 0 shared  best 5.2500, trial 0")
        assert summary.endswith("left")
