"""Several ranks train a stage: the same artefacts as one process, and every way in which a rank may end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from stackwise.cli.app import main
from stackwise.config import StackWiseConfig
from stackwise.errors import InterruptedRun, StackWiseError, UsageError
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.runner.workers import WorkerFailed
from stackwise.store import ActivationStore
from tests.conftest import Micro, raises_naming, run
from tests.pipeline.test_modes import committed
from tests.pipeline.test_run import named, weights

STEP: dict[str, Any] = {"training__batch_size": 4, "training__accumulation": 8, "training__steps": 20}
SETTINGS: dict[str, Any] = STEP | {
    "model__dropout": 0.1,
    "training__checkpoint_steps": 2,
    "training__eval_every": 5,
    "training__grad_clip": 0.1,
    "evaluation__samples": 8,
}


@pytest.fixture(scope="module")
def alone(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    run(micro(**SETTINGS), directory)
    return directory


def boundaries(directory: Path) -> dict[str, str]:
    with ActivationStore(directory / "store", create=False) as store:
        assert store.verify()["damaged"] == []
        return {info.id: info.state for info in store.boundaries()}


def stopped(
    config: StackWiseConfig, directory: Path, rank: int, number: int, only: int | None = None
) -> StackWiseError:
    """Run until something is saved and the ranks tell how they fare, send one a signal; what the run ends with."""
    sent: list[float] = []
    saved: list[int] = []

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint":
            saved.append(event["step"])
        if event["event"] == "ranks" and saved and not sent:
            sent.append(time.monotonic())
            os.kill(event["ranks"][rank]["pid"], number)

    with pytest.raises(StackWiseError) as caught:
        Runner(config, RunDirectory(directory), observe).run(only=only)
    assert time.monotonic() - sent[0] < 20
    return caught.value


def same(directory: Path, alone: Path) -> None:
    assert weights(directory) == weights(alone)
    assert boundaries(directory) == boundaries(alone)
    for here, there in zip(committed(directory), committed(alone), strict=True):
        assert here.record["losses"] == there.record["losses"]
        assert here.record["held_out"] == there.record["held_out"]


@pytest.mark.parametrize(
    "ranks", [2, pytest.param(4, marks=pytest.mark.stress), pytest.param(8, marks=pytest.mark.stress)]
)
def test_any_number_of_ranks_makes_what_one_process_makes(
    micro: Micro, alone: Path, tmp_path: Path, ranks: int
) -> None:
    events = run(micro(**SETTINGS, parallel__data=ranks), tmp_path)
    same(tmp_path, alone)
    fare = named(events, "ranks")[-1]
    assert [one["rank"] for one in fare["ranks"]] == list(range(ranks))
    assert all(0 <= one["sync_fraction"] <= 1 and one["memory"] > 0 for one in fare["ranks"])
    shown = status(RunDirectory(tmp_path))
    assert shown["ranks"] == ranks
    assert shown["group"]["slowest"] in range(ranks)


def test_a_rank_is_killed_and_another_number_of_ranks_goes_on(micro: Micro, alone: Path, tmp_path: Path) -> None:
    error = stopped(micro(**SETTINGS, parallel__data=4), tmp_path, 2, signal.SIGKILL)
    assert "rank 2" in error.message
    assert str(tmp_path / "logs" / "rank-2.log") in (error.hint or "")
    events = run(micro(**SETTINGS, parallel__data=2), tmp_path)
    assert named(events, "resumed") or named(events, "reused")
    same(tmp_path, alone)


def test_a_rank_that_does_not_answer_is_given_up(micro: Micro, tmp_path: Path) -> None:
    config = micro(**SETTINGS | {"training__steps": 2000}, parallel__data=2, parallel__timeout=2.0)
    error = stopped(config, tmp_path, 1, signal.SIGSTOP)
    assert isinstance(error, WorkerFailed)
    assert error.message.startswith("rank 1 ")
    assert "parallel.timeout" in error.message


def test_a_rank_is_told_to_stop(micro: Micro, tmp_path: Path) -> None:
    error = stopped(micro(**SETTINGS | {"training__steps": 2000}, parallel__data=2), tmp_path, 1, signal.SIGTERM)
    assert isinstance(error, InterruptedRun)
    assert error.exit_code == 75


def test_rows_are_divided_where_ranks_do_not_divide_microbatches(micro: Micro, alone: Path, tmp_path: Path) -> None:
    """The step of 8 microbatches of 4 rows, written as one of 32."""
    config = micro(**SETTINGS | {"training__batch_size": 16, "training__accumulation": 2}, parallel__data=8)
    runner = Runner(config, RunDirectory(tmp_path), lambda event: None)
    with pytest.raises(UsageError, match="nearest that do: 2 and 4"):
        Runner(micro(**STEP, parallel__data=3), RunDirectory(tmp_path), lambda event: None).run()
    assert not (tmp_path / "run.json").exists()
    runner.run(only=0)
    assert weights(tmp_path)[0] == weights(alone)[0]


def test_the_fastest_order_of_sums_is_another_recipe(micro: Micro, alone: Path, tmp_path: Path) -> None:
    config = micro(**SETTINGS, parallel__data=2, parallel__deterministic=False)
    run(config, tmp_path, only=0)
    recipe = status(RunDirectory(tmp_path))["stages"][0]["recipe"]
    with ActivationStore(tmp_path / "store", create=False) as store:
        stage = store.stage(recipe)
    assert stage is not None
    here, there = stage.record, committed(alone)[0].record
    assert here["recipe"]["settings"]["training"]["ranks"] == 2
    assert here["losses"] == pytest.approx(there["losses"], rel=1e-4)


def test_what_compression_leaves_out_is_in_the_checkpoint(micro: Micro, tmp_path: Path) -> None:
    settings = SETTINGS | {"parallel__deterministic": False, "parallel__compression_rank": 2}
    config = micro(**settings, parallel__data=2, parallel__compression="powersgd")
    run(config, tmp_path / "whole", only=0)
    stopped(config, tmp_path / "killed", 1, signal.SIGKILL)
    events = run(config, tmp_path / "killed", only=0)
    assert named(events, "resumed")
    recipe = status(RunDirectory(tmp_path / "whole"))["stages"][0]["recipe"]
    records = []
    for name in ("whole", "killed"):
        with ActivationStore(tmp_path / name / "store", create=False) as store:
            stage = store.stage(recipe)
        assert stage is not None
        records.append(stage.record)
    assert records[0]["parts"] == records[1]["parts"]
    assert records[0]["recipe"]["settings"]["training"]["compression"] == "powersgd"


def test_compression_is_refused_where_sums_are_to_be_those_of_one_process(micro: Micro) -> None:
    with raises_naming(UsageError, "parallel.deterministic"):
        micro(parallel__data=2, parallel__compression="bf16")


@pytest.mark.parametrize("why", ["swapped and compressed", "port"])
def test_what_ranks_cannot_do_is_refused_before_anything_is_written(why: str, tmp_path: Path) -> None:
    swapped = ["parallel.compression=bf16", "training.swap=always", "parallel.deterministic=false"]
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        options = [f"parallel.port={port}"] if why == "port" else swapped
        arguments = ["run", "--preset", "micro", "--run", str(tmp_path / "run"), "--engine", "torchrun", "--ranks", "2"]
        arguments += [word for option in options for word in ("-o", option)]
        done = CliRunner().invoke(main, arguments, standalone_mode=False)
    assert isinstance(done.exception, UsageError)
    assert options[0].partition("=")[0] in str(done.exception)
    assert not (tmp_path / "run").exists()


def test_every_rank_has_a_store_of_its_own(micro: Micro, alone: Path, tmp_path: Path) -> None:
    """With all rows: the same artefacts in each; one that is lost comes back over the wire, boundaries and weights."""
    own = {"store__path": str(tmp_path / "stores" / "{rank}"), "training__row_groups": 1}
    config = micro(**SETTINGS, parallel__data=2, **own)
    run(config, tmp_path / "run", only=0)
    shutil.rmtree(tmp_path / "stores" / "1")
    run(config, tmp_path / "run")
    assert weights(tmp_path / "run") == weights(alone)
    with ActivationStore(alone / "store", create=False) as store:
        whole = {info.id: info.state for info in store.boundaries()}
    for rank in (0, 1):
        with ActivationStore(tmp_path / "stores" / str(rank), create=False) as store:
            assert store.verify()["damaged"] == []
            assert {info.id: info.state for info in store.boundaries()} == whole
            assert all(store.stage(stage.recipe) for stage in committed(alone))


SHARDED: dict[str, Any] = SETTINGS | {"precision": "fp64", "training__steps": 16, "model__tie_embeddings": True}


@pytest.fixture(scope="module")
def in_float64(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("float64") / "run"
    run(micro(**SHARDED), directory)
    return directory


ANEW: dict[str, Any] = {"training__activation_checkpointing": True}
"""Blocks are recomputed in the backward pass: with ranks, too, it changes no number and no recipe."""


def to_rounding(directory: Path, alone: Path) -> None:
    for here, there in zip(committed(directory), committed(alone), strict=True):
        assert here.record["losses"] == pytest.approx(there.record["losses"], rel=1e-9)
        assert here.record["held_out"][-1][1] == pytest.approx(there.record["held_out"][-1][1], rel=1e-9)
        for part in there.parts:
            ours, theirs = load_file(here.path(part)), load_file(there.path(part))
            assert all(torch.allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-9) for name in theirs)


@pytest.mark.stress
@pytest.mark.parametrize(("zero", "shard", "data"), [(3, 2, 1), (2, 2, 2), (1, 4, 1)])
def test_a_stage_divided_over_ranks_makes_what_one_process_makes_to_rounding(
    micro: Micro, in_float64: Path, tmp_path: Path, zero: int, shard: int, data: int
) -> None:
    mesh = {"parallel__zero": zero, "parallel__shard": shard, "parallel__data": data}
    error = stopped(micro(**SHARDED, **mesh), tmp_path, 1, signal.SIGKILL)
    assert "rank 1" in error.message
    others = {} if data == 1 else {"parallel__shard": 8}  # whole tensors: any number of ranks goes on
    events = run(micro(**SHARDED, **others), tmp_path)
    assert named(events, "resumed") or named(events, "reused")
    to_rounding(tmp_path, in_float64)


def test_two_ranks_divide_a_stage_are_killed_and_go_on(micro: Micro, tmp_path: Path) -> None:
    settings = SHARDED | {"training__batch_size": 2, "training__eval_every": 8}
    run(micro(**settings), tmp_path / "alone", only=0)
    stopped(micro(**settings, **ANEW, parallel__shard=2), tmp_path / "divided", 1, signal.SIGKILL, only=0)
    events = run(micro(**settings, parallel__shard=2), tmp_path / "divided", only=0)  # the same recipe, as it goes on
    assert named(events, "resumed")
    to_rounding(tmp_path / "divided", tmp_path / "alone")


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ({"optimizer": "muon"}, "training.optimizer"),
        ({"ema": 0.9}, "training.ema"),
        ({"compile": True}, "training.compile"),
    ],
)
def test_what_cannot_be_divided_is_refused(micro: Micro, setting: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError, match=key):
        micro(parallel__shard=2, **{f"training__{name}": value for name, value in setting.items()})


@pytest.mark.stress
def test_a_divided_stage_in_bf16_makes_what_one_process_makes(micro: Micro, tmp_path: Path) -> None:
    settings = SHARDED | {"precision": "bf16", "training__steps": 4, "training__eval_every": 4}
    run(micro(**settings), tmp_path / "alone", only=0)
    run(micro(**settings, parallel__shard=2), tmp_path / "divided", only=0)
    here, there = (committed(tmp_path / name)[0].record for name in ("divided", "alone"))
    assert here["losses"] == pytest.approx(there["losses"], rel=1e-4)


SPLIT: dict[str, Any] = SHARDED | {
    "training__steps": 20,
    "training__accumulation": 2,
    "training__batch_size": 4,
    "training__checkpoint_steps": None,
    "model__attention": {"kind": "gqa", "kv_heads": 2, "qk_norm": True},
    "model__n_heads": 4,
    "model__bias": True,
}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"model__attention": "mla"}, "model.attention: mla"),
        ({"model__n_heads": 4, "parallel__tensor": 3}, "parallel.tensor: 3 does not divide .*nearest that do: 2 and 4"),
        ({"parallel__sequence": True, "model__dropout": 0.1}, "parallel.sequence"),
        ({"parallel__sequence": True, "parallel__tensor": 1}, "parallel.sequence"),
    ],
)
def test_what_cannot_be_split_is_refused(micro: Micro, settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError, match=key):
        micro(**({"parallel__tensor": 2} | settings))


def test_ranks_split_the_matrices_of_a_stage(micro: Micro, tmp_path: Path) -> None:
    run(micro(**SPLIT), tmp_path / "alone", only=0)
    run(micro(**SPLIT, **ANEW, parallel__tensor=2), tmp_path / "split", only=0)
    to_rounding(tmp_path / "split", tmp_path / "alone")


ROW: dict[str, Any] = SHARDED | {
    "model__dropout": 0.0,
    "training__mode": "end_to_end",
    "model__architecture__n_stacks": 4,
    "training__steps": 6,
    "training__accumulation": 4,
    "training__batch_size": 2,
    "training__eval_every": 3,
    "training__checkpoint_steps": None,
}


def test_blocks_of_a_stage_are_divided_over_ranks(micro: Micro, tmp_path: Path) -> None:
    run(micro(**ROW), tmp_path / "alone")
    run(micro(**ROW, **ANEW, parallel__pipeline=2), tmp_path / "divided")
    to_rounding(tmp_path / "divided", tmp_path / "alone")


@pytest.mark.stress
@pytest.mark.parametrize(
    "mesh",
    [
        {"schedule": "gpipe", "data": 2, "zero": 1},
        {"schedule": "interleaved", "shard": 2},
        {"schedule": "1f1b", "shard": 2, "tensor": 2},
    ],
)
def test_blocks_divided_over_ranks_are_taken_up_by_others(micro: Micro, tmp_path: Path, mesh: dict[str, Any]) -> None:
    settings = ROW | {"training__steps": 16, "training__checkpoint_steps": 2, "training__objective": "clm"}
    parallel = {f"parallel__{name}": value for name, value in (mesh | {"pipeline": 2}).items()}
    run(micro(**settings), tmp_path / "alone")
    error = stopped(micro(**settings, **parallel), tmp_path / "divided", 1, signal.SIGKILL)
    assert "rank 1" in error.message
    events = run(micro(**settings, parallel__shard=2), tmp_path / "divided")
    assert named(events, "resumed")
    to_rounding(tmp_path / "divided", tmp_path / "alone")


def test_blocks_that_do_not_divide_are_refused(micro: Micro, tmp_path: Path) -> None:
    with raises_naming(UsageError, "3 ranks", "2 parts", "stage 0", "4 blocks") as caught:
        run(micro(**ROW, parallel__pipeline=3, parallel__schedule="interleaved"), tmp_path)
    assert "2" in (caught.value.hint or "")
    assert not list(tmp_path.iterdir())
    with raises_naming(UsageError, "parallel.pipeline"):
        micro(parallel__pipeline=2, model__dropout=0.1)


@pytest.mark.stress
@pytest.mark.parametrize(
    "mesh",
    [{"shard": 2}, {"data": 2}, {"data": 2, "shard": 2, "zero": 1}, {"shard": 2, "sequence": True}],
)
def test_matrices_are_split_within_slices_and_copies(micro: Micro, tmp_path: Path, mesh: dict[str, Any]) -> None:
    kind = {"model__ffn": "gelu", "model__norm_place": "post", "model__dropout": 0.0 if "sequence" in mesh else 0.1}
    parallel = {f"parallel__{name}": value for name, value in (mesh | {"tensor": 2}).items()}
    run(micro(**SPLIT | kind), tmp_path / "alone")
    run(micro(**SPLIT | kind, **parallel), tmp_path / "split")
    to_rounding(tmp_path / "split", tmp_path / "alone")
