"""A run while it goes: what its events come to, as plain lines for logs, or as a table redrawn in place."""

from __future__ import annotations

import abc
import contextlib
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from stackwise import words
from stackwise.cli.drawing import Table, drawn, state
from stackwise.cli.output import Line, Styled, is_live, print_event, say
from stackwise.cli.tables import ranks_table
from stackwise.pipeline.events import EVENTS, PHASES, Event, wording

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.text import Text

    from stackwise.config import StackWiseConfig


SECONDS = 5.0
"""Between two lines of progress, and between two lines on skipped steps."""
ROWS = 16
"""Stages shown at once; of more, those around the running one."""
RANKS = 8
"""Ranks shown at once."""
SMOOTH = {"loss": 0.3, "tokens_per_second": 0.3, "seconds_per_step": 0.12}
"""Weight of the newest of the figures that the live view smooths."""


@dataclass
class StageView:
    """One stage; `figures` are those of its last step, smoothed."""

    depth: int
    blocks: tuple[int, int]
    window: int = 0
    label: str = ""
    """Its number, and its window's where there are several."""
    steps: int | None = None
    state: str = "pending"
    step: int = 0
    why: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    held_out: float | None = None
    last: tuple[float, int] | None = None
    passes: Event | None = None
    """How far the step in hand is, where it takes long."""

    def take_step(self, event: Event) -> None:
        """Take up the figures of a step."""
        now = time.monotonic()
        event = dict(event)  # the log and the trackers have the same one
        # A step that comes again after a rollback has no pace.
        if self.last is not None and event["step"] > self.last[1]:
            event["seconds_per_step"] = (now - self.last[0]) / (event["step"] - self.last[1])
        self.last, self.step, self.steps = (now, event["step"]), event["step"], event["steps"]
        self.passes = None
        for name, share in SMOOTH.items():
            before, value = self.figures.get(name), event.get(name)
            if value is None:  # no loss where every step since was skipped
                event[name] = before
            elif before is not None:
                event[name] = (1 - share) * before + share * value
        self.figures = event

    @property
    def done(self) -> float:
        """Steps, with the share of the one in hand."""
        return self.step + (self.passes["done"] / self.passes["total"] if self.passes is not None else 0.0)

    @property
    def seconds_left(self) -> float | None:
        """Until its last step, at the pace so far."""
        pace = self.figures.get("seconds_per_step")
        return None if pace is None or self.steps is None else pace * (self.steps - self.step)


