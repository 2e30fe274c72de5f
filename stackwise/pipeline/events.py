"""The events of a run: one table that says of each kind how it is shown, kept and forwarded, in which words.

What happens is emitted as plain data: `{"event": name, …}`. The views, the log and the trackers ask the table; an event
that has no row is refused where it is emitted.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from stackwise import words
from stackwise.errors import StackWiseError
from stackwise.files import METADATA_BYTES, open_regular, parse_json

Event = dict[str, Any]
Observer = Callable[[Event], None]
Emit = Callable[..., None]  # emits an event: its name, and its values by name
PHASES = {"reading": "reading text", "tokenizer": "training the tokenizer"}
"""What is prepared before there is a plan, where its name does not say it."""


@dataclass(frozen=True)
class Kind:
    """What events of one kind are like.

    Args:
        shown_by: "line": a line in every view; "table": the live table shows it, plain lines say it; "progress": a
            bar, or a line now and then; "nothing": it is for the log and for programs.
    """

    words: Callable[[Event], str | None] | None = None  # what one says, without its stage; None: nothing
    style: str = "dim"  # of the line above the live table
    shown_by: Literal["line", "table", "progress", "nothing"] = "line"
    figures: tuple[str, ...] = ()  # its numbers that are figures at a step of its stage, for trackers
    repeated: bool = False  # whoever begins to observe later gets it, too


def event(name: str, /, **values: Any) -> Event:
    """An event of a kind that the table has."""
    if name not in EVENTS:
        raise StackWiseError(f"there is no event {name}", hint="add it to EVENTS in stackwise/pipeline/events.py")
    return {"event": name, **values}


def read_log(
    path: Path, offset: int = 0, end: int | None = None, kinds: tuple[str, ...] = ()
) -> Iterator[tuple[Event, int]]:
    """The events of a run's log, oldest first, each with the offset behind it; none where there is no log.

    Lines that are no events are passed over: what a kill cut off, what is still being written, what a stranger left.

    Args:
        path: The log.
        offset: Bytes of it that are passed over.
        end: Bytes of it that are read; None: all.
        kinds: The kinds of events that are asked for; none: all.

    Raises:
        IrregularFile: Something else lies there.
    """
    marks = [f'"{kind}"'.encode() for kind in kinds]
    with contextlib.suppress(FileNotFoundError), os.fdopen(open_regular(path), "rb") as file:
        file.seek(offset)
        # Of a bounded length: a line without an end would take memory without one.
        for line in iter(partial(file.readline, METADATA_BYTES), b""):
            if end is not None and offset >= end:
                return
            offset += len(line)
            # Most lines are steps: where these are not asked for they are not parsed.
            if not line.endswith(b"\n") or (marks and not any(mark in line for mark in marks)):
                continue
            event: Any = None
            with contextlib.suppress(ValueError):
                event = parse_json(line)
            named = isinstance(event, dict) and isinstance(event.get("event"), str)
            if named and (not kinds or event["event"] in kinds):
                yield event, offset


class Pace:
    """Lets events on how far something is pass every now and then alone.

    Args:
        at_once: The first one passes, whenever it comes.
        seconds: Between two of them.
    """

    def __init__(self, *, at_once: bool = False, seconds: float = 0.25) -> None:
        self._seconds, self._last = seconds, -math.inf if at_once else time.perf_counter()

    def due(self) -> bool:
        """Whether one may pass now; asked for no other reason."""
        now = time.perf_counter()
        if now - self._last <= self._seconds:
            return False
        self._last = now
        return True


def wording(event: Event) -> str | None:
    """What an event says, without its stage; None for those that are shown as progress alone, or not."""
    kind = EVENTS.get(event["event"])
    return kind.words(event) if kind is not None and kind.words is not None else None


def _text(event: Event) -> str:
    return str(event["text"])


def _device(event: Event) -> str:
    memory = f", {words.size(event['memory'])} of memory" if event.get("memory") else ""
    return f"device: {event['device']} ({event['name']}{memory}), {event.get('precision', 'fp32')}"


def _fit(event: Event) -> str:
    disk = f"{words.size(event['disk_needed'])} of disk, {words.size(event['disk_free'])} are free"
    largest = f"the largest stage about {words.size(event['memory_needed'])} of memory (estimated, without its process)"
    return f"it fits: needs {disk}; {largest}, there are {words.size(event['memory_total'])}{_traffic(event)}"


def _traffic(event: Event) -> str:
    """What the boundaries cost where they are not each written by a pass of their own, beside what those would."""
    here, separate = event.get("traffic"), event.get("separate")
    if not here or not separate or here == separate:
        return ""

    def figures(of: dict[str, int]) -> str:
        return (
            f"{words.size(of['read'])} read, {words.size(of['written'])} written, "
            f"{of['flops'] / 1e12:.3g} TFLOP of forward passes"
        )

    return f"; boundaries: {figures(here)} (with each stored by a pass of its own: {figures(separate)})"


def _data(event: Event) -> str:
    splits = f"{words.plural(event['documents'], 'document')}, {words.count(event['tokens'])} tokens"
    if size := event.get("tokenizer", {}).get("vocab_size"):
        splits += f" of {words.plural(size, 'kind')}"
    if event.get("bytes"):
        splits += f", {words.size(event['bytes'])}"
    how = "reused, unchanged" if event["reused"] else f"prepared in {words.duration(event['seconds'])}"
    return f"data: {how}: {splits} ({event['directory']})"


def _plan(event: Event) -> str:
    """Reuse or train, and why; neighbours that agree share a line."""
    stages = event["stages"]

    def alike(stage: dict[str, Any]) -> tuple[Any, ...]:
        return stage.get("window", 0), stage["action"], stage["reason"], stage["steps"]

    spans = []
    for (window, action, reason, steps), group in itertools.groupby(stages, alike):
        depths = [stage["depth"] for stage in group]
        which = f"stage{'s' if len(depths) > 1 else ''} {words.span(depths[0], depths[-1])}"
        doing = "reuse" if action == "reuse" else f"train, {words.plural(steps, 'step')}"
        spans.append((which, f"{doing} ({reason})", window))
    several, lines = any(stage.get("window", 0) for stage in stages), []
    for (which, doing), same in itertools.groupby(spans, lambda span: span[:2]):
        windows = [window for *_, window in same]
        when = f", window{'s' if len(windows) > 1 else ''} {words.span(windows[0], windows[-1])}" if several else ""
        lines.append(f"{which}{when}: {doing}")
    return "\n".join(lines)


def _writing(event: Event) -> str:
    chunks = event.get("chunks")
    return "writing its boundary" + (f", {words.plural(chunks, 'chunk')}" if chunks else "")


def _filling(event: Event) -> str:
    chunks = words.plural(event["chunks"], "chunk")
    return f"its boundary is written while stage {event.get('above', event['stage'] + 1)} trains on it, {chunks}"


def _written(event: Event) -> str:
    speed = event["bytes"] / event["seconds"] if event["seconds"] else 0.0
    took = f"{words.size(event['bytes'])} in {words.duration(event['seconds'])}, {words.size(speed)}/s"
    waits = [
        f"{words.percent(event[key])} waiting for {what}"
        for key, what in (("wait_fraction", "data"), ("blocked_fraction", "the disk"))
        if event.get(key, 0.0) >= 0.005
    ]
    return f"boundary written: {', '.join([took, *waits])}"


def _held_out(event: Event) -> str:
    best = "" if event["best"] >= event["nats"] else f", best {event['best']:.4f}"
    if curve := event.get("adaptation"):
        ways = " → ".join(f"{nats:.4f}" for nats in curve)
        steps = words.plural(len(curve) - 1, "inner step")
        return f"loss on tasks held out {ways} by {steps}, at step {event['step']:,}{best}"
    return f"held-out loss {event['nats']:.4f} at step {event['step']:,}{best}"


def _rolled_out(event: Event) -> str:
    figures = f"score {event['score']:.4g}, KL {event['kl']:.3g} nats an answer, {event['length']:.3g} tokens"
    return f"{words.plural(event['rows'], 'answer')} drawn: {figures}, KL coefficient {event['coefficient']:.3g}"


def _routes(event: Event) -> str:
    reached = f"a step's rows reach {event['reached']:.1f} of {words.plural(event['of'], 'expert')}"
    chance = "" if event["by_chance"] is None else f" ({event['by_chance']:.1f} in an order by chance)"
    read = "" if event["bytes"] is None else f", {words.size(event['bytes'])} of weights and moments"
    return f"as the stage begins, {reached}{chance}{read}; its first step {event['first']}; then its routers move"


def _grown(event: Event) -> str:
    before, after = event["before"], event["after"]
    figures = [
        f"{name} {before[key]:.4g} → {after[key]:.4g}"
        for key, name in (("loss", "loss"), ("gradient_norm", "gradient norm"))
        if before[key] is not None and after[key] is not None
    ]
    return ": ".join(filter(None, ["from {} to {} blocks".format(*event["blocks"]), ", ".join(figures)]))


def _tasks(event: Event) -> str:
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in event["terms"].items())
    return f"held-out loss by task: {losses}"


def _best(event: Event) -> str:
    return f"takes the weights of step {event['step']:,}, held-out loss {event['nats']:.4f}"


def _diverged(event: Event) -> str:
    back = f"rolled back to step {event['to']:,}, at a lower learning rate" if "to" in event else ""
    return f"step {event['step']:,} diverged: {event['why']}; {back or 'the step is skipped'}"


def _probe(event: Event) -> str:
    return f"{_blocks(event)} unfrozen: held-out loss {event['nats']:.4f}{_gain(event)}"


def _fused(event: Event) -> str:
    kept = "" if event["gain"] > 0 else ": the weights stay as they were"
    return f"{_blocks(event)} trained: held-out loss {event['nats']:.4f}{_gain(event)}{kept}"


def _blocks(event: Event) -> str:
    first, last = event["blocks"]
    return f"block{'s' if last > first else ''} {words.span(first, last)}"


def _gain(event: Event) -> str:
    return f", {event['gain']:.4f} less than before" if event["gain"] > 0 else ", no gain"


def _dropped(event: Event) -> str:
    return f"boundary {event['stage']} dropped, {words.size(event['bytes'])} freed ({event.get('why', 'store.keep')})"


GAIN = ("gain", "nats")
STEP_FIGURES = ("learning_rate", "gradient_norm", "tokens_per_second", "wait_fraction", "memory", "gpu_use")

EVENTS: dict[str, Kind] = {
    # before there is a plan
    "start": Kind(shown_by="nothing", repeated=True),
    "note": Kind(lambda event: f"note: {event['text']}", repeated=True),
    "preparing": Kind(shown_by="progress"),
    "data": Kind(_data, repeated=True),
    "device": Kind(_device, repeated=True),
    "trial": Kind(shown_by="nothing"),
    "settled": Kind(shown_by="nothing"),
    "plan": Kind(_plan, shown_by="table"),
    "fit": Kind(_fit),
    # a stage in training
    "training": Kind(
        lambda event: f"training, {words.plural(event['steps'], 'step')} ({event['reason']})", shown_by="table"
    ),
    "measured": Kind(lambda event: f"the ranges of what enters {words.plural(event['layers'], 'layer')} are measured"),
    "rolled_out": Kind(_rolled_out, figures=("score", "kl", "length", "coefficient", "ended", "seconds")),
    "resumed": Kind(lambda event: f"resumed at step {event['step']:,} of {event['steps']:,}", shown_by="table"),
    "step": Kind(shown_by="progress", figures=STEP_FIGURES),
    "passes": Kind(shown_by="progress"),
    "ranks": Kind(shown_by="progress"),
    "checkpoint": Kind(shown_by="nothing", figures=("seconds", "written_seconds")),
    "grown": Kind(_grown),
    "held_out": Kind(_held_out, figures=("nats", "best", "seconds")),
    "tasks": Kind(_tasks, figures=("average",)),
    "best": Kind(_best, figures=("nats",)),
    "diverged": Kind(_diverged, "yellow", figures=("to",)),
    "probe": Kind(_probe, figures=GAIN),
    "unfrozen": Kind(lambda event: f"{_blocks(event)}, which gained most, now trained", figures=GAIN),
    "fused": Kind(_fused, figures=GAIN),
    "committed": Kind(lambda event: "committed", shown_by="table"),
    "waiting": Kind(_text),
    "reused": Kind(lambda event: f"reused ({event['reason']})", shown_by="table"),
    # its boundary
    "writing": Kind(_writing, shown_by="table"),
    "teacher": Kind(lambda event: f"the teacher {event['model']} goes over its {words.plural(event['rows'], 'row')}"),
    "past": Kind(lambda event: f"as its window before left it, it goes over its {words.plural(event['rows'], 'row')}"),
    "routing": Kind(lambda event: f"as it begins, it routes its {words.plural(event['rows'], 'row')} to its experts"),
    "routes": Kind(_routes, figures=("first", "reached", "by_chance")),
    "filling": Kind(_filling),
    "recomputing": Kind(_text),
    "boundary": Kind(shown_by="progress"),
    "written": Kind(_written, figures=("bytes", "seconds")),
    "dropped": Kind(_dropped),
    "pruned": Kind(lambda event: f"weights of an earlier window dropped, {words.size(event['bytes'])} freed"),
    # the end, good or bad
    "warning": Kind(lambda event: f"warning: {event['text']}", "yellow", repeated=True),
    "stopping": Kind(_text, "yellow"),
    "interrupted": Kind(lambda event: f"interrupted: {event['text']}", "yellow"),
    "failed": Kind(_text, "red"),
    "evaluating": Kind(shown_by="progress"),
    "evaluation": Kind(lambda event: "evaluation: reused (the weights are the same)" if event.get("reused") else None),
    "fill": Kind(shown_by="nothing"),
    "exported": Kind(lambda event: f"exported to {event.get('path') or event.get('directory')}"),
    "done": Kind(lambda event: f"done in {words.duration(event['seconds'])}", shown_by="table"),
    # a sweep, a search
    "combination": Kind(shown_by="nothing"),
    "combination_ended": Kind(shown_by="nothing"),
    "trial_begun": Kind(shown_by="nothing"),
    "trial_ended": Kind(shown_by="nothing"),
}
"""Every event that a run emits."""
