"""YAML of configurations: read as plain data, written so that it reads back as it was, and written with its meaning."""

from __future__ import annotations

import contextlib
import re
import textwrap
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from stackwise.config.fields import AS_AUTO, Section
from stackwise.config.kinds import Kind
from stackwise.config.schema import Settings
from stackwise.errors import ConfigError, NotFound
from stackwise.presets import PRESETS
from stackwise.registry import Registry
from stackwise.text import printable

MOST_BYTES = 256 << 10
"""Bytes of a configuration file, at most."""
MOST_NODES, MOST_DEPTH = 10_000, 24
"""Values of a file, those behind aliases each time they are named; levels of nesting."""
MOST_DIGITS = 18
"""Digits of a whole number, at most: what 64 bits hold."""


_LibYAML: Any = getattr(yaml, "CBaseLoader", None)
"""libyaml's parser, several times as fast as the one in Python; PyYAML may have been built without it."""
_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Dumper(_SafeDumper):  # type: ignore[misc]
    """YAML that `_Loader` reads back as it was: a text that it would take for a number is quoted."""


class _Loader(yaml.SafeLoader):
    """YAML of plain data: 1e-3 is a number (as YAML 1.2 has it), and what is no plain data is a fault."""

    def __init__(self, text: str, events: Any = None) -> None:
        super().__init__(text)
        if events is not None:
            vars(self).update({name: getattr(events, name) for name in ("check_event", "peek_event", "get_event")})
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


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def _fault(text: str, place: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, place.start_mark)


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    if ":" in node.value:  # YAML 1.1 counts 1:30:00 in base 60; nobody who writes it means 5400
        return str(node.value)
    if re.match(r"[-+]?0[0-9_]", node.value):  # YAML 1.1 reads 010 as 8, YAML 1.2 as 10
        text = f"{node.value[:40]} could be octal or decimal"
        raise _fault(f"{text}: leave its leading zeros out, or put it in quotes where text is meant", node)
    if len(node.value.replace("_", "")) > MOST_DIGITS * 4:  # of which binary digits are the most
        raise _fault("a number of more digits than anything here can have", node)
    value = int(loader.construct_yaml_int(node))
    if abs(value) >= 10**MOST_DIGITS:
        raise _fault("a number of more digits than anything here can have", node)
    return value


def _number(loader: _Loader, node: yaml.ScalarNode) -> float | int | str:
    """1e9 is a whole number; 1e-3 and 2.0 are not, nor is what a float cannot tell from its neighbours."""
    if ":" in node.value:
        return str(node.value)
    value = float(loader.construct_yaml_float(node))
    whole = "." not in node.value and "e" in node.value.lower() and value.is_integer() and abs(value) < 2**53
    return int(value) if whole else value