@dataclass
class RunView:
    """A run as its events have it so far.

    Args:
        config: Its configuration.
        run: Its directory.
        earlier: The stages' states before, as `status` gives them: the results of stages that are reused.
    """

    config: StackWiseConfig
    run: str
    earlier: list[dict[str, Any]] = field(default_factory=list)
    stages: list[StageView] = field(default_factory=list)
    current: int | None = None
    activity: str | None = None
    done: int = 0
    total: int | None = None
    evaluation: dict[str, Any] | None = None
    fill: Event | None = None
    group: Event | None = None
    """How the ranks of the running stage fare."""
    saved: bool = False

    def __post_init__(self) -> None:
        self._plan()

    def _plan(self) -> None:
        """The stages as the configuration has them."""
        from stackwise.pipeline.recipe import known_steps
        from stackwise.pipeline.schedule import schedule

        self.stages = []
        for stage in schedule(self.config):
            steps = known_steps(self.config, stage)
            self.stages.append(StageView(stage.depth, (stage.first, stage.last), stage.window, stage.label, steps))

    def observe(self, event: Event) -> None:
        """Take up an event."""
        kind, place = event["event"], event.get("stage")
        match kind:
            case "settled":
                self.config = self.config.model_copy(deep=True)  # the runner goes on with its own
                self.config.training.block_size = event["value"]
                self._plan()
            case "plan":
                self._planned(event["stages"])
            case "preparing" | "evaluating":
                self._progress(str(event.get("phase", kind)), event.get("done", 0), event.get("total"))
            case "evaluation":
                self.evaluation = event["result"]
            case "fill":
                self.fill = event
            case "ranks":
                self.group = event
            case "training" | "step":
                self.current = place
        if kind in ("training", "reused"):
            self.saved = True  # from here on a checkpoint or a commit is there
        if kind in ("plan", "data", "evaluation", "done", "training", "written"):
            self.activity = None
        if isinstance(place, int) and place < len(self.stages):
            self._observe_stage(self.stages[place], event)

    def _observe_stage(self, stage: StageView, event: Event) -> None:
        match event["event"]:
            case "training":
                stage.state, stage.steps, stage.why = "running", event["steps"], event["reason"]
                stage.step, stage.skipped, stage.figures, stage.last, stage.passes = 0, 0, {}, None, None
            case "resumed":
                stage.step, stage.why = event["step"], f"resumed at step {event['step']:,}"
            case "step":
                stage.take_step(event)
            case "passes" if event["step"] > stage.step:
                stage.passes = event
            case "diverged":
                stage.skipped += "to" not in event  # a rollback is no skipped step
            case "held_out":
                stage.held_out = event["nats"]
            case "committed":
                stage.state, stage.step = "done", stage.steps or stage.step
            case "reused":
                stage.state, stage.why = "done", event["reason"]
                for row in self.earlier:
                    if (row["depth"], row.get("window", 0), row["state"]) == (stage.depth, stage.window, "done"):
                        stage.figures, stage.step, stage.steps = {"loss": row["loss"]}, row["step"], row["steps"]
            case "writing" | "recomputing" | "boundary":
                self._progress(f"boundary {stage.depth + 1}", event.get("done", 0), event.get("total"))
            case "failed":
                stage.state = "failed"

    def _planned(self, stages: list[dict[str, Any]]) -> None:
        """The stages as they are planned: how many windows they have may not have been known before."""
        if len(stages) != len(self.stages):
            blocks = {view.depth: view.blocks for view in self.stages}
            several = {entry["depth"] for entry in stages if entry.get("window", 0)}
            self.stages = []
            for entry in stages:
                depth, window = entry["depth"], entry.get("window", 0)
                label = f"{depth}, window {window}" if depth in several else str(depth)
                self.stages.append(StageView(depth, blocks[depth], window, label))
        for entry in stages:
            self.stages[entry["stage"]].why = entry["reason"]
            self.stages[entry["stage"]].steps = entry["steps"]

    def label(self, place: int) -> str:
        """What the stage at a place of the schedule is called."""
        return self.stages[place].label if place < len(self.stages) else str(place)

    def _progress(self, activity: str, done: int, total: int | None) -> None:
        self.activity, self.done, self.total = activity, done, total

    def end(self) -> None:
        """The run ended: a stage still running was interrupted."""
        self.activity = None
        for stage in self.stages:
            if stage.state == "running":
                stage.state = "interrupted"

    @property
    def running(self) -> StageView | None:
        """The stage in training."""
        stage = self.stages[self.current] if self.current is not None else None
        return stage if stage is not None and stage.state == "running" else None

    @property
    def slowest(self) -> list[str]:
        """Which rank the others wait for, in words; nothing where there is one."""
        if self.group is None:
            return []
        longest = max(rank.get("sync_fraction") or 0.0 for rank in self.group["ranks"])
        return [f"slowest rank {self.group['slowest']}, others wait up to {words.percent(longest)}"]

    @property
    def seconds_left(self) -> float | None:
        """Until the last step of the last stage, as if every stage took as long a step as this one."""
        pace = self.running.figures.get("seconds_per_step") if self.running is not None else None
        if pace is None or any(stage.steps is None for stage in self.stages):
            return None
        left = [stage for stage in self.stages if stage.state in ("pending", "running")]  # what is reused takes no time
        return float(pace * sum((stage.steps or 0) - stage.step for stage in left))


def step_figures(figures: Event, stage: StageView) -> list[str]:
    """The figures of a step in words, those of its event or smoothed ones."""
    loss = figures.get("loss")
    parts = [
        f"loss {loss:.3f}" if loss is not None else "loss –",  # every step since the last one shown was skipped
        *([f"held out {stage.held_out:.3f}"] if stage.held_out is not None else []),
        f"lr {words.rate(figures['learning_rate'])}",
        f"{words.count(figures['tokens_per_second'])} tokens/s",
        f"wait {words.percent(figures['wait_fraction'])}",
        f"memory {words.size(figures['memory'])}",
    ]
    if stage.skipped:
        parts.append(f"{words.plural(stage.skipped, 'step')} skipped")
    if stage.seconds_left is not None and stage.step < (stage.steps or 0):
        parts.append(f"{words.clock(stage.seconds_left)} left")
    return parts


def passes_made(passes: Event) -> str:
    """How far a step is, in words."""
    made = f"{passes['done']:,} of {passes['total']:,} passes"
    return f"step {passes['step']:,} so far: {made}, {words.clock(passes['seconds'])}"


def watcher(view: RunView, as_json: bool) -> contextlib.AbstractContextManager[Callable[[Event], None]]:
    """Who shows the events: JSON lines, a live view where the terminal can be drawn on, plain lines otherwise."""
    if as_json:
        return contextlib.nullcontext(print_event)  # programs fold events themselves
    if is_live(sys.stdout):
        from rich.console import Console

        return Live(view, Console(highlight=False))
    return Lines(view, view.config.training.log_every)


