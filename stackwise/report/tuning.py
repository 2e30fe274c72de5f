"""What a search came to: its result as plain data, its page (`tune.html`), and the best configuration as YAML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stackwise import durable, words
from stackwise.config.tune import Interval, same
from stackwise.config.yaml_files import dump
from stackwise.pipeline.batch.grid import label, shown
from stackwise.pipeline.search.record import Trial
from stackwise.pipeline.search.space import Searched
from stackwise.pipeline.search.study import Study
from stackwise.report.html import Bar, Html, bars, colour, data_table, join, soft, tag
from stackwise.report.page import document
from stackwise.text import printable

WIDTH, HEIGHT, TOP, BASE = 860, 300, 34, 262
"""Of the parallel coordinates, and between which heights their axes stand."""


def result(study: Study) -> dict[str, Any]:
    """A search as plain data.

    Returns:
        `{"best": {"value", "settings", "run"} (None: no trial came to a value), "trials": [{"number", "state",
        "value", "settings", "run", "stages_trained", "stages_reused", "values", "failure"}], "front": numbers of the
        trials that none beats in all objectives, "sharing": {"trained", "stages"}, "importance": {key: share}}`.
        `value` is that of the first objective, `values` are those of all, by name.
    """
    names = list(study.search.objectives)

    def entry(trial: Trial) -> dict[str, Any]:
        values = None if trial.values is None else dict(zip(names, trial.values, strict=True))
        return {
            "number": trial.number,
            "state": trial.state,
            "value": trial.values[0] if trial.values else None,
            "settings": trial.settings,
            "run": str(study.run_directory(trial).path),
            "stages_trained": trial.trained,
            "stages_reused": trial.reused,
            "values": values,
            "failure": trial.failure,
        }

    best = study.best
    chosen = None if best is None else {key: entry(best)[key] for key in ("value", "settings", "run")}
    trained, reused = (sum(getattr(trial, name) for trial in study.trials) for name in ("trained", "reused"))
    return {
        "best": chosen,
        "trials": [entry(trial) for trial in study.trials],
        "front": [trial.number for trial in study.front],
        "sharing": {"trained": trained, "stages": trained + reused},
        "importance": study.importance(),
    }


def write(study: Study) -> Path:
    """Write `tune.json`, `tune.html` and, where there is one, the best configuration `best.yaml`; returns the page.

    Raises:
        NoSpaceError: The disk is full.
    """
    if study.best is not None:
        durable.write_bytes(study.directory / "best.yaml", dump(study.config(study.best)).encode())
    durable.write_json(study.directory / "tune.json", result(study))
    page = study.directory / "tune.html"
    durable.write_bytes(page, printable(_page(study), lines=True).encode())
    return page


def _page(study: Study) -> str:
    value = result(study)
    sections = [_header(study, value), _coordinates(study), _importance(value), _front(study), _table(study)]
    return document(f"{study.directory.name} – StackWise", sections)


def _header(study: Study, value: dict[str, Any]) -> Html:
    names, best, sharing = list(study.search.objectives), study.best, value["sharing"]
    sampler = study.record.search["sampler"]
    how = ", ".join(f"{key} {shown(entry)}" for key, entry in sampler.items())
    states = [trial.state for trial in study.trials]
    keys = []
    if best is not None and best.values:
        settings = ", ".join(f"{label(key)} {shown(entry)}" for key, entry in best.settings.items())
        keys.append((f"best {names[0]}", f"{best.values[0]:.4f}", f"trial {best.number}: {settings}"))
    counts = ", ".join(f"{states.count(entry)} {entry}" for entry in dict.fromkeys(states))
    keys.append(("trials", f"{len(states)} of {study.search.trials}", counts))
    if sharing["trained"]:
        factor = f"{sharing['stages'] / sharing['trained']:.1f}×"
        keys.append(("fewer stage trainings", factor, f"{sharing['trained']} for {sharing['stages']} stages"))
    cells = [tag("div", tag("dt", name), tag("dd", figure, tag("small", more))) for name, figure, more in keys]
    return tag("header", tag("h1", study.directory.name), soft(f"a search: {how}"), tag("dl", cells, cls="keys"))


def _importance(value: dict[str, Any]) -> Html:
    if not value["importance"]:
        return join([])
    items = [Bar(label(key), share, words.percent(share)) for key, share in value["importance"].items()]
    about = soft("How much of the difference between good trials and others each key makes (PED-ANOVA, 2304.10255).")
    return tag("section", tag("h2", "Which key matters"), bars(items, name="key", figure="importance"), about)


def _front(study: Study) -> Html:
    names = list(study.search.objectives)
    if len(names) < 2:
        return join([])
    rows = [("", [str(t.number), *(f"{value:.6g}" for value in t.values or [])]) for t in study.front]
    about = soft("Trials that no other one is better than in one objective and as good in all.")
    return tag("section", tag("h2", "Pareto front"), data_table(["trial", *names], rows), about)


def _table(study: Study) -> Html:
    names = list(study.search.objectives)
    keys = list(dict.fromkeys(key for trial in study.trials for key in trial.settings))
    rows = []
    for trial in sorted(study.trials, key=lambda one: (one.values is None, one.values or [])):
        values = [f"{value:.6g}" for value in trial.values or []] or [""] * len(names)
        settings = [shown(trial.settings[key]) if key in trial.settings else "" for key in keys]
        state = trial.state if trial.failure is None else f"{trial.state}: {trial.failure.splitlines()[0]}"
        cells = [str(trial.number), *values, *settings, state, str(trial.trained), str(trial.reused)]
        rows.append(("best" if trial is study.best else "", cells))
    columns = ["trial", *names, *map(label, keys), "state", "trained", "reused"]
    return tag("section", tag("h2", "Trials"), data_table(columns, rows, text=(0, len(names) + len(keys) + 1)))


def _coordinates(study: Study) -> Html:
    """Each trial as a line through its settings to its value; the best ones stand out by their colour."""
    done = [trial for trial in study.trials if trial.values is not None]
    if len(done) < 2:
        return join([])
    keys = [
        searched
        for searched in study.search.sampling.space.keys
        if any(searched.key in trial.settings for trial in done)
    ]
    if not keys:  # those of a population differ from stage to stage
        return join([])
    values = [trial.values[0] for trial in done if trial.values]
    low, high = min(values), max(values)
    name = next(iter(study.search.objectives))
    gap = (WIDTH - 120) / len(keys)
    parts: list[Html] = []
    for trial, value in sorted(zip(done, values, strict=True), key=lambda pair: -pair[1]):
        heights = [
            _height(searched, trial.settings[searched.key]) if searched.key in trial.settings else None
            for searched in keys
        ]
        heights.append((value - low) / (high - low) if high > low else 0.5)
        at = [
            f"{60 + number * gap:.1f},{BASE - (BASE - TOP) * height:.1f}"
            for number, height in enumerate(heights)
            if height is not None  # where a key is not searched, the line passes its axis by
        ]
        hint = "\n".join(
            [f"trial {trial.number}: {value:.4f}", *(f"{k}: {shown(v)}" for k, v in trial.settings.items())]
        )
        share = heights[-1] or 0.0
        parts.append(tag("polyline", cls="line", style=colour(share), points=" ".join(at), data_tip=hint))
    for number, (title, bottom, top) in enumerate([*map(_axis, keys), (name, f"{low:.4g}", f"{high:.4g}")]):
        x = round(60 + number * gap, 1)
        parts.append(tag("line", cls="axis", x1=x, x2=x, y1=TOP, y2=BASE))
        for text, y, kind in ((title, 12, "name"), (top, 28, "tick"), (bottom, BASE + 16, "tick")):
            parts.append(tag("text", text, cls=kind, x=x, y=y, text_anchor="middle"))
    drawing = tag("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label="parallel coordinates")
    return tag("section", tag("h2", "Settings and what they came to"), drawing)


def _height(one: Searched, value: Any) -> float:
    """Where a value stands on its key's axis, from 0 to 1."""
    import math

    range_ = one.range
    if not isinstance(range_, Interval):
        choices: Sequence[Any] = range_.values
        return next(number for number, choice in enumerate(choices) if same(choice, value)) / (len(choices) - 1)
    low, high, at = (math.log(x) if range_.log else x for x in (range_.low, range_.high, value))
    return float((at - low) / (high - low))


def _axis(one: Searched) -> tuple[str, str, str]:
    ends = one.range.ends
    return label(one.key), shown(ends[0]), shown(ends[-1])
