"""Strings that leave the process: to a terminal, a script, a page, a tracker. One gate for all of them."""

from __future__ import annotations

import re

from stackwise.errors import UsageError

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (escape sequences begin with one), line separators, directions of writing, lone surrogates."""


def printable(text: str, *, lines: bool = False) -> str:
    """A string as it may be shown: control characters are written out (`\\x1b`) instead of being obeyed.

    Args:
        text: From a file, a name, a message.
        lines: Leave line breaks and tabs as they are.
    """

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if lines and character in "\n\t":  # a message of our own has several lines
            return character
        return f"\\x{ord(character):02x}" if ord(character) < 0x100 else f"\\u{ord(character):04x}"

    return _CONTROL.sub(escaped, text)


def has_control(text: str) -> bool:
    """Whether a string has characters that a script, a terminal or a page would obey instead of showing."""
    return _CONTROL.search(text) is not None


def check_plain(text: str, what: str) -> str:
    """The string itself, where it has no control characters.

    Args:
        text: What is to leave the process as it is.
        what: What it is called in the refusal: a key, "run name".

    Raises:
        UsageError: It has some.
    """
    if has_control(text):
        fault = "is not UTF-8" if any("\ud800" <= one <= "\udfff" for one in text) else "has control characters"
        raise UsageError(f"{what}: {printable(text)!r} {fault}", hint="write it in one plain line of UTF-8")
    return text
