"""Events of a run, for people: one table that says of each kind how it is shown, and what the run has come to so far.

The views (plain lines, the live table) take their words from here. An event without a row is not shown.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from stackwise.report import words

if TYPE_CHECKING:
    from stackwise.config import StackWiseConfig

Event = dict[str, Any]
PHASES = {"reading": "reading text", "tokenizer": "training the tokenizer", "waiting": "waiting for another process"}
"""What is prepared before there is a plan, where its name does not say it."""


@dataclass(frozen=True)
class Kind:
    """How events of one kind are shown.

    Args:
        words: What one says, without its stage; None: nothing.
        style: Of the line above the live table.
        shown_by: "line": a line in every view; "table": the live table shows it, plain lines say it; "progress": a
            bar, or a line now and then; "nothing": it is for the log and for programs.
    """

    words: Callable[[Event], str | None] | None = None
    style: str = "dim"
    shown_by: Literal["line", "table", "progress", "nothing"] = "line"


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
    memory = f"about {words.size(event['memory_needed'])} of memory, there are {words.size(event['memory_total'])}"
    return f"it fits: needs {disk}; {memory}{_traffic(event)}"


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
    return f"held-out loss {event['nats']:.4f} at step {event['step']:,}{best}"


def _diverged(event: Event) -> str:
    back = f"rolled back to step {event['to']:,}, at a lower learning rate" if "to" in event else ""
    return f"step {event['step']:,} diverged: {event['why']}; {back or 'the step is skipped'}"


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


def step_line(event: Event, stage: StageView) -> str:
    """A step's figures in a line."""
    loss = event["loss"]
    parts = [
        f"step {event['step']:,}/{event['steps']:,}",
        f"loss {loss:.3f}" if loss is not None else "loss –",  # every step since the last one shown was skipped
        f"lr {words.rate(event['learning_rate'])}",
        f"{words.count(event['tokens_per_second'])} tokens/s",
        f"wait {words.percent(event['wait_fraction'])}",
        f"memory {words.size(event['memory'])}",
    ]
    if stage.skipped:
        parts.append(f"{words.plural(stage.skipped, 'step')} skipped")
    if stage.seconds_left is not None and event["step"] < event["steps"]:
        parts.append(f"{words.clock(stage.seconds_left)} left")
    return "  ".join(parts)


EVENTS: dict[str, Kind] = {
    # before there is a plan
    "start": Kind(shown_by="nothing"),
    "note": Kind(lambda event: f"note: {event['text']}"),
    "preparing": Kind(shown_by="progress"),
    "data": Kind(_data),
    "device": Kind(_device),
    "settled": Kind(shown_by="nothing"),
    "plan": Kind(_plan, shown_by="table"),
    "fit": Kind(_fit),
    # a stage in training
    "training": Kind(
        lambda event: f"training, {words.plural(event['steps'], 'step')} ({event['reason']})", shown_by="table"
    ),
    "resumed": Kind(
        lambda event: f"resumed at step {event['step']:,} of {event['steps']:,}",
        shown_by="table",
    ),
    "step": Kind(shown_by="progress"),
    "checkpoint": Kind(shown_by="nothing"),
    "held_out": Kind(_held_out),
    "best": Kind(lambda event: f"takes the weights of step {event['step']:,}, held-out loss {event['nats']:.4f}"),
    "diverged": Kind(_diverged, "yellow"),
    "probe": Kind(lambda event: f"{_blocks(event)} unfrozen: held-out loss {event['nats']:.4f}{_gain(event)}"),
    "unfrozen": Kind(lambda event: f"{_blocks(event)}, which gained most, now trained"),
    "fused": Kind(_fused),
    "committed": Kind(lambda event: "committed", shown_by="table"),
    "reused": Kind(lambda event: f"reused ({event['reason']})", shown_by="table"),
    # its boundary
    "writing": Kind(_writing, shown_by="table"),
    "filling": Kind(_filling),
    "recomputing": Kind(_text),
    "boundary": Kind(shown_by="progress"),
    "written": Kind(_written),
    "dropped": Kind(_dropped),
    "pruned": Kind(lambda event: f"weights of an earlier window dropped, {words.size(event['bytes'])} freed"),
    # the end, good or bad
    "warning": Kind(lambda event: f"warning: {event['text']}", "yellow"),
    "stopping": Kind(_text, "yellow"),
    "interrupted": Kind(lambda event: f"interrupted: {event['text']}", "yellow"),
    "failed": Kind(_text, "red"),
    "evaluating": Kind(shown_by="progress"),
    "evaluation": Kind(lambda event: "evaluation: reused (the weights are the same)" if event.get("reused") else None),
    "fill": Kind(shown_by="nothing"),
    "exported": Kind(lambda event: f"exported to {event.get('path') or event.get('directory')}"),
    "done": Kind(lambda event: f"done in {words.duration(event['seconds'])}", shown_by="table"),
}
"""Every event that a run emits."""

SMOOTH = 0.3
"""Weight of the newest figure in speeds and losses that are shown."""


@dataclass
class StageView:
    """One stage."""

    depth: int
    blocks: tuple[int, int]
    window: int = 0
    label: str = ""
    """Its number, and its window's where there are several."""
    state: str = "pending"
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    why: str = ""
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    wait_fraction: float | None = None
    memory: int | None = None
    skipped: int = 0
    held_out: float | None = None
    seconds_per_step: float | None = None
    last: tuple[float, int] | None = None

    @property
    def seconds_left(self) -> float | None:
        """Until its last step, at the pace so far."""
        if self.seconds_per_step is None or self.steps is None:
            return None
        return self.seconds_per_step * (self.steps - self.step)


