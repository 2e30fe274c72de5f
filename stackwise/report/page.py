"""The page: its head, the key figures, and its sections: held-out text, training, disk and time, configuration."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stackwise import words
from stackwise.config.yaml_files import dump
from stackwise.report.charts import Axes, Line, Points, line_chart, padded_range, settled_range, smooth, thin
from stackwise.report.facts import BoundaryFacts, Facts, StageFacts
from stackwise.report.held_out import baselines_of, depth_name, footnote, rows, scored, stages_of
from stackwise.report.html import Bar, Html, bars, data_table, hue_of, join, soft, tag
from stackwise.version import __version__

_HERE = Path(__file__).parent
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)
"""It makes the promise hold: nothing is fetched from anywhere."""
RAW, SMOOTHED = 300, 160
"""Points kept of a stage's raw and smoothed losses."""
MANY = 16
"""Of more stages than this, bits per byte is drawn as a line."""
HOLES = re.compile(r"((?:\[MASK\])+)")
MADE = ("filled", "right", "wrong")
"""Kinds of text that the rack made."""


def page(facts: Facts) -> str:
    """The whole report as HTML that needs nothing beside it."""
    sections = (_header, _held_out, _training, _passage, _storage, _configuration)
    return document(f"{facts.config.name} – StackWise", [section(facts) for section in sections])


