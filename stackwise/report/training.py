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
    curves, told, depths = _by_depth(facts.stages)
    if not curves:
        return []
    lines = [
        Line(
            f"stage {depth}",
            thin(smooth(curve, max(5.0, len(curve) / 10)), SMOOTHED),
            hue_of(depth, depths),
            faint=thin(curve, RAW),
        )
        for depth, curve in curves.items()
    ]
    lines += [
        Line(f"held out {depth}", told[depth], hue_of(depth, depths), faint=[], dashed=True)
        for depth in curves
        if told[depth]
    ]
    held_out = " Dashed: the mean loss on held-out rows." if any(told[depth] for depth in curves) else ""
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


def _by_depth(stages: list[StageFacts]) -> tuple[dict[int, Points], dict[int, Points], int]:
    """Losses and held-out losses of each depth that has some, window after window, and how many depths there are."""
    curves: dict[int, Points] = {}
    told: dict[int, Points] = {}
    before: dict[int, int] = {}
    for stage in stages:
        first = before.get(stage.depth, 0)
        curves.setdefault(stage.depth, []).extend((first + step, loss) for step, loss in stage.curve)
        told.setdefault(stage.depth, []).extend((first + step, loss) for step, loss in stage.held_out)
        before[stage.depth] = first + stage.steps
    return {depth: curve for depth, curve in curves.items() if len(curve) > 1}, told, len(before)


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
    several = any(stage.window for stage in facts.stages)
    rows = "".join(_row(stage, several) for stage in facts.stages)
    return scroll(
        '<table class="data"><thead><tr><th class="text">stage</th><th class="text">blocks</th>'
        f'<th class="text">state</th>{head}<th class="text">recipe</th><th class="text">why</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>",
        len(facts.stages),
    ) + ('<p class="soft">“Waiting” is the share of its training that a stage waited for data.</p>')


def _row(stage: StageFacts, several: bool) -> str:
    label = f"{stage.depth}, window {stage.window}" if several else str(stage.depth)
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
        f'<tr><th scope="row" class="text">{label}</th><td class="text">{words.span(*stage.blocks)}</td>'
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
            done = f"blocks {words.span(*each['chosen'])}, then {each['nats']:.4f}"
            done += "" if each["kept"] else ", not kept"
            shown.append(
                f"<h3>Stage {stage.depth}, round {number}: {done}</h3>"
                '<table class="data"><thead><tr><th class="text">unfrozen</th><th>held-out loss</th><th>gain</th>'
                f"</tr></thead><tbody>{gains}</tbody></table>"
            )
    return shown
