"""Kinds found by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stackwise.config.choices import FUSIONS, MODES, Fusion, Mode
from stackwise.config.kinds import (
    ATTENTIONS,
    FEED_FORWARDS,
    OBJECTIVES,
    OPTIMIZERS,
    TRACKERS,
    Attention,
    FeedForward,
    Objective,
    Optimizer,
    Tracker,
)
from stackwise.errors import NotFound, UsageError
from stackwise.registry import CODECS, Registry
from stackwise.store.codecs import Codec


def test_kinds_are_found_by_name_and_names_are_given_once() -> None:
    registry: Registry[type] = Registry("optimizer", "", "pathlib", {"path": "Path"})
    assert registry["path"] is Path
    assert registry.code("path") is None

    @registry.register("mine")
    class Mine:
        pass

    assert registry["mine"] is Mine
    assert {"path", "mine"} <= set(registry.names())
    assert registry.code("mine") is not None
    with pytest.raises(UsageError):
        registry.register("path")(Mine)
    with pytest.raises(NotFound):
        registry["none"]


def test_a_file_that_the_environment_names_is_imported_and_its_code_is_in_its_digest(tmp_path: Path) -> None:
    ask = "import tests_registry as t; print(t.R['mine'].__name__, t.R.code('mine'))"
    (tmp_path / "tests_registry.py").write_text(
        "from stackwise.registry import Registry\nR = Registry('optimizer', '', '', {})\n"
    )
    plugin = tmp_path / "plugin.py"

    def answer(body: str) -> tuple[str, str]:
        plugin.write_text(f"from tests_registry import R\n@R.register('mine')\nclass {body}\n")
        env = {**os.environ, "STACKWISE_PLUGINS": str(plugin), "PYTHONPATH": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, check=True)
        name, code = done.stdout.split()
        return name, code

    first, second = answer("Mine: pass"), answer("Mine: x = 1")
    assert first[0] == second[0] == "Mine"
    assert first[1] != second[1]


@pytest.mark.parametrize(
    ("registry", "base", "body", "lacks"),
    [
        (OPTIMIZERS, Optimizer, {}, "build, state_bytes"),
        (OPTIMIZERS, Optimizer, {"build": lambda self, groups: None}, "state_bytes"),
        (OPTIMIZERS, Optimizer, {"build": lambda self: None, "state_bytes": lambda self, a, b: 0}, "build"),
        (OBJECTIVES, Objective, {}, "build"),
        (TRACKERS, Tracker, {}, "build"),
        (ATTENTIONS, Attention, {}, "build, kept, matrices"),
        (FEED_FORWARDS, FeedForward, {}, "build, kept, matrices"),
        (CODECS, Codec, {}, "decode, encode, stored, decoded, arrays"),
        (CODECS, Codec, {"direct": True, "stored": "x", "decoded": "x", "arrays": ()}, "encode"),
        (MODES, Mode, {}, "partition"),
        (FUSIONS, Fusion, {}, "groups"),
        (OPTIMIZERS, object, {}, "Optimizer"),
    ],
)
def test_a_kind_that_lacks_what_its_sort_must_have_is_refused_by_name(
    registry: Registry[Any], base: type, body: dict[str, Any], lacks: str
) -> None:
    kind = type("Partial", (base,), {"__module__": __name__, **body})
    with pytest.raises(UsageError) as error:
        registry.register("partial")(kind)
    assert f"{registry.sort} partial: Partial" in error.value.message
    assert lacks in error.value.message
    assert "partial" not in registry.names()


def test_a_plug_in_with_a_partial_kind_ends_with_one_line(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "from stackwise.config.kinds import OPTIMIZERS, Optimizer\n"
        "@OPTIMIZERS.register('half')\nclass Half(Optimizer): ...\n"
    )
    env = {**os.environ, "STACKWISE_PLUGINS": str(plugin)}
    command = [
        sys.executable,
        "-m",
        "stackwise",
        "run",
        "--preset",
        "micro",
        "-o",
        "training.optimizer=half",
        "--dry-run",
    ]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert all(name in done.stderr for name in ("optimizer half", "build", "state_bytes"))
    assert "Traceback" not in done.stderr
