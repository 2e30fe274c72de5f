"""The sections on held-out text: loss by depth, bits per byte beside baselines, a passage before and after."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from stackwise.report import words
from stackwise.report.charts import Bar, Line, bars, hue_of, line_chart, scroll
from stackwise.report.collect import Facts

MANY = 16
"""Of more stages than this, bits per byte is drawn as a line."""
HOLES = re.compile(r"(?:\[MASK\])+")
BASELINES = {"unigram": "unigram frequencies"}
MADE = ("filled", "right", "wrong")
"""Kinds of text that the rack made."""
FIRST_STAGE = "first_stage"
"""A baseline that is the first of the stages, and is called so there."""


def section(facts: Facts) -> list[str]:
    """Held-out figures; nothing where there is no evaluation."""
    result = facts.evaluation
    if result is None or not result.get("loss"):
        return []
    stages = result.get("stages") or [result]
    size = f"{words.count(result['tokens'])} tokens" if result.get("tokens") else "held-out text"
    text = f" ({words.size(result['bytes'])} of text)" if result.get("bytes") else ""
    exact = result.get("likelihood") == "exact"
    kind = "the likelihood itself" if exact else "an upper bound, from the masked-diffusion likelihood"
    if bounded(result):
        kind += " (before the rack was made causal, an upper bound)"
    spread = result.get("bits_per_byte_error")
    error = f", standard error {spread:.3f}" if spread else ""
    return [
        "<h2>On held-out text</h2>",
        f'<p class="soft">{size}{text} that no stage was trained on. Loss is in nats a masked token; bits per byte is '
        f"{kind}{error}.</p>",
        '<div class="pair">',
        f"<section><h3>Loss by depth, at each masked share</h3>{_losses(stages)}</section>",
        f"<section><h3>Bits per byte by depth</h3>{_bits(result, stages)}</section>",
        "</div>",
        _table(result, stages),
    ]


def bounded(result: Mapping[str, Any]) -> bool:
    """Whether the rack's bits per byte are its likelihood, and those of stages before it bounds."""
    kinds = [stage.get("likelihood") for stage in result.get("stages") or []]
    return result.get("likelihood") == "exact" and "bound" in kinds


def _losses(stages: list[dict[str, Any]]) -> str:
    fractions = [key for key in stages[-1]["loss"] if stages[-1]["loss"][key] is not None]
    lines = [
        Line(
            words.fraction(key),
            [(float(i), s["loss"][key]) for i, s in enumerate(stages) if s.get("loss", {}).get(key) is not None],
            hue_of(number, len(fractions)),
            marked=True,
        )
        for number, key in enumerate(fractions)
    ]
    values = [y for line in lines for _, y in line.points]
    return line_chart(
        lines,
        title="Held-out loss by depth",
        x_label="stage",
        y_label="nats",
        y_range=_padded(min(values), max(values)),
        x_ticks=[float(i) for i in range(len(stages))],
        widths=(420,),
        height=270,
    )


def _bits(result: dict[str, Any], stages: list[dict[str, Any]]) -> str:
    known = [(i, s["bits_per_byte"]) for i, s in enumerate(stages) if s.get("bits_per_byte") is not None]
    baselines = {
        BASELINES.get(name, name.replace("_", " ")): figures["bits_per_byte"]
        for name, figures in (result.get("baselines") or {}).items()
        if name != FIRST_STAGE and figures.get("bits_per_byte") is not None
    }
    if not known:
        return '<p class="soft">not measured: the data says nothing of its bytes</p>'
    if len(known) > MANY:
        values = [y for _, y in known] + list(baselines.values())
        ends = (float(known[0][0]), float(known[-1][0]))
        lines = [Line("", [(float(i), y) for i, y in known], 0.0, marked=True)]
        lines += [Line(name.split()[0], [(x, y) for x in ends], None, dashed=True) for name, y in baselines.items()]
        return line_chart(
            lines,
            title="Bits per byte by depth",
            x_label="stage",
            y_label="bits per byte",
            y_range=_padded(min(values), max(values)),
            x_ticks=[float(i) for i, _ in known],
            widths=(420,),
            height=270,
        )
    items = [Bar(name, y, f"{y:.3f}") for name, y in baselines.items()]
    items += [
        Bar(depth_name(i, len(stages)), y, f"{y:.3f}", hue=hue_of(i, len(stages)), hint=_gain(y, baselines))
        for i, y in known
    ]
    return bars(items, name="depth", figure="bits per byte")


