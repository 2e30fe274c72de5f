"""The border of the configuration: from YAML text to a checked configuration, with every fault of it in one report.

Nothing behind it needs to doubt a type, a bound or a string: what no machine could hold, what is no plain data, what
is nested without end is refused here, in a line, before anything is built from it.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import ValidationError

from stackwise.config.checks import faults as contradictions
from stackwise.config.fields import Section
from stackwise.config.kinds import Kind, Stream
from stackwise.config.schema import PATTERNS, Settings
from stackwise.config.training import STACK_PRECISION
from stackwise.config.translations import translate
from stackwise.config.yaml_files import MOST_BYTES, MOST_DEPTH, parse_yaml, preset_path
from stackwise.errors import ConfigError, NotFound, UsageError
from stackwise.files import IrregularFile, read_bytes
from stackwise.presets import PRESETS
from stackwise.text import has_control, printable

C = TypeVar("C", bound=Settings)
Tree = dict[str, Any]
Key = tuple[str | int, ...]
ANYWHERE = {"enabled", "kind", "name"}
"""Names that mean something beside their section alone: another section's is never the one that was meant."""


def parse_overrides(items: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """`KEY=VALUE` strings (the command line's `-o`) as dotted keys and YAML values.

    Raises:
        UsageError: An item has no `=`, its key is none, or its value is not YAML.
    """
    overrides: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        key, shown = key.strip(), printable(item[:80])
        if not equals or not key:
            raise UsageError(f"-o {shown}: needs KEY=VALUE", hint="for example -o training.learning_rate=1e-3")
        if has_control(key) or not all(key.split(".")) or key.count(".") >= MOST_DEPTH:
            raise UsageError(f"-o {shown}: {printable(key[:60])} is no key", hint="names with dots between")
        overrides[key] = parse_yaml(text, f"-o {shown}")
    return overrides


def load(cls: type[C], path: str, overrides: Mapping[str, Any], *, source: str | None = None) -> C:
    """Read, override, build and check a configuration file. See `StackWiseConfig.from_yaml`."""
    source = source or path
    try:
        # The user names it, so it may be reached through links; but what it leads to is a file.
        text = read_bytes(Path(path).resolve(), limit=MOST_BYTES).decode()
    except FileNotFoundError:
        hint = f"{path} is a preset: --preset {path}" if path in PRESETS else "`stackwise init` writes one"
        raise NotFound(f"{path}: there is no such file", hint=hint) from None
    except IrregularFile as error:
        raise UsageError(f"{path}: cannot be read as text: {error.message}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: cannot be read as text: it is not UTF-8", hint="save it as UTF-8") from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{printable(path)}: cannot be read as text: {reason}") from None
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
    tree, faults = reading.tree, {_key(key): text for key, text in reading.faults}
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
        faults |= field_faults(error, tree)
        # What is left may hold contradictions of its own: report them now, not after the next try.
        config = _what_is_left(cls, tree, set(faults))
    resolve(config)
    config.unused = reading.unused
    wrong = {dotted(key) for key in faults}
    lines = [f"{dotted(key)}: {text}" for key, text in faults.items()]
    if model_is_known(config):
        lines += [f"{key}: {text}" for key, text in contradictions(config) if key not in wrong]
    if lines:
        raise ConfigError([printable(line) for line in lines], source=source)
    return config


def model_is_known(config: Settings) -> bool:
    """Whether `model.*` is that of the run; False: it follows from `init.weights`, which is still to be read."""
    return config.init.weights is None or set(type(config.model).model_fields) <= config.model.model_fields_set


def resolve(config: Settings) -> None:
    """Settle the settings that follow from others."""
    architecture, progressive = config.model.architecture, config.training.progressive
    if not model_is_known(config):
        pass  # the depth of the rack is among what is still to be read
    elif architecture.n_stacks is None:
        architecture.n_stacks = (progressive.max_stacks if progressive.enabled else None) or 1
    elif progressive.enabled and progressive.max_stacks is not None:
        architecture.n_stacks = min(architecture.n_stacks, progressive.max_stacks)
    if config.training.continual.columns and config.data.tasks and "stream" not in config.model.model_fields_set:
        config.model.stream = Stream.of({"kind": "columns", "count": len(config.data.tasks)})
    precision = STACK_PRECISION.get(progressive.new_stack_precision) if progressive.enabled else None
    if precision is not None and config.precision == "auto":
        config.precision = precision
    if config.objective.packs and "within_documents" not in config.data.model_fields_set:
        config.data.within_documents = True
    if config.training.growth and "lr_schedule" not in config.training.model_fields_set:
        config.training.lr_schedule = "wsd"  # a rate that has fallen early leaves new blocks none to learn with


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of nested mappings, by its dotted key."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flat(config: Settings) -> dict[str, Any]:
    """The settings by dotted key, without those that say only where and how it runs; a stage's own ones come last."""
    elsewhere = {"tracking", "slurm", "tune", "parallel", "stages", "name", "init"}
    values = dict(leaves(config.model_dump(exclude=elsewhere)))
    for depth, overrides in sorted(config.stages.items()):
        values |= leaves(overrides.model_dump(exclude_unset=True), f"stages.{depth}.")
    return values


def _key(written: str) -> Key:
    return tuple(int(part) if part.isascii() and part.isdecimal() else part for part in written.split("."))


def _without(tree: Tree, keys: set[Key], prefix: Key = ()) -> Tree:
    """The tree less the faulty keys, so that the rest of it can still be checked; a list goes with a faulty item."""
    depth = len(prefix) + 1
    lists = {key[:depth] for key in keys if len(key) > depth}
    return {
        name: _without(value, keys, (*prefix, name)) if isinstance(value, dict) else value
        for name, value in tree.items()
        if (*prefix, name) not in keys and not (isinstance(value, list) and (*prefix, name) in lists)
    }


def _what_is_left(cls: type[C], tree: Tree, faulty: set[Key]) -> C:
    """The configuration less what is faulty; a choice that lacks a setting then goes as a whole."""
    while True:
        try:
            return cls.model_validate(_without(tree, faulty))
        except ValidationError as error:
            more = set(field_faults(error, _without(tree, faulty))) - faulty
            if not more:
                return cls()
            faulty = faulty | more


# Faults in words: one line a key, with what is allowed.


def dotted(key: Key) -> str:
    """A key as it is written: its names with dots between."""
    return ".".join(map(str, key))


def field_faults(error: ValidationError, tree: Tree) -> dict[Key, str]:
    """One line a key. A union's branches report one by one; they become one line that names all that is allowed."""
    messages: dict[Key, list[str]] = {}
    values: dict[Key, Any] = {}
    whole, items = set[Key](), set[Key]()
    for item in error.errors(include_url=False):
        key = _present(item["loc"], tree)
        text = _unknown(key, tree) if item["type"] in ("extra_forbidden", "invalid_key") else _allowed(dict(item))
        if "[key]" in item["loc"]:  # of a mapping a key is at fault: a stage's number
            text, values[key] = f"its key {text}", item["loc"][item["loc"].index("[key]") - 1]
        messages.setdefault(key, []).append(text)
        if any(isinstance(name, int) for name in item["loc"][len(key) :]):  # a plain item: the list is what is shown
            items.add(key)
        if item["type"] == "value_error":  # settings that do not go together: the text says which
            whole.add(key)
        if item["type"] == "kind":  # of a choice its name is at fault, not its settings
            values[key] = item["ctx"]["given"]
    faults = {}
    for key, texts in messages.items():
        value = values.get(key, _at(tree, key))
        allowed = " or ".join(dict.fromkeys(texts))
        if key in items and isinstance(value, list) and allowed.startswith("must ") and "a list" not in allowed:
            allowed = f"each item {allowed}"
        faults[key] = allowed if key in whole or allowed.startswith("unknown") else f"{allowed}, not {kind_of(value)}"
    return faults


def _present(loc: tuple[str | int, ...], tree: Any) -> Key:
    """The part of an error's location that stands in the tree: pydantic appends the names of union branches."""
    key: list[str | int] = []
    for name in loc:
        in_list = isinstance(tree, list) and isinstance(name, int) and isinstance(tree[name], dict)
        if not in_list and (not isinstance(tree, dict) or name not in tree):
            break
        tree = tree[name]
        key.append(name)
    return tuple(key)


def _at(tree: Any, key: Key) -> Any:
    for name in key:
        tree = tree[name]
    return tree


def kind_of(value: Any) -> str:
    """A value as a message shows it."""
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section of settings",
    "model_attributes_type": "a section of settings",
    "none_required": "null",
}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def _allowed(item: dict[str, Any]) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind in _TYPES:
        return f"must be {_TYPES[kind]}"
    if kind == "literal_error":
        allowed = context["expected"].replace(" or ", ", ").replace("'", "").replace("False", "false")
        return f"must be one of {allowed}" if "," in allowed else f"must be {allowed}"
    if kind == "missing":
        return f"needs {item['loc'][-1]}"
    if kind in ("too_long", "too_short"):
        exactly = context.get("max_length", context.get("min_length"))
        return f"must have {'at most' if kind == 'too_long' else 'at least'} {exactly} items"
    for bound, words in _BOUNDS.items():
        if bound in context:
            return f"must be {words} {context[bound]}"
    if kind == "string_pattern_mismatch":
        return f"must be {PATTERNS.get(context['pattern'], context['pattern'])}"
    return str(context["error"] if kind == "value_error" else item["msg"])


