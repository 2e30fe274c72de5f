"""Every example of the store's documentation runs."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

import stackwise.store.store

DOCS = Path(__file__).parents[2] / "docs" / "store.md"


def test_the_first_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[0]
    names: dict[str, object] = {}
    exec(compile(code, str(DOCS), "exec"), names)
    assert names["x"].shape == (64, 32)  # type: ignore[attr-defined]


def test_the_docstring_of_the_store() -> None:
    result = doctest.testmod(stackwise.store.store)
    assert result.attempted > 3
    assert result.failed == 0
