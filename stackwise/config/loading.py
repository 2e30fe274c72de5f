"""From YAML text to a checked configuration, with every fault of it in one report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from stackwise.config.checks import faults as cross_faults
from stackwise.config.faults import Key, Tree, dotted, field_faults, kind_of, sections
from stackwise.config.progressive import STACK_PRECISION
from stackwise.config.schema import Settings
from stackwise.config.translations import translate
from stackwise.errors import ConfigError, NotFound, UsageError

C = TypeVar("C", bound=Settings)


class _Loader(yaml.SafeLoader):
    """YAML with 1e-3 as a number (as YAML 1.2 has it) and a key given twice as a fault."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _number(loader: _Loader, node: yaml.ScalarNode) -> float | int:
    """1e9 is a whole number; 1e-3 and 2.0 are not, nor is what a float cannot tell from its neighbours."""
    value = loader.construct_yaml_float(node)
    whole = "." not in node.value and "e" in node.value.lower() and value.is_integer() and abs(value) < 2**53
    return int(value) if whole else float(value)


_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int):
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is no key", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML.

    Raises:
        ConfigError: The text is not YAML, or gives a key twice; says the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError([f"{where}{error.problem or error.context}"], source=source) from None
    except yaml.YAMLError as error:
        raise ConfigError([str(error).splitlines()[0]], source=source) from None


def parse_overrides(items: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """`KEY=VALUE` strings (the command line's `-o`) as dotted keys and YAML values.

    Raises:
        UsageError: An item has no `=`, or its value is not YAML.
    """
    overrides: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"-o {item}: needs KEY=VALUE", hint="for example -o training.learning_rate=1e-3")
        overrides[key.strip()] = parse_yaml(text, f"-o {item}")
    return overrides


def load(cls: type[C], path: str, overrides: Mapping[str, Any], *, source: str | None = None) -> C:
    """Read, override, build and check a configuration file. See `StackWiseConfig.from_yaml`."""
    source = source or path
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFound(f"{path}: there is no such file", hint="`stackwise init` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text: {error}") from None
    tree = parse_yaml(text, source)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError([f"a mapping of settings was expected, not {kind_of(tree)}"], source=source)
    return build(cls, tree, overrides, source=source)


def build(cls: type[C], tree: Tree, overrides: Mapping[str, Any] | None = None, *, source: str = "configuration") -> C:
    """A checked configuration from plain data.

    Args:
        cls: The class to build.
        tree: Nested mappings, as YAML gives them; not changed.
        overrides: Dotted keys and values, applied on top.
        source: What the report calls it.

    Raises:
        ConfigError: With every fault: unknown keys (and the key meant), wrong types, contradictions.
    """
    reading = translate(cls, tree, overrides or {})
    tree, found = reading.tree, {_key(key): text for key, text in reading.faults}
    for name in sections(cls):  # a section whose keys are all commented out
        parent: Any = tree
        *above, last = name.split(".")
        for part in above:
            parent = parent.get(part) if isinstance(parent, dict) else None
        if isinstance(parent, dict) and last in parent and parent[last] is None:
            parent[last] = {}
    try:
        config = cls.model_validate(tree)
    except ValidationError as error:
        found |= field_faults(error, tree)
        # What is left may hold contradictions of its own: report them now, not after the next try.
        try:
            config = cls.model_validate(_without(tree, set(found)))
        except ValidationError:  # what is wrong is required, such as a setting of a kind
            raise ConfigError([f"{dotted(key)}: {text}" for key, text in found.items()], source=source) from None
    resolve(config)
    config.unused = reading.unused
    wrong = {dotted(key) for key in found}
    lines = [f"{dotted(key)}: {text}" for key, text in found.items()]
    lines += [f"{key}: {text}" for key, text in cross_faults(config) if key not in wrong]
    if lines:
        raise ConfigError(lines, source=source)
    return config


def resolve(config: Settings) -> None:
    """Settle the settings that follow from others."""
    architecture, progressive = config.model.architecture, config.training.progressive
    if architecture.n_stacks is None:
        architecture.n_stacks = (progressive.max_stacks if progressive.enabled else None) or 1
    elif progressive.enabled and progressive.max_stacks is not None:
        architecture.n_stacks = min(architecture.n_stacks, progressive.max_stacks)
    wanted = STACK_PRECISION.get(progressive.new_stack_precision) if progressive.enabled else None
    if wanted is not None and config.precision == "auto":
        config.precision = wanted
    if progressive.enabled and progressive.time_interpretation == "input" and config.model.time_embedding == "none":
        config.model.time_embedding = progressive.time_encoding_type
        config.model.time_embedding_dim = progressive.time_embedding_dim
    if config.store.path is None and config.training.cache_dir is not None:
        config.store.path = config.training.cache_dir


def dump(config: Settings) -> str:
    """A configuration as YAML, every setting resolved, that `load` reads back as an equal one."""
    plain = config.model_dump(exclude={"stages"})
    plain["stages"] = {k: own.model_dump(exclude_unset=True) for k, own in sorted(config.stages.items())}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def flat(config: Settings) -> dict[str, Any]:
    """The settings by dotted key, without those that say only where and how it runs; a stage's own ones come last."""
    found: dict[str, Any] = {}

    def walk(tree: Mapping[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            else:
                found[f"{prefix}{key}"] = value

    walk(config.model_dump(exclude={"tracking", "slurm", "stages", "name"}), "")
    for depth, own in sorted(config.stages.items()):
        walk(own.model_dump(exclude_unset=True), f"stages.{depth}.")
    return found


def _key(written: str) -> Key:
    return tuple(int(part) if part.isdecimal() else part for part in written.split("."))


def _without(tree: Tree, keys: set[Key], prefix: Key = ()) -> Tree:
    """The tree less the faulty keys, so that the rest of it can still be checked."""
    return {
        name: _without(value, keys, (*prefix, name)) if isinstance(value, dict) else value
        for name, value in tree.items()
        if (*prefix, name) not in keys
    }
