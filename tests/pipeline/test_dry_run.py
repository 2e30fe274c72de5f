"""What a run says beforehand: reuse or train, the key that decided, and nothing left behind."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.kinds import FEED_FORWARDS, OBJECTIVES, OPTIMIZERS
from stackwise.data import prepare
from stackwise.errors import NoSpaceError, UsageError
from stackwise.pipeline.device import cpu_alone
from stackwise.pipeline.recipe import Reads, Span, forward_specification, stage_recipe
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.schedule import schedule
from tests.conftest import Micro, raises_naming, run

PLUGIN = """
from stackwise.config.kinds import OBJECTIVES, OPTIMIZERS, Objective
from stackwise.training.kinds import AdamW

@OPTIMIZERS.register("mine")
class Mine(AdamW):
    pass

@OBJECTIVES.register("mine")
class MyObjective(Objective):
    share: float = 0.1

    def build(self, mask_token, vocab_size, seed): ...
"""


def files(directory: Path) -> set[str]:
    """What is under a directory; rowsets that a store was told of are of use to any later run."""
    found = {path.relative_to(directory) for path in directory.rglob("*")}
    return {str(path) for path in found if "rowsets" not in path.parts}


def previewed(config: StackWiseConfig, directory: Path) -> list[tuple[str, str]]:
    """Action and reason of each stage of a dry run."""
    events: list[dict[str, Any]] = []
    Runner(config, RunDirectory(directory), events.append).run(dry=True)
    assert not {"training", "step", "committed", "evaluation"} & {event["event"] for event in events}
    assert events[-1]["event"] == "fit"
    (plan,) = (event for event in events if event["event"] == "plan")
    return [(stage["action"], stage["reason"]) for stage in plan["stages"]]


@pytest.fixture(scope="module")
def finished(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished") / "run"
    run(micro(training__steps=5), directory)
    return directory


def test_of_a_new_run_nothing_is_left(micro: Micro, tmp_path: Path) -> None:
    config = micro(store__path=str(tmp_path / "store"))
    assert previewed(config, tmp_path / "run") == [("train", "not trained yet")] * 2
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [("reuse", "committed: the recipe is the same")] * 2),
        (
            {"stages": {1: {"training": {"learning_rate": 1e-3}}}},
            [
                ("reuse", "committed: the recipe is the same"),
                ("train", "changed: stages.1.training.learning_rate: 0.003 → 0.001"),
            ],
        ),
        (
            {"training.weight_decay": 0.2, "stages": {1: {"training": {"warmup": 0.2}}}},
            [
                ("train", "changed: training.weight_decay: 0.1 → 0.2"),
                ("train", "stage 0 below it is trained; stages.1.training.warmup: 0.05 → 0.2"),
            ],
        ),
        (
            {"training.masks_per_sample": 2, "training.rows": 40},
            [
                ("train", "changed: training.rows: unset → 40; training.masks_per_sample: 1 → 2"),
                ("train", "stage 0 below it is trained"),
            ],
        ),
        (
            {"model.norm": "layernorm"},
            [("train", "changed: model.norm: rmsnorm → layernorm"), ("train", "stage 0 below it is trained")],
        ),
        (
            {"training.mode": "end_to_end"},
            [("train", "changed: training.mode: blockwise → end_to_end")],
        ),
        ({"training.log_every": 3, "store.keep": "none"}, [("reuse", "committed: the recipe is the same")] * 2),
    ],
    ids=["nothing", "one stage", "all, and one more", "rows", "model", "mode", "what shapes no result"],
)
def test_the_key_that_decides_is_named(
    micro: Micro, finished: Path, changes: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    before = files(finished)
    config = micro(training__steps=5, **{key.replace(".", "__"): value for key, value in changes.items()})
    assert previewed(config, finished) == expected
    assert files(finished) == before


@pytest.mark.parametrize(
    ("key", "value", "trains"),
    [
        ("store.codec", "fp32", [1]),
        ("training.compile", True, [0, 1]),
        ("training.optimizer", "muon", [0, 1]),
        ("training.optimizer", {"name": "adamw", "beta2": 0.9}, [0, 1]),
        ("training.objective", "clm", [0, 1]),
        ("training.objective", {"name": "mask_diffusion", "weight": "inverse_time"}, [0, 1]),
        ("training.tied_head", "frozen", [1]),
        ("training.lookahead", "auxiliary", [0, 1]),
        ("training.seq_len", 16, [0, 1]),
        ("model.attention", "linear", [0, 1]),
        ("model.init_std", 0.03, [0, 1]),
        ("data.within_documents", True, [0, 1]),
        ("data.held_out", 0.3, [0, 1]),
        ("precision", "bf16", [0, 1]),
        ("seed", 1, [0, 1]),
        # What has no effect trains nothing again.
        ("store.codec", "bf16-zstd", []),
        ("training.memory", 1 << 40, []),
        ("training.patience", None, []),
        ("training.log_every", 1, []),
        ("model.max_seq_len", 32, []),
        ("deterministic", False, [0, 1] if not cpu_alone("auto") else []),
    ],
)
def test_each_setting_that_shapes_a_result_is_named_and_no_other_trains_again(
    micro: Micro, finished: Path, key: str, value: Any, trains: list[int]
) -> None:
    config = micro(training__steps=5, **{key.replace(".", "__"): value})
    said = previewed(config, finished)
    assert [place for place, (action, _) in enumerate(said) if action == "train"] == trains
    for place in trains:
        reason = said[place][1]
        assert key in reason or (place and reason.startswith(f"stage {place - 1} below it is trained")), reason


def test_the_code_of_a_kind_from_outside_is_in_the_recipe(
    micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for text in ("kinds_a", "kinds_b"):
        plugin = tmp_path / f"{text}.py"
        plugin.write_text(PLUGIN + f"# {text}\n")
        monkeypatch.syspath_prepend(tmp_path)
        with OPTIMIZERS.restored(), OBJECTIVES.restored(), FEED_FORWARDS.restored():
            importlib.import_module(text)
            for kind in ({"training__optimizer": "mine"}, {"training__objective": {"name": "mine", "share": 0.5}}):
                config = micro(**kind)
                stage = schedule(config)[0]
                forward = forward_specification(config, 257, 256, "data")
                reads = Reads("rows", 8, {"front": None}, None, {})
                said.append(stage_recipe(config, stage, forward, Span(0, 5, 5), reads))
    optimizer, objective, edited_optimizer, edited_objective = said
    code = optimizer["settings"]["training"]["optimizer"]["code"]
    assert code != edited_optimizer["settings"]["training"]["optimizer"]["code"]
    mine = objective["settings"]["training"]["objective"]
    assert mine == {"name": "mine", "share": 0.5, "code": code}, "one file has both"
    assert mine != edited_objective["settings"]["training"]["objective"]
    shown = objective["forward"]["training"]["objective"]
    assert (shown["share"], shown["code"]) == (0.5, code), "it decides what is shown"


def test_what_a_stage_was_trained_by_outlives_a_run_that_did_not_reach_it(
    micro: Micro, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    run(micro(training__steps=5, training__beta2=0.9), tmp_path / "run", only=0)
    config = micro(training__steps=5, stages={1: {"training": {"warmup": 0.3}}})
    assert previewed(config, tmp_path / "run")[1] == ("train", "changed: stages.1.training.warmup: 0.05 → 0.3")


@pytest.mark.parametrize("dry", [True, False])
def test_a_store_that_is_elsewhere_is_said_before_anything_trains_again(
    micro: Micro, finished: Path, tmp_path: Path, dry: bool
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    moved = RunDirectory(tmp_path / "run")
    manifest = moved.manifest()
    (tmp_path / "run" / "store").rename(tmp_path / "elsewhere")
    moved.write_manifest({**manifest, "store": str(tmp_path / "run" / "store")})
    events: list[dict[str, Any]] = []
    Runner(micro(training__steps=5), moved, events.append).run(dry=dry)
    kinds = [event["event"] for event in events]
    warning = events[kinds.index("warning")]["text"]
    assert "store.path" in warning
    assert str(tmp_path / "run" / "store") in warning
    (plan,) = (event for event in events if event["event"] == "plan")
    assert [("store.path" in stage["reason"], stage["action"]) for stage in plan["stages"][:1]] == [(True, "train")]
    assert dry or kinds.index("warning") < kinds.index("training")
    # Where it is named, all of it is there again.
    config = micro(training__steps=5, store__path=str(tmp_path / "elsewhere"))
    assert [action for action, _ in previewed(config, tmp_path / "run")] == ["reuse", "reuse"]


def test_what_does_not_fit_is_said(micro: Micro, tmp_path: Path) -> None:
    with pytest.raises(NoSpaceError, match=r"store\.max_bytes"):
        previewed(micro(store__max_bytes=1000), tmp_path / "run")
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("settings", "free", "helps", "others"),
    [
        (
            {"training__steps": 400}, 2_500_000,
            ("windows: ", "keep: none", "codec: int8", "every: 2", "growth"), ("block_size",),
        ),
        (
            {"training__steps": 400, "store__codec": "int8", "store__keep": "none"}, 10,
            ("growth",), ("codec", "keep", "windows"),
        ),
        ({"training__steps": 1}, 20_000, (), ("windows", "codec", "growth")),
    ],
)  # fmt: skip
def test_a_disk_that_is_too_small_is_refused_with_what_each_change_comes_to(
    micro: Micro,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    free: int,
    helps: tuple[str, ...],
    others: tuple[str, ...],
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=free, used=0, free=free))
    with pytest.raises(NoSpaceError) as refused:
        previewed(micro(model__architecture__n_stacks=4, **settings), tmp_path / "run")
    hint = str(refused.value.hint)
    for way in (*helps, "store.path"):
        assert way in hint, hint
    for other in others:
        assert other not in hint, hint
    assert files(tmp_path) == set()


@pytest.mark.parametrize("dry", [True, False])
def test_a_place_that_cannot_be_used_is_refused_before_data_is_prepared(
    micro: Micro, tmp_path: Path, dry: bool
) -> None:
    (tmp_path / "file").write_text("")
    cache = tmp_path / "cache"
    (tmp_path / "loop").symlink_to("loop")
    there = sorted(os.listdir(tmp_path))
    for place in (tmp_path / "file" / "run", tmp_path / ("y" * 300), tmp_path / "loop", tmp_path / "store"):
        change = {} if place.name != "store" else {"store__path": str(tmp_path / "file")}
        directory = tmp_path / "run" if change else place
        with raises_naming(UsageError, tmp_path / "file" if change else place):
            Runner(micro(data__cache_dir=str(cache), **change), RunDirectory(directory), lambda event: None).run(
                dry=dry
            )
    assert sorted(os.listdir(tmp_path)) == there


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"training__rows": 10**6}, "training.rows: 1000000 is more than the corpus gives: "),
        ({"training__rows": 10**6, "training__windows": 2}, "training.rows: 1000000 is more than the corpus gives: "),
        ({"training__swap_parts": 2}, "training.swap_parts is unused: no stage is swapped (training.swap is auto)"),
        ({"training__rows": 64, "training__swap": "always", "training__swap_parts": 2}, None),
        ({}, None),
    ],
)
def test_what_the_plan_cannot_use_is_said(
    micro: Micro, tmp_path: Path, settings: dict[str, Any], said: str | None
) -> None:
    events: list[dict[str, Any]] = []
    Runner(micro(**settings), RunDirectory(tmp_path / "run"), events.append).run(dry=True)
    notes = [e["text"] for e in events if e["event"] == "note" and not e["text"].startswith("stage ")]
    assert [note[: len(said or "")] for note in notes] == ([said] if said else [])


def test_a_small_corpus_limits_steps_and_gives_samples_several_masks(micro: Micro, tmp_path: Path) -> None:
    config = micro(**{"training.steps": 10_000, "training.max_passes": 2.0, "data.tokenizer": "bytes"})
    config.data.max_bytes = 3000
    run(config.validate(), tmp_path / "run")
    samples = prepare(config.data)[0].train.n_samples(config.training.seq_len)
    settled = RunDirectory(tmp_path / "run").config().training
    assert settled.steps == 2 * samples // config.training.batch_size
    assert settled.masks_per_sample == 2
    assert {stage["steps"] for stage in status(RunDirectory(tmp_path / "run"))["stages"]} == {settled.steps}
    again = run(RunDirectory(tmp_path / "run").config(), tmp_path / "run")
    assert not any(event["event"] == "step" for event in again), "what was settled stays, and nothing trains again"
