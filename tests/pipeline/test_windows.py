"""Windows of the corpus: what a disk too small for it holds, and what training comes to."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stackwise.config import StackWiseConfig
from stackwise.data import PreparedData, prepare
from stackwise.errors import ConfigError, NoSpaceError, UsageError
from stackwise.pipeline.decisions import AGAIN
from stackwise.pipeline.recipe import SHUFFLED_CHUNKS, order_rows
from stackwise.pipeline.rows import choose_samples
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.schedule import schedule
from stackwise.store import ActivationStore, RowOrder
from stackwise.training.optim import learning_rate
from tests.conftest import Micro, raises_naming
from tests.pipeline.test_passes import run_stages
from tests.pipeline.test_run import named, weights

SMALL: dict[str, Any] = {
    "model.architecture.n_stacks": 3,
    "training.steps": 7,
    "training.batch_size": 8,
    "training.masks_per_sample": 3,
    "training.windows": 3,
    "store.chunk_bytes": 1 << 13,
    "precision": "fp32",
    "tracking.tensorboard": False,
}
"""Three stages and windows of two or three steps each; samples whose masks a window must not part."""

Finished = tuple[StackWiseConfig, Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def finished(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run in three windows, up to its evaluation."""
    config, directory = micro(**SMALL), tmp_path_factory.mktemp("windows") / "run"
    return config, directory, run_stages(config, directory)


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> tuple[StackWiseConfig, Path]:
    """The same run, to be changed."""
    shutil.copytree(finished[1], tmp_path / "run")
    return finished[0].model_copy(deep=True), tmp_path / "run"


def prepared(config: StackWiseConfig) -> PreparedData:
    return prepare(config.data, model_vocab=config.model.vocab_size)[0]


def stage_files(directory: Path) -> dict[tuple[int, int], set[str]]:
    """What is left of each committed stage's parts, by depth and window."""
    found = {}
    for row in status(RunDirectory(directory))["stages"]:
        files = (directory / "store" / "stages" / row["recipe"]).glob("*.safetensors")
        found[row["depth"], row["window"]] = {path.stem for path in files}
    return found


def test_each_window_goes_through_every_stage_before_the_next_does(micro: Micro) -> None:
    stages = schedule(micro(**SMALL))
    assert [(s.depth, s.window, s.rowset) for s in stages] == [(d, w, w) for w in range(3) for d in range(3)]
    fresh = schedule(micro(**SMALL, training__fresh_masks=True))
    assert [s.rowset for s in fresh] == [3 * d + w for w in range(3) for d in range(3)]
    fused = schedule(micro(**SMALL, training__fusion__strategy="hierarchical"))
    assert [(s.depth, s.window, s.reads_boundary) for s in fused[9:]] == [(3, 0, False), (4, 0, False)]
    heads = schedule(micro(**SMALL, training__fusion__strategy="frozen"))
    assert [(s.depth, s.window, s.reads_boundary) for s in heads[9:]] == [(3, 0, True), (3, 1, True), (3, 2, True)]


@pytest.mark.parametrize(
    "mode",
    [
        {"training__mode": "end_to_end"},
        {"training__mode": "independent"},
        {"training__mode": "fused", "training__fusion_mode": "trainable"},
        {"training__progressive__enabled": True, "training__progressive__building_mode": "prepend"},
        {"training__progressive__enabled": True, "training__progressive__trunk_strategy": "qlora"},
    ],
    ids=str,
)
def test_a_schedule_that_reads_no_boundary_runs_as_one_window(micro: Micro, mode: dict[str, Any]) -> None:
    from stackwise.config.unused import unused_settings

    config, plain = micro(training__windows=3, **mode), micro(**mode)
    assert "training.windows is unused: no stage of this schedule reads a boundary" in unused_settings(config)
    assert schedule(config) == schedule(plain)


