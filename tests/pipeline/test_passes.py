"""Boundaries filled on demand: passes fused, only every w-th stored; the weights are those of separate passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.config import StackWiseConfig
from stackwise.pipeline.device import describe
from stackwise.pipeline.job import FinishJob, StageJob, from_plain
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.runner.manifest import RunContext
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.worker.jobs import run_stage
from stackwise.store import ActivationStore
from stackwise.training.ranks import SingleProcess
from tests.conftest import Micro, run
from tests.pipeline.storm import kill_worker
from tests.pipeline.test_run import named, weights

SMALL: dict[str, Any] = {
    "model.architecture.n_stacks": 4,
    "store.chunk_bytes": 1 << 15,
    "training.steps": 12,
    "training.rows": 150,
    "evaluation.samples": 4,
}
"""Four stages; rows seen more than once, several chunks a boundary, the last one short."""


def verified(directory: Path) -> dict[int, int]:
    """The boundaries of a run by depth, with the chunks published; nothing is damaged, all of them are complete."""
    with ActivationStore(directory / "store", create=False) as store:
        assert store.verify()["damaged"] == []
        found = store.boundaries()
        assert all(info.state == "complete" for info in found)
        return {info.depth: info.published for info in found}


def run_stages(
    config: StackWiseConfig,
    directory: Path,
    told: Callable[[dict[str, Any]], None] = lambda event: None,
    **only: Any,
) -> list[dict[str, Any]]:
    """A run (or `only` a stage of it) without its evaluation, its workers' jobs done in this process; its events.

    Every job goes through its line of JSON, as to a process.
    """
    events: list[dict[str, Any]] = []

    class Here(Runner):
        def _finish(self, context: RunContext) -> dict[str, Any]:
            return {}

    def work(job: StageJob | FinishJob) -> list[dict[str, Any]]:
        run_stage(
            from_plain(StageJob, json.loads(json.dumps(asdict(job)))),
            runner._observe,
            lambda: False,
            torch.device("cpu"),
            SingleProcess(),
        )
        return []

    def observe(event: dict[str, Any]) -> None:
        events.append(event)
        told(event)

    runner = Here(config, RunDirectory(directory), observe)
    runner._pool.work = work  # type: ignore[method-assign]
    ready = {"event": "ready", **describe(torch.device("cpu"))}
    runner._pool.start = lambda log: ready  # type: ignore[method-assign]
    runner.run(**only)
    return events


Separate = Callable[[str], Path]


@pytest.fixture(scope="module")
def separate(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> Separate:
    """By codec, a run whose boundaries were each written by a pass of their own."""
    home = tmp_path_factory.mktemp("separate")

    def made(codec: str) -> Path:
        if not (home / codec).exists():
            run_stages(micro(store__codec=codec, **SMALL), home / codec)
            assert len(verified(home / codec)) == 3
        return home / codec

    return made


@pytest.mark.parametrize(
    ("codec", "how", "kept"),
    [
        pytest.param("bf16", {"fuse_passes": True}, [1, 2, 3], marks=pytest.mark.stress),
        pytest.param("fp32", {"fuse_passes": True}, [1, 2, 3], marks=pytest.mark.stress),
        ("int8-zstd", {"fuse_passes": True}, [1, 2, 3]),
        pytest.param("bf16", {"every": 2}, [2], marks=pytest.mark.stress),
        ("fp32", {"every": 2}, [2]),
        ("bf16", {"every": 3}, [3]),
        pytest.param("fp32", {"every": 3}, [3], marks=pytest.mark.stress),
        pytest.param("int8-zstd", {"every": 3}, [3], marks=pytest.mark.stress),
        ("bf16", {"every": 2, "fuse_passes": True}, [2]),
        ("fp32", {"every": 9}, []),
    ],
    ids=str,
)
def test_the_weights_are_those_of_separate_passes(
    separate: Separate, tmp_path: Path, codec: str, how: dict[str, Any], kept: list[int]
) -> None:
    config = RunDirectory(separate(codec)).config()
    for key, value in how.items():
        setattr(config.store, key, value)
    events = run_stages(config, tmp_path / "run")
    assert weights(tmp_path / "run") == weights(separate(codec))
    chunks = verified(separate(codec))
    assert verified(tmp_path / "run") == {depth: chunks[depth] for depth in kept}
    assert not named(events, "recomputing")
    assert len(named(events, "filling")) == (len(kept) if "fuse_passes" in how else 0)


def test_a_fused_pass_killed_halfway_goes_on(separate: Separate, tmp_path: Path) -> None:
    config = RunDirectory(separate("bf16")).config()
    config.store.fuse_passes = True
    kill_worker(config, tmp_path / "run", 1, 2)
    run(config, tmp_path / "run")
    assert weights(tmp_path / "run") == weights(separate("bf16"))
    assert verified(tmp_path / "run") == verified(separate("bf16"))


def test_damage_below_and_in_the_boundary_being_filled_is_made_again(separate: Separate, tmp_path: Path) -> None:
    config = RunDirectory(separate("bf16")).config()
    config.store.fuse_passes = True
    harmed: list[int] = []

    def harm(event: dict[str, Any]) -> None:
        """Change a bit of the boundary that stage 2 reads, once, and of that which it fills, once."""
        if event["event"] == "filling" and event["stage"] == 1 and len(harmed) < 2:
            depth = 1 + len(harmed)
            with ActivationStore(tmp_path / "run" / "store", create=False) as store:
                (info,) = [info for info in store.boundaries() if info.depth == depth]
            for chunk in (tmp_path / "run" / "store" / "boundaries" / info.id / "activations").glob("c/*/0/0"):
                raw = bytearray(chunk.read_bytes())
                raw[len(raw) // 2] ^= 1
                chunk.write_bytes(raw)
            harmed.append(depth)

    events = run_stages(config, tmp_path / "run", harm)
    assert harmed == [1, 2]
    assert len(named(events, "warning")) >= 1
    assert weights(tmp_path / "run") == weights(separate("bf16"))
    assert verified(tmp_path / "run") == verified(separate("bf16"))


def test_a_boundary_that_nobody_reads_again_is_not_written(separate: Separate, tmp_path: Path) -> None:
    config = RunDirectory(separate("bf16")).config()
    config.store.fuse_passes, config.store.keep = True, "none"
    config.training.steps = 9  # 144 of the 150 rows: each is seen once at most
    events = run_stages(config, tmp_path / "run")
    assert [event["stage"] for event in named(events, "filling")] == [0, 1]
    assert verified(tmp_path / "run") == {}
    config.store.fuse_passes, config.store.keep = False, "all"
    run_stages(config, tmp_path / "other")
    assert weights(tmp_path / "run") == weights(tmp_path / "other")


def test_the_cost_is_said_before_the_run(separate: Separate, tmp_path: Path) -> None:
    config = RunDirectory(separate("bf16")).config()
    row = 32 * 32 * 2
    one, seen = 150 * row, 12 * 16 * row

    def cost(**store: Any) -> dict[str, Any]:
        for key, value in {"every": 1, "fuse_passes": False, **store}.items():
            setattr(config.store, key, value)
        (fit,) = named(run_stages(config, tmp_path / "run"), "fit")
        shutil.rmtree(tmp_path / "run")
        return fit

    fit = cost()
    assert fit["traffic"] == fit["separate"]
    flops = fit["traffic"]["flops"] / 3
    assert fit["traffic"]["written"] == 3 * one
    assert fit["traffic"]["read"] == 3 * seen + 2 * one
    fit = cost(fuse_passes=True)
    assert fit["traffic"] == {"read": 3 * (seen - one) + 2 * one, "written": 3 * one, "flops": 3 * flops}
    # Stage 1 goes through stage 0 and stage 3 through stage 2, on the rows they see; boundary 2 is made from tokens.
    fit = cost(every=2)
    assert fit["traffic"]["read"] == 2 * seen
    assert fit["traffic"]["written"] == one
    assert fit["traffic"]["flops"] == pytest.approx(2 * flops * 12 * 16 / 150 + 2 * flops)
