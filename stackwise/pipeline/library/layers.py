"""Layers of one's own: whether they can be trained stage by stage, and what identifies them.

A result may be reused only where it would come out the same. What a layer computes follows from its code and all that
it closes over, so both are in its identity: the bytecode of its class and of every function, class and module that it
reaches outside installed packages, defaults, closures, globals, attributes, buffers and hooks. What is installed counts
by name and version, and by what other code put in its place. Where something cannot be described so, the layer has no
identity, and nothing is reused.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import enum
import functools
import importlib.metadata
import sys
import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stackwise.errors import UsageError, line_of
from stackwise.identity import NUMERICS, digest

UNFORESEEABLE = {"ctypes", "datetime", "importlib", "os", "random", "secrets", "socket", "subprocess", "time", "uuid"}
"""Modules of the standard library whose answers do not follow from the code."""
_OUTSIDE = {"__import__", "eval", "exec", "globals", "input", "open", "vars"}
"""Builtins that reach further than the names in the code."""
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(Ellipsis))
_CALLED = (types.FunctionType, staticmethod, classmethod, property)
_TORCH = (torch, nn.functional, torch.Tensor)
"""Where torch keeps the functions that its own modules call."""
_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
"""Of a module's attributes those that are described apart, or are digested as its initial weights."""


class Undescribed(Exception):
    """Something that a layer reaches cannot be described; the text says what."""


def identity(module: nn.Module) -> str:
    """The digest of what a module computes, its parameters' values aside.

    Raises:
        Undescribed: It reaches something whose behaviour does not follow from what can be read.
    """
    everywhere = {key: value for key, value in vars(nn.modules.module).items() if key.startswith("_global_") and value}
    describer = _Describer()
    everywhere |= {place.__name__: patches for place in _TORCH if (patches := describer.patches(place))}
    try:
        described = describer.of([module, everywhere])  # hooks on all modules are hooks on this one
    except RecursionError:
        raise Undescribed("it is nested too deeply") from None
    return digest(repr((sys.version_info[:2], torch.__version__, described)).encode("utf-8", "surrogatepass"))


