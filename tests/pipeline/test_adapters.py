"""Adapters beside the frozen weights of a pretrained model, in any mode: what trains, is stored, and is shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.loading import build
from stackwise.errors import ConfigError
from stackwise.pipeline.committed.use import recomputer
from stackwise.pipeline.initial import with_checkpoint
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.schedule import schedule
from tests.conftest import run
from tests.pipeline.storm import killed

SETTINGS: dict[str, Any] = {
    "training.mode": "end_to_end",
    "training.steps": 4,
    "training.seq_len": 24,
    "training.batch_size": 2,
    "training.learning_rate": 3e-3,
    "evaluation.samples": 4,
    "training.adapters": {"rank": 4, "alpha": 8.0, "above": 1, "precision": "nf4", "dropout": 0.1},
}
MODES: dict[str, dict[str, Any]] = {
    "end_to_end": {},
    "layerwise": {},
    "in_turn": {"training.block_size": 1, "training.windows": 2},
}


def configuration(weights: Path, text: Path, **more: Any) -> StackWiseConfig:
    """A run of adapters beside a checkpoint's weights."""
    values = SETTINGS | {"init.weights": str(weights), "data.paths": [str(text)]} | more
    return with_checkpoint(build(StackWiseConfig, {}, values))


def weights_of(directory: Path) -> list[str]:
    """Digests of what each stage of a run came to."""
    return [stage["weights"] for stage in RunDirectory(directory).manifest()["stages"]]


@pytest.mark.parametrize(
    "mode", [mode if mode == "layerwise" else pytest.param(mode, marks=pytest.mark.stress) for mode in MODES]
)
def test_swapped_they_come_to_the_same_weights(checkpoints: Any, text: Path, tmp_path: Path, mode: str) -> None:
    more = {"training.mode": mode, "store.path": str(tmp_path / "store")} | MODES[mode]
    resident = configuration(checkpoints("llama"), text, **more)
    for stage in schedule(resident):
        assert stage.reads_boundary
        assert all(part.startswith("adapter.block.") for part in stage.commits if not part.startswith("state."))
    events = run(resident, tmp_path / "resident")
    assert next(event["depth"] for event in events if event["event"] == "written") == 0, "what leaves block 0"
    swapped = configuration(checkpoints("llama"), text, **more, **{"training.swap": "always"})
    swapped.store.path = str(tmp_path / "other")
    run(swapped, tmp_path / "swapped")
    assert weights_of(tmp_path / "resident") == weights_of(tmp_path / "swapped")


def test_runs_of_other_adapters_share_the_boundary_below_them(checkpoints: Any, text: Path, tmp_path: Path) -> None:
    written = []
    for rank in (2, 3):
        adapters = SETTINGS["training.adapters"] | {"rank": rank}
        more = {"training.adapters": adapters, "store.path": str(tmp_path / "store")}
        events = run(configuration(checkpoints("llama"), text, **more), tmp_path / str(rank))
        written.append([event["boundary"] for event in events if event["event"] == "written"])
    assert [len(ids) for ids in written] == [1, 0]
    assert weights_of(tmp_path / "2") != weights_of(tmp_path / "3")


def test_killed_and_resumed_they_come_to_the_same_weights(checkpoints: Any, text: Path, tmp_path: Path) -> None:
    more = {"training.mode": "layerwise", "training.steps": 6, "training.checkpoint_steps": 2}
    config = configuration(checkpoints("llama"), text, **more)
    run(config, tmp_path / "whole")
    killed(config, tmp_path / "killed", 0, 1)
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "killed")


def test_a_damaged_boundary_below_them_is_made_again(checkpoints: Any, text: Path, tmp_path: Path) -> None:
    adapters = SETTINGS["training.adapters"] | {"above": 2}
    run(configuration(checkpoints("llama"), text, **{"training.adapters": adapters}), tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    with directory.open_store(directory.config()) as store:
        (info,) = store.boundaries()
        chunk = next((store.path / "boundaries" / info.id / "activations").glob("c/*/0/0"))
    before = chunk.read_bytes()
    chunk.write_bytes(before[:-1])
    with directory.open_store(directory.config()) as store:
        store.repair(recomputer(directory, store, "cpu"))
        assert not store.verify()["damaged"]
    assert chunk.read_bytes() == before


def test_layers_go_by_the_names_of_transformers_too(checkpoints: Any, text: Path) -> None:
    named = {"rank": 2, "targets": ["q_proj", "mlp.up_proj", "v"]}
    targets = configuration(checkpoints("llama"), text, **{"training.adapters": named}).training.adapters
    assert targets is not None
    assert targets.targets == ["attention.q", "ffn.up", "v"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"training.adapters": {"rank": 33}}, "training.adapters.rank: 33 is above the rank of"),
    "target": ({"training.adapters": {"targets": ["query"]}}, "query is no layer of a block"),
    "above": ({"training.adapters": {"above": 3}}, "nothing would train"),
    "head alone": ({"training.mode": "layerwise", "training.fusion": "frozen"}, "nothing trains"),
    "apart": ({"training.mode": "independent"}, "takes them apart"),
    "stack": ({"training.progressive.enabled": True}, "choose one of the two"),
    "integers": ({"training.quantization": {"bits": 4}}, "training.adapters.precision"),
    "fresh": ({"init.weights": None}, "set init.weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_train_is_refused_before_anything_is_written(checkpoints: Any, text: Path, case: str) -> None:
    more, said = REFUSED[case]
    with pytest.raises(ConfigError) as refused:
        configuration(checkpoints("llama"), text, **more)
    assert said in str(refused.value)
