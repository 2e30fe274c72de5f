from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stackwise.store import ActivationStore


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark of checked indexes is a test's own, and so is that of the processes that it starts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ActivationStore]:
    with ActivationStore(tmp_path / "store") as store:
        yield store
        assert store.verify()["damaged"] == []
