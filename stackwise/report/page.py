"""The page: its head, the key figures, and its sections: held-out text, training, disk and time, configuration."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from stackwise import words
from stackwise.report.charts import (
    Bar,
    Line,
    Points,
    bars,
    hue_of,
    line_chart,
    padded_range,
    scroll,
    settled_range,
    smooth,
    thin,
)
from stackwise.report.facts import BoundaryFacts, Facts, StageFacts
from stackwise.report.held_out import baselines_of, depth_name, footnote, rows, scored, stages_of
from stackwise.version import __version__

_HERE = Path(__file__).parent


def page(facts: Facts) -> str:
    """The whole report as HTML that needs nothing beside it."""
    body = "\n".join(
        [
            _header(facts),
            *_held_out(facts),
            *_training(facts),
            *_passage(facts),
            *_storage(facts),
            *_configuration(facts),
        ]
    )
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    script = (_HERE / "script.js").read_text(encoding="utf-8")
    # The policy makes the promise hold: nothing is fetched from anywhere.
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )
    now = time.strftime("%Y-%m-%d %H:%M")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(facts.name)} – StackWise</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
<footer>Written by StackWise {__version__} on {now}. This file needs nothing beside it.</footer>
</main>
<div id="tip" hidden></div>
<script>
{script}</script>
</body>
</html>
"""


def _header(facts: Facts) -> str:
    config, model = facts.config, facts.config.model
    device = facts.history.device or {}
    place = f"{device['name']}, {device.get('precision', config.precision)}" if device else config.device
    stages = words.plural(config.n_stages, "stage")
    stages += f" and {words.plural(config.windows, 'window')}" if config.windows > 1 else ""
    blocks = f"{words.plural(model.n_blocks, 'block')} of width {model.d_model}"
    objective = config.objective.name.replace("_", " ")
    objective += ", then causal" if config.adapts else ""
    rack = f"{blocks}, {words.count(_parameters(facts))} parameters, in {stages} ({_mode(facts)}, {objective})"
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(facts.history.begun)) if facts.history.begun else "not begun"
    return f"""<header>
<h1>{escape(facts.name)}</h1>
<p><span class="state {facts.state}">{facts.state}</span> <span class="soft">· {escape(rack)}</span></p>
<p class="soft">{when} · {escape(place)} · <span class="mono">{escape(facts.path)}</span></p>
{_alerts(facts)}<dl class="keys">
{_keys(facts)}
</dl>
</header>"""


def _mode(facts: Facts) -> str:
    training = facts.config.training
    return "progressive" if training.progressive.enabled else training.mode.replace("_", " ")


def _alerts(facts: Facts) -> str:
    """What a reader must know first: a failure, an interruption, warnings."""
    alerts = []
    if facts.state == "failed" and facts.history.failure:
        alerts.append(("alert bad", f"The run failed: {facts.history.failure}"))
    elif facts.state == "interrupted":
        alerts.append(("alert", "The run was interrupted; the same command resumes from its last checkpoint."))
    alerts += [("alert", text) for text in dict.fromkeys(facts.history.warnings[-3:])]
    return "".join(f'<p class="{kind}">{escape(text)}</p>\n' for kind, text in alerts)


