"""A run while it goes: plain lines for logs, a table redrawn in place for terminals, or its events as JSON."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any, Self

from stackwise import words
from stackwise.cli.events import RunView, StageView, step_line
from stackwise.cli.output import STATES, console, is_live, plain, print_event, say, table
from stackwise.pipeline.events import EVENTS, PHASES, wording

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

Event = dict[str, Any]
SECONDS = 5.0
"""Between two lines of progress, and between two lines on skipped steps."""
ROWS = 16
"""Stages shown at once; of more, those around the running one."""


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
