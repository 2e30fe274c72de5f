"""A run on a terminal: a line a stage, the running one with its figures, redrawn in place."""

from __future__ import annotations

from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stackwise.cli.output import STATES, plain, table
from stackwise.cli.views.state import RunView, StageView
from stackwise.cli.views.wording import PHASES, wording
from stackwise.report import words

Event = dict[str, Any]
ROWS = 16
"""Stages shown at once; of more, those around the running one."""
SILENT = ("plan", "training", "committed", "writing", "reused", "resumed", "done")
"""What the table shows anyway."""


class Live:
    """Redraws the run a few times a second; what should stay is printed above.

    Args:
        view: Kept up to date with what is told.
        console: Where to draw.
    """

    def __init__(self, view: RunView, console: Console) -> None:
        self._view, self._console = view, console
        self._live = RichLive(console=console, get_renderable=self._render, refresh_per_second=5, transient=False)

    def __call__(self, event: Event) -> None:
        """Take up an event."""
        self._view.observe(event)
        if event["event"] in SILENT:
            return
        if (text := wording(event)) is not None:
            place = event.get("stage")
            where = ""
            if isinstance(place, int) and event["event"] != "dropped":
                where = f"stage {self._view.label(place)}: "
            style = {"warning": "yellow", "failed": "red", "stopping": "yellow", "interrupted": "yellow"}
            self._console.print(plain(where + text), style=style.get(event["event"], "dim"))

    def __enter__(self) -> Self:
        name = f"{self._view.config.name}: {words.plural(len(self._view.stages), 'stage')} in {self._view.run}"
        self._console.print(plain(name), style="bold")
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._view.end()
        self._live.stop()

    def _render(self) -> RenderableType:
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
        figures = [f"stage {stage.label}", f"{stage.step:,}/{stage.steps or 0:,}"]
        if stage.loss is not None:
            figures.append(f"loss {stage.loss:.3f}")
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
        view = self._view
        activity = view.activity or ""
        size = view.activity in ("reading", "tokenizer", "tokenizing")
        unit = words.size if size else words.count
        figures = PHASES.get(activity, activity)
        if activity.startswith("boundary"):
            figures = f"writing {activity}"
        if activity != "waiting" and (view.done or view.total):
            figures += f"  {unit(view.done)}" + (f" of {unit(view.total)}" if view.total else "")
        return self._lines(self._bar(view.done, view.total), Text(figures))

    def _lines(self, bar: RenderableType, figures: Text) -> Table:
        lines = Table.grid()
        lines.add_row(bar)
        lines.add_row(figures)
        return lines

    def _bar(self, done: int, total: int | None) -> RenderableType:
        width = min(64, self._console.width)
        if not total:
            return ProgressBar(total=None, width=width, pulse=True, pulse_style="cyan")
        return ProgressBar(
            total=total, completed=min(done, total), width=width, complete_style="cyan", finished_style="cyan"
        )