class _Describer:
    """From an object to nested tuples that are equal in another process exactly where the object is the same."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._parameters: dict[int, int] = {}
        self._alive: list[object] = []  # an id is another object's once its own is gone

    def of(self, value: Any) -> Any:
        """Describe a value."""
        if isinstance(value, enum.Enum):
            return ("enum", self.of(type(value)), value.name)
        if isinstance(value, _PLAIN) and type(value) in _PLAIN:
            return (type(value).__name__, repr(value))
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, weakref.ReferenceType):
            return ("reference", self.of(value()))
        if id(value) in self._parameters:
            return ("parameter", self._parameters[id(value)])
        # Equal constants may be one object or two, as it happens; only what can change has an identity of its own.
        if not isinstance(value, tuple | frozenset | types.CodeType):
            if id(value) in self._seen:  # the second time, or a cycle
                return ("again", self._seen[id(value)])
            self._remember(value)
        match value:
            case torch.Tensor():
                return self._tensor(value)
            case np.ndarray() | np.generic():
                return ("array", str(value.dtype), value.shape, self._array(value))
            case list() | tuple():
                return (type(value).__name__, *map(self.of, value), *self._beside(value))
            case dict():
                return ("dict", self._class(type(value)), *((self.of(k), self.of(v)) for k, v in value.items()))
            case set() | frozenset():
                return ("set", *sorted((self.of(item) for item in value), key=repr))
            case types.ModuleType():
                return ("module", self._installed(value.__name__) or value.__name__)
            case types.CodeType():
                return self._code(value)
            case types.FunctionType():
                return self._function(value)
            case types.MethodType():
                return ("method", self.of(value.__func__), self.of(value.__self__))
            case staticmethod() | classmethod():
                return (type(value).__name__, self.of(value.__func__))
            case property():
                return ("property", self.of(value.fget), self.of(value.fset))
            case functools.partial():
                return ("partial", self.of(value.func), self.of(value.args), self.of(value.keywords))
            case functools.cached_property():
                return ("cached", self.of(value.func))
            case nn.Module():
                return self._module(value)
            case types.BuiltinFunctionType() | types.WrapperDescriptorType() | types.MethodDescriptorType():
                return self._builtin(value)
        return self._object(value)

    def patches(self, place: types.ModuleType | type) -> dict[str, types.FunctionType]:
        """Functions of code of one's own in an installed module or class: no installed package put them there."""
        functions = {name: value for name, value in vars(place).items() if isinstance(value, types.FunctionType)}
        return {name: value for name, value in functions.items() if self._is_own(_module_of(value))}

    def _is_own(self, module: str) -> bool:
        try:
            return self._installed(module) is None
        except Undescribed:  # of the standard library
            return False

    def _remember(self, value: object) -> None:
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)

    def _tensor(self, value: torch.Tensor) -> Any:
        if value.is_meta:
            return ("tensor", str(value.dtype), tuple(value.shape), "meta")
        raw = value.detach().cpu().contiguous()
        if raw.layout is not torch.strided or raw.is_quantized:
            raise Undescribed(f"a tensor of layout {raw.layout}")
        return ("tensor", str(raw.dtype), tuple(raw.shape), digest(raw.reshape(-1).view(torch.uint8).numpy().tobytes()))

    def _array(self, value: Any) -> str:
        if np.asarray(value).dtype.hasobject:
            raise Undescribed("an array of objects")
        return digest(np.ascontiguousarray(value).tobytes())

    def _beside(self, value: Any) -> tuple[Any, ...]:
        """What an instance of a subclass of a container has beside its items."""
        return () if type(value) in (list, tuple) else (self._class(type(value)), self._attributes(value))

    def _installed(self, module: str) -> str | None:
        """Name and version of what is installed; None where a module is code of one's own."""
        top = module.partition(".")[0]
        if top in ("builtins", *sys.stdlib_module_names):
            if top in UNFORESEEABLE:
                raise Undescribed(f"the module {top}")
            return module
        if top == "stackwise":
            return f"{module} {NUMERICS}"
        file = getattr(sys.modules.get(top), "__file__", None)
        if file is None or not {"site-packages", "dist-packages"} & set(Path(file).parts):
            return f"{module} {torch.__version__}" if top == "torch" else None
        version = getattr(sys.modules[top], "__version__", None)
        if not isinstance(version, str):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                version = importlib.metadata.version(top)
        return f"{module} {version}" if isinstance(version, str) else None

    def _class(self, kind: type) -> Any:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if (installed := self._installed(kind.__module__)) is not None:
            patches = {base.__qualname__: entries for base in kind.__mro__ if (entries := self.patches(base))}
            return ("class", installed, kind.__qualname__, *([self.of(patches)] if patches else []))
        if id(kind) in self._seen:
            return ("again", self._seen[id(kind)])
        self._remember(kind)
        if kind.__flags__ & (1 << 9) == 0:  # not made by a class statement: of a C extension
            raise Undescribed(f"the class {name} of a C extension")
        slots = (types.MemberDescriptorType, types.GetSetDescriptorType)
        members = {
            key: value for key, value in vars(kind).items() if key != "_abc_impl" and not isinstance(value, slots)
        }
        # Of the special names only functions do something: the others are annotations, documentation, lines.
        members = {k: v for k, v in members.items() if not k.startswith("__") or isinstance(v, _CALLED)}
        return (
            "class",
            name,
            self._class(type(kind)),
            *map(self.of, kind.__bases__),
            *((key, self.of(members[key])) for key in sorted(members)),
        )

    def _function(self, function: types.FunctionType) -> Any:
        where = _module_of(function)
        if (installed := self._installed(where)) is not None and function.__closure__ is None:
            return ("function", installed, function.__qualname__)
        cells = []
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # empty: not assigned yet
                cells.append(self.of(cell.cell_contents))
        code = installed or (self._code(function.__code__), self._globals(function))
        defaults = (self.of(function.__defaults__), self.of(function.__kwdefaults__))
        return ("function", function.__qualname__, code, defaults, tuple(cells), self._attributes(function))

    def _code(self, code: types.CodeType) -> Any:
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_argcount, code.co_flags)
        parts = (code.co_code.hex(), code.co_exceptiontable.hex(), code.co_kwonlyargcount, code.co_posonlyargcount)
        return ("code", *parts, repr(names), *map(self.of, code.co_consts))

    def _globals(self, function: types.FunctionType) -> Any:
        """What the names in a function's code, and in the code within it, stand for outside it."""
        names, imports = set[str](), set[str]()
        for code in _codes(function.__code__):
            names |= set(code.co_names)
            imports |= {str(i.argval) for i in dis.get_instructions(code) if i.opname == "IMPORT_NAME"}
        described = []
        for name in sorted(names):
            if name in function.__globals__:
                described.append((name, self._reached(function.__globals__[name], names)))
            elif name in _OUTSIDE and hasattr(builtins, name):
                raise Undescribed(f"{name}() in {function.__qualname__}")
        for name in sorted(imports):
            if name not in sys.modules:
                raise Undescribed(f"the import of {name} in {function.__qualname__}")
            described.append((name, self._reached(sys.modules[name], names)))
        return tuple(described)

    def _reached(self, value: Any, names: set[str]) -> Any:
        """A global; of a module of one's own, what of it the names can mean."""
        if not isinstance(value, types.ModuleType):
            return self.of(value)
        if value is torch.ops or (value is torch and "ops" in names):
            raise Undescribed("operators of torch.ops")
        if value is np.random or (value is np and "random" in names):
            raise Undescribed("the module numpy.random")
        members = sorted(name for name in names if name in vars(value))
        if (installed := self._installed(value.__name__)) is not None:
            return ("module", installed, *self._patches(value, names))
        return (
            "module",
            value.__name__,
            *((name, self._reached(vars(value)[name], names - {name})) for name in members),
        )

    def _patches(self, module: types.ModuleType, names: set[str]) -> tuple[Any, ...]:
        """What was put in place of functions of an installed module that the names can mean."""
        replaced, patches = self.patches(module), list[tuple[str, Any]]()
        for name in sorted(names & vars(module).keys()):
            value = vars(module)[name]
            renamed = isinstance(value, types.BuiltinFunctionType) and value.__name__ != name
            if name in replaced or renamed:
                patches.append((name, self.of(value)))
            elif isinstance(value, types.ModuleType):
                patches += self._patches(value, names - {name})
        return tuple(patches)

    def _builtin(self, value: Any) -> Any:
        owner = getattr(value, "__self__", None)
        where = getattr(value, "__module__", None) or getattr(getattr(value, "__objclass__", None), "__module__", None)
        if isinstance(owner, types.ModuleType):
            where = owner.__name__
        if where is None and owner is not None:  # a bound method of something built in
            return ("bound", value.__qualname__, self.of(owner))
        if where is None or (installed := self._installed(where)) is None:
            raise Undescribed(f"{value.__qualname__}, compiled code of {where or 'nowhere'}")
        return ("builtin", installed, value.__qualname__)

    def _module(self, module: nn.Module) -> Any:
        if isinstance(module, torch.jit.ScriptModule):
            return ("script", str(module.inlined_graph), self._attributes(module))
        members = {key: value for key, value in vars(module).items() if key not in _STATE}
        # Hooks are numbered through the process: the numbers are left out.
        members |= {
            key: list(value.values()) for key, value in members.items() if "_hooks" in key and isinstance(value, dict)
        }
        return (
            "layer",
            self._class(type(module)),
            tuple((key, *self._parameter(p)) for key, p in module._parameters.items() if p is not None),
            tuple((key, self.of(buffer)) for key, buffer in module._buffers.items()),
            tuple(sorted(module._non_persistent_buffers_set)),
            tuple((key, self.of(child)) for key, child in module._modules.items()),
            tuple((key, self.of(members[key])) for key in sorted(members)),
        )

    def _parameter(self, parameter: nn.Parameter) -> Any:
        """Its value is digested as the layer's initial weights; which names are one parameter is not."""
        self._alive.append(parameter)
        number = self._parameters.setdefault(id(parameter), len(self._parameters))
        return number, tuple(parameter.shape), str(parameter.dtype)

    def _attributes(self, value: Any) -> Any:
        members = getattr(value, "__dict__", {})
        return tuple((key, self.of(members[key])) for key in sorted(members))

    def _object(self, value: Any) -> Any:
        """Anything else: its class, and what it would be copied from."""
        kind = type(value)
        if isinstance(wrapped := getattr(value, "__wrapped__", None), types.FunctionType):  # such as by a cache
            return ("wrapped", self._class(kind), self.of(wrapped))
        if kind.__module__ == "builtins":
            raise Undescribed(f"{kind.__name__} {str(value)[:60]}")
        try:
            reduced = value.__reduce_ex__(4)
        except Exception as error:
            raise Undescribed(f"an object of {kind.__module__}.{kind.__qualname__}") from error
        if isinstance(reduced, str):
            return ("global", kind.__module__, reduced)
        callable_, arguments, *state = reduced
        parts = [list(part) if isinstance(part, Iterator) else part for part in state]
        return ("object", self._class(kind), self.of(callable_), self.of(arguments), *map(self.of, parts))