class _View(abc.ABC):
    """What both views do with an event: keep the run's state, and find its words."""

    def __init__(self, view: RunView) -> None:
        self._view = view
        self._said_skipped: dict[int, float] = {}

    def __call__(self, event: Event) -> None:
        """Show an event."""
        self._view.observe(event)
        self.take(event)

    @abc.abstractmethod
    def take(self, event: Event) -> None:
        """Show an event that the state of the run has been brought level with."""

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
        self._phase: str | None = None
        self._spoke = time.monotonic()

    def take(self, event: Event) -> None:
        """Print what an event says, where it is due."""
        kind, place = event["event"], event.get("stage", 0)
        if kind == "step":
            before, step = self._shown.get(place), event["step"]
            late = time.monotonic() - self._spoke >= SECONDS  # fast steps would fill a log
            due = before is None or (late and step // self._every > before // self._every)
            if due or step == event["steps"]:
                self._shown[place] = step
                figures = [f"step {step:,}/{event['steps']:,}", *step_figures(event, self._view.stages[place])]
                figures += self._view.slowest
                self._say(self.at(place, "  ".join(figures)))
            return
        if kind == "training":
            self._shown.pop(event["stage"], None)  # it begins anew: its first step is shown
        if (shown := EVENTS.get(kind)) is not None and shown.shown_by == "progress":
            self._say_progress(event)
        elif (text := self.words_of(event)) is not None:
            for line in text.splitlines():
                self._say(line)

    def _say_progress(self, event: Event) -> None:
        phase, before = event.get("phase"), self._phase
        self._phase = phase
        if phase not in (None, before) and event.get("total") is None:  # how long it takes is not known
            self._say(f"{PHASES.get(phase, phase)} …")
            return
        if time.monotonic() - self._spoke < SECONDS or not event.get("total"):
            return
        share = words.percent(event["done"] / event["total"])
        if event["event"] == "passes":
            self._say(self.at(event["stage"], passes_made(event)))
        elif event["event"] == "boundary":
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
        self._drawing = Drawing(console=console, get_renderable=self.render, refresh_per_second=5, transient=False)

    def take(self, event: Event) -> None:
        """Print above the table what it does not show."""
        kind = EVENTS.get(event["event"])
        if kind is not None and kind.shown_by == "line" and (text := self.words_of(event)) is not None:
            self._console.print(drawn([[Styled(text, kind.style)]]))

    def __enter__(self) -> Self:
        name = f"{self._view.config.name}: {words.plural(len(self._view.stages), 'stage')} in {self._view.run}"
        self._console.print(drawn([[Styled(name, "bold")]]))
        self._drawing.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._view.end()
        self._drawing.stop()

    def render(self) -> Text:
        """What is to be seen now."""
        lines: list[Line] = [[], *self._stages()]
        view = self._view
        if view.activity is not None:
            lines += [[], self._bar(view.done, view.total), [self._activity(view.activity)]]
        elif (stage := view.running) is not None:
            lines += [[], self._bar(stage.done, stage.steps), self._training(stage)]
            if view.group is not None:
                lines += [[], *ranks_table(view.group, RANKS)]
        return drawn(lines)

    def _stages(self) -> list[Line]:
        stages, current = self._view.stages, self._view.current or 0
        table = Table("stage", "blocks", "state", "step", "loss", "why", right=(0, 3, 4))
        first = min(max(0, current - ROWS // 2), max(0, len(stages) - ROWS))  # so that the running one is in sight
        if first:
            table.add_row("…", "", f"{first} above", "", "", "", style="dim")
        for stage in stages[first : first + ROWS]:
            loss = stage.figures.get("loss")
            table.add_row(
                stage.label,
                words.span(*stage.blocks),
                state(stage.state),
                f"{stage.step:,}/{stage.steps:,}" if stage.steps else "",
                f"{loss:.3f}" if loss is not None else "",
                Styled(stage.why, "dim"),
            )
        if (rest := len(stages) - first - ROWS) > 0:
            table.add_row("…", "", f"{rest} more", "", "", "", style="dim")
        return table.lines(self._console.width)

    def _training(self, stage: StageView) -> Line:
        begun = f"stage {stage.label}  {stage.step:,}/{stage.steps or 0:,}"
        if stage.passes is not None:
            begun = f"{begun}  {passes_made(stage.passes)}"
        if "step" not in stage.figures:
            return [begun, Styled("" if stage.passes is not None else "  starting", "dim")]
        left = self._view.seconds_left if len(self._view.stages) > 1 else None
        whole = "" if left is None else f"  all stages {words.clock(left)}"
        return ["  ".join([begun, *step_figures(stage.figures, stage)]), Styled(whole, "dim")]

    def _activity(self, activity: str) -> str:
        done, total = self._view.done, self._view.total
        text = f"writing {activity}" if activity.startswith("boundary") else PHASES.get(activity, activity)
        if activity.startswith("waiting") or not (done or total):
            return text
        unit = words.size if activity in ("reading", "tokenizer", "tokenizing") else words.count
        return f"{text}  {unit(done)}" + (f" of {unit(total)}" if total else "")

    def _bar(self, done: float, total: int | None) -> Line:
        room = min(64, self._console.width)
        if total:
            full = int(room * min(done, total) / total)
            return [Styled("━" * full, "cyan"), Styled("─" * (room - full), "dim")]
        at = int(5 * time.monotonic()) % max(1, room - 8)  # it moves where nobody knows how far there is to go
        return [Styled("─" * at, "dim"), Styled("━" * 8, "cyan"), Styled("─" * max(0, room - 8 - at), "dim")]
