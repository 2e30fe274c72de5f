"""Tasks one after the other: what each method does, what the figures say; swapped, killed, resumed; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from stackwise.config import StackWiseConfig
from stackwise.config.loading import build
from stackwise.config.yaml_files import dump
from stackwise.data import PreparedData, prepare
from stackwise.errors import ConfigError, UsageError
from stackwise.model import Front
from stackwise.pipeline.committed.generate import generate
from stackwise.pipeline.committed.load import load_rack
from stackwise.pipeline.committed.use import evaluate_rack, export_rack
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.initial import with_checkpoint
from stackwise.pipeline.planning.trace import TraceJob, trace
from stackwise.pipeline.rows import HELD_OUT, choose_samples, drawn_rows, task_ranges
from stackwise.pipeline.run import RunDirectory, status, task_figures
from stackwise.pipeline.schedule import schedule
from stackwise.store import ActivationStore, RowOrder
from stackwise.training.anchor import FISHER, PLACE, Anchored, consolidated
from stackwise.training.curriculum import ReplayOrder
from tests.pipeline.test_passes import run_stages
from tests.pipeline.test_run import named, weights

SMALL: dict[str, Any] = {
    "data.paths": [],
    "data.held_out": 0.2,
    "data.tokenizer": "bytes",
    "model.architecture.n_stacks": 2,
    "model.vocab_size": None,
    "training.mode": "end_to_end",
    "training.steps": 4,
    "training.batch_size": 4,
    "training.seq_len": 32,
    "training.lr_schedule": "constant",
    "training.warmup": 0.0,
    "training.checkpoint_steps": 2,
    "evaluation.samples": 4,
    "precision": "fp32",
    "tracking.trackers": [],
}
EWC: dict[str, Any] = {"method": "ewc", "samples": 3, "strength": 300.0}
LWF: dict[str, Any] = {"method": "lwf", "top_k": 8}
COLUMNS: dict[str, Any] = {"model.d_model": 48, "model.n_heads": 2, "model.tie_embeddings": False}
REPLAY: dict[str, Any] = {"method": "replay", "buffer": 6, "share": 0.5}

Tasks = list[dict[str, Any]]
Events = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Tasks:
    """Real sources as three tasks: as they are, in capitals, backwards."""
    root = tmp_path_factory.mktemp("tasks")
    changes: dict[str, Callable[[str], str]] = {"plain": str, "upper": str.upper, "back": lambda s: s[::-1]}
    sources = sorted(file for file in text.rglob("*") if file.is_file())[:9]
    for number, file in enumerate(sources):
        name = list(changes)[number % 3]
        (root / name).mkdir(exist_ok=True)
        changed = changes[name](file.read_text(encoding="utf-8")[:8000])
        (root / name / f"{number}.txt").write_text(changed, encoding="utf-8")
    return [{"name": name, "paths": [str(root / name)]} for name in changes]


def settings(tasks: Tasks, method: Any, **more: Any) -> StackWiseConfig:
    values = SMALL | {"data.tasks": tasks, "training.continual": method}
    return StackWiseConfig.from_preset("micro", values | {key.replace("__", "."): v for key, v in more.items()})


def prepared(config: StackWiseConfig) -> PreparedData:
    return prepare(config.data)[0]


@pytest.fixture(scope="module")
def naive(tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with nothing done against forgetting."""
    directory = tmp_path_factory.mktemp("naive") / "run"
    run_stages(settings(tasks, "naive"), directory)
    return directory


def recipes(directory: Path) -> list[str]:
    return [stage["recipe"] for stage in status(RunDirectory(directory))["stages"]]


def test_tasks_are_windows_of_their_own_rows(tasks: Tasks) -> None:
    config = settings(tasks, {**REPLAY, "by": "task"}, training__mode="layerwise")
    assert [(s.depth, s.window, s.rowset) for s in schedule(config)] == [(d, t, t) for t in range(3) for d in range(2)]
    data = prepared(config)
    of_sample = data.train.sample_tasks(32)
    for task in range(3):
        rows = choose_samples(config, data.train, task)
        new, replayed = np.split(rows, [drawn_rows(config, data.train, task)])
        assert set(of_sample[new]) == {task}
        assert np.bincount(of_sample[replayed], minlength=3).tolist() == [[0, 0, 0], [6, 0, 0], [3, 3, 0]][task]
    held_out = data.held_out.sample_tasks(32)[choose_samples(config, data.held_out, HELD_OUT)]
    for task, (first, last) in enumerate(task_ranges(config, data.held_out)):
        assert set(held_out[first:last]) == {task}