def sections(model: type[Section], prefix: str = "") -> dict[str, type[Section]]:
    """Every section by its dotted name; choices, whose settings depend on what is chosen, are none."""
    by_prefix = {prefix: model}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section) and not issubclass(kind, Kind):
            by_prefix |= sections(kind, f"{prefix}.{name}" if prefix else name)
    return by_prefix


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _section_at(key: Key, tree: Tree) -> type[Section] | None:
    """The section that a key leads to: through mappings of sections (`stages.3`), into the kind that is chosen."""
    section, here = Settings, tree  # type: Any, Any
    for name in key:
        here = here.get(name, {}) if isinstance(here, dict) else here[int(name)] if isinstance(here, list) else {}
        if typing.get_origin(section) in (dict, list):
            section = typing.get_args(section)[-1]
        elif _is_section(section) and name in section.model_fields:
            section = section.model_fields[str(name)].annotation
        else:
            return None
        if typing.get_origin(section) not in (dict, list):  # of `Section | None`, the section
            section = next((arm for arm in typing.get_args(section) if _is_section(arm)), section)
        if isinstance(section, type) and issubclass(section, Kind) and "registry" in section.__dict__:
            section = section.registry[here[section.tag]]
    return section if _is_section(section) else None


def _unknown(key: Key, tree: Tree) -> str:
    """What was meant by a key that does not exist: near misses in its section, else those of that name elsewhere."""
    here = _section_at(key[:-1], tree)
    names = list(here.model_fields) if here else []
    if here and issubclass(here, Kind):
        # a setting of another kind of its sort is no slip of the pen: say which kinds have it
        kinds = {name: here.registry[name] for name in here.registry.names()}
        having = [name for name, kind in kinds.items() if key[-1] in kind.model_fields]
        if having:
            last = next(name for name, kind in kinds.items() if kind is here)
            return f"unknown key; {last} has no {key[-1]}: it is a setting of {', '.join(having)}"
    meant = [dotted((*key[:-1], name)) for name in difflib.get_close_matches(str(key[-1]), names, n=3, cutoff=0.7)]
    if not meant and key[-1] not in ANYWHERE:
        everywhere = {
            f"{where}.{name}" if where else name: name
            for where, section in sections(Settings).items()
            for name in section.model_fields
            if name not in ANYWHERE
        }
        near = difflib.get_close_matches(str(key[-1]), sorted(set(everywhere.values())), n=3, cutoff=0.75)
        meant = [full for full, name in everywhere.items() if name == key[-1]]
        meant = meant or [full for name in near for full, last in everywhere.items() if last == name]
    if not meant:  # nothing is near: what the section has, where that is short enough to read
        loose = names if len(names) <= 8 else difflib.get_close_matches(str(key[-1]), names, n=3, cutoff=0.0)
        return f"unknown key; {dotted(key[:-1]) or 'the top level'} has {', '.join(sorted(loose)) or 'no settings'}" + (
            f" and {len(names) - 3} others" if len(names) > 8 else ""
        )
    return f"unknown key; did you mean {' or '.join(meant[:3])}?"


class StackWiseConfig(Settings):
    """The whole configuration of a run, as users hold it."""

    @classmethod
    def from_yaml(cls, path: str, overrides: dict[str, Any] | None = None) -> Self:
        """Read a YAML file; every fault of it is reported at once.

        Args:
            path: The file.
            overrides: Dotted keys and their values, applied on top.

        Raises:
            ConfigError: Unknown keys, wrong types, values out of range, settings that contradict each other.
        """
        return load(cls, path, overrides or {})

    @classmethod
    def from_preset(cls, name: str, overrides: dict[str, Any] | None = None) -> Self:
        """One of the built-in configurations.

        Raises:
            UsageError: No preset has that name.
            ConfigError: An override is faulty.
        """
        return load(cls, str(preset_path(name)), overrides or {}, source=f"preset {name}")

    def validate(self) -> Self:  # type: ignore[override]
        """Check that the settings fit each other.

        Raises:
            ConfigError: They do not; every fault is named.
        """
        resolve(self)
        if model_is_known(self) and (faults := contradictions(self)):
            raise ConfigError([f"{key}: {text}" for key, text in faults])
        return self
