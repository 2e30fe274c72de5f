"""What is wrong with a configuration's keys and values, in words: one line a key, with what is allowed."""

from __future__ import annotations

import difflib
import typing
from typing import Any

from pydantic import ValidationError

from stackwise.config.fields import Section
from stackwise.config.kinds import Kind
from stackwise.config.schema import PATTERNS, Settings

Tree = dict[str, Any]
Key = tuple[str | int, ...]


def dotted(key: Key) -> str:
    """A key as it is written: its names with dots between."""
    return ".".join(map(str, key))


def field_faults(error: ValidationError, tree: Tree) -> dict[Key, str]:
    """One line a key. A union's branches report one by one; they become one line that names all that is allowed."""
    said: dict[Key, list[str]] = {}
    for item in error.errors(include_url=False):
        key = _present(item["loc"], tree)
        text = _unknown(key, tree) if item["type"] == "extra_forbidden" else _allowed(dict(item))
        said.setdefault(key, []).append(text)
    found = {}
    for key, texts in said.items():
        value = _at(tree, key)
        allowed = " or ".join(dict.fromkeys(texts))
        if isinstance(value, list) and allowed.startswith("must ") and "a list" not in allowed:
            allowed = f"each item {allowed}"
        found[key] = allowed if allowed.startswith("unknown") else f"{allowed}, not {kind_of(value)}"
    return found


def _present(loc: tuple[str | int, ...], tree: Any) -> Key:
    """The part of an error's location that stands in the tree: pydantic appends the names of union branches."""
    key: list[str | int] = []
    for name in loc:
        if not isinstance(tree, dict) or name not in tree:
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
    return str(item["msg"])


def sections(model: type[Section], prefix: str = "") -> dict[str, type[Section]]:
    """Every section by its dotted name; choices, whose settings depend on what is chosen, are none."""
    found = {prefix: model}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section) and not issubclass(kind, Kind):
            found |= sections(kind, f"{prefix}.{name}" if prefix else name)
    return found


def _section_at(key: Key, tree: Tree) -> type[Section] | None:
    """The section that a key leads to: through mappings of sections (`stages.3`), into the kind that is chosen."""
    section, here = Settings, tree  # type: Any, Any
    for name in key:
        here = here.get(name, {}) if isinstance(here, dict) else {}
        if typing.get_origin(section) is dict:
            section = typing.get_args(section)[1]
        elif isinstance(section, type) and issubclass(section, Section) and name in section.model_fields:
            section = section.model_fields[str(name)].annotation
        else:
            return None
        if isinstance(section, type) and issubclass(section, Kind) and "registry" in section.__dict__:
            section = section.registry[here[section.tag]]
    return section if isinstance(section, type) and issubclass(section, Section) else None


def _unknown(key: Key, tree: Tree) -> str:
    """What was meant by a key that does not exist: near misses in its section, else those of that name elsewhere."""
    here = _section_at(key[:-1], tree)
    names = list(here.model_fields) if here else []
    meant = [dotted((*key[:-1], name)) for name in difflib.get_close_matches(str(key[-1]), names, n=3, cutoff=0.7)]
    if not meant:
        everywhere = {
            f"{where}.{name}" if where else name: name
            for where, section in sections(Settings).items()
            for name in section.model_fields
        }
        near = difflib.get_close_matches(str(key[-1]), sorted(set(everywhere.values())), n=3, cutoff=0.75)
        meant = [full for full, name in everywhere.items() if name == key[-1]]
        meant = meant or [full for name in near for full, own in everywhere.items() if own == name]
    if not meant:  # nothing is near: what the section has, where that is short enough to read
        loose = names if len(names) <= 8 else difflib.get_close_matches(str(key[-1]), names, n=3, cutoff=0.0)
        return f"unknown key; {dotted(key[:-1]) or 'the top level'} has {', '.join(sorted(loose)) or 'no settings'}" + (
            f" and {len(names) - 3} others" if len(names) > 8 else ""
        )
    return f"unknown key; did you mean {' or '.join(meant[:3])}?"
