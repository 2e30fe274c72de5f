"""Committed stages: whole or not there, and never trusted when touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stackwise.errors import DamageError, UsageError
from stackwise.store import ActivationStore
from tests.conftest import raises_naming

RECIPE = "12" * 16


def part(value: float) -> Callable[[Path], None]:
    return lambda path: save_file({"w": np.full((3, 5), value, np.float32)}, path)


def test_a_stage_comes_back_as_it_was_committed(tmp_path: Path) -> None:
    record = {"parts": {"front": "aa", "block.3": "bb"}, "loss": 1.5, "none": None}
    with ActivationStore(tmp_path / "s") as store:
        assert store.stage(RECIPE) is None
        made = store.commit_stage(RECIPE, {"front": part(1), "block.3": part(2)}, record)
    with ActivationStore(tmp_path / "s") as store:
        stage = store.stage(RECIPE)
        assert stage == made
        assert stage is not None
        assert stage.record == record
        assert list(stage.parts) == ["front", "block.3"]
        assert (load_file(stage.path("block.3"))["w"] == 2).all()
        with raises_naming(UsageError, "'head'", "front, block.3"):
            stage.path("head")
        store.commit_stage(RECIPE, {"head": part(3)}, {})
        assert list((store.stage(RECIPE) or made).parts) == ["head"], "committed again, it is replaced"
        assert store.stages() == [RECIPE]
        assert store.verify()["checked_stages"] == 1
        assert store.verify()["orphans"] == []
        assert store.drop_stage(RECIPE) > 0
        assert store.drop_stage(RECIPE) == 0
        assert store.stage(RECIPE) is None
        assert list((store.path / "stages").iterdir()) == []


def test_a_failing_part_leaves_nothing(store: ActivationStore) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("no")

    store.commit_stage(RECIPE, {"front": part(1)}, {})
    with pytest.raises(RuntimeError):
        store.commit_stage(RECIPE, {"front": part(2), "head": fail}, {})
    with pytest.raises(TypeError):
        store.commit_stage(RECIPE, {"front": part(2)}, {"x": object()})
    for name in ("../x", "stage", "", ".x", "a/b"):
        with pytest.raises(UsageError):
            store.commit_stage(RECIPE, {name: part(2)}, {})
    stage = store.stage(RECIPE)
    assert stage is not None
    assert (load_file(stage.path("front"))["w"] == 1).all()
    assert [p.name for p in (store.path / "stages").iterdir()] == [RECIPE]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _link(path: Path) -> None:
    other = path.with_name("other")
    path.rename(other)
    path.symlink_to(other)


@pytest.mark.parametrize(
    ("hurt", "says"),
    [
        (_flip, "was changed"),
        (Path.unlink, "is missing"),
        (lambda path: path.write_bytes(b"x"), "has 1 bytes"),
        (_link, "is no regular file"),
    ],
)
def test_an_altered_file_is_named(tmp_path: Path, hurt: Callable[[Path], object], says: str) -> None:
    with ActivationStore(tmp_path / "s") as store:
        stage = store.commit_stage(RECIPE, {"front": part(1), "head": part(2)}, {})
        hurt(stage.path("head"))
        with pytest.raises(DamageError, match=rf"head\.safetensors {says}"):
            store.stage(RECIPE)
        assert store.stage(RECIPE, check=False) is not None
        (damage,) = store.verify()["damaged"]
        assert damage["boundary"] == f"stage {RECIPE}"
        assert damage["chunk"] == "head.safetensors"


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(recipe="34" * 16),
        lambda v: v["parts"]["front"].update(file="../../../etc/passwd"),
        lambda v: v["parts"].update({"../x": v["parts"]["front"]}),
        lambda v: v["parts"]["front"].update(bytes="many"),
        lambda v: v.pop("record"),
        lambda v: v.update(parts=[1]),
    ],
)
def test_a_forged_record_is_refused(tmp_path: Path, change: Callable[[dict[str, object]], object]) -> None:
    with ActivationStore(tmp_path / "s") as store:
        stage = store.commit_stage(RECIPE, {"front": part(1)}, {})
        path = stage.directory / "stage.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))
        with pytest.raises(DamageError, match=r"stage\.json"):
            store.stage(RECIPE)
        path.unlink()
        with pytest.raises(DamageError, match="missing"):
            store.stage(RECIPE)