@dataclass
class RunView:
    """A run as its events have it so far.

    Args:
        config: Its configuration.
        run: Its directory.
        known: The stages' states before, as `status` gives them: what a stage that is reused came to.
    """

    config: StackWiseConfig
    run: str
    known: list[dict[str, Any]] = field(default_factory=list)
    stages: list[StageView] = field(default_factory=list)
    current: int | None = None
    activity: str | None = None
    done: int = 0
    total: int | None = None
    evaluation: dict[str, Any] | None = None
    fill: Event | None = None
    saved: bool = False

    def __post_init__(self) -> None:
        self._plan()

    def _plan(self) -> None:
        from stackwise.pipeline.schedule import schedule

        self.stages = []
        for stage in schedule(self.config):
            steps = self.config.stage_training(stage.depth).steps if self.config.windows == 1 else None
            view = StageView(stage.depth, (stage.first, stage.last), stage.window, stage.label, steps=steps)
            self.stages.append(view)

    def observe(self, event: Event) -> None:
        """Take up an event."""
        place = event.get("stage")
        stage = self.stages[place] if isinstance(place, int) and place < len(self.stages) else None
        if stage is not None:
            if event["event"] in ("training", "step"):
                self.current = place
            self._observe_stage(stage, event)
        match event["event"]:
            case "settled":
                self.config = self.config.model_copy(deep=True)
                self.config.training.block_size = event["value"]
                self._plan()
            case "plan":
                self.activity = None
                self._planned(event["stages"])
            case "preparing":
                self._progress(event["phase"], event["done"], event["total"])
            case "evaluating":
                self._progress("evaluating", event.get("done", 0), event.get("total"))
            case "data" | "evaluation" | "done":
                self.activity = None
        if event["event"] == "evaluation":
            self.evaluation = event["result"]
        elif event["event"] == "fill":
            self.fill = event
        elif event["event"] in ("training", "reused"):
            self.saved = True

    def label(self, place: int) -> str:
        """What the stage at a place of the schedule is called."""
        return self.stages[place].label if place < len(self.stages) else str(place)

    def _planned(self, stages: list[dict[str, Any]]) -> None:
        """The stages as they are planned: how many windows they have may not have been known before."""
        blocks = {view.depth: view.blocks for view in self.stages}
        if len(stages) != len(self.stages):
            several = {each["depth"] for each in stages if each.get("window", 0)}
            self.stages = [
                StageView(
                    (depth := each["depth"]),
                    blocks[depth],
                    each.get("window", 0),
                    f"{depth}, window {each.get('window', 0)}" if depth in several else str(depth),
                )
                for each in stages
            ]
        for each in stages:
            self.stages[each["stage"]].why = each["reason"]
            self.stages[each["stage"]].steps = each["steps"]

    def end(self) -> None:
        """Nothing goes on any more: what ran was interrupted."""
        self.activity = None
        for stage in self.stages:
            if stage.state == "running":
                stage.state = "interrupted"

    def _observe_stage(self, stage: StageView, event: Event) -> None:
        match event["event"]:
            case "training":
                stage.state, stage.steps, stage.why, stage.step = "running", event["steps"], event["reason"], 0
                stage.skipped = 0
                self.activity = None
            case "resumed":
                stage.step, stage.why = event["step"], f"resumed at step {event['step']:,}"
            case "step":
                self._step(stage, event)
            case "diverged":
                stage.skipped += "to" not in event
            case "held_out":
                stage.held_out = event["nats"]
            case "committed":
                stage.state, stage.step = "done", stage.steps or stage.step
            case "reused":
                stage.state, stage.why = "done", event["reason"]
                self._recall(stage)
            case "writing" | "recomputing":
                self._progress(f"boundary {stage.depth + 1}", 0, None)
            case "boundary":
                self._progress(f"boundary {stage.depth + 1}", event["done"], event["total"])
            case "written":
                self.activity = None
            case "failed":
                stage.state = "failed"

    def _step(self, stage: StageView, event: Event) -> None:
        now = time.monotonic()
        if stage.last is not None and event["step"] > stage.last[1]:
            pace = (now - stage.last[0]) / (event["step"] - stage.last[1])
            stage.seconds_per_step = _smooth(stage.seconds_per_step, pace, 0.12)
        stage.last = (now, event["step"])
        stage.step, stage.steps, stage.learning_rate = event["step"], event["steps"], event["learning_rate"]
        if event["loss"] is not None:  # else every step since was skipped
            stage.loss = _smooth(stage.loss, event["loss"])
        stage.tokens_per_second = _smooth(stage.tokens_per_second, event["tokens_per_second"])
        stage.wait_fraction, stage.memory = event["wait_fraction"], event["memory"]

    def _recall(self, stage: StageView) -> None:
        """What a stage that is not trained again came to before."""
        for before in self.known:
            if (before["depth"], before.get("window", 0)) == (stage.depth, stage.window) and before["state"] == "done":
                stage.loss, stage.step, stage.steps = before["loss"], before["step"], before["steps"]

    def _progress(self, activity: str, done: int, total: int | None) -> None:
        self.activity, self.done, self.total = activity, done, total

    @property
    def running(self) -> StageView | None:
        """The stage in training."""
        stage = self.stages[self.current] if self.current is not None else None
        return stage if stage is not None and stage.state == "running" else None

    @property
    def seconds_left(self) -> float | None:
        """Until the last step of the last stage, as if every stage took as long a step as this one."""
        stage = self.running
        if stage is None or stage.seconds_per_step is None or any(s.steps is None for s in self.stages):
            return None
        steps = sum((s.steps or 0) - s.step for s in self.stages if s.state in ("pending", "running"))
        return stage.seconds_per_step * steps


def _smooth(before: float | None, now: float, share: float = SMOOTH) -> float:
    return now if before is None else (1 - share) * before + share * now
