"""The commented file that `stackwise init` writes."""

from __future__ import annotations

import textwrap
from typing import get_args, get_origin

import yaml

from stackwise.config.fields import Section
from stackwise.config.kinds import Kind
from stackwise.config.loading import parse_yaml, preset_path
from stackwise.config.schema import Settings
from stackwise.registry import Registry


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