def _keys(facts: Facts) -> str:
    keys: list[tuple[str, str, str]] = []
    result = facts.evaluation
    if result is not None and result.get("bits_per_byte") is not None:
        error = result.get("bits_per_byte_error")
        baseline = (result.get("baselines", {}).get("unigram") or {}).get("bits_per_byte")
        beside = f"unigram {baseline:.3f}" if baseline is not None else ""
        keys.append(
            ("bits per byte, held out", f"{result['bits_per_byte']:.3f}", beside or (f"± {error:.3f}" if error else ""))
        )
    if result is not None and scored(result):
        shares = sorted(share for share, loss in result["loss"].items() if loss is not None)
        middle = shares[len(shares) // 2]
        right = (result.get("accuracy") or {}).get(middle)
        beside = f"{100 * right:.1f}% of tokens right" if right is not None else ""
        keys.append((f"loss at {words.fraction(middle)} masked", f"{result['loss'][middle]:.3f}", beside))
    done = sum(stage.state == "done" for stage in facts.stages)
    steps = sum(stage.step for stage in facts.stages)
    keys.append(("stages done", f"{done} of {len(facts.stages) or facts.config.n_stages}", f"{steps:,} steps"))
    tokens = sum(stage.tokens or 0 for stage in facts.stages)
    speeds = [stage.tokens_per_second for stage in facts.stages if stage.tokens_per_second]
    if tokens and speeds:
        keys.append(("tokens trained on", words.count(tokens), f"{words.count(sum(speeds) / len(speeds))} a second"))
    total = sum(facts.history.phases.values())
    if total:
        sittings = facts.history.sittings
        keys.append(("time", words.duration(total), f"in {words.plural(sittings, 'sitting')}" if sittings > 1 else ""))
    memory = [stage.peak_memory_bytes for stage in facts.stages if stage.peak_memory_bytes]
    if memory:
        keys.append(("peak memory of a stage", words.size(max(memory)), ""))
    return "\n".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(figure)}<small>{escape(more)}</small></dd></div>"
        for name, figure, more in keys
    )


def _parameters(facts: Facts) -> int:
    """Parameters of the rack: front, blocks, head."""
    model, vocabulary = facts.config.model, facts.vocabulary or facts.config.model.vocab_size or 0
    ends = model.front_parameters(vocabulary, facts.config.training.seq_len)
    ends += model.head_parameters(vocabulary, shared=model.tie_embeddings)
    return model.n_blocks * model.block_parameters + ends


TEXT = ' class="text"'
MANY = 16
"""Of more stages than this, bits per byte is drawn as a line."""
HOLES = re.compile(r"(?:\[MASK\])+")
MADE = ("filled", "right", "wrong")
"""Kinds of text that the rack made."""


def _held_out(facts: Facts) -> list[str]:
    """Held-out figures; nothing where there is no evaluation."""
    result = facts.evaluation
    if result is None or not scored(result):
        return []
    stages = stages_of(result)
    return [
        "<h2>On held-out text</h2>",
        f'<p class="soft">No stage was trained on it: {escape(footnote(result))}.</p>',
        '<div class="pair">',
        f"<section><h3>Loss by depth, at each masked share</h3>{_losses(stages)}</section>",
        f"<section><h3>Bits per byte by depth</h3>{_bits(result, stages)}</section>",
        "</div>",
        _held_out_table(result),
    ]


def _losses(stages: list[Mapping[str, Any]]) -> str:
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
        y_range=padded_range(min(values), max(values)),
        x_ticks=[float(i) for i in range(len(stages))],
        half=True,
    )


def _bits(result: dict[str, Any], stages: list[Mapping[str, Any]]) -> str:
    known = [(i, s["bits_per_byte"]) for i, s in enumerate(stages) if s.get("bits_per_byte") is not None]
    baselines = {
        name: figures["bits_per_byte"]
        for name, figures in baselines_of(result).items()
        if figures.get("bits_per_byte") is not None
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
            y_range=padded_range(min(values), max(values)),
            x_ticks=[float(i) for i, _ in known],
            half=True,
        )
    items = [Bar(name, y, f"{y:.3f}") for name, y in baselines.items()]
    items += [
        Bar(depth_name(i, len(stages)), y, f"{y:.3f}", hue=hue_of(i, len(stages)), hint=_gain(y, baselines))
        for i, y in known
    ]
    return bars(items, name="depth", figure="bits per byte")


def _gain(bits: float, baselines: Mapping[str, float]) -> str:
    return "\n".join(f"{100 * (1 - bits / y):+.1f}% below {name}" for name, y in baselines.items() if y)


def _held_out_table(result: Mapping[str, Any]) -> str:
    columns, depths = rows(result)
    return data_table(
        ["depth", *columns],
        [
            f'<tr class="{kind}"><th scope="row" class="text">{escape(name)}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
            for name, cells, kind in depths
        ],
    )


