"""The page: its head, the key figures, the sections in order."""

from __future__ import annotations

import time
from html import escape
from pathlib import Path

from stackwise.report import held_out, storage, training, words
from stackwise.report.collect import Facts
from stackwise.version import __version__

_HERE = Path(__file__).parent


def page(facts: Facts) -> str:
    """The whole report as HTML that needs nothing beside it."""
    body = "\n".join(
        [
            _header(facts),
            *held_out.section(facts),
            *training.section(facts),
            *held_out.passage(facts),
            *storage.section(facts),
            *storage.configuration(facts),
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
    objective = config.objective.replace("_", " ")
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
    found = []
    if facts.state == "failed" and facts.history.failure:
        found.append(("alert bad", f"The run failed: {facts.history.failure}"))
    elif facts.state == "interrupted":
        found.append(("alert", "The run was interrupted; the same command goes on from its last checkpoint."))
    found += [("alert", text) for text in dict.fromkeys(facts.history.warnings[-3:])]
    return "".join(f'<p class="{kind}">{escape(text)}</p>\n' for kind, text in found)


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
    if result is not None and result.get("loss"):
        middle = sorted(result["loss"])[len(result["loss"]) // 2]
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
    """Parameters of the rack: blocks, embedding, positions, head, final norm."""
    model, config = facts.config.model, facts.config
    vocabulary = facts.vocabulary or model.vocab_size or 0
    ends = vocabulary * model.d_model * (1 if model.tie_embeddings else 2) + model.d_model
    positions = (model.max_seq_len or config.training.seq_len) * model.d_model if model.positions == "learned" else 0
    return model.n_blocks * model.block_parameters + ends + positions
