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

import contextlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from stackwise.errors import NotFound, UsageError, line_of
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
        base: The class that they derive from, as "module:attribute"; empty: any class.
        module: The module of the built-in kinds.
        builtin: The class of each built-in kind, in another module as "module:attribute".
    """

    def __init__(self, sort: str, base: str, module: str, builtin: Mapping[str, str]) -> None:
        self.sort = sort
        self._base = base
        self._builtin = {name: at if ":" in at else f"{module}:{at}" for name, at in builtin.items()}
        self._kinds: dict[str, K] = {}
        self._outside: dict[str, Hex] = {}

    def register(self, name: str) -> Callable[[K], K]:
        """A decorator that adds a kind from outside the package.

        Raises:
            UsageError: There is one of that name already, or it lacks what its sort must have.
        """

        def add(kind: K) -> K:
            if name in self._builtin or name in self._kinds:
                raise UsageError(f"{self.sort} {name}: there is one of that name already", hint="give yours another")
            # here, not at its first use: that may be hours into a run
            if self._base and (fault := _fault(kind, _attribute(self._base))):
                where = self._base.replace(":", ".")
                raise UsageError(f"{self.sort} {name}: {fault}", hint=f"what it must have is in {where}")
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
            self._kinds[name] = _attribute(self._builtin[name])
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

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """What is registered within is known until the block ends."""
        kinds, outside = dict(self._kinds), dict(self._outside)
        try:
            yield
        finally:
            self._kinds, self._outside = kinds, outside


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
    except UsageError as error:  # of a kind that it registers
        raise UsageError(f"plugin {what}: {error.message}", hint=error.hint) from error
    except (Exception, SystemExit) as error:
        line = line_of(error, "")
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


def _attribute(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _fault(kind: Any, base: type) -> str | None:
    """What a class lacks of what `base` asks for: its abstract methods, class variables without a value, arguments."""
    if not (inspect.isclass(kind) and issubclass(kind, base)):
        return f"{getattr(kind, '__name__', kind)} does not derive from {base.__name__}"
    lacks = sorted(getattr(kind, "__abstractmethods__", ()))
    for parent in base.__mro__:
        for name, annotation in inspect.get_annotations(parent).items():
            if str(annotation).startswith("ClassVar") and not name.startswith("_") and not hasattr(kind, name):
                lacks.append(name)
    if lacks:
        return f"{kind.__name__} has no {', '.join(lacks)}"
    for name, method in inspect.getmembers(base, inspect.isfunction):
        member = getattr(kind, name)
        if member is method or not method.__module__.startswith(__package__) or not callable(member):
            continue
        parameters = inspect.signature(method).parameters.values()
        by_name = {parameter.name: None for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
        try:
            inspect.signature(member).bind(
                *(parameter for parameter in parameters if parameter.name not in by_name), **by_name
            )
        except TypeError as error:
            return f"{kind.__name__}.{name} cannot be called as {name}{inspect.signature(method)}: {error}"
    return None


def _source_digest(kind: object) -> Hex:
    target = kind if inspect.isclass(kind) or inspect.isfunction(kind) else type(kind)
    return digest(read_bytes(Path(inspect.getfile(target)).resolve()))


CODECS: Registry[Any] = Registry(
    "codec",
    "stackwise.store.codecs:Codec",
    "stackwise.store.codecs",
    {name: name.upper() for name in ("fp32", "bf16", "fp16", "fp8", "int8")},
)
"""Number formats of stored activations: here, as the store knows no configuration and the configuration no store.

A codec is one of them, or one with a compressor: `<name>-blosc`, `<name>-zstd` (`stackwise.store.codec_named`).
"""
