"""A run while it goes: what its events come to, as plain lines for logs, or as a table redrawn in place."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from stackwise import words
from stackwise.cli.output import STATES, console, is_live, plain, print_event, say, table
from stackwise.pipeline.events import EVENTS, PHASES, wording

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from stackwise.config import StackWiseConfig

Event = dict[str, Any]
SECONDS = 5.0
"""Between two lines of progress, and between two lines on skipped steps."""
ROWS = 16
"""Stages shown at once; of more, those around the running one."""


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
        known: The stages' states before, as `status` gives them: the results of stages that are reused.
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
            several = {entry["depth"] for entry in stages if entry.get("window", 0)}
            self.stages = [
                StageView(
                    (depth := entry["depth"]),
                    blocks[depth],
                    entry.get("window", 0),
                    f"{depth}, window {entry.get('window', 0)}" if depth in several else str(depth),
                )
                for entry in stages
            ]
        for entry in stages:
            self.stages[entry["stage"]].why = entry["reason"]
            self.stages[entry["stage"]].steps = entry["steps"]

    def end(self) -> None:
        """The run ended: a stage still running was interrupted."""
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
        """Take a reused stage's results from the earlier run."""
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


def watcher(view: RunView, as_json: bool) -> contextlib.AbstractContextManager[Callable[[Event], None]]:
    """Who shows the events: JSON lines, a live view where the terminal can be drawn on, plain lines otherwise."""
    if as_json:
        return contextlib.nullcontext(print_event)
    if is_live(sys.stdout):
        return Live(view, console())
    return Lines(view, view.config.training.log_every)


class _View:
    """What both views do with an event: keep the run's state, and find its words."""

    def __init__(self, view: RunView) -> None:
        self._view = view
        self._said_skipped: dict[int, float] = {}

    def __call__(self, event: Event) -> None:
        """Show an event."""
        self._view.observe(event)
        self.take(event)

    def take(self, event: Event) -> None:
        """Show an event that the state of the run has been brought level with."""
        raise NotImplementedError

    def words_of(self, event: Event) -> str | None:
        """What an event says, with its stage. Where many steps are skipped, only one of a few seconds speaks."""
        place = event.get("stage")
        if event["event"] == "diverged" and "to" not in event and isinstance(place, int):
            now = time.monotonic()
            if now - self._said_skipped.get(place, -SECONDS) < SECONDS:
                return None
            self._said_skipped[place] = now
        text = wording(event)
        # A dropped boundary is named by its depth, not by a stage.
        return text if text is None or event["event"] == "dropped" else self.at(place, text)

    def at(self, place: Any, text: str) -> str:
        """A text behind the name of its stage."""
        return f"stage {self._view.label(place)}: {text}" if isinstance(place, int) else text

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._view.end()


