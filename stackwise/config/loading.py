"""The border of the configuration: from YAML text to a checked configuration, with every fault of it in one report.

Nothing behind it needs to doubt a type, a bound or a string: what no machine could hold, what is no plain data, what
is nested without end is refused here, in a line, before anything is built from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import ValidationError

from stackwise.config.checks import faults as contradictions
from stackwise.config.faults import Key, Tree, dotted, field_faults, kind_of, sections
from stackwise.config.schema import Settings
from stackwise.config.training import STACK_PRECISION
from stackwise.config.translations import translate
from stackwise.errors import ConfigError, NotFound, UsageError
from stackwise.files import IrregularFile, read_bytes
from stackwise.text import has_control, printable

C = TypeVar("C", bound=Settings)

PRESETS = ("micro", "smoke", "demo", "gpt2-small", "bert-base", "llama-1b", "llama-70b")
"""The built-in configurations: from seconds on two cores to one H200 for months."""

MOST_BYTES = 256 << 10
"""Bytes of a configuration file, at most."""
MOST_NODES, MOST_DEPTH = 10_000, 24
"""Values of a file, those behind aliases each time they are named; levels of nesting."""
MOST_DIGITS = 18
"""Digits of a whole number, at most: what 64 bits hold."""


class _Loader(yaml.SafeLoader):
    """YAML of plain data: 1e-3 is a number (as YAML 1.2 has it), and what is no plain data is a fault."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0
        self._sizes: dict[str, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node; it is counted, and what could grow without end is refused."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            # A bomb is small in the file and names the same values again and again.
            self._count(self._sizes.get(str(event.anchor), MOST_NODES), event)
            return super().compose_node(parent, index)
        if getattr(event, "tag", None) is not None:
            raise _fault(f"tags are not read here: leave {event.tag} out", event)
        self._depth += 1
        before = self._nodes
        self._count(1, event)
        if self._depth > MOST_DEPTH:
            raise _fault(f"it is nested more than {MOST_DEPTH} levels deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._sizes[event.anchor] = self._nodes - before
        return node

    def _count(self, nodes: int, event: Any) -> None:
        self._nodes += nodes
        if self._nodes > MOST_NODES:
            raise _fault(f"it has more than {MOST_NODES} values, aliases included", event)


def _fault(text: str, place: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, place.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value.replace("_", "")) > MOST_DIGITS * 4:  # of which binary digits are the most
        raise _fault("a number of more digits than anything here can have", node)
    value = int(loader.construct_yaml_int(node))
    if abs(value) >= 10**MOST_DIGITS:
        raise _fault("a number of more digits than anything here can have", node)
    return value


def _number(loader: _Loader, node: yaml.ScalarNode) -> float | int:
    """1e9 is a whole number; 1e-3 and 2.0 are not, nor is what a float cannot tell from its neighbours."""
    value = float(loader.construct_yaml_float(node))
    whole = "." not in node.value and "e" in node.value.lower() and value.is_integer() and abs(value) < 2**53
    return int(value) if whole else value


def _date(loader: _Loader, node: yaml.ScalarNode) -> Any:
    raise _fault(f"{node.value} reads as a date: put it in quotes where text is meant", node)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            raise _fault("merge keys (<<) are not read here: write the settings out", key_node)
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise _fault(f"{key!r} is no key", key_node)
        if key in seen:
            raise _fault(f"key {key!r} is given twice", key_node)
        seen.add(key)
    return dict(loader.construct_mapping(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _date)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML.

    Raises:
        ConfigError: The text is not YAML of plain data, gives a key twice, or is larger than a configuration can be;
            says the line.
    """
    if len(text) > MOST_BYTES:
        raise ConfigError([f"it is longer than {MOST_BYTES} characters"], source=source)
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join((error.problem or error.context or "").split())[:200]
        raise ConfigError([printable(f"{where}{problem}")], source=source) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a character, or a number, that is none
        lines = str(error).splitlines() or ["it is no YAML"]
        raise ConfigError([printable(lines[0][:200])], source=source) from None


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
        raise NotFound(f"{path}: there is no such file", hint="`stackwise init` writes one") from None
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
        config = _what_is_left(cls, tree, set(found))
    resolve(config)
    config.unused = reading.unused
    wrong = {dotted(key) for key in found}
    lines = [f"{dotted(key)}: {text}" for key, text in found.items()]
    lines += [f"{key}: {text}" for key, text in contradictions(config) if key not in wrong]
    if lines:
        raise ConfigError([printable(line) for line in lines], source=source)
    return config


def preset_path(name: str) -> Path:
    """The YAML file of a preset.

    Raises:
        NotFound: No preset has that name.
    """
    if name not in PRESETS:
        raise NotFound(f"there is no preset {name!r}", hint=f"presets: {', '.join(PRESETS)}")
    return Path(__file__).parent / "presets" / f"{name}.yaml"


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


def dump(config: Settings) -> str:
    """A configuration as YAML, every setting resolved, that `load` reads back as an equal one."""
    plain = config.model_dump(exclude={"stages"})
    plain["stages"] = {k: own.model_dump(exclude_unset=True) for k, own in sorted(config.stages.items())}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of nested mappings, by its dotted key."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flat(config: Settings) -> dict[str, Any]:
    """The settings by dotted key, without those that say only where and how it runs; a stage's own ones come last."""
    found = dict(leaves(config.model_dump(exclude={"tracking", "slurm", "stages", "name"})))
    for depth, own in sorted(config.stages.items()):
        found |= leaves(own.model_dump(exclude_unset=True), f"stages.{depth}.")
    return found


def _key(written: str) -> Key:
    return tuple(int(part) if part.isascii() and part.isdecimal() else part for part in written.split("."))


def _without(tree: Tree, keys: set[Key], prefix: Key = ()) -> Tree:
    """The tree less the faulty keys, so that the rest of it can still be checked."""
    return {
        name: _without(value, keys, (*prefix, name)) if isinstance(value, dict) else value
        for name, value in tree.items()
        if (*prefix, name) not in keys
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
        if found := contradictions(self):
            raise ConfigError([f"{key}: {text}" for key, text in found])
        return self