def data_table(columns: list[str], lines: list[str], text: tuple[int, ...] = (0,)) -> str:
    """A table of rows that are HTML; the columns numbered in `text` hold words, the others figures."""
    head = "".join(f"<th{TEXT * (n in text)}>{escape(name)}</th>" for n, name in enumerate(columns))
    return scroll(
        f'<table class="data"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>', len(lines)
    )


def _passage(facts: Facts) -> list[str]:
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


RAW, SMOOTHED = 300, 160
"""Points kept of a stage's raw and smoothed losses."""


def _training(facts: Facts) -> list[str]:
    """Loss by stage and step, and what each stage did."""
    if not facts.stages:
        return ["<h2>Training</h2>", '<p class="soft">No stage has begun yet.</p>']
    return ["<h2>Training</h2>", *_curves(facts), _stages(facts), *_fusions(facts)]


def _curves(facts: Facts) -> list[str]:
    curves, evaluated, depths = _by_depth(facts.stages)
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
        Line(f"held out {depth}", evaluated[depth], hue_of(depth, depths), faint=[], dashed=True)
        for depth in curves
        if evaluated[depth]
    ]
    held_out = " Dashed: the mean loss on held-out rows." if any(evaluated[depth] for depth in curves) else ""
    return [
        '<p class="soft">Loss in nats on the rows of each stage, by its step; the line is a running mean. The first '
        f"steps may lie above the frame.{held_out}</p>",
        "<figure style='margin:8px 0'>",
        line_chart(
            lines,
            title="Loss by stage and step",
            x_label="step",
            y_label="nats",
            y_range=settled_range(lines),
        ),
        "</figure>",
    ]


def _by_depth(stages: list[StageFacts]) -> tuple[dict[int, Points], dict[int, Points], int]:
    """Losses and held-out losses of each depth that has some, window after window, and how many depths there are."""
    curves: dict[int, Points] = {}
    evaluated: dict[int, Points] = {}
    before: dict[int, int] = {}
    for stage in stages:
        first = before.get(stage.depth, 0)
        curves.setdefault(stage.depth, []).extend((first + step, loss) for step, loss in stage.curve)
        evaluated.setdefault(stage.depth, []).extend((first + step, loss) for step, loss in stage.held_out)
        before[stage.depth] = first + stage.steps
    return {depth: curve for depth, curve in curves.items() if len(curve) > 1}, evaluated, len(before)


def _stages(facts: Facts) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("steps", "loss", "tokens/s", "waiting", "peak memory", "time"))
    several = any(stage.window for stage in facts.stages)
    rows = "".join(_stage_row(stage, several) for stage in facts.stages)
    return scroll(
        '<table class="data"><thead><tr><th class="text">stage</th><th class="text">blocks</th>'
        f'<th class="text">state</th>{head}<th class="text">recipe</th><th class="text">why</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>",
        len(facts.stages),
    ) + ('<p class="soft">“Waiting” is the share of its training that a stage waited for data.</p>')


def _stage_row(stage: StageFacts, several: bool) -> str:
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
        for number, outcome in enumerate((stage.fusion or {}).get("rounds", []), 1):
            gains = "".join(
                f'<tr class="{"last" if probe["blocks"] == outcome["chosen"] else ""}"><th scope="row" class="text">'
                f"{words.span(*probe['blocks'])}</th><td>{probe['nats']:.4f}</td><td>{probe['gain']:+.4f}</td></tr>"
                for probe in outcome["probes"]
            )
            done = f"blocks {words.span(*outcome['chosen'])}, then {outcome['nats']:.4f}"
            done += "" if outcome["kept"] else ", not kept"
            shown.append(
                f"<h3>Stage {stage.depth}, round {number}: {done}</h3>"
                '<table class="data"><thead><tr><th class="text">unfrozen</th><th>held-out loss</th><th>gain</th>'
                f"</tr></thead><tbody>{gains}</tbody></table>"
            )
    return shown


def _storage(facts: Facts) -> list[str]:
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


def _configuration(facts: Facts) -> list[str]:
    """The resolved configuration."""
    return [
        "<h2>Configuration</h2>",
        '<p class="soft">As it was run, every value resolved.</p>',
        f'<details><summary>Show it</summary><pre class="yaml">{escape(facts.yaml)}</pre></details>',
    ]