class Lines(_View):
    """Prints a line for each change of state, and of a stage's steps the first, the last, and some between.

    Args:
        view: Kept up to date with the events.
        every: Steps between two lines, at least; so many that a few seconds lie between them.
    """

    def __init__(self, view: RunView, every: int) -> None:
        super().__init__(view)
        self._every = every
        self._shown: dict[int, int] = {}
        self._spoke = time.monotonic()

    def take(self, event: Event) -> None:
        """Print what an event says, where it is due."""
        kind, place = event["event"], event.get("stage")
        if kind == "step":
            before, step = self._shown.get(event["stage"]), event["step"]
            late = time.monotonic() - self._spoke >= SECONDS
            due = before is None or (late and step // self._every > before // self._every)
            if due or step == event["steps"]:
                self._shown[event["stage"]] = step
                self._say(self.at(place, step_line(event, self._view.stages[event["stage"]])))
            return
        if kind == "training":
            self._shown.pop(event["stage"], None)
        if (shown := EVENTS.get(kind)) is not None and shown.shown_by == "progress":
            self._say_progress(event)
        elif (text := self.words_of(event)) is not None:
            for line in text.splitlines():
                self._say(line)

    def _say_progress(self, event: Event) -> None:
        if time.monotonic() - self._spoke < SECONDS or not event.get("total"):
            return
        share = words.percent(event["done"] / event["total"])
        if event["event"] == "boundary":
            depth = self._view.stages[event["stage"]].depth
            self._say(self.at(event["stage"], f"boundary {depth + 1}: {share}"))
        else:
            phase = event.get("phase", "evaluating")
            self._say(f"{PHASES.get(phase, phase)}: {share}")

    def _say(self, text: str) -> None:
        self._spoke = time.monotonic()
        say(f"{time.strftime('%H:%M:%S')} {text}")
        sys.stdout.flush()


class Live(_View):
    """Redraws the run a few times a second; what should stay is printed above.

    Args:
        view: Kept up to date with the events.
        console: Where to draw.
    """

    def __init__(self, view: RunView, console: Console) -> None:
        from rich.live import Live as Drawing

        super().__init__(view)
        self._console = console
        self._drawing = Drawing(console=console, get_renderable=self._render, refresh_per_second=5, transient=False)

    def take(self, event: Event) -> None:
        """Print above the table what it does not show."""
        kind = EVENTS.get(event["event"])
        if kind is not None and kind.shown_by == "line" and (text := self.words_of(event)) is not None:
            self._console.print(plain(text), style=kind.style)

    def __enter__(self) -> Self:
        name = f"{self._view.config.name}: {words.plural(len(self._view.stages), 'stage')} in {self._view.run}"
        self._console.print(plain(name), style="bold")
        self._drawing.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._view.end()
        self._drawing.stop()

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = [Text(), self._stages()]
        if self._view.activity is not None:
            parts += [Text(), self._activity()]
        elif (stage := self._view.running) is not None:
            parts += [Text(), self._training(stage)]
        return Group(*parts)

    def _stages(self) -> Table:
        view = self._view
        shown = table("stage", "blocks", "state", "step", "loss", "why", right=(0, 3, 4))
        first = 0
        if len(view.stages) > ROWS:
            first = min(max(0, (view.current or 0) - ROWS // 2), len(view.stages) - ROWS)
        if first:
            shown.add_row("…", "", f"[dim]{first} above[/]", "", "", "")
        for stage in view.stages[first : first + ROWS]:
            style = STATES.get(stage.state, "")
            shown.add_row(
                stage.label,
                words.span(*stage.blocks),
                f"[{style}]{stage.state}[/]",
                f"{stage.step:,}/{stage.steps:,}" if stage.steps else "",
                f"{stage.loss:.3f}" if stage.loss is not None else "",
                f"[dim]{plain(stage.why)}[/]",
            )
        if (rest := len(view.stages) - first - ROWS) > 0:
            shown.add_row("…", "", f"[dim]{rest} more[/]", "", "", "")
        return shown

    def _training(self, stage: StageView) -> RenderableType:
        from rich.text import Text

        figures = [f"stage {stage.label}", f"{stage.step:,}/{stage.steps or 0:,}"]
        if stage.loss is not None:
            figures.append(f"loss {stage.loss:.3f}")
        if stage.held_out is not None:
            figures.append(f"held out {stage.held_out:.3f}")
        if stage.skipped:
            figures.append(f"[yellow]{words.plural(stage.skipped, 'step')} skipped[/]")
        if stage.learning_rate is not None:
            figures.append(f"lr {words.rate(stage.learning_rate)}")
        if stage.tokens_per_second is not None:
            figures.append(f"{words.count(stage.tokens_per_second)} tokens/s")
        if stage.wait_fraction is not None:
            figures.append(f"wait {words.percent(stage.wait_fraction)}")
        if stage.memory is not None:
            figures.append(f"memory {words.size(stage.memory)}")
        if stage.seconds_left is not None:
            figures.append(f"{words.clock(stage.seconds_left)} left")
        if len(self._view.stages) > 1 and self._view.seconds_left is not None:
            figures.append(f"[dim]all stages {words.clock(self._view.seconds_left)}[/]")
        if stage.seconds_per_step is None and stage.step == 0:
            figures.append("[dim]starting[/]")
        return self._lines(self._bar(stage.step, stage.steps), Text.from_markup("  ".join(figures)))

    def _activity(self) -> RenderableType:
        from rich.text import Text

        view = self._view
        activity = view.activity or ""
        size = view.activity in ("reading", "tokenizer", "tokenizing")
        unit = words.size if size else words.count
        figures = PHASES.get(activity, activity)
        if activity.startswith("boundary"):
            figures = f"writing {activity}"
        if not activity.startswith("waiting") and (view.done or view.total):
            figures += f"  {unit(view.done)}" + (f" of {unit(view.total)}" if view.total else "")
        return self._lines(self._bar(view.done, view.total), Text(figures))

    def _lines(self, bar: RenderableType, figures: Text) -> Table:
        from rich.table import Table

        lines = Table.grid()
        lines.add_row(bar)
        lines.add_row(figures)
        return lines

    def _bar(self, done: int, total: int | None) -> RenderableType:
        from rich.progress_bar import ProgressBar

        width = min(64, self._console.width)
        if not total:
            return ProgressBar(total=None, width=width, pulse=True, pulse_style="cyan")
        return ProgressBar(
            total=total, completed=min(done, total), width=width, complete_style="cyan", finished_style="cyan"
        )