@pytest.mark.parametrize(("drawn", "fresh"), [(0, False), (2, True)])
def test_the_windows_hold_the_rows_and_masks_of_one(micro: Micro, tmp_path: Path, drawn: int, fresh: bool) -> None:
    from stackwise.pipeline.rows import put_rows

    windows, whole = micro(**SMALL, training__fresh_masks=fresh), micro(**{**SMALL, "training.windows": 1})
    data = prepared(windows)
    with ActivationStore(tmp_path / "store") as store:

        def pairs(config: StackWiseConfig, number: int) -> Counter[bytes]:
            rows = store.rowset(put_rows(config, data.train, store, number)[0])
            joined = zip(rows.sample_ids, rows.mask_ids, strict=True)
            return Counter(bytes(sample) + bytes(mask) for sample, mask in joined)

        parts = [pairs(windows, 3 * drawn + window) for window in range(3)]
        assert sum(parts, Counter()) == pairs(whole, drawn)
        samples = [{pair[:16] for pair in part} for part in parts]
        assert all(samples)
        assert not samples[0] & samples[1]
        assert not samples[1] & samples[2]


def test_learning_rates_run_over_all_windows(finished: Finished) -> None:
    config, _, events = finished
    done: dict[int, list[float]] = {}
    for event in named(events, "step"):
        depth = event["stage"] % 3
        for _ in event["losses"][:-1]:
            done.setdefault(depth, []).append(float("nan"))
        done.setdefault(depth, []).append(event["learning_rate"])
    wanted = [learning_rate(config.stage_training(0), step, 7) for step in range(7)]
    for rates in done.values():
        assert len(rates) == 7
        assert [rate for rate in rates if rate == rate] == [w for r, w in zip(rates, wanted, strict=True) if r == r]
    steps = [(row["step"], row["steps"]) for row in status(RunDirectory(finished[1]))["stages"]]
    assert [sum(done for done, _ in steps[depth::3]) for depth in range(3)] == [7, 7, 7]
    assert all(done == total for done, total in steps)


@pytest.mark.parametrize(
    "setting",
    [
        {"training.ema": 0.9},
        {"training.optimizer": "adamw8bit"},
        pytest.param({}, marks=pytest.mark.stress),
        pytest.param({"training.optimizer": "muon"}, marks=pytest.mark.stress),
    ],
    ids=str,
)
def test_a_stage_goes_on_as_if_it_had_never_stopped(micro: Micro, tmp_path: Path, setting: dict[str, Any]) -> None:
    """The first stage, whose input is no other stage's, against one trainer over the same batches in one go."""
    from stackwise.objectives import make_objective
    from stackwise.pipeline.job import Source
    from stackwise.pipeline.parts import make_block, make_front, make_head, require_gradients
    from stackwise.training.engine import ResidentEngine
    from stackwise.training.feed import Feed
    from stackwise.training.stage import StageModel
    from stackwise.training.trainer import Trainer

    config = micro(**{**SMALL, "model.dropout": 0.1, **setting})
    run_stages(config, tmp_path / "run")
    data, run = prepared(config), RunDirectory(tmp_path / "run")
    vocabulary = run.manifest()["vocabulary"]
    fresh = {"front": Source(), "block.0": Source(), "head": Source()}
    front = make_front(config, vocabulary["size"], Source())
    block = make_block(config, "block.0", fresh)
    head = make_head(config, vocabulary["size"], Source(), front.embedding.weight, projects=False)
    objective = make_objective(config.training, vocabulary["mask"], vocabulary["size"], config.seed)
    model = StageModel(front, [block], head, objective, "fp32")
    stages = [stage for stage in schedule(config) if stage.depth == 0]
    for part, module in (("front", front), ("block.0", block), ("head", head)):
        require_gradients(part, module, stages[0])
    engine = ResidentEngine(model, config.stage_training(0), seed=(config.seed, 0), device=torch.device("cpu"))
    trainer = Trainer(engine, config.stage_training(0), steps=7)
    rows = [row for row in status(run)["stages"] if row["depth"] == 0]
    with ActivationStore(tmp_path / "run" / "store", create=False) as store:
        for stage, row in zip(stages, rows, strict=True):
            committed = store.stage(row["recipe"])
            assert committed is not None
            rowset = store.rowset(committed.record["recipe"]["rowset"])
            samples = choose_samples(config, data.train, stage.rowset)
            feed = Feed.stored(store, rowset, data.train, samples, config.training.seq_len)
            order = RowOrder(
                rowset.rows,
                seed=(config.seed, 0, *((stage.window,) if stage.window else ()), "order"),
                chunk_rows=order_rows(config, rowset.rows),
                window_chunks=SHUFFLED_CHUNKS,
            )
            batches = feed.shuffled(order, config.training.batch_size, 0)
            for _ in range(row["steps"]):
                trainer.train_step([next(batches)])
    engine.settle()
    assert committed is not None
    for part, module in (("front", front), ("block.0", block), ("head", head)):
        saved = load_file(committed.path(part))
        assert all(torch.equal(saved[name], tensor) for name, tensor in module.state_dict().items()), part


