"""Settings that are given and not used: rules that say when, and the one line for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from stackwise.config.fields import Section, changed
from stackwise.config.schema import Settings

Why = Callable[[Settings, Any], str | None]
"""Why a setting of a section is not used; None where it is. It is given the configuration and the section."""


@dataclass(frozen=True)
class Rule:
    """Settings of one section that are used under one condition.

    Args:
        keys: Their names, with a blank between.
        why: Why they are not used, if they are not.
    """

    keys: str
    why: Why


@dataclass(frozen=True)
class Limit:
    """A number of which only so much can be used.

    Args:
        key: Its name.
        most: How much that is; None: all.
        what: Of what.
    """

    key: str
    most: Callable[[Settings, Any], int | None]
    what: str


def when(condition: bool, why: str) -> str | None:
    """A reason that holds under a condition."""
    return why if condition else None


def told(
    config: Settings, path: str, section: Section, rules: tuple[Rule | Limit, ...], effective: Section | None = None
) -> Iterator[str]:
    """One line for each reason why settings of a section are not used; none for what is left at its default.

    The first rule that gives a reason for a setting is the one that is told.

    Args:
        config: The configuration.
        path: The section's dotted key.
        section: The section.
        rules: In order.
        effective: What the rules look at; None: the section.
    """
    given, own = changed(section), effective or section
    found: dict[str, list[str]] = {}
    limits: list[str] = []
    for rule in rules:
        if isinstance(rule, Limit):
            most = rule.most(config, own) if rule.key in given else None
            if most is not None and (value := getattr(own, rule.key)) > most:
                given.remove(rule.key)
                limits.append(f"{path}.{rule.key}: {value} is more than {rule.what}: {most} is used")
            continue
        names = [name for name in rule.keys.split() if name in given]
        if names and (why := rule.why(config, own)) is not None:
            found.setdefault(why, []).extend(names)
            given = [name for name in given if name not in names]
    for why, names in found.items():
        many = len(names) > 1
        yield f"{path}.{', '.join(sorted(names))}{': unused,' if many else ' is unused:'} {why}"
    yield from limits
