"""Boundaries in an object store (S3 and its like), by way of obstore; the index and the leases stay local.

    ActivationStore("runs/a/store", backend=ObjectBackend("s3://bucket/prefix", region="eu-central-1"))

An object appears whole or not at all, so staging uploads under a temporary key and installing copies it, inside
the store, to its own. Not for use across a fork: spawn processes instead (obstore's threads do not survive one).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from stackwise import durable
from stackwise.errors import UsageError
from stackwise.store.backend import Handle

_SMALL = 1 << 16


class ObjectFile:
    """An object opened for reading by ranges; a small one is fetched at once."""

    fd: int | None = None

    def __init__(self, store: Any, key: str) -> None:
        self._store, self._key = store, key
        with _errors(key):
            self.size = int(_obstore().head(store, key)["size"])
        self._whole: bytes | None = None

    def read_into(self, buffer: Any, offset: int) -> int:
        """See `Handle`."""
        view = memoryview(buffer).cast("B")
        end = min(self.size, offset + len(view))
        if end <= offset:
            return 0
        if self._whole is None and self.size <= _SMALL:
            with _errors(self._key):
                self._whole = bytes(_obstore().get(self._store, self._key).bytes())
        if self._whole is not None:
            data: Any = self._whole[offset:end]
        else:
            with _errors(self._key):
                data = memoryview(_obstore().get_range(self._store, self._key, start=offset, end=end))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """See `Handle`."""


class ObjectBackend:
    """Boundaries' files as objects under a URL.

    Args:
        url: Where, such as `s3://bucket/prefix`, `gs://…`, `az://…`, `memory://` or `file:///directory`.
        options: What `obstore.store.from_url` takes, such as `region`, `endpoint`, `access_key_id`.

    Raises:
        UsageError: obstore is not installed, or the URL is not one.
    """

    def __init__(self, url: str, **options: Any) -> None:
        try:
            module = importlib.import_module("obstore.store")
        except ImportError:
            raise UsageError(
                "boundaries in an object store need obstore", hint="pip install 'stackwise[objects]'"
            ) from None
        self._url, self._pid = url.rstrip("/"), os.getpid()
        try:
            self._store: Any = module.MemoryStore() if url == "memory://" else module.from_url(url, **options)
        except Exception as error:
            raise UsageError(f"{url} is no object store: {str(error).splitlines()[0][:200]}") from error

    @property
    def _objects(self) -> Any:
        if self._pid != os.getpid():
            raise UsageError("an object store cannot be used across a fork", hint="start processes by `spawn`")
        return self._store

    def prepare(self, keys: Sequence[str]) -> None:
        """See `Backend`: an object store has no directories."""

    def stage(self, key: str, buffers: Sequence[Any], size: int | None = None) -> str:
        """See `Backend`."""
        directory, _, name = key.rpartition("/")
        temporary = f"{directory}/{durable.TEMPORARY}{secrets.token_hex(8)}-{name}"
        self._write(temporary, buffers, size)
        return temporary

    def settle(self, staged: Sequence[str]) -> None:
        """See `Backend`: an upload that has ended is durable."""

    def install(self, staged: Sequence[tuple[str, str]]) -> None:
        """See `Backend`."""
        for temporary, key in staged:
            try:
                with _errors(temporary):
                    _obstore().copy(self._objects, temporary, key, overwrite=True)
            except FileNotFoundError:
                continue  # installed the first time this transaction ran
            self.discard(temporary)

    def discard(self, staged: str) -> None:
        """See `Backend`."""
        with contextlib.suppress(OSError), _errors(staged):
            _obstore().delete(self._objects, staged)

    def put(self, key: str, data: bytes) -> None:
        """See `Backend`."""
        self._write(key, [data], None)

    def _write(self, key: str, buffers: Sequence[Any], size: int | None) -> None:
        data = b"".join(memoryview(buffer).cast("B") for buffer in buffers)
        if size is not None:
            data = data.ljust(size, b"\0")
        with _errors(key):
            _obstore().put(self._objects, key, data)

    def open(self, key: str) -> Handle:
        """See `Backend`."""
        return ObjectFile(self._objects, key)

    def walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        """See `Backend`."""
        with _errors(prefix):
            for batch in _obstore().list(self._objects, prefix or None):
                for item in batch:
                    yield str(item["path"]), int(item["size"])

    def remove(self, prefix: str) -> int:
        """See `Backend`."""
        freed, keys = 0, []
        for key, size in self.walk(prefix):
            keys.append(key)
            freed += size
        with _errors(prefix):
            if keys:
                _obstore().delete(self._objects, keys)
            else:
                with contextlib.suppress(FileNotFoundError), _errors(prefix):
                    _obstore().delete(self._objects, prefix)
        return freed

    def names(self) -> list[str]:
        """See `Backend`."""
        with _errors(""):
            found = _obstore().list_with_delimiter(self._objects)
        return sorted(
            {str(name).strip("/").rpartition("/")[2] for name in found["common_prefixes"]}
            | {str(item["path"]) for item in found["objects"]}
        )

    def advise(self, handle: Handle) -> None:
        """See `Backend`: nothing to say."""

    def uri(self, prefix: str) -> str:
        """See `Backend`."""
        return f"{self._url}/{prefix}"


def _obstore() -> Any:
    return importlib.import_module("obstore")


@contextlib.contextmanager
def _errors(key: str) -> Iterator[None]:
    """obstore's errors as the builtin ones that local files raise."""
    known: Any = importlib.import_module("obstore.exceptions")
    try:
        yield
    except FileNotFoundError:
        raise
    except known.NotFoundError as error:
        raise FileNotFoundError(2, "no such object", key) from error
    except known.BaseError as error:
        raise OSError(5, str(error).splitlines()[0][:300], key) from error
