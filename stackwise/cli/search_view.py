"""A search while it goes: a table of its trials redrawn in place, or plain lines for logs."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from stackwise import words
from stackwise.cli.drawing import Table, drawn, state
from stackwise.cli.output import Line, is_live, say
from stackwise.pipeline.batch.grid import label, shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from stackwise.pipeline.search.record import Trial
    from stackwise.pipeline.search.study import Study

Event = dict[str, Any]
SECONDS = 5.0
"""Between two lines of progress of a trial."""
ROWS = 16
"""Trials shown at once: the best one, and the newest."""


def watcher(study: Study) -> contextlib.AbstractContextManager[Callable[[Trial, Event], None]]:
    """Who shows the trials' events: a live view where the terminal can be drawn on, plain lines otherwise."""
    if is_live(sys.stdout):
        from rich.console import Console

        return Live(study, Console(highlight=False))
    return contextlib.nullcontext(Lines(study))


def figure(name: str, value: float) -> str:
    """An objective's value, as people read it."""
    return words.size(value) if name == "memory" else words.duration(value) if name == "seconds" else f"{value:.4f}"


def settings_of(trial: Trial) -> str:
    """A trial's settings, in a few words."""
    return ", ".join(f"{label(key)} {shown(value)}" for key, value in trial.settings.items())


def outcome(study: Study, trial: Trial) -> str:
    """What a trial came to, in a line."""
    if trial.values is not None:
        named = zip(study.search.objectives, trial.values, strict=True)
        came = ", ".join(f"{name} {figure(name, value)}" for name, value in named)
        came += " (the best so far)" if study.best is trial else ""
    else:
        came = trial.state if trial.failure is None else f"failed: {trial.failure.splitlines()[0]}"
    stages = f"{words.plural(trial.trained, 'stage')} trained, {trial.reused} reused"
    of = f"trial {trial.number} ({trial.number + 1} of {study.search.trials})"
    return f"{of}: {came}; {settings_of(trial)}; {stages}"


def remark(trial: Trial, event: Event) -> str | None:
    """What an event says that is worth a line of its own; None: nothing."""
    if event["event"] not in ("warning", "waiting") or trial.state != "running":
        return None
    stage = event.get("stage")
    return f"trial {trial.number}: {'' if stage is None else f'stage {stage} '}{event['text']}"


class Lines:
    """Says when trials begin and end, and now and then how far they are."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._spoke = time.monotonic()
        self._begun: dict[int, float] = {}

    def __call__(self, trial: Trial, event: Event) -> None:
        """Say what an event of a trial says, where it is due."""
        kind, now = event["event"], time.monotonic()
        if kind == "trial_begun":
            self._begun[trial.number] = now
        elif kind == "trial_ended":
            self._say(f"{outcome(self._study, trial)}, {words.duration(now - self._begun[trial.number])}")
        elif (text := remark(trial, event)) is not None:
            self._say(text)
        elif kind == "step" and now - self._spoke >= SECONDS:
            loss = "" if event["loss"] is None else f", loss {event['loss']:.3f}"
            self._say(f"trial {trial.number}: stage {event['stage']}, step {event['step']:,}/{event['steps']:,}{loss}")

    def _say(self, text: str) -> None:
        self._spoke = time.monotonic()
        say(f"{time.strftime('%H:%M:%S')} {text}")
        sys.stdout.flush()  # into a pipe as well: somebody looks at it as it goes


@dataclass
class Going:
    """A trial that goes on: its stages so far, and the steps of the one in training."""

    stage: int = 0
    step: int = 0
    steps: int = 0
    trained: int = 0
    reused: int = 0


class Live:
    """Redraws the trials a few times a second; what should stay is printed above.

    Args:
        console: Where to draw.
    """

    def __init__(self, study: Study, console: Console) -> None:
        from rich.live import Live as Drawing

        self._study, self._console = study, console
        self._lock = threading.Lock()  # events come from the trials' threads, and it is drawn in another
        self._going: dict[int, Going] = {}
        self._begun, self._ended = time.monotonic(), 0
        self._drawing = Drawing(console=console, get_renderable=self.render, refresh_per_second=4, transient=True)

    def __call__(self, trial: Trial, event: Event) -> None:
        """Take up an event of a trial."""
        with self._lock:
            going = self._going.setdefault(trial.number, Going())
            match event["event"]:
                case "step" | "training":
                    going.stage, going.step, going.steps = event["stage"], event.get("step", 0), event["steps"]
                case "committed":
                    going.trained += 1
                case "reused":
                    going.reused += 1
                case "trial_ended":
                    self._going.pop(trial.number)
                    self._ended += 1
        if (text := remark(trial, event)) is not None:
            self._console.print(drawn([[text]]))

    def __enter__(self) -> Self:
        self._drawing.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._drawing.stop()

    @property
    def seconds_left(self) -> float | None:
        """Until the last trial, at the pace of those that ended in this sitting."""
        if not self._ended:
            return None
        left = self._study.search.trials - sum(trial.state != "running" for trial in self._study.trials)
        return (time.monotonic() - self._begun) / self._ended * left

    def render(self) -> Text:
        """The trials as they stand."""
        study, names = self._study, list(self._study.search.objectives)
        with self._lock:
            going, trials, best = dict(self._going), list(study.trials), study.best
        newest = sorted({*([] if best is None else [best.number]), *(entry.number for entry in trials[-ROWS:])})[
            -ROWS - 1 :
        ]
        figures = range(2, 2 + len(names))
        table = Table("trial", "state", *names, "step", "trained", "shared", "settings", right=(0, *figures))
        for trial in (trials[number] for number in newest):
            at = going.get(trial.number) if trial.state == "running" else None
            values = [figure(name, value) for name, value in zip(names, trial.values or [], strict=False)]
            table.add_row(
                str(trial.number),
                state(trial.state),
                *values,
                *[""] * (len(names) - len(values)),
                f"stage {at.stage} {at.step:,}/{at.steps:,}" if at is not None and at.steps else "",
                str(trial.trained if at is None else at.trained),
                str(trial.reused if at is None else at.reused),
                settings_of(trial),
                style="bold" if trial is best else "",
            )
        over = [trial for trial in trials if trial.state != "running"]
        trained, reused = sum(trial.trained for trial in over), sum(trial.reused for trial in over)
        parts = [f"{len(over)} of {words.plural(study.search.trials, 'trial')}"]
        parts += [f"{words.plural(trained, 'stage')} trained, {reused} shared"]
        if best is not None and best.values is not None:
            parts.append(f"best {figure(names[0], best.values[0])}, trial {best.number}")
        if (left := self.seconds_left) is not None:
            parts.append(f"{words.clock(left)} left")
        lines: list[Line] = [[], *table.lines(self._console.width), [], ["  ".join(parts)]]
        return drawn(lines)