def _gain(bits: float, baselines: Mapping[str, float]) -> str:
    return "\n".join(f"{100 * (1 - bits / y):+.1f}% below {name}" for name, y in baselines.items() if y)


def depth_name(depth: int, stages: int) -> str:
    """What the rack up to a stage is called."""
    if stages == 1:
        return "the rack"
    return f"stages 0–{depth}" if depth else "first stage only"


def _table(result: dict[str, Any], stages: list[dict[str, Any]]) -> str:
    fractions = list(stages[-1]["loss"])
    head = "<th>bits/byte</th>" + "".join(f"<th>loss {words.fraction(f)}</th>" for f in fractions)
    head += "".join(f"<th>accuracy {words.fraction(f)}</th>" for f in fractions)
    rows = [
        _row(depth_name(i, len(stages)), stage, fractions, "last" if i == len(stages) - 1 else "")
        for i, stage in enumerate(stages)
    ]
    for name, figures in (result.get("baselines") or {}).items():
        if name != FIRST_STAGE:
            rows.append(_row(BASELINES.get(name, name.replace("_", " ")), figures, fractions, "aside"))
    return scroll(
        f'<table class="data"><thead><tr><th class="text">depth</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>",
        len(rows),
    )


def _row(name: str, figures: Mapping[str, Any], fractions: list[str], kind: str) -> str:
    bits, loss, accuracy = figures.get("bits_per_byte"), figures.get("loss") or {}, figures.get("accuracy") or {}
    cells = [f"{bits:.3f}" if bits is not None else "–"]
    cells += [f"{loss[f]:.3f}" if loss.get(f) is not None else "–" for f in fractions]
    cells += [f"{100 * accuracy[f]:.1f}%" if accuracy.get(f) is not None else "–" for f in fractions]
    shown = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr class="{kind}"><th scope="row" class="text">{escape(name)}</th>{shown}</tr>'


def passage(facts: Facts) -> list[str]:
    """A held-out passage with holes, and as the rack filled them."""
    fill = facts.history.fill
    if not fill or not fill.get("before"):
        return []
    before = holes_marked(str(fill["before"]))
    spans = fill.get("spans") or [[fill.get("after", ""), "given"]]
    after = "".join(
        f'<mark class="{kind}">{escape(str(text))}</mark>' if kind in MADE else escape(str(text))
        for text, kind in spans
    )
    compared = any(kind in ("right", "wrong") for _, kind in spans)
    legend = (
        '<p class="soft">What the rack filled in: <mark class="right">as in the original</mark>, '
        '<mark class="wrong">otherwise</mark>.</p>'
    )
    return [
        "<h2>A held-out passage, filled in</h2>",
        legend if compared else "",
        '<div class="pair">',
        f'<section><h3>Before</h3><pre class="passage">{before}</pre></section>',
        f'<section><h3>After</h3><pre class="passage">{after}</pre></section>',
        "</div>",
    ]


def holes_marked(before: str) -> str:
    """A text with holes as HTML: runs of holes are marked as one, with their count."""
    shown, at = "", 0
    for match in HOLES.finditer(before):
        count = match.group().count("[MASK]")
        name = f"{words.plural(count, 'token')} masked"
        shown += f'{escape(before[at : match.start()])}<mark class="hole" data-tip="{name}">{"▒" * count}</mark>'
        at = match.end()
    return shown + escape(before[at:])


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return max(0.0, low - room), high + room