def test_what_a_later_window_takes_the_place_of_is_gone_and_no_damage(copy: tuple[StackWiseConfig, Path]) -> None:
    config, directory = copy
    files = stage_files(directory)
    assert all(not files[depth, window] for depth in range(3) for window in range(2))
    assert [files[depth, 2] for depth in range(3)] == [
        {"front", "block.0", "head"}, {"block.1", "head"}, {"block.2", "head"}
    ]  # fmt: skip
    with ActivationStore(directory / "store", create=False) as store:
        assert store.verify()["damaged"] == []
        assert store.gc()["stages"] == []
    events = run_stages(config, directory)
    assert len(named(events, "reused")) == 9
    assert not named(events, "training")


def test_only_the_boundaries_of_the_window_in_hand_are_there(finished: Finished) -> None:
    _, directory, events = finished
    with ActivationStore(directory / "store", create=False) as store:
        present = store.boundaries()
        assert sorted(info.depth for info in present) == [1, 2]  # store.keep: all, of the last window
    dropped = [event for event in events if event["event"] == "dropped"]
    assert [event["stage"] for event in dropped] == [1, 2, 1, 2]
    assert {event["why"] for event in dropped} == {"its window is finished"}


class Killed(Exception):
    """Stands for a kill: nothing is saved beyond what is."""


@pytest.mark.parametrize(
    "moment",
    [
        (4, "step"),
        (5, "written"),
        pytest.param((4, "committed"), marks=pytest.mark.stress),
        pytest.param((5, "training"), marks=pytest.mark.stress),
        pytest.param((3, "committed"), marks=pytest.mark.stress),
    ],
)
def test_a_run_that_ends_inside_or_between_windows_comes_to_the_same_weights(
    micro: Micro, finished: Finished, tmp_path: Path, moment: tuple[int, str]
) -> None:
    config = micro(**{**SMALL, "training.checkpoint_steps": 1})
    place, what = (moment[0] - 1, moment[1]) if moment[1] == "written" else moment

    def told(event: dict[str, Any]) -> None:
        if event["event"] == what and event.get("stage") == place:
            raise Killed

    with pytest.raises(Killed):
        run_stages(config, tmp_path / "run", told)
    events = run_stages(config, tmp_path / "run")
    assert len(named(events, "reused")) >= 3
    assert weights(tmp_path / "run") == weights(finished[1])


def sampled(path: Path, until: threading.Event, most: list[int]) -> None:
    """Watch what boundaries and committed stages take on the disk."""
    while not until.wait(0.0005):
        most.append(on_disk(path))


def on_disk(path: Path) -> int:
    """Bytes of the boundaries and committed stages, those in the making among them."""
    total = 0
    for place in ("boundaries", "stages"):
        for directory, _, files in os.walk(path / place):
            for name in files:
                with contextlib.suppress(OSError):  # gone meanwhile
                    total += os.stat(os.path.join(directory, name)).st_size
    return total


def test_the_store_stays_within_its_budget_throughout(micro: Micro, tmp_path: Path) -> None:
    budget = 1_800_000
    config = micro(**{**SMALL, "training.steps": 60, "training.windows": "auto", "store.max_bytes": budget})
    most: list[int] = [0]

    def told(event: dict[str, Any]) -> None:
        most.append(on_disk(tmp_path / "run" / "store"))

    over = threading.Event()
    watcher = threading.Thread(target=sampled, args=(tmp_path / "run" / "store", over, most))
    watcher.start()
    try:
        events = run_stages(config, tmp_path / "run", told)
    finally:
        over.set()
        watcher.join()
    windows = RunDirectory(tmp_path / "run").config().training.windows
    assert windows > 1
    assert any(f"training.windows: auto is {windows}" in event["text"] for event in named(events, "note"))
    assert 0.5 * budget < max(most) <= budget
    (fit,) = named(events, "fit")
    assert fit["boundary"] * 2 < budget
    # A budget that grows is no reason to train anew.
    config = micro(**{**SMALL, "training.steps": 60, "training.windows": "auto", "store.max_bytes": 2 * budget})
    again = run_stages(config, tmp_path / "run")
    assert not named(again, "training")


