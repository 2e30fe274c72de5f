"""A run's boundaries made again from its weights, and kept within a quota."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stackwise.cli import main
from stackwise.config import StackWiseConfig
from stackwise.errors import NoSpaceError
from stackwise.pipeline.committed.use import recomputer
from stackwise.pipeline.run import RunDirectory
from stackwise.store import ActivationStore
from tests.conftest import Micro, run
from tests.pipeline.test_run import named, weights


@pytest.fixture(scope="module", params=["bf16", "fp32", "int8"])
def finished(request: pytest.FixtureRequest, micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages, two boundaries of several chunks each."""
    directory = tmp_path_factory.mktemp("heal") / "run"
    overrides: dict[str, Any] = {"model.architecture.n_stacks": 3, "store.chunk_bytes": 1 << 17}
    run(micro(store__codec=request.param, training__steps=10, training__rows=300, **overrides), directory)
    return directory


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def chunks_of(directory: Path, depth: int) -> list[Path]:
    with ActivationStore(directory / "store", create=False) as store:
        (info,) = [info for info in store.boundaries() if info.depth == depth]
        assert info.chunks > 1
    return sorted((directory / "store" / "boundaries" / info.id / "activations").glob("c/*/0/0"))


@pytest.mark.parametrize("depth", [1, 2])
def test_repair_restores_the_identical_bytes_from_the_trunk(copy: Path, depth: int) -> None:
    first, *_, last = chunks_of(copy, depth)
    before = [first.read_bytes(), last.read_bytes()]
    raw = bytearray(before[0])
    raw[7] ^= 1
    first.write_bytes(raw)
    last.unlink()
    with ActivationStore(copy / "store", create=False) as store:
        assert len(store.verify()["damaged"]) == 2
        done = store.repair(recomputer(RunDirectory(copy), store))
        assert len(done["repaired"]) == 2
        assert done["gone"] == []
        assert store.verify()["damaged"] == []
    assert [first.read_bytes(), last.read_bytes()] == before


def test_the_command_repairs_with_the_runs_weights(copy: Path) -> None:
    chunk = chunks_of(copy, 2)[0]
    before = chunk.read_bytes()
    chunk.write_bytes(before[:-10])
    shutil.rmtree(copy / "store" / "index")
    answer = CliRunner().invoke(main, ["cache", "repair", "--run", str(copy), "--json"])
    done = json.loads(answer.stdout)
    assert done["index"] == "rebuilt"
    again = CliRunner().invoke(main, ["cache", "verify", "--run", str(copy), "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["damaged"] == []
    before_weights = weights(copy)
    run(RunDirectory(copy).config(), copy)
    assert weights(copy) == before_weights


@pytest.mark.stress
def test_a_quota_evicts_what_is_not_in_use_and_changes_no_weight(micro: Micro, tmp_path: Path) -> None:
    config: StackWiseConfig = micro(training__steps=10, **{"model.architecture.n_stacks": 5})
    run(config, tmp_path / "free")
    with ActivationStore(tmp_path / "free" / "store", create=False) as store:
        size = store.boundaries()[0].disk_bytes
    config.store.max_bytes = 2 * size + size // 2
    events = run(config, tmp_path / "tight")
    assert len(named(events, "dropped")) == 2
    assert weights(tmp_path / "tight") == weights(tmp_path / "free")
    config.stages = {2: {"training": {"learning_rate": 1e-3}}}  # type: ignore[dict-item]
    again = run(config, tmp_path / "tight")
    assert "is not in the store: made by forward passes" in named(again, "recomputing")[0]["text"]
    with ActivationStore(tmp_path / "tight" / "store", create=False) as store:
        assert sum(info.disk_bytes for info in store.boundaries()) <= config.store.max_bytes
    config.store.max_bytes = size
    config.seed = 1
    with pytest.raises(NoSpaceError):
        run(config, tmp_path / "none")
