"""Chunks written behind the caller's back: all there after `flush`, errors raised, nothing half."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stackwise.errors import NoSpaceError
from stackwise.store import ActivationStore, BoundaryWriter
from stackwise.store import disk as store_files

from .tools import DIM, SEQ, TRUNK, put_rowset, values


def writer_of(store: ActivationStore, rows: int, codec: str = "fp32") -> BoundaryWriter:
    rowset = put_rowset(store, rows)
    return store.writer(trunk=TRUNK, rowset=rowset, depth=1, seq_len=SEQ, d_model=DIM, codec=codec, chunk_rows=2)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
def test_the_caller_may_reuse_what_it_handed_over(store: ActivationStore, codec: str, as_tensor: bool) -> None:
    x = values(81)
    with writer_of(store, 81, codec) as writer:
        buffer = torch.empty(2, SEQ, DIM)
        for chunk in writer.missing:
            start, stop = writer.chunk_rows_of(chunk)
            part = buffer[: stop - start]
            part.copy_(torch.from_numpy(x[start:stop]))
            writer.submit(chunk, part if as_tensor else part.numpy())
            buffer.fill_(-1)
        writer.flush()
        assert writer.missing == []
        info = writer.finish()
    with store.reader(info.id) as reader:
        got = reader.read(np.arange(81)).float()
    assert torch.allclose(got, torch.from_numpy(x), atol=0.05)
    assert store.verify()["orphans"] == []


def test_closing_publishes_what_was_submitted(store: ActivationStore) -> None:
    with writer_of(store, 9) as writer:
        writer.submit(0, values(2))
    with writer_of(store, 9) as writer:
        assert writer.missing == [1, 2, 3, 4]


def test_an_error_behind_is_raised_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = store_files.write_all, []

    def fails_later(fd: int, buffer: Any) -> None:
        calls.append(fd)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, buffer)

    with ActivationStore(tmp_path / "s") as store:
        writer = writer_of(store, 40)
        monkeypatch.setattr(store_files, "write_all", fails_later)

        def submit_all() -> None:
            for chunk in range(20):
                writer.submit(chunk, values(2))
            writer.flush()

        with pytest.raises(NoSpaceError, match=r"\d+ of its 20 .*[\d,]+ bytes") as caught:
            submit_all()
        assert caught.value.exit_code == 5
        with pytest.raises(NoSpaceError):
            writer.close()
        monkeypatch.undo()
        assert store.verify()["damaged"] == []
        assert store.verify()["orphans"] == []
        with writer_of(store, 40) as writer:
            for chunk in writer.missing:
                writer.submit(chunk, values(2))
            assert writer.finish().state == "complete"