def test_a_reservoir_keeps_of_more_a_part_of_what_it_kept(tasks: Tasks) -> None:
    config = settings(tasks, REPLAY)
    split = prepared(config).train
    kept = [choose_samples(config, split, task)[drawn_rows(config, split, task) :] for task in range(3)]
    assert [len(rows) for rows in kept] == [0, 6, 6]
    of_first = kept[2][split.sample_tasks(32)[kept[2]] == 0]
    assert set(of_first) <= set(kept[1])
    assert set(kept[1]) <= set(choose_samples(config, split, 0))


def test_each_step_replays_its_share() -> None:
    order = ReplayOrder(RowOrder(40, seed=(1,), chunk_rows=4), 6, 0.25, 8)
    steps = order.at(0, 80).reshape(10, 8)
    assert ((steps >= 34).sum(axis=1) == 2).all()
    assert sorted(steps[steps < 34][:34]) == list(range(34))  # new rows go in epochs
    assert order.at(13, 29).tolist() == order.at(0, 80)[13:29].tolist()
    assert order.window_rows(17)[0].tolist() == steps[2].tolist()


def test_what_is_done_against_forgetting_begins_with_the_second_task(tasks: Tasks, naive: Path, tmp_path: Path) -> None:
    for method in (REPLAY, LWF):
        run_stages(settings(tasks, method), tmp_path / method["method"])
        assert [a == b for a, b in zip(recipes(naive), recipes(tmp_path / method["method"]), strict=True)] == [
            True, False, False,
        ]  # fmt: skip
        assert weights(tmp_path / method["method"])[0] == weights(naive)[0]


class Killed(BaseException):
    """Stands for a kill: nothing is saved beyond what is."""


def test_what_is_held_is_the_same_swapped_and_killed(tasks: Tasks, tmp_path: Path) -> None:
    resident, swapped = (
        settings(tasks, EWC, model__architecture__n_stacks=1, training__swap=s) for s in ("never", "always")
    )

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and event["stage"] == 1:
            raise Killed

    events = run_stages(resident, tmp_path / "resident")
    assert named(events, "step")[-1]["terms"]["ewc"] > 0
    with pytest.raises(Killed):
        run_stages(swapped, tmp_path / "killed", kill)
    events = run_stages(swapped, tmp_path / "killed")
    assert [event["stage"] for event in named(events, "resumed")] == [1]
    assert weights(tmp_path / "killed") == weights(tmp_path / "resident")
    figures = [status(RunDirectory(tmp_path / name))["tasks"] for name in ("killed", "resident")]
    assert figures[0] == figures[1]
    assert figures[0]["before"]


def test_the_stage_as_it_was_says_the_same_swapped(tasks: Tasks, tmp_path: Path) -> None:
    resident, swapped = (
        settings(tasks[:2], LWF, model__architecture__n_stacks=1, training__swap=s) for s in ("never", "always")
    )
    run_stages(resident, tmp_path / "resident")
    events = run_stages(swapped, tmp_path / "swapped")
    assert weights(tmp_path / "swapped") == weights(tmp_path / "resident")
    assert [event["stage"] for event in named(events, "past")] == [1]
    with ActivationStore(tmp_path / "swapped" / "store") as store:  # what it said is gone with its commit
        assert not store.boundaries()


