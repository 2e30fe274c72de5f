"""What a run has come to so far, from its events."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stackwise import words

if TYPE_CHECKING:
    from stackwise.config import StackWiseConfig

Event = dict[str, Any]
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