def test_a_change_above_trains_again_what_gave_way(copy: tuple[StackWiseConfig, Path]) -> None:
    from stackwise.config.loading import build
    from stackwise.config.yaml_files import dump, parse_yaml

    _, directory = copy
    before = {(row["depth"], row["window"]): row["weights"] for row in status(RunDirectory(directory))["stages"]}
    tree = parse_yaml(dump(RunDirectory(directory).config()), "test")
    config = build(StackWiseConfig, tree, {"stages.2.training.learning_rate": 1e-2})
    events = run_stages(config, directory)
    (plan,) = named(events, "plan")
    said = {(each["depth"], each["window"]): (each["action"], each["reason"]) for each in plan["stages"]}
    assert said[0, 0] == ("train", AGAIN)
    assert said[2, 0][0] == "train"
    assert "stages.2.training.learning_rate" in said[2, 0][1]
    trained = [event["stage"] for event in named(events, "training")]
    assert sorted(trained) == trained == list(dict.fromkeys(trained))  # each of them once
    after = {(row["depth"], row["window"]): row["weights"] for row in status(RunDirectory(directory))["stages"]}
    assert all((after[key] == before[key]) == (key[0] != 2) for key in after)


def test_a_last_weight_that_is_damaged_is_trained_anew_from_the_first_window(
    copy: tuple[StackWiseConfig, Path],
) -> None:
    config, directory = copy
    before = weights(directory)
    row = status(RunDirectory(directory))["stages"][7]
    path = directory / "store" / "stages" / row["recipe"] / "block.1.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    events = run_stages(config, directory)
    damaged, *again = named(events, "warning")
    assert row["recipe"] in damaged["text"]
    assert any("later window" in event["text"] for event in again)
    assert weights(directory) == before


@pytest.mark.parametrize("ema", [0.9, pytest.param(0.0, marks=pytest.mark.stress)])
def test_swapped_stages_go_on_like_resident_ones(micro: Micro, tmp_path: Path, ema: float) -> None:
    settings = {**SMALL, "training.windows": 2, "training.steps": 4, "training.ema": ema}
    run_stages(micro(**settings), tmp_path / "resident")
    run_stages(micro(**settings, training__swap="always"), tmp_path / "swapped")
    assert weights(tmp_path / "resident") == weights(tmp_path / "swapped")


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param({"training.lookahead": "tail", "training.ema": 0.9}, marks=pytest.mark.stress),
        {"training.lookahead": "auxiliary", "training.fresh_masks": True},
        pytest.param({"training.fusion.strategy": "trainable"}, marks=pytest.mark.stress),
        pytest.param({"training.fusion.strategy": "frozen"}, marks=pytest.mark.stress),
        {"training.progressive.enabled": True, "training.progressive.new_stack_precision": "qlora"},
        {"store.fuse_passes": True},
        {"training.eval_every": 1, "training.keep_best": True},
    ],
    ids=str,
)
def test_schedules_that_read_boundaries_run_in_windows(micro: Micro, tmp_path: Path, mode: dict[str, Any]) -> None:
    config = micro(**{**SMALL, "training.steps": 4, "training.windows": 2, "evaluation.samples": 4, **mode})
    run_stages(config, tmp_path / "run")
    rows = status(RunDirectory(tmp_path / "run"))["stages"]
    assert all(row["state"] == "done" for row in rows)
    files = stage_files(tmp_path / "run")
    assert all(not any(name.startswith("state") for name in files[key]) for key in files)
    again = run_stages(config, tmp_path / "run")
    assert not named(again, "training")