def test_the_penalty_is_that_of_every_task_around_its_own_weights() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    fisher = [{name: torch.rand_like(p) for name, p in module.named_parameters()} for _ in range(2)]
    places = [{name: torch.randn_like(p) for name, p in module.named_parameters()} for _ in range(2)]
    held = consolidated(fisher[1], places[1], consolidated(fisher[0], places[0], {}, 1.0), 1.0)
    term = Anchored(held, 3.0).term(module, 7)
    assert (term.count, term.weight) == (7, 3.0)
    (term.sum / term.count).backward()  # type: ignore[no-untyped-call]
    for name, p in module.named_parameters():
        expected = torch.stack([f[name] * (p - w[name]) for f, w in zip(fisher, places, strict=True)]).sum(0)
        torch.testing.assert_close(p.grad, expected.detach())
    online = consolidated(fisher[1], places[1], consolidated(fisher[0], places[0], {}, 0.5), 0.5)
    torch.testing.assert_close(online[f"{FISHER}bias"], 0.5 * fisher[0]["bias"] + fisher[1]["bias"])
    torch.testing.assert_close(online[f"{PLACE}bias"], places[1]["bias"])


def test_figures(naive: Path) -> None:
    losses = [[1.0, 3.0, 3.0], [2.0, 1.5, 2.5], [1.5, 2.0, 1.0]]
    stages = [
        {
            "depth": 1,
            "window": t,
            "state": "done",
            "tasks": {"names": ["a", "b", "c"], "after": row, "before": [4.0] * 3},
        }
        for t, row in enumerate(losses)
    ]
    figures = task_figures(stages)
    assert figures is not None
    assert (figures["average_loss"], figures["forgetting"], figures["forward_transfer"]) == (1.5, 0.5, 1.25)
    assert task_figures([{"depth": 0, "window": 0, "state": "done", "tasks": None}]) is None
    value = status(RunDirectory(naive))
    assert value["tasks"]["tasks"] == ["plain", "upper", "back"]
    assert list(value["stages"][2]["tasks"].values()) == value["tasks"]["losses"][2]
    assert value["tasks"]["forward_transfer"] > 0  # text of any of them says something about the others


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"data.tasks": []}, "data.tasks names none"),
        ({"training.windows": 2, "training.mode": "layerwise"}, "tasks are the windows"),
        ({"training.mode": "independent"}, "cannot take up the task before"),
        ({"training.growth": [{"blocks": 1, "until": 0.5}]}, "leave fusion, adaptation and growth out"),
        ({"training.continual": "forget"}, "must be one of none, naive, replay, ewc, lwf, columns"),
        ({"training.continual": {"method": "ewc", "strength": 0.0}}, "must be more than 0"),
        ({"training.continual": {"method": "replay", "share": 1.0}}, "less than 1"),
        ({"training.continual": {"method": "ewc", "buffer": 3}}, "buffer"),
        ({"training.continual": EWC, "precision": "fp16"}, "vanish in fp16"),
        ({"training.continual": "columns", "model.d_model": 48}, "set model.tie_embeddings: false"),
        (
            {"training.continual": "columns", **COLUMNS, "model.d_model": 50},
            "3 columns do not divide d_model 50",
        ),
        ({"training.continual": "columns", **COLUMNS, "model.n_heads": 3}, "3 heads do not divide a column's width 16"),
        (
            {"training.continual": "columns", **COLUMNS, "model.stream": {"kind": "columns", "count": 2}},
            "it follows the tasks",
        ),
        ({"model.stream": {"kind": "columns", "count": 3}, **COLUMNS}, "set training.continual: columns"),
        ({"training.continual": "columns", **COLUMNS, "parallel.tensor": 2}, "take parallel.data alone"),
        ({"training.continual": REPLAY, "training.curriculum": {"by": "rarity"}}, "leave training.curriculum out"),
    ],
    ids=str,
)
def test_what_cannot_be(tasks: Tasks, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        StackWiseConfig.from_preset("micro", SMALL | {"data.tasks": tasks, "training.continual": "naive"} | changes)


Parts = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def columns(tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Parts]]:
    """A run whose tasks have a column each, and what its upper block was after each of them."""
    directory, after = tmp_path_factory.mktemp("columns") / "run", list[Parts]()

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "committed" and "block.1" in event["parts"]:
            after.append(load_file(directory / "store" / "stages" / event["recipe"] / "block.1.safetensors"))

    run_stages(settings(tasks, "columns", **COLUMNS, training__mode="layerwise"), directory, note)
    return directory, after


