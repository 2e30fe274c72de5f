"""A store that can only be read: on a read-only disk, and of another user."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from stackwise.errors import UsageError
from stackwise.store import ActivationStore
from tests.conftest import mounted, raises_naming

from .tools import DIM, SEQ, TRUNK, pairs, put_rowset, values, write

X = values(9)


@pytest.fixture(params=["never opened", "opened before"])
def frozen(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A store on a file system that is read-only from then on."""
    with mounted(tmp_path, 32):
        with ActivationStore(tmp_path / "s") as store:
            write(store, X)
        if request.param == "never opened":
            for path in (tmp_path / "s" / "locks").iterdir():
                path.unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        yield tmp_path / "s"


def test_it_is_read_looked_at_and_verified(frozen: Path) -> None:
    with ActivationStore(frozen, create=False) as store, ActivationStore(frozen, create=False) as again:
        assert store.read_only
        (info,) = again.boundaries()
        with store.reader(info.id) as reader:
            assert torch.equal(reader.read(np.arange(9)), torch.from_numpy(X))
            assert torch.equal(reader.read([3, 1]), torch.from_numpy(X[[3, 1]]))
        samples, masks = pairs(9)
        assert torch.equal(store.lookup(TRUNK, samples[4], store.put_masks(masks)[4]), torch.from_numpy(X[4]))
        assert store.verify()["damaged"] == []
        assert store.inspect()["boundaries"][0]["rows"] == 9
        assert store.usage()["boundaries"] > 0


def test_what_would_change_it_is_refused_in_a_line(frozen: Path) -> None:
    with ActivationStore(frozen, create=False) as store:
        (info,) = store.boundaries()
        with raises_naming(UsageError, info.id):
            store.drop(info.id)
        with raises_naming(UsageError, info.id):
            store.gc(all=True)
        with raises_naming(UsageError, frozen):
            put_rowset(store, 5, seed=7)
        given = {"trunk": "cd" * 16, "rowset": info.rowset, "depth": 2, "seq_len": SEQ, "d_model": DIM}
        with raises_naming(UsageError, frozen):
            store.writer(**given)
        assert store.boundaries() == [info]


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_another_users_store_is_read() -> None:
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        path = Path(directory) / "s"
        with ActivationStore(path) as store:
            info = write(store, X)
        for top, _, names in os.walk(path):
            os.chmod(top, 0o755)
            for name in names:
                os.chmod(os.path.join(top, name), 0o644)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.environ["XDG_CACHE_HOME"] = directory
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                with ActivationStore(path, create=False) as store, store.reader(info.id) as reader:
                    for _ in range(2):  # of another user's file the kernel does not say what is in memory
                        assert torch.equal(reader.read(np.arange(9)), torch.from_numpy(X))
                    assert store.read_only
                    status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