def test_one_stage_at_a_time_takes_its_next_window(micro: Micro, finished: Finished, tmp_path: Path) -> None:
    config = micro(**SMALL)

    def step(depth: int, window: int | None = None) -> None:
        run_stages(config, tmp_path / "run", only=depth, window=window)

    with raises_naming(UsageError, "stage 0", "window 0", "stage 1") as error:
        step(1)
    assert error.value.exit_code == 2
    for depth in (0, 1):
        step(depth)
    with raises_naming(UsageError, "stage 2", "window 0", "stage 0") as error:
        step(0)
    assert "--depth 2" in str(error.value.hint)
    for depth in (2, 0, 1, 2, 0, 1):
        step(depth)
    step(2, 2)
    assert weights(tmp_path / "run") == weights(finished[1])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"training.windows": 8},
            "training.windows: 8 windows are more than the 7 steps of stage 0, and each needs one: give at most 7",
        ),
        (
            {"training.windows": "auto"},
            "training.windows: auto makes boundaries fit into store.max_bytes, which is not",
        ),
        ({"training.windows": 0}, "training.windows"),
        ({"training.windows": "many"}, "training.windows"),
    ],
    ids=str,
)
def test_windows_that_cannot_be_are_refused_in_a_line(micro: Micro, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        micro(**{**SMALL, **settings})


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"training.rows": 6, "training.windows": 5}, UsageError, "5 windows are more than the samples"),
        ({"training.steps": None, "training.rows": 30, "training.windows": 9}, UsageError, "more than the 4 steps"),
        (
            {"training.windows": "auto", "store.max_bytes": 90_000},
            NoSpaceError,
            "auto: no windows fit into store.max_bytes 90.0 kB",
        ),
        ({"store.max_bytes": 900_000, "training.steps": 80}, NoSpaceError, "beside .* of committed stages"),
    ],
    ids=str,
)
def test_windows_that_do_not_suit_the_data_are_refused_in_a_line(
    micro: Micro, tmp_path: Path, settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        run_stages(micro(**{**SMALL, **settings}), tmp_path / "run")


def test_the_schedule_and_the_state_name_windows(finished: Finished) -> None:
    from stackwise.cli.tables import listing, status_table
    from stackwise.cli.views import RunView
    from stackwise.pipeline.events import wording
    from stackwise.report.facts import collect
    from stackwise.report.page import page

    config, directory, events = finished
    assert [(row["depth"], row["window"]) for row in listing(config)] == [(d, w) for w in range(3) for d in range(3)]
    text = "\n".join("".join(map(str, line)) for line in status_table(status(RunDirectory(directory))))
    assert "2, window 1" in text
    assert "9 of 9 stages done" in text
    view = RunView(config.model_copy(update={"training": config.training.model_copy(update={"windows": 1})}), "run")
    for event in events:
        view.observe(event)
    assert [stage.label for stage in view.stages][3:5] == ["0, window 1", "1, window 1"]
    assert all(stage.state == "done" and stage.figures["loss"] is not None for stage in view.stages)
    (plan,) = named(events, "plan")
    said = wording(plan)
    assert said is not None
    assert "stages 0–2, windows 0–1: train, 2 steps" in said
    facts = collect(RunDirectory(directory))
    assert [len(stage.curve) for stage in facts.stages] == [row["steps"] for row in plan["stages"]]
    assert "1, window 2" in page(facts)
    assert {facts.depth for facts in facts.boundaries} == {1, 2}


@pytest.mark.stress
@pytest.mark.parametrize(("place", "event"), [(4, "step"), (3, "committed"), (5, "training")])
def test_workers_and_runners_killed_inside_and_between_windows(
    micro: Micro, tmp_path: Path, place: int, event: str
) -> None:
    from stackwise.config.yaml_files import dump
    from tests.conftest import run
    from tests.pipeline.storm import Command

    config = micro(**{**SMALL, "training.steps": 60, "training.checkpoint_steps": 5, "store.max_bytes": 2_200_000})
    (tmp_path / "stackwise.yaml").write_text(dump(config))
    run(config, tmp_path / "whole")
    first = Command(tmp_path / "stackwise.yaml", tmp_path / "run")
    told = first.until(event, place)
    if event == "step":
        os.kill(told["pid"], signal.SIGKILL)
    else:
        first.process.kill()
    first.end()
    code, err = Command(tmp_path / "stackwise.yaml", tmp_path / "run").end()
    assert code == 0, err
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    with ActivationStore(tmp_path / "run" / "store", create=False) as store:
        assert store.verify()["damaged"] == []
