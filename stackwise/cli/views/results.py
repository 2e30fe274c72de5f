"""What a run came to: the held-out table, and a passage before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from stackwise.cli.output import plain, table
from stackwise.report import words
from stackwise.report.page import FIRST_STAGE, bounded, depth_name

MADE = {"filled": "bold cyan", "right": "bold green", "wrong": "underline yellow"}
"""How text that the rack made is shown: as such, as it stood in the original, otherwise than there."""


def held_out(result: Mapping[str, Any]) -> RenderableType:
    """Held-out figures by depth, and the baselines under them."""
    fractions = list(result["loss"])
    columns = ["held out", "bits/byte", *(f"loss {words.fraction(f)}" for f in fractions)]
    columns += [f"acc. {words.fraction(f)}" for f in fractions]
    shown = table(*columns, right=range(1, len(columns)))
    stages = result.get("stages") or [result]
    for depth, stage in enumerate(stages):
        last = depth == len(stages) - 1
        _row(shown, depth_name(depth, len(stages)), stage, fractions, "bold" if last else "")
    for name, baseline in result.get("baselines", {}).items():
        if name != FIRST_STAGE:
            _row(shown, f"baseline: {name.replace('_', ' ')}", baseline, fractions, "dim")
    return Group(shown, Text(_footnote(result), style="dim"))


def _row(shown: Table, name: str, figures: Mapping[str, Any], fractions: list[str], style: str) -> None:
    bits = figures.get("bits_per_byte")
    loss, accuracy = figures.get("loss") or {}, figures.get("accuracy") or {}
    cells = [f"{bits:.3f}" if bits is not None else "–"]
    cells += [f"{loss[f]:.3f}" if loss.get(f) is not None else "–" for f in fractions]
    cells += [f"{100 * accuracy[f]:.1f}%" if accuracy.get(f) is not None else "–" for f in fractions]
    shown.add_row(plain(name), *cells, style=style)


def _footnote(result: Mapping[str, Any]) -> str:
    text = f"{words.count(result['tokens'])} tokens"
    if result.get("bytes"):
        text += f", {words.size(result['bytes'])} of text"
    kind = "bits/byte is the likelihood" if result.get("likelihood") == "exact" else "bits/byte is an upper bound"
    if bounded(result):
        kind += " (before the rack was made causal, an upper bound)"
    error = result.get("bits_per_byte_error")
    causal = result.get("likelihood") == "exact" and not bounded(result)
    token = "token, at the positions that would be masked" if causal else "masked token"
    return f"{text}; loss in nats a {token}; {kind}" + (f" (± {error:.3f})" if error else "")


def passage(console: Console, fill: Mapping[str, Any]) -> None:
    """A passage with its holes, and as the rack filled them; what it made stands out."""
    from rich.rule import Rule

    before, after = Text(fill["before"]), Text()
    before.highlight_words(["[MASK]"], style="dim cyan")
    for text, kind in fill.get("spans") or [[fill["after"], "given"]]:
        after.append(text, style=MADE.get(kind, ""))
    for title, shown in (("before", before), ("after", after)):
        console.print(Rule(title, style="dim", align="left") if console.is_terminal else f"--- {title}")
        console.print(shown)
    console.print(Rule(style="dim") if console.is_terminal else "---")
