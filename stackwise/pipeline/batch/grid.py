"""The grid of a sweep: every combination of some settings' values, each a configuration with a name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.yaml_files import parse_yaml
from stackwise.errors import ConfigError, UsageError
from stackwise.identity import content_id

NAME_LENGTH = 100  # longest name of a combination's directory
EXAMPLE = "for example -o training.learning_rate=1e-3,3e-3"


@dataclass(frozen=True)
class Combination:
    """One run of a sweep."""

    name: str
    values: dict[str, Any]
    config: StackWiseConfig


def parse_axes(items: Sequence[str], option: str = "-o") -> dict[str, list[Any]]:
    """`KEY=V1,V2,…` strings as dotted keys with the values to try; a list as one value stands in brackets.

    Args:
        items: The strings.
        option: What they were given by.

    Raises:
        UsageError: An item has no `=`, or its values are not YAML.
    """
    axes: dict[str, list[Any]] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{option} {item}: needs KEY=VALUE,VALUE,…", hint=EXAMPLE)
        try:
            values = parse_yaml(f"[{text}]", f"{option} {item}")
        except ConfigError:  # text that is no list inside brackets may be a value on its own
            values = [parse_yaml(text, f"{option} {item}")]
        axes[key.strip()] = values or [parse_yaml(text, f"{option} {item}")]
    return axes


def combinations(axes: dict[str, list[Any]], make: Callable[[dict[str, Any]], StackWiseConfig]) -> list[Combination]:
    """The product of the axes, in their order, each once.

    Raises:
        UsageError: No key has several values.
        ConfigError: A combination is no valid configuration; every fault of the first such is named.
    """
    varied = [key for key, values in axes.items() if len(values) > 1]
    if not varied:
        raise UsageError("a sweep needs a key with several values", hint=EXAMPLE)
    by_name: dict[str, Combination] = {}
    for values in itertools.product(*axes.values()):
        overrides = dict(zip(axes, values, strict=True))
        varied_values = {key: overrides[key] for key in varied}
        name = _name(varied_values)
        if name not in by_name:
            by_name[name] = Combination(name, varied_values, make(overrides))
    return list(by_name.values())


def label(key: str) -> str:
    """A key, short: `learning_rate`, `stage3.weight_decay`, `model.d_model`."""
    if staged := re.fullmatch(r"stages\.(\d+)\.training\.(.+)", key):
        return f"stage{staged.group(1)}.{staged.group(2)}"
    return key.removeprefix("training.")


def shown(value: Any) -> str:
    """A value, short."""
    if isinstance(value, float):
        return f"{value:g}"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if _plain(value) else str(value)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _name(values: dict[str, Any]) -> str:
    text = "_".join(f"{label(key)}-{shown(value)}" for key, value in values.items())
    clean = re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-")
    if clean != text or len(clean) > NAME_LENGTH:
        clean = f"{clean[: NAME_LENGTH - 9]}-{content_id('combination', text)[:8]}"
    return clean
