"""The section on training: loss by stage and step, and a table of the stages."""

from __future__ import annotations

from html import escape

from stackwise.report import words
from stackwise.report.charts import Line, hue_of, line_chart, scroll
from stackwise.report.collect import Facts, StageFacts
from stackwise.report.curves import Points, smooth, thin

RAW, SMOOTHED = 300, 160
"""Points kept of a stage's raw and smoothed losses."""
SETTLED = 0.15
"""Share of a stage's steps after which its loss has come into the picture."""


def section(facts: Facts) -> list[str]:
    """Loss by stage and step, and what each stage did."""
    if not facts.stages:
        return ["<h2>Training</h2>", '<p class="soft">No stage has begun yet.</p>']
    return ["<h2>Training</h2>", *_curves(facts), _table(facts), *_fusions(facts)]


def _curves(facts: Facts) -> list[str]:
    drawn = [stage for stage in facts.stages if len(stage.curve) > 1]
    if not drawn:
        return []
    lines = []
    for stage in drawn:
        smoothed = smooth(stage.curve, max(5.0, len(stage.curve) / 10))
        lines.append(
            Line(
                f"stage {stage.depth}",
                thin(smoothed, SMOOTHED),
                hue_of(stage.depth, len(facts.stages)),
                faint=thin(stage.curve, RAW),
            )
        )
    for stage in drawn:
        if stage.held_out:
            hue = hue_of(stage.depth, len(facts.stages))
            lines.append(Line(f"held out {stage.depth}", stage.held_out, hue, faint=[], dashed=True))
    held_out = " Dashed: the mean loss on held-out rows." if any(stage.held_out for stage in drawn) else ""
    return [
        '<p class="soft">Loss in nats on the rows of each stage, by its step; the line is a running mean. The first '
        f"steps may lie above the frame.{held_out}</p>",
        "<figure style='margin:8px 0'>",
        line_chart(
            lines,
            title="Loss by stage and step",
            x_label="step",
            y_label="nats",
            y_range=_range(lines),
        ),
        "</figure>",
    ]


def _range(lines: list[Line]) -> tuple[float, float]:
    """Where the settled parts of the curves lie, with room for most of their noise."""
    settled: Points = []
    for line in lines:
        settled += line.points[int(SETTLED * len(line.points)) :]
    noise = sorted(y for line in lines for _, y in (line.faint or [])[int(0.2 * len(line.faint or [])) :])
    low, high = min(y for _, y in settled), max(y for _, y in settled)
    low = min(low, noise[len(noise) // 20]) if noise else low
    room = 0.06 * (high - low) or 0.1
    return max(0.0, low - room), high + room


def _table(facts: Facts) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("steps", "loss", "tokens/s", "waiting", "peak memory", "time"))
    rows = "".join(_row(stage) for stage in facts.stages)
    return scroll(
        '<table class="data"><thead><tr><th class="text">stage</th><th class="text">blocks</th>'
        f'<th class="text">state</th>{head}<th class="text">recipe</th><th class="text">why</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>",
        len(facts.stages),
    ) + ('<p class="soft">“Waiting” is the share of its training that a stage waited for data.</p>')


def _row(stage: StageFacts) -> str:
    recipe = f'<span class="mono" data-tip="{_ids(stage)}">{escape(stage.recipe[:8])}</span>' if stage.recipe else "–"
    figures = [
        f"{stage.step:,}/{stage.steps:,}" if stage.step != stage.steps else f"{stage.steps:,}",
        f"{stage.loss:.3f}" if stage.loss is not None else "–",
        words.count(stage.tokens_per_second) if stage.tokens_per_second else "–",
        words.percent(stage.wait_fraction) if stage.wait_fraction is not None else "–",
        words.size(stage.peak_memory_bytes) if stage.peak_memory_bytes else "–",
        words.duration(stage.seconds) if stage.seconds else "–",
    ]
    return (
        f'<tr><th scope="row" class="text">{stage.depth}</th><td class="text">{words.span(*stage.blocks)}</td>'
        f'<td class="text"><span class="state {escape(stage.state)}">{escape(stage.state)}</span></td>'
        f"{''.join(f'<td>{cell}</td>' for cell in figures)}"
        f'<td class="text">{recipe}</td><td class="text why">{escape(stage.reason or "")}</td></tr>'
    )


def _ids(stage: StageFacts) -> str:
    named = (("recipe", stage.recipe), ("reads trunk", stage.trunk or "tokens"), ("weights", stage.weights))
    return escape("\n".join(f"{name} {value}" for name, value in named if value))


def _fusions(facts: Facts) -> list[str]:
    """What adaptive fusion found out: the gain of each section in each round, and which was trained."""
    shown = []
    for stage in facts.stages:
        for number, each in enumerate((stage.fusion or {}).get("rounds", []), 1):
            gains = "".join(
                f'<tr class="{"last" if probe["blocks"] == each["chosen"] else ""}"><th scope="row" class="text">'
                f"{words.span(*probe['blocks'])}</th><td>{probe['nats']:.4f}</td><td>{probe['gain']:+.4f}</td></tr>"
                for probe in each["probes"]
            )
            done = (
                f"blocks {words.span(*each['chosen'])}, then {each['nats']:.4f}" if each["chosen"] else "none: no gain"
            )
            shown.append(
                f"<h3>Stage {stage.depth}, round {number}: {done}</h3>"
                '<table class="data"><thead><tr><th class="text">unfrozen</th><th>held-out loss</th><th>gain</th>'
                f"</tr></thead><tbody>{gains}</tbody></table>"
            )
    return shown