def document(title: str, content: Any) -> str:
    """A page of some content, with its style and its script in it."""
    now = time.strftime("%Y-%m-%d %H:%M")
    footer = f"Written by StackWise {__version__} on {now}. This file needs nothing beside it."
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
{tag("title", title)}
<style>
{(_HERE / "style.css").read_text(encoding="utf-8")}</style>
</head>
<body>
{tag("main", content, tag("footer", footer))}
<div id="tip" hidden></div>
<script>
{(_HERE / "script.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _pair(*parts: tuple[str, Any]) -> Html:
    """Sections side by side where there is room, each under its heading."""
    return tag("div", [tag("section", tag("h3", name), content) for name, content in parts], cls="pair")


def _header(facts: Facts) -> Html:
    config, model = facts.config, facts.config.model
    device = facts.history.device or {}
    place = f"{device['name']}, {device.get('precision', config.precision)}" if device else config.device
    stages = words.plural(config.n_stages, "stage")
    stages += f" and {words.plural(config.windows, 'window')}" if config.windows > 1 else ""
    blocks = f"{words.plural(model.n_blocks, 'block')} of width {model.d_model}"
    objective = config.objective.name.replace("_", " ") + (", then causal" if config.adapts else "")
    mode = config.training.plan.name.replace("_", " ")
    rack = f"{blocks}, {words.count(_parameters(facts))} parameters, in {stages} ({mode}, {objective})"
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(facts.history.begun)) if facts.history.begun else "not begun"
    keys = [
        tag("div", tag("dt", name), tag("dd", figure, tag("small", more))) for name, figure, more in _key_figures(facts)
    ]
    return tag(
        "header",
        tag("h1", facts.config.name),
        tag("p", tag("span", facts.state, cls=f"state {facts.state}"), " ", tag("span", f"· {rack}", cls="soft")),
        soft(f"{when} · {place} · ", tag("span", facts.path, cls="mono")),
        _alerts(facts),
        tag("dl", keys, cls="keys"),
    )


def _alerts(facts: Facts) -> Iterator[Html]:
    """What a reader must know first: a failure, an interruption, warnings."""
    if facts.state == "failed" and facts.history.failure:
        yield tag("p", f"The run failed: {facts.history.failure}", cls="alert bad")
    elif facts.state == "interrupted":
        yield tag("p", "The run was interrupted; the same command resumes from its last checkpoint.", cls="alert")
    for text in dict.fromkeys(facts.history.warnings[-3:]):  # a warning may come at every step
        yield tag("p", text, cls="alert")


def _key_figures(facts: Facts) -> Iterator[tuple[str, str, str]]:
    """The figures at the top: what each is, itself, and what stands beside it."""
    result, stages = facts.evaluation or {}, facts.stages
    if result.get("bits_per_byte") is not None:
        unigram = (result.get("baselines", {}).get("unigram") or {}).get("bits_per_byte")
        error = result.get("bits_per_byte_error")
        beside = f"unigram {unigram:.3f}" if unigram is not None else f"± {error:.3f}" if error else ""
        yield "bits per byte, held out", f"{result['bits_per_byte']:.3f}", beside
    if scored(result):
        shares = sorted(share for share, loss in result["loss"].items() if loss is not None)
        middle = shares[len(shares) // 2]  # a share in the middle says most of the rack in one figure
        right = (result.get("accuracy") or {}).get(middle)
        beside = f"{100 * right:.1f}% of tokens right" if right is not None else ""
        yield f"loss at {words.fraction(middle)} masked", f"{result['loss'][middle]:.3f}", beside
    for name, value in (result.get("figures") or {}).items():
        if value is not None:
            yield f"{name}, held out", f"{value:.4g}", ""
    done = sum(stage.state == "done" for stage in stages)
    steps = sum(stage.step for stage in stages)
    yield "stages done", f"{done} of {len(stages) or facts.config.n_stages}", f"{steps:,} steps"
    tokens = sum(stage.tokens or 0 for stage in stages)
    # A stage that was reused has a speed, too.
    speeds = [stage.tokens_per_second for stage in stages if stage.tokens_per_second]
    if tokens and speeds:
        yield "tokens trained on", words.count(tokens), f"{words.count(sum(speeds) / len(speeds))} a second"
    if total := sum(facts.history.phases.values()):
        sittings = facts.history.sittings
        yield "time", words.duration(total), f"in {words.plural(sittings, 'sitting')}" if sittings > 1 else ""
    if memory := [stage.peak_memory_bytes for stage in stages if stage.peak_memory_bytes]:
        yield "peak memory of a stage", words.size(max(memory)), ""


def _parameters(facts: Facts) -> int:
    """Parameters of the rack: front, blocks, head."""
    model, vocabulary = facts.config.model, facts.vocabulary or facts.config.model.vocab_size or 0
    ends = model.front_parameters(vocabulary, facts.config.training.seq_len)
    ends += model.head_parameters(vocabulary, shared=model.tie_embeddings)
    return model.total(lambda block: block.block_parameters) + ends


def _held_out(facts: Facts) -> list[Html]:
    """Held-out figures; nothing where there is no evaluation."""
    result = facts.evaluation
    if result is None or not (scored(result) or result.get("figures")):
        return []
    if result.get("figures"):
        columns, depths = rows(result)
        figures = data_table(["", *columns], [(kind, [name, *cells]) for name, cells, kind in depths])
        return [tag("h2", "Held out"), soft(f"No stage was trained on it: {footnote(result)}."), figures]
    stages = stages_of(result)
    columns, depths = rows(result)
    return [
        tag("h2", "On held-out text"),
        soft(f"No stage was trained on it: {footnote(result)}."),
        _pair(("Loss by depth, at each masked share", _losses(stages)), ("Bits per byte by depth", _bits(result))),
        data_table(["depth", *columns], [(kind, [name, *cells]) for name, cells, kind in depths]),
    ]


def _losses(stages: Sequence[Mapping[str, Any]]) -> Html:
    fractions = [key for key, loss in stages[-1]["loss"].items() if loss is not None]
    lines = []
    for number, key in enumerate(fractions):
        losses = [(float(i), stage["loss"].get(key)) for i, stage in enumerate(stages) if stage.get("loss")]
        points = [(i, loss) for i, loss in losses if loss is not None]
        lines.append(Line(words.fraction(key), points, hue_of(number, len(fractions)), marked=True))
    depths = [float(i) for i in range(len(stages))]
    return line_chart(
        lines, Axes("Held-out loss by depth", "stage", "nats", padded_range(lines), x_ticks=depths), half=True
    )


def _bits(result: Mapping[str, Any]) -> Html:
    stages = stages_of(result)
    measured = [(i, stage["bits_per_byte"]) for i, stage in enumerate(stages) if stage.get("bits_per_byte") is not None]
    named = {name: figures.get("bits_per_byte") for name, figures in baselines_of(result).items()}
    baselines = {name: bits for name, bits in named.items() if bits is not None}
    if not measured:  # bits a byte need the bytes of the text
        return soft("not measured: the data says nothing of its bytes")
    if len(measured) > MANY:  # so many bars would be a page of their own
        depths = [float(i) for i, _ in measured]
        lines = [Line("", [(float(i), bits) for i, bits in measured], 0.0, marked=True)]
        for name, bits in baselines.items():
            lines.append(Line(name.split()[0], [(depths[0], bits), (depths[-1], bits)], None, dashed=True))
        return line_chart(
            lines, Axes("Bits per byte by depth", "stage", "bits per byte", padded_range(lines), depths), half=True
        )
    items = [Bar(name, bits, f"{bits:.3f}") for name, bits in baselines.items()]
    for i, bits in measured:
        gains = [f"{100 * (1 - bits / other):+.1f}% below {name}" for name, other in baselines.items() if other]
        hue, name = hue_of(i, len(stages)), depth_name(i, len(stages))
        items.append(Bar(name, bits, f"{bits:.3f}", hue=hue, hint="\n".join(gains)))
    return bars(items, name="depth", figure="bits per byte")


def _passage(facts: Facts) -> list[Html]:
    """A held-out passage with holes, and as the rack filled them."""
    fill = facts.history.fill
    if not fill or not fill.get("before"):  # the run was not evaluated, or has no passage
        return []
    spans = fill.get("spans") or [[fill.get("after", ""), "given"]]
    after = [tag("mark", text, cls=kind) if kind in MADE else text for text, kind in spans]
    legend = soft(
        "What the rack filled in: ",
        tag("mark", "as in the original", cls="right"),
        ", ",
        tag("mark", "otherwise", cls="wrong"),
        ".",
    )
    return [
        tag("h2", "A held-out passage, filled in"),
        legend if any(kind in ("right", "wrong") for _, kind in spans) else Html(),
        _pair(
            ("Before", tag("pre", holes_marked(fill["before"]), cls="passage")),
            ("After", tag("pre", after, cls="passage")),
        ),
    ]


def holes_marked(before: str) -> Html:
    """A text with holes as HTML: runs of holes are marked as one, with their count."""
    pieces: list[Any] = HOLES.split(before)
    for place in range(1, len(pieces), 2):  # every second piece is a run of holes
        count = pieces[place].count("[MASK]")
        pieces[place] = tag("mark", "▒" * count, cls="hole", data_tip=f"{words.plural(count, 'token')} masked")
    return join(pieces)


def _training(facts: Facts) -> list[Html]:
    """Loss by stage and step, and what each stage did."""
    if not facts.stages:
        return [tag("h2", "Training"), soft("No stage has begun yet.")]
    return [
        tag("h2", "Training"),
        *_curves(facts.stages),
        *_stages(facts.stages),
        *_tasks(facts.tasks),
        *_experts(facts.stages),
        *_adaptation(facts.stages),
        *_fusions(facts.stages),
    ]


def _curves(stages: Sequence[StageFacts]) -> list[Html]:
    """Losses of each depth, window after window, and those on held-out rows."""
    losses: dict[int, Points] = {}
    held_out: dict[int, Points] = {}
    before: dict[int, int] = {}
    for stage in stages:
        first = before.get(stage.depth, 0)
        losses.setdefault(stage.depth, []).extend((first + step, loss) for step, loss in stage.curve)
        held_out.setdefault(stage.depth, []).extend((first + step, loss) for step, loss in stage.held_out)
        before[stage.depth] = first + stage.steps  # the next window goes on where this one ended
    lines, dashed = [], []
    for depth, curve in losses.items():
        if len(curve) > 1:  # one point is no curve
            hue, smoothed = hue_of(depth, len(before)), thin(smooth(curve, max(5.0, len(curve) / 10)), SMOOTHED)
            lines.append(Line(f"stage {depth}", smoothed, hue, faint=thin(curve, RAW)))
            if held_out[depth]:
                dashed.append(Line(f"held out {depth}", held_out[depth], hue, faint=[], dashed=True))
    if not lines:
        return []
    lines += dashed
    axes = Axes("Loss by stage and step", "step", "nats", settled_range(lines))
    return [
        soft(
            "Loss in nats on the rows of each stage, by its step; the line is a running mean. The first steps may lie "
            "above the frame." + (" Dashed: the mean loss on held-out rows." if dashed else "")
        ),
        tag("figure", line_chart(lines, axes)),
    ]


def _stages(stages: Sequence[StageFacts]) -> list[Html]:
    several = any(stage.window for stage in stages)
    columns = ["stage", "blocks", "state", "steps", "loss", "tokens/s", "waiting", "peak memory", "time", "recipe"]
    lines = []
    for stage in stages:
        ids = (("recipe", stage.recipe), ("reads trunk", stage.trunk or "tokens"), ("weights", stage.weights))
        hint = "\n".join(f"{name} {value}" for name, value in ids if value)
        cells = [
            f"{stage.depth}, window {stage.window}" if several else str(stage.depth),
            words.span(*stage.blocks),
            tag("span", stage.state, cls=f"state {stage.state}"),
            f"{stage.step:,}/{stage.steps:,}" if stage.step != stage.steps else f"{stage.steps:,}",
            f"{stage.loss:.3f}" if stage.loss is not None else "–",
            words.count(stage.tokens_per_second) if stage.tokens_per_second else "–",
            words.percent(stage.wait_fraction) if stage.wait_fraction is not None else "–",
            words.size(stage.peak_memory_bytes) if stage.peak_memory_bytes else "–",
            words.duration(stage.seconds) if stage.seconds else "–",
            tag("span", stage.recipe[:8], cls="mono", data_tip=hint) if stage.recipe else "–",
            tag("div", stage.reason or "", cls="why"),
        ]
        lines.append(("", cells))
    return [
        data_table([*columns, "why"], lines, text=(0, 1, 2, 9, 10)),
        soft("“Waiting” is the share of its training that a stage waited for data."),
    ]


def _tasks(tasks: Mapping[str, Any] | None) -> list[Html]:
    """The held-out loss of each task, a line a task that was learned, and what they come to."""
    if tasks is None:
        return []
    names, losses = tasks["tasks"], tasks["losses"]
    learned = names if len(losses) > 1 else ["all tasks"]
    lines = [("", [name, *(f"{loss:.4f}" for loss in row)]) for name, row in zip(learned, losses, strict=False)]
    meanings = {
        "average_loss": "after the last one, the mean over all tasks",
        "forgetting": "what a task's loss has risen by since it was lowest, the mean over all but the last",
        "forward_transfer": "what a task's loss has fallen by before it was learned, the mean over all but the first",
    }
    rows = [
        f"{key.replace('_', ' ')} {tasks[key]:.4f}: {text}" for key, text in meanings.items() if tasks[key] is not None
    ]
    table = data_table(["held-out loss after", *names], lines, text=(0,))
    return [tag("h3", "Tasks"), table, soft("; ".join(rows) + ".")]


def _experts(stages: Sequence[StageFacts]) -> list[Html]:
    """How the experts of each block are used: a heat map of their shares, and what they come to."""
    used = {int(block): figures for stage in stages for block, figures in stage.experts.items()}
    if not used:
        return []
    lines = []
    for block, figures in sorted(used.items()):
        numbers = [words.percent(figures[key]) if key in figures else "–" for key in ("least", "most", "dropped")]
        entropy = f"{figures['entropy']:.3f}" if "entropy" in figures else "–"
        lines.append(("", [str(block), entropy, *numbers, _shares(figures.get("shares", []))]))
    text = (
        "Shares of all choices that the least and the most used expert of a block had; an entropy of 1: all were used "
        "alike. The map is of held-out rows, the darker the more."
    )
    table = data_table(["block", "entropy", "least", "most", "dropped", "experts"], lines, text=(0, 5))
    return [tag("h3", "Experts"), table, soft(text)]


def _adaptation(stages: Sequence[StageFacts]) -> list[Html]:
    """What inner steps make of the loss on tasks that were held out."""
    adapting = [stage for stage in stages if stage.adaptation]
    if not adapting:
        return []
    most = max(len(stage.adaptation) for stage in adapting)
    columns = ["stage", "before", *(f"step {step}" for step in range(1, most))]
    lines = [("", [str(stage.depth), *(f"{nats:.3f}" for nats in stage.adaptation)]) for stage in adapting]
    text = "Loss in nats on the query rows of tasks held out, before and after each step on their support rows."
    return [tag("h3", "Adaptation to tasks held out"), data_table(columns, lines, text=(0,)), soft(text)]


def _shares(shares: Sequence[float]) -> Html:
    """A row of the heat map: a cell for each expert."""
    if not shares:
        return tag("span", "–")
    side = max(2.0, min(18.0, 320.0 / len(shares)))
    highest = max(shares) or 1.0
    cells = []
    for number, share in enumerate(shares):
        shade, place, wide = f"{0.06 + 0.94 * share / highest:.3f}", f"{number * side:.1f}", f"{side - 0.5:.1f}"
        name = tag("title", f"expert {number}: {words.percent(share)}")
        cells.append(
            tag("rect", name, x=place, y="0", width=wide, height="18", fill="var(--accent)", fill_opacity=shade)
        )
    width = f"{side * len(shares):.0f}"
    return tag("svg", cells, width=width, height="18", viewBox=f"0 0 {width} 18", role="img")


def _fusions(stages: Sequence[StageFacts]) -> list[Html]:
    """What adaptive fusion found out: the gain of each section in each round, and which was trained."""
    shown = []
    for stage in stages:
        for number, outcome in enumerate((stage.fusion or {}).get("rounds", []), 1):
            gains = [
                (
                    "last" if probe["blocks"] == outcome["chosen"] else "",
                    [words.span(*probe["blocks"]), f"{probe['nats']:.4f}", f"{probe['gain']:+.4f}"],
                )
                for probe in outcome["probes"]
            ]
            done = f"blocks {words.span(*outcome['chosen'])}, then {outcome['nats']:.4f}"
            done += "" if outcome["kept"] else ", not kept"  # an update that gained nothing was taken back
            shown.append(tag("h3", f"Stage {stage.depth}, round {number}: {done}"))
            shown.append(data_table(["unfrozen", "held-out loss", "gain"], gains))
    return shown


def _storage(facts: Facts) -> list[Html]:
    """Bytes by boundary, and time by phase."""
    parts = []
    if facts.boundaries:
        items = [_boundary(item, len(facts.stages)) for item in facts.boundaries]
        parts.append(("Bytes by boundary", [bars(items, name="boundary", figure="bytes"), _store(facts)]))
    phases = facts.history.phases
    if total := sum(phases.values()):
        items = [
            Bar(name, seconds, words.duration(seconds), words.percent(seconds / total), hue=None if n == 4 else 0.0)
            for n, (name, seconds) in enumerate(phases.items())
            if seconds > 0
        ]
        reused = (facts.history.data or {}).get("reused")
        note = soft("The data was prepared before; it was reused.") if reused else Html()
        parts.append(("Time by phase", [bars(items, name="phase", figure="time"), note]))
    return [tag("h2", "Disk and time"), _pair(*parts)] if parts else []


def _boundary(item: BoundaryFacts, stages: int) -> Bar:
    hint = f"{item.id}\n{item.codec}, {item.state}"
    hint += f"\n{' × '.join(map(str, item.shape))}" if item.shape else ""
    more = item.codec if item.state == "complete" else f"{item.codec}, {item.state}"
    hue = None if item.state == "dropped" else hue_of(item.depth, stages)  # what is gone is grey
    return Bar(f"boundary {item.depth}", item.bytes, words.size(item.bytes), more, hue, hint)


def _store(facts: Facts) -> Html:
    if facts.store_bytes is None:
        return soft("The store could not be opened; these figures are from the log.")
    written = words.size(sum(item.bytes for item in facts.boundaries))
    there, weights = (words.size(facts.store_bytes[name]) for name in ("boundaries", "stages"))
    return soft(f"The run wrote {written} of activations. Its store holds {there} of them, and {weights} of weights.")


def _configuration(facts: Facts) -> list[Html]:
    """The resolved configuration."""
    return [
        tag("h2", "Configuration"),
        soft("As it was run, every value resolved."),
        tag("details", tag("summary", "Show it"), tag("pre", dump(facts.config), cls="yaml")),
    ]