def test_columns_forget_nothing(columns: tuple[Path, list[Parts]]) -> None:
    figures = status(RunDirectory(columns[0]))["tasks"]
    assert figures["forgetting"] == 0.0
    for task in range(3):  # the same bits
        assert {row[task] for row in figures["losses"][task:]} == {figures["losses"][-1][task]}


def test_a_task_moves_its_own_column_alone(columns: tuple[Path, list[Parts]]) -> None:
    after = columns[1]
    for task in (1, 2):
        for name, tensor in after[task].items():
            assert torch.equal(tensor, after[task - 1][name]) != (f".{task}." in name), name


def test_a_rack_in_columns_is_evaluated_and_answers(columns: tuple[Path, list[Parts]]) -> None:
    rack = load_rack(RunDirectory(columns[0]), torch.device("cpu"))
    assert evaluate_rack(rack, rack.data.held_out)["stages"][1]["bits_per_byte"] > 0
    assert generate(rack, None)  # a passage, filled in
    with pytest.raises(UsageError):
        export_rack(rack, columns[0] / "exported")
    with pytest.raises(ConfigError, match=r"init\.weights"):
        with_checkpoint(StackWiseConfig.from_preset("micro", {"init.weights": str(columns[0])}))


@pytest.mark.stress
@pytest.mark.parametrize("method", ["columns", "ewc", "lwf"])
def test_the_estimate_knows_what_a_method_takes(tasks: Tasks, method: str) -> None:
    large = {"model.d_model": 192, "model.vocab_size": 300, "training.batch_size": 16, "training.seq_len": 64}
    config = settings(tasks, method, **COLUMNS | large)
    for stage in schedule(config)[::2]:
        peak = trace(TraceJob(dump(config), stage, 300, "cpu", 16, 1))["peak"]
        assert Estimate(config, 300, stage).memory == pytest.approx(peak, rel=0.15)


def test_columns_are_the_same_swapped_killed_and_resumed(tasks: Tasks, tmp_path: Path) -> None:
    resident, swapped = (settings(tasks[:2], "columns", **COLUMNS, training__swap=s) for s in ("never", "always"))

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and event["stage"] == 1:
            raise Killed

    run_stages(resident, tmp_path / "resident")
    with pytest.raises(Killed):
        run_stages(swapped, tmp_path / "killed", kill)
    events = run_stages(swapped, tmp_path / "killed")
    assert [event["stage"] for event in named(events, "resumed")] == [1]
    assert weights(tmp_path / "killed") == weights(tmp_path / "resident")
    figures = [status(RunDirectory(tmp_path / name))["tasks"] for name in ("killed", "resident")]
    assert figures[0] == figures[1]


@pytest.mark.stress
def test_what_is_replayed_goes_through_no_block_that_stands_still(
    tasks: Tasks, checkpoints: Any, tmp_path: Path
) -> None:
    changes = {
        "init.weights": str(checkpoints("llama")),
        "training.adapters": {"rank": 2, "above": 2},
        "training.objective": "clm",
        "training.swap": "never",
    }
    left_out = ("model.", "data.tokenizer")
    plain = {key: value for key, value in (SMALL | changes).items() if not key.startswith(left_out)}
    through: dict[str, int] = {}

    def rows_through(name: str, method: Any, told: Callable[[dict[str, Any]], None] = lambda event: None) -> Events:
        config = with_checkpoint(
            build(StackWiseConfig, {}, plain | {"data.tasks": tasks, "training.continual": method})
        )

        def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if isinstance(module, Front):
                through[name] = through.get(name, 0) + len(inputs[0])

        hook = register_module_forward_pre_hook(count)
        try:
            return run_stages(config, tmp_path / name, told)
        finally:
            hook.remove()

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and event["stage"] == 1:
            raise Killed

    rows_through("naive", "naive")
    events = rows_through("replay", REPLAY)
    assert [event["replayed"] for event in named(events, "written") if "replayed" in event] == [6, 6]
    assert through["replay"] == through["naive"]
    with pytest.raises(Killed):
        rows_through("killed", REPLAY, kill)
    rows_through("killed", REPLAY)
    assert through["killed"] == through["naive"]
    assert weights(tmp_path / "killed") == weights(tmp_path / "replay")