def _module_of(function: types.FunctionType) -> str:
    return str(function.__globals__.get("__name__"))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def named(layers: Sequence[nn.Module], index: int) -> str:
    """What a layer is called in messages."""
    return f"layer {index} ({type(layers[index]).__name__})"


def check_layers(front: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Refuse what cannot be trained stage by stage.

    Raises:
        UsageError: Something is no module, has no values, or is shared.
    """
    owners: dict[int, str] = {}
    for index in range(-1, len(layers)):
        module = front if index < 0 else layers[index]
        if not isinstance(module, nn.Module):
            raise UsageError(
                f"layer {index} is no torch.nn.Module but of {type(module).__name__}",
                hint="wrap it in a class with a forward method",
            )
        name = "the front" if index < 0 else named(layers, index)
        for key, parameter in module.named_parameters():
            if parameter.is_meta:
                raise UsageError(f"{name}: {key} is on the meta device, without values", hint="give it values first")
            if (other := owners.setdefault(id(parameter), name)) != name:
                raise UsageError(
                    f"{name} shares its parameter {key} with {other}",
                    hint="layers are trained one after another: give each parameters of its own",
                )


def probe(
    front: nn.Module,
    layers: Sequence[nn.Module],
    tokens_BS: torch.Tensor,
    numerics: tuple[torch.device, torch.dtype | None],
) -> set[int]:
    """Run a few rows through all layers, so that what does not fit is said before anything is trained.

    Args:
        numerics: The device, and the dtype of autocast (None: float32).

    Returns:
        The layers that changed something of themselves that no state dict holds.

    Raises:
        UsageError: One raises, or returns something else than a tensor like the one it is given; it names the layer.
    """
    device, narrow = numerics
    changing, x_BSD = set(), tokens_BS.to(device)
    with torch.no_grad(), torch.autocast(device.type, narrow, enabled=narrow is not None), torch.random.fork_rng():
        for index in range(-1, len(layers)):
            module = front if index < 0 else layers[index]
            name = "the front" if index < 0 else named(layers, index)
            try:
                with _restored(module, device) as changes:
                    returned = module(x_BSD)
            except Exception as error:
                line = line_of(error, "")
                described = f"{str(x_BSD.dtype).removeprefix('torch.')} {list(x_BSD.shape)}"
                raise UsageError(
                    f"{name} raises {type(error).__name__} where it is given {described}: {line}",
                    hint="a layer takes activations [batch, seq, d_model] in the run's precision, on the run's device",
                ) from error
            if changes:
                changing.add(index)
            wrong = _wrong(returned, x_BSD, narrow, first=index < 0)
            if wrong:
                raise UsageError(f"{name} {wrong}", hint="a layer returns one tensor [batch, seq, d_model], as given")
            x_BSD = returned.to(narrow or torch.float32) if index < 0 else returned
    return changing


def _wrong(returned: Any, entered: torch.Tensor, narrow: torch.dtype | None, *, first: bool) -> str | None:
    """What is wrong with a layer's output, as the end of a sentence."""
    if not isinstance(returned, torch.Tensor):
        return f"returns {type(returned).__name__}, not a tensor"
    if returned.ndim != 3 or returned.shape[:2] != entered.shape[:2] or (not first and returned.shape != entered.shape):
        return f"returns the shape {list(returned.shape)} where it is given {list(entered.shape)}"
    if returned.dtype not in (torch.float32, narrow):
        return f"returns {returned.dtype} where the run computes in {narrow or torch.float32}"
    if not returned.isfinite().all():
        return "returns values that are not finite (NaN or infinity) on the first rows"
    return None


@contextlib.contextmanager
def _restored(module: nn.Module, device: torch.device) -> Iterator[list[str]]:
    """Put a module on `device`, and leave it as it was; the list has what it changed outside its state dict."""
    home = next((parameter.device for parameter in module.parameters()), device)
    module.to(device)
    parts = list(module.modules())
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    attributes: list[Mapping[str, Any]] = [
        {key: value for key, value in vars(part).items() if key not in _STATE} for part in parts
    ]
    before = [{key: repr(value) for key, value in kept.items() if isinstance(value, _PLAIN)} for kept in attributes]
    changes: list[str] = []
    try:
        yield changes
    finally:
        for part, kept, plain in zip(parts, attributes, before, strict=True):
            now = {key: value for key, value in vars(part).items() if key not in _STATE}
            changes += [
                key
                for key, value in now.items()
                if key != "terms" and value is not kept.get(key) and (key not in kept or repr(value) != plain.get(key))
            ]  # `terms` are losses that a layer hands up
            for key in now.keys() - kept.keys():
                delattr(part, key)
            vars(part).update(kept)
        persistent = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
        for buffer, value in buffers:
            if id(buffer) not in persistent and not torch.equal(buffer, value):
                changes.append("a buffer that is not persistent")
            buffer.copy_(value)
        module.to(home)
