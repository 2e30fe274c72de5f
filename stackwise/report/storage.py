"""The sections on disk and time, and the configuration."""

from __future__ import annotations

from html import escape

from stackwise.report import words
from stackwise.report.charts import Bar, bars, hue_of, scroll
from stackwise.report.collect import BoundaryFacts, Facts


def section(facts: Facts) -> list[str]:
    """Bytes by boundary, and time by phase."""
    parts = []
    if facts.boundaries:
        parts.append(f"<section><h3>Bytes by boundary</h3>{_boundaries(facts)}{_store(facts)}</section>")
    if any(facts.history.phases.values()):
        parts.append(f"<section><h3>Time by phase</h3>{_phases(facts)}</section>")
    return ["<h2>Disk and time</h2>", '<div class="pair">', *parts, "</div>"] if parts else []


def _boundaries(facts: Facts) -> str:
    def bar(item: BoundaryFacts) -> Bar:
        there = item.state != "dropped"
        hint = f"{item.id}\n{item.codec}, {item.state}" + (
            f"\n{' × '.join(map(str, item.shape))}" if item.shape else ""
        )
        more = item.codec if item.state == "complete" else f"{item.codec}, {item.state}"
        hue = hue_of(item.depth, len(facts.stages)) if there else None
        return Bar(f"boundary {item.depth}", item.bytes, words.size(item.bytes), more, hue, hint)

    shown = bars([bar(item) for item in facts.boundaries], name="boundary", figure="bytes")
    return scroll(shown, len(facts.boundaries))


def _store(facts: Facts) -> str:
    if facts.store_bytes is None:
        return '<p class="soft">The store could not be opened; these figures are from the log.</p>'
    written = sum(item.bytes for item in facts.boundaries)
    used = facts.store_bytes
    text = (
        f"The run wrote {words.size(written)} of activations. Its store holds {words.size(used['boundaries'])} of them"
    )
    return f'<p class="soft">{text}, and {words.size(used["stages"])} of committed weights.</p>'


def _phases(facts: Facts) -> str:
    phases = facts.history.phases
    total = sum(phases.values())
    items = [
        Bar(name, seconds, words.duration(seconds), words.percent(seconds / total), hue=None if n == 4 else 0.0)
        for n, (name, seconds) in enumerate(phases.items())
        if seconds > 0
    ]
    data = facts.history.data
    note = '<p class="soft">The data was prepared before; it was reused.</p>' if data and data.get("reused") else ""
    return bars(items, name="phase", figure="time") + note


def configuration(facts: Facts) -> list[str]:
    """The resolved configuration."""
    return [
        "<h2>Configuration</h2>",
        '<p class="soft">As it was run, every value resolved.</p>',
        f'<details><summary>Show it</summary><pre class="yaml">{escape(facts.yaml)}</pre></details>',
    ]