def _date(loader: _Loader, node: yaml.ScalarNode) -> Any:
    raise _fault(f"{node.value} reads as a date: put it in quotes where text is meant", node)


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    if re.search("[\ud800-\udfff]", node.value):  # "\ud800" in quotes: no file and no page could hold it
        raise _fault(f"{node.value[:40]!r} has half a character (\\ud800 to \\udfff): write the whole one", node)
    return str(node.value)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            raise _fault("merge keys (<<) are not read here: write the settings out", key_node)
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, bool) or not isinstance(key, str | int) or key == "":
            raise _fault(f"{key!r} is no key", key_node)
        if key in seen:
            raise _fault(f"key {key!r} is given twice", key_node)
        seen.add(key)
    return dict(loader.construct_mapping(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:str", _text)
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
    if _LibYAML is not None:
        # What it stumbles on is read again in Python, which says more exactly what is wrong where.
        with contextlib.suppress(yaml.YAMLError, ValueError, OverflowError):
            return _Loader(text, _LibYAML(text)).get_single_data()
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join((error.problem or error.context or "").split())[:200]
        raise ConfigError([printable(f"{where}{problem}")], source=source) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a character, or a number, that is none
        lines = str(error).splitlines() or ["it is no YAML"]
        raise ConfigError([printable(lines[0][:200])], source=source) from None


def preset_path(name: str) -> Path:
    """The YAML file of a preset.

    Raises:
        NotFound: No preset has that name.
    """
    if name not in PRESETS:
        raise NotFound(f"there is no preset {name!r}", hint=f"presets: {', '.join(PRESETS)}")
    return Path(__file__).parent / "presets" / f"{name}.yaml"


def dump(config: Settings) -> str:
    """A configuration as YAML, every setting resolved, that `load` reads back as an equal one."""
    plain = config.model_dump(exclude={"stages"})
    plain["stages"] = {k: overrides.model_dump(exclude_unset=True) for k, overrides in sorted(config.stages.items())}
    text: str = yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def commented(preset: str, name: str | None = None) -> str:
    """A preset as a file to edit: every setting with its meaning, those the preset leaves alone commented out."""
    text = preset_path(preset).read_text(encoding="utf-8")
    settings = parse_yaml(text, preset)
    if name is not None:
        settings["name"] = name
    lines = [
        f"# StackWise configuration, from the preset {preset}. Run it: stackwise run stackwise.yaml",
        "# A setting that is commented out shows its default. -o KEY=VALUE overrides any of them for one run.",
        *(f"# {line}" for line in _about(text)),
        "",
        *_section(Settings, settings, 0),
        "",
    ]
    return "\n".join(lines)


def _about(text: str) -> list[str]:
    """The comment at the top of a preset's file."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines


def _section(model: type[Section], settings: dict[str, object], depth: int) -> list[str]:
    pad, lines = "  " * depth, []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section) and not issubclass(kind, Kind):
            below = settings.get(name)
            inner = _section(kind, below if isinstance(below, dict) else {}, depth + 1)
            used = isinstance(below, dict) and bool(below)
            title = (kind.__doc__ or "").strip().splitlines()[0]
            lines += ["", f"{pad}# {title}", f"{pad}{name}:" if used or depth == 0 else f"{pad}# {name}:", *inner]
            continue
        names = [f": {', '.join(known.names())}" for known in field.metadata if isinstance(known, Registry)]
        about = "".join([field.description or "", *names])
        lines += [f"{pad}# {line}" for line in textwrap.wrap(about, 100 - len(pad))]
        kind = next(iter(get_args(kind)), kind) if get_origin(kind) is list else kind
        if isinstance(kind, type) and issubclass(kind, Kind):
            lines += [f"{pad}# {line}" for line in _kinds(kind, 100 - len(pad))]
        value = settings[name] if name in settings else field.get_default(call_default_factory=True)
        value = "auto" if value is None and AS_AUTO in field.metadata else value  # a switch not settled yet
        value = value.name if isinstance(value, Kind) else value
        if isinstance(value, list):
            value = [item.name if isinstance(item, Kind) else item for item in value]
        # One key in flow style is "{key: value}": the value stays on its line, the braces go.
        shown = yaml.safe_dump({name: value}, default_flow_style=True, sort_keys=False, width=10**6).strip()[1:-1]
        lines.append(f"{pad}{shown}" if name in settings else f"{pad}# {shown}")
    return lines


def _kinds(sort: type[Kind], width: int) -> list[str]:
    """Each kind of a choice: what it is, and its settings with their defaults and meanings."""
    lines = []
    for name in sort.registry.names():
        kind = sort.registry[name]
        about = (kind.__doc__ or "").strip().partition("\n")[0]
        lines += textwrap.wrap(f"{sort.tag} {name}: {about}", width, initial_indent="  ", subsequent_indent="    ")
        lines += _fields(kind, width)
    return lines


def _fields(model: type[Section], width: int) -> list[str]:
    """The settings of a kind, or of a section within it, with their defaults and meanings."""
    lines = []
    for key, field in model.model_fields.items():
        value, below = None if field.is_required() else field.get_default(call_default_factory=True), field.annotation
        within = isinstance(below, type) and issubclass(below, Section)
        value = value.name if isinstance(value, Kind) else value
        shown = "" if field.is_required() or isinstance(value, Section) else f" ({_plain(value)})"
        text = f"{key}{shown}: {field.description or ''}"
        lines += textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="      ")
        if isinstance(below, type) and within:
            inner = _kinds(below, width - 4) if issubclass(below, Kind) else _fields(below, width - 2)
            lines += [f"{'    ' if issubclass(below, Kind) else '  '}{line}" for line in inner]
    return lines


def _plain(value: object) -> str:
    return yaml.safe_dump({"": value}).strip().partition(": ")[2]
