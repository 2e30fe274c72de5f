"""Runs side by side: the settings that differ, and the results of each. Reads files alone."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackwise import durable, words
from stackwise.config.loading import flat
from stackwise.errors import NotFound, StackWiseError
from stackwise.pipeline.batch.grid import label, shown
from stackwise.pipeline.run import RunDirectory, status
from stackwise.report.facts import read_history
from stackwise.report.groups import Measured, group_cells, groups
from stackwise.text import printable

PLACES = ("store.path", "data.cache_dir")
"""Keys that say only where things are."""


@dataclass(frozen=True)
class Entry:
    """A run to compare.

    Args:
        run: Its directory; it need not exist.
        name: What it is called; None: its directory.
        values: What is its own, by dotted key; None: whatever differs between the runs.
        failure: Why it ended, where its own log does not say.
    """

    run: RunDirectory
    name: str | None = None
    values: Mapping[str, Any] | None = None
    failure: str | None = None


def compare(entries: Sequence[Entry]) -> dict[str, Any]:
    """A table of runs as plain data.

    Returns:
        `{"keys", "runs": [{"name", "run", "state", "failure", "values", "loss", "bits_per_byte", "seconds", "trained",
        "reused"}], "groups"}`: `keys` are those that differ; `loss` is by stage, in nats; `trained` and `reused` count
        the stages that this run trained itself and those that it found in the store. `groups` are the evaluated runs
        that differ by no more than their seed (`groups.py`).

    Raises:
        NotFound: A run that was named is not there.
    """
    settings = [flat(entry.run.config()) if entry.values is None else None for entry in entries]
    whole = [config for config in settings if config is not None]
    differing = [
        key
        for key in dict.fromkeys(key for config in whole for key in config)
        if key not in PLACES and len({repr(_value(config, key)) for config in whole}) > 1
    ]
    keys = list(dict.fromkeys([*(key for entry in entries for key in entry.values or ()), *differing]))
    rows, measured = [], []
    for entry, config in zip(entries, settings, strict=True):
        values = entry.values or {} if config is None else {key: _value(config, key) for key in differing}
        row, samples = _row(entry, dict(values))
        rows.append(row)
        if samples is not None:
            measured.append(Measured(row["name"], values, samples))
    return {"keys": keys, "runs": rows, "groups": groups(measured)}


def _value(config: Mapping[str, Any], key: str) -> Any:
    """A setting; a stage's that is not its own is the default of all."""
    if key in config or not key.startswith("stages."):
        return config.get(key)
    return config.get(key.split(".", 2)[2])


def _row(entry: Entry, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A run's row, and its figures by held-out sample."""
    row: dict[str, Any] = {
        "name": entry.name or str(entry.run.path),
        "run": str(entry.run.path),
        "state": "failed" if entry.failure else "pending",
        "failure": entry.failure,
        "values": values,
        "loss": [],
        "bits_per_byte": None,
        "seconds": 0.0,
        "trained": 0,
        "reused": 0,
    }
    try:
        state = status(entry.run)
    except NotFound:
        if entry.name is None:  # a run that was named by its directory must be there
            raise
        return row, None
    except StackWiseError as error:
        return row | {"state": "failed", "failure": entry.failure or error.message}, None
    history = read_history(entry.run.events_file)
    done = [stage for stage in state["stages"] if stage["state"] == "done"]
    # What the log has steps of was not found in the store.
    trained_here = {curve.recipe for curve in history.curves.values()}
    row["state"] = "failed" if entry.failure else state["state"]
    if row["failure"] is None and state["state"] == "failed":
        row["failure"] = history.failure
    last = {stage["depth"]: stage for stage in state["stages"]}.values()  # of several windows
    row["loss"] = [stage["loss"] if stage["state"] == "done" else None for stage in last]
    row["trained"] = sum(stage["recipe"] in trained_here for stage in done)
    row["reused"] = len(done) - row["trained"]
    row["seconds"] = round(sum(history.phases.values()), 3)  # worked on the run, however many sittings it took
    if len(done) == len(state["stages"]):  # an evaluation of before a change is not its own
        with contextlib.suppress(OSError, ValueError):
            evaluation = entry.run.evaluation() or {}
            row["bits_per_byte"] = evaluation.get("bits_per_byte")
            return row, evaluation.get("by_sample")
    return row, None


def cells(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table as text: the columns' names, and a row a run."""
    keys = comparison["keys"]
    columns = ["run", *map(label, keys), "state", "loss by stage", "bits/byte", "seconds", "trained", "reused"]
    rows = []
    for run in comparison["runs"]:
        bits = run["bits_per_byte"]
        rows.append(
            [
                run["name"],
                *(shown(run["values"].get(key)) for key in keys),
                run["state"],
                "  ".join(f"{loss:.3f}" if loss is not None else "–" for loss in run["loss"]),
                f"{bits:.3f}" if bits is not None else "–",
                f"{run['seconds']:.1f}",
                str(run["trained"]),
                str(run["reused"]),
            ]
        )
    return columns, rows


def best(comparison: Mapping[str, Any]) -> int | None:
    """The row with the fewest held-out bits a byte."""
    measured = [(run["bits_per_byte"], row) for row, run in enumerate(comparison["runs"]) if run["bits_per_byte"]]
    return min(measured)[1] if measured else None


def summary(comparison: Mapping[str, Any]) -> str:
    """In a line: runs by state, and how many stages were trained."""
    runs = comparison["runs"]
    states = Counter(run["state"] for run in runs)
    trained, reused = sum(run["trained"] for run in runs), sum(run["reused"] for run in runs)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    return f"{words.plural(len(runs), 'run')}: {counts}; {words.plural(trained, 'stage')} trained, {reused} reused"


def markdown(comparison: Mapping[str, Any], title: str) -> str:
    """The table as a page of Markdown."""
    columns, rows = cells(comparison)
    star = best(comparison)
    lines = [f"# {title}", "", summary(comparison), "", _line(columns), _line(["---"] * len(columns))]
    lines += [_line([f"**{cell}**" if row == star else cell for cell in texts]) for row, texts in enumerate(rows)]
    failures = [
        f"- {printable(run['name'])}: {printable(run['failure'])}" for run in comparison["runs"] if run["failure"]
    ]
    if comparison["groups"]:
        head, texts = group_cells(comparison["groups"])
        lines += ["", _line(head), _line(["---"] * len(head)), *map(_line, texts)]
    return "\n".join([*lines, *(["", "Failed:", "", *failures] if failures else []), ""])


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(printable(text).replace('|', '¦').replace('<', '&lt;') for text in texts)} |"


def write(directory: Path, comparison: Mapping[str, Any]) -> Path:
    """Write `sweep.json` and `sweep.md`; returns the latter.

    Raises:
        NoSpaceError: The disk is full.
    """
    durable.write_json(directory / "sweep.json", dict(comparison))
    page = directory / "sweep.md"
    durable.write_bytes(page, markdown(comparison, f"Sweep {directory.name}").encode())
    return page
