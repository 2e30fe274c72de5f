from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stackwise.store import ActivationStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ActivationStore]:
    with ActivationStore(tmp_path / "store") as store:
        yield store
        assert store.verify()["damaged"] == []
