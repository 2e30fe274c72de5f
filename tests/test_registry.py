"""Kinds found by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stackwise.errors import NotFound, UsageError
from stackwise.registry import Registry


def test_kinds_are_found_by_name_and_names_are_given_once() -> None:
    registry: Registry[type] = Registry("optimizer", {"path": "pathlib:Path"})
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
        "from stackwise.registry import Registry\nR = Registry('optimizer', {})\n"
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
