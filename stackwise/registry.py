"""Kinds found by name: attentions, feed-forwards, optimizers, objectives, codecs, trackers.

A kind is one class that owns its facts. The built-in ones are imported when they are asked for, so that a registry
costs nothing; those of others register themselves in a file of their own:

    from stackwise.config.kinds import OPTIMIZERS, Optimizer

    @OPTIMIZERS.register("lion")
    class Lion(Optimizer): ...

Such files are named by the environment (`STACKWISE_PLUGINS=/path/lion.py`, several with a colon between) or by an
installed package's entry point in the group `stackwise.plugins`; never by a configuration, which may come from
elsewhere. What is trained with a kind from outside has the digest of its file in its recipe.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from stackwise.errors import NotFound, UsageError
from stackwise.files import read_bytes
from stackwise.identity import Hex, digest

K = TypeVar("K")

PLUGINS = "STACKWISE_PLUGINS"
"""The variable of the environment that names files with kinds."""
GROUP = "stackwise.plugins"
"""The group of entry points that name modules with kinds."""

_loaded = False


class Registry(Generic[K]):
    """The kinds of one sort, by name.

    Args:
        sort: What they are called, in messages: "optimizer".
        builtin: Where each built-in kind is, as "module:attribute".
    """

    def __init__(self, sort: str, builtin: Mapping[str, str]) -> None:
        self.sort = sort
        self._builtin = dict(builtin)
        self._kinds: dict[str, K] = {}
        self._outside: dict[str, Hex] = {}

    def register(self, name: str) -> Callable[[K], K]:
        """A decorator that adds a kind from outside the package.

        Raises:
            UsageError: There is one of that name already.
        """

        def add(kind: K) -> K:
            if name in self._builtin or name in self._kinds:
                raise UsageError(f"there is an {self.sort} {name} already", hint="give yours another name")
            self._kinds[name] = kind
            self._outside[name] = _source_digest(kind)
            return kind

        return add

    def __getitem__(self, name: str) -> K:
        """The kind of this name.

        Raises:
            NotFound: There is none.
        """
        if name not in self._kinds and name in self._builtin:
            module, _, attribute = self._builtin[name].partition(":")
            self._kinds[name] = getattr(importlib.import_module(module), attribute)
        if name not in self._kinds:
            load_plugins()
        if name not in self._kinds:
            raise NotFound(f"there is no {self.sort} {name}", hint=f"there are {', '.join(self.names())}")
        return self._kinds[name]

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._kinds or name in self.names()

    def names(self) -> list[str]:
        """The names of all kinds, built-in ones first."""
        load_plugins()
        return [*self._builtin, *(name for name in self._kinds if name not in self._builtin)]

    def name_of(self, kind: K) -> str:
        """The name that a kind is found by.

        Raises:
            NotFound: It is in no registry of this sort.
        """
        for name, known in self._kinds.items():
            if known is kind:
                return name
        raise NotFound(f"{kind!r} is no registered {self.sort}", hint="register it: @REGISTRY.register(NAME)")

    def code(self, name: str) -> Hex | None:
        """The digest of the file that a kind from outside is in, for its recipe; None: it is built in."""
        self[name]
        return self._outside.get(name)


def load_plugins() -> None:
    """Import the files that the environment names and the modules of entry points, once.

    Raises:
        UsageError: One of them cannot be imported.
    """
    global _loaded
    if _loaded:
        return
    _loaded = True
    from importlib import metadata  # a third of what `status` may cost

    for entry in metadata.entry_points(group=GROUP):
        _import(entry.name, entry.load)
    for path in filter(None, os.environ.get(PLUGINS, "").split(os.pathsep)):
        _import(path, lambda path=path: _import_file(Path(path)))  # type: ignore[misc]


def _import(what: str, load: Callable[[], object]) -> None:
    try:
        load()
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"plugin {what} cannot be imported: {type(error).__name__}: {line}", hint=f"mend it, or unset {PLUGINS}"
        ) from error


def _import_file(path: Path) -> None:
    name = f"stackwise_plugin_{digest(str(path.absolute()).encode())}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _source_digest(kind: object) -> Hex:
    target = kind if inspect.isclass(kind) or inspect.isfunction(kind) else type(kind)
    return digest(read_bytes(Path(inspect.getfile(target)).resolve()))


CODECS: Registry[Any] = Registry(
    "codec",
    {name: f"stackwise.store.codecs:{name.upper()}" for name in ("fp32", "bf16", "fp16", "fp8", "int8")},
)
"""Number formats of stored activations: here, as the store knows no configuration and the configuration no store.

A codec is one of them, or one with a compressor: `<name>-blosc`, `<name>-zstd` (`stackwise.store.codec_named`).
"""
