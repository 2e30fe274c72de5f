"""Runs that differ by no more than their seed, as one figure with an interval, and beside the first of the groups.

Differences between runs that were measured on the same held-out samples are by a paired bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackwise.errors import UsageError
from stackwise.identity import generator
from stackwise.pipeline.batch.grid import label, shown
from stackwise.report.charts import ticks
from stackwise.report.html import Html, tag

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Samples:
    """What a rack said of held-out samples, as an evaluation has it (`by_sample`).

    Args:
        nats: Of each sample.
        of: Bytes or tokens that they are of, by sample.
        unit: byte or token.
    """

    nats: Sequence[float]
    of: Sequence[int]
    unit: str

    def sums(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The figure's two sums, by sample: bits and bytes, or nats and tokens."""
        scale = 1 / math.log(2) if self.unit == "byte" else 1.0
        return np.asarray(self.nats, np.float64) * scale, np.asarray(self.of, np.float64)

    @property
    def value(self) -> float:
        """Bits a byte, or nats a token."""
        bits_N, of_N = self.sums()
        return float(bits_N.sum() / max(of_N.sum(), 1))


@dataclass(frozen=True)
class Interval:
    """A figure, or a difference of two, and its 95% interval."""

    mean: float
    low: float
    high: float


def figure(runs: Sequence[Samples]) -> Interval:
    """The mean over runs of bits a byte (nats a token), and its interval over runs and samples."""
    return _interval([run.sums() for run in runs], None)


def paired(pairs: Sequence[tuple[Samples, Samples]]) -> Interval:
    """The mean difference, first less second, of pairs of runs: of the same seed, say.

    In each of 2,000 draws the pairs are drawn anew, and so are the held-out samples, the same ones for all pairs
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13); the interval is
    that of percentiles. One pair says nothing of how seeds differ: the interval is then that of the samples alone.

    Raises:
        UsageError: The runs were not measured on the same samples.
    """
    for one, other in pairs:
        if one.unit != other.unit or list(one.of) != list(other.of):
            raise UsageError("the runs were measured on other held-out samples", hint="evaluate them on the same text")
    return _interval([one.sums() for one, _ in pairs], [other.sums() for _, other in pairs])


Sums = tuple[NDArray[np.float64], NDArray[np.float64]]


def _interval(runs: Sequence[Sums], others: Sequence[Sums] | None) -> Interval:
    bits_RN = np.stack([bits for bits, _ in runs])
    if others is not None:
        bits_RN = bits_RN - np.stack([bits for bits, _ in others])
    of_RN = np.stack([of for _, of in runs])
    count, samples = bits_RN.shape
    rng = generator(0, "bootstrap", count, samples)  # the same table each time
    drawn = np.empty(DRAWS)
    for draw in range(DRAWS):
        runs_R, samples_N = rng.integers(count, size=count), rng.integers(samples, size=samples)
        at = np.ix_(runs_R, samples_N)
        drawn[draw] = (bits_RN[at].sum(1) / np.maximum(of_RN[at].sum(1), 1)).mean()
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    mean = float((bits_RN.sum(1) / np.maximum(of_RN.sum(1), 1)).mean())
    return Interval(mean, float(low), float(high))


SEED = "seed"
NOT_A_SETTING = (SEED, "name")
"""Keys by which runs of a group may differ."""


@dataclass(frozen=True)
class Measured:
    """A run that was evaluated.

    Args:
        name: What it is called.
        values: Its settings that differ from other runs', by dotted key.
        samples: `by_sample` of its evaluation.
    """

    name: str
    values: Mapping[str, Any]
    samples: Mapping[str, Any]


