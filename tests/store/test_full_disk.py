"""A disk that is really full: exit 5 with what is needed, nothing lost, and it can be cleaned and gone on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from stackwise.errors import NoSpaceError
from stackwise.store import ActivationStore, BoundaryWriter, boundary_id_of
from stackwise.store.disk import free_bytes
from tests.conftest import mounted

from .test_stages import part
from .tools import TRUNK, put_rowset

MIB = 1 << 20
SEQ, DIM = 64, 4096  # rows of 1 MiB in float32


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 32 MiB."""
    with mounted(tmp_path, 32):
        yield tmp_path


def writer_of(store: ActivationStore, trunk: str, rows: int) -> BoundaryWriter:
    rowset = put_rowset(store, rows, seq=SEQ)
    return store.writer(trunk=trunk, rowset=rowset, depth=1, seq_len=SEQ, d_model=DIM, codec="fp32", chunk_rows=1)


def chunk_of(chunk: int) -> np.ndarray:
    return np.full((1, SEQ, DIM), chunk, np.float32)


def fill(store: ActivationStore, trunk: str, rows: int, *, behind: bool) -> str:
    with writer_of(store, trunk, rows) as writer:
        for chunk in writer.missing:
            (writer.submit if behind else writer.write_chunk)(chunk, chunk_of(chunk))
        return writer.finish().id


@pytest.mark.parametrize("behind", [False, True])
def test_a_boundary_that_does_not_fit_goes_on_after_gc(small: Path, behind: bool) -> None:
    with ActivationStore(small / "s") as store:
        fill(store, "cd" * 16, 10, behind=False)
        half = boundary_id_of(TRUNK, put_rowset(store, 24, seq=SEQ), "fp32")
        store.register_run("run", recipes=[], boundaries=[half])
        with pytest.raises(NoSpaceError, match=r"\d+ of its 24 .* [\d,]+ bytes") as full:
            fill(store, TRUNK, 24, behind=behind)
        assert full.value.exit_code == 5
        assert "gc" in (full.value.hint or "")
        assert 0 < store.boundary(half).published < 24
        result = store.verify()
        assert (result["damaged"], result["orphans"]) == ([], [])
        with pytest.raises(NoSpaceError):
            store.commit_stage("12" * 16, {"front": lambda path: path.write_bytes(bytes(8 * MIB))}, {})
        assert store.stages() == []
    (small / "ballast").write_bytes(bytes(free_bytes(small)))
    assert free_bytes(small) == 0
    with ActivationStore(small / "s") as store:
        freed = store.gc()
        assert freed["freed"] >= 10 * MIB, "a disk that is full to the last byte can be cleaned"
        (small / "ballast").unlink()
        assert fill(store, TRUNK, 24, behind=behind) == half
        with store.reader(half) as reader:
            assert torch.equal(reader.read(np.arange(24))[:, 0, 0], torch.arange(24.0))
        assert store.verify()["damaged"] == []


def test_a_store_is_opened_read_and_cleaned_on_a_full_disk(small: Path) -> None:
    with ActivationStore(small / "s") as store:
        boundary = fill(store, TRUNK, 3, behind=False)
        store.commit_stage("12" * 16, {"front": part(1)}, {})
    (small / "ballast").write_bytes(bytes(free_bytes(small)))
    with ActivationStore(small / "s") as store:
        with store.reader(boundary) as reader:
            assert reader.read([2])[0, 0, 0] == 2
        assert store.stage("12" * 16) is not None
        assert store.gc(all=True)["boundaries"] == [boundary]


def test_a_store_for_which_there_is_no_room_at_all_is_refused(small: Path) -> None:
    (small / "ballast").write_bytes(bytes(free_bytes(small)))
    with pytest.raises(NoSpaceError):
        ActivationStore(small / "s")
