"""Local disk and object stores are held to the conformance suite; S3 is a real server on loopback."""

from __future__ import annotations

import importlib.util
import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from stackwise.errors import UsageError
from stackwise.store import ActivationStore, BoundaryInfo
from stackwise.store.backend import Backend, LocalBackend
from stackwise.store.testing import BackendSuite

from .tools import values, write

needs_obstore = pytest.mark.skipif(importlib.util.find_spec("obstore") is None, reason="obstore is not installed")
needs_moto = pytest.mark.skipif(importlib.util.find_spec("moto") is None, reason="moto is not installed")


class TestLocal(BackendSuite):
    def make_backend(self, path: Path) -> Backend:
        return LocalBackend(path)


@needs_obstore
class TestObjectsInMemory(BackendSuite):
    def make_backend(self, path: Path) -> Backend:
        from stackwise.store.objects import ObjectBackend

        return ObjectBackend("memory://")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The endpoint of a server that speaks S3."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@needs_obstore
@needs_moto
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
class TestS3(BackendSuite):
    number: ClassVar[int] = 0

    @pytest.fixture(autouse=True)
    def _endpoint(self, s3: str) -> None:
        self.s3 = s3

    def make_backend(self, path: Path) -> Backend:
        from stackwise.store.objects import ObjectBackend

        type(self).number += 1
        bucket = f"bucket-{self.number}"
        request = urllib.request.Request(f"{self.s3}/{bucket}", method="PUT")
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200
        return ObjectBackend(
            f"s3://{bucket}/boundaries",
            endpoint=self.s3,
            access_key_id="k",
            secret_access_key="s",
            region="us-east-1",
            client_options={"allow_http": True},
            virtual_hosted_style_request=False,
        )

    def test_zarr_python_reads_it_where_it_is(self, store: ActivationStore) -> None:
        zarr = pytest.importorskip("zarr")
        from zarr.storage import ObjectStore

        info: BoundaryInfo = write(store, values(9))
        objects = ObjectStore(store._backend._objects, read_only=True)  # type: ignore[attr-defined]
        group = zarr.open_group(objects, path=info.id, mode="r", zarr_format=3)
        assert (group["activations"][:] == values(9)).all()
        assert json.loads(json.dumps(group.attrs.asdict()))["stackwise"]["id"] == info.id


@pytest.mark.skipif(importlib.util.find_spec("obstore") is not None, reason="obstore is installed")
def test_without_obstore_it_says_what_to_install() -> None:
    from stackwise.store.objects import ObjectBackend

    with pytest.raises(UsageError, match="obstore"):
        ObjectBackend("memory://")


def test_the_environment_stays_as_it_was() -> None:
    assert "AWS_ACCESS_KEY_ID" not in os.environ