def groups(runs: Sequence[Measured]) -> list[dict[str, Any]]:
    """Figures of groups of runs, each with a 95% interval over seeds and held-out samples.

    A run with a sample whose loss is no number is left out.

    Returns:
        `[{"name", "values", "runs", "seeds", "unit", "held_out": {"mean", "low", "high"}, "against": None or the same,
        "why_not"}]`: bits a byte, or nats a token where the unit is that; `against` is the difference from the first
        group, by a paired bootstrap over the seeds that both have; `why_not` says why there is none.
    """
    runs = [run for run in runs if None not in run.samples["nats"]]  # a loss that is no number has no place in a mean
    if not runs:
        return []
    from stackwise.report.groups import Samples, figure  # numpy comes with it

    gathered: dict[str, list[tuple[Measured, Any]]] = {}
    for run in runs:
        values = {key: value for key, value in run.values.items() if key not in NOT_A_SETTING}
        unit = run.samples["unit"]
        samples = Samples(run.samples["nats"], run.samples["of"], unit)
        # Of the same settings, runs may still have been evaluated on other text: files change.
        gathered.setdefault(repr((values, unit, samples.of)), []).append((run, samples))
    result = []
    first = next(iter(gathered.values()))
    for members in gathered.values():
        values = {key: value for key, value in members[0][0].values.items() if key not in NOT_A_SETTING}
        against, why_not = (None, None) if members is first else _against(members, first)
        result.append(
            {
                "name": ", ".join(f"{label(key)} {shown(value)}" for key, value in values.items())
                or members[0][0].name,
                "values": values,
                "runs": [run.name for run, _ in members],
                "seeds": len({_seed(run) for run, _ in members}),
                "unit": members[0][1].unit,
                "held_out": vars(figure([samples for _, samples in members])),
                "against": against,
                "why_not": why_not,
            }
        )
    return result


def _against(members: list[tuple[Measured, Any]], first: list[tuple[Measured, Any]]) -> tuple[Any, str | None]:
    from stackwise.report.groups import paired

    theirs = {_seed(run): samples for run, samples in first}
    pairs = [(samples, theirs[_seed(run)]) for run, samples in members if _seed(run) in theirs]
    if not pairs:
        return None, "no seed in common"
    try:
        return vars(paired(pairs)), None
    except UsageError as error:
        return None, error.message


def _seed(run: Measured) -> str:
    return repr(run.values.get(SEED))


def group_cells(groups: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The groups as a table."""
    rows = []
    for number, group in enumerate(groups):
        beside = "–" if number == 0 else group["why_not"] or _said(group["against"], "+.3f")
        unit = "bits/byte" if group["unit"] == "byte" else "nats/token"
        rows.append([group["name"], str(group["seeds"]), _said(group["held_out"], ".3f"), unit, beside])
    return ["settings", "seeds", "held out (95%)", "unit", "against the first (95%)"], rows


def _said(interval: Mapping[str, float], form: str) -> str:
    return f"{interval['mean']:{form}} ({interval['low']:{form}} to {interval['high']:{form}})"


WIDTH, ROW, NAMES, TOP, BOTTOM = 860, 30, 340, 16, 48


def plot(groups: Sequence[Mapping[str, Any]]) -> Html:
    """The groups as points with their intervals, an SVG; those of the first one's unit.

    Raises:
        UsageError: No run was evaluated.
    """
    if not groups:
        raise UsageError("no run here has been evaluated", hint="`stackwise eval --run RUN`, or finish the runs")
    drawn = [group for group in groups if group["unit"] == groups[0]["unit"]]
    low = min(group["held_out"]["low"] for group in drawn)
    high = max(group["held_out"]["high"] for group in drawn)
    room = 0.06 * (high - low) or 0.1
    low, high = low - room, high + room
    height = TOP + ROW * len(drawn) + BOTTOM

    def across(value: float) -> float:
        return round(float(NAMES + (value - low) / (high - low) * (WIDTH - NAMES - 20)), 1)

    parts = [tag("rect", width=str(WIDTH), height=str(height), fill="#fff")]
    for value in ticks(low, high, 6):
        x = str(across(value))
        parts.append(tag("path", d=f"M{x} {TOP}V{height - BOTTOM}", stroke="#ddd"))
        parts.append(_text(f"{value:g}", x, height - BOTTOM + 18, "middle"))
    for number, group in enumerate(drawn):
        y, held_out = TOP + ROW * number + ROW // 2, group["held_out"]
        hue = "#c33" if number == 0 else "#357"
        parts.append(_text(group["name"], str(NAMES - 12), y + 4, "end"))
        parts.append(tag("path", d=f"M{across(held_out['low'])} {y}H{across(held_out['high'])}", stroke=hue))
        parts.append(tag("circle", cx=str(across(held_out["mean"])), cy=str(y), r="4", fill=hue))
    unit = "bits a byte" if drawn[0]["unit"] == "byte" else "nats a token"
    parts.append(_text(f"held out, {unit}, 95% over seeds and samples", str((NAMES + WIDTH) / 2), height - 8, "middle"))
    attributes = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {height}"}
    return tag("svg", *parts, **attributes, style="font: 13px sans-serif")


def _text(text: str, x: str, y: float, anchor: str) -> Html:
    return tag("text", text, x=x, y=str(y), text_anchor=anchor, fill="#333")
