"""What a run looks like while it goes, from events made by hand and on a real terminal."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import termios
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stackwise.cli.output import say_all
from stackwise.cli.tables import held_out_table
from stackwise.cli.views import Lines, Live, RunView
from stackwise.config import StackWiseConfig
from stackwise.pipeline.events import wording
from tests.cli.conftest import COMMAND

FIGURES = {"learning_rate": 2.1e-3, "tokens_per_second": 8420.0, "wait_fraction": 0.012, "memory": 612_000_000}


def step(number: int, loss: float = 2.5, stage: int = 0) -> dict[str, Any]:
    return {"event": "step", "stage": stage, "step": number, "steps": 60, "losses": [loss], "loss": loss, **FIGURES}


EVENTS: list[dict[str, Any]] = [
    {"event": "start", "run": "runs/smoke", "name": "smoke", "stages": 3},
    {"event": "note", "text": "a setting is unused"},
    {"event": "preparing", "phase": "reading", "done": 10, "total": 100},
    {
        "event": "data",
        "reused": False,
        "directory": "/d",
        "seconds": 2.0,
        "documents": 3,
        "tokens": 9000,
        "bytes": 9000,
    },
    {"event": "device", "device": "cpu", "name": "2 CPU cores", "memory": 8 * 10**9, "precision": "fp32"},
    {
        "event": "plan",
        "stages": [
            {"stage": 0, "depth": 0, "action": "reuse", "reason": "the same", "steps": 60, "recipe": "aa"},
            {"stage": 1, "depth": 1, "action": "train", "reason": "not trained yet", "steps": 60, "recipe": None},
            {"stage": 2, "depth": 2, "action": "train", "reason": "not trained yet", "steps": 60, "recipe": None},
        ],
    },
    {"event": "fit", "disk_needed": 1e9, "disk_free": 5e10, "memory_needed": 6e8, "memory_total": 8e9},
    {"event": "reused", "stage": 0, "recipe": "aa", "reason": "committed: the recipe is the same"},
    {"event": "training", "stage": 1, "recipe": "bb", "reason": "changed: [x] → y", "steps": 60, "trunk": "cc"},
    {"event": "resumed", "stage": 1, "step": 5, "steps": 60},
    step(9, stage=1),
    step(10, stage=1),
    {"event": "checkpoint", "stage": 1, "step": 10, "seconds": 0.1},
    step(60, 2.25, stage=1),
    {"event": "committed", "stage": 1, "recipe": "bb", "parts": {}},
    {"event": "writing", "stage": 1, "boundary": "dd", "chunks": 4},
    {"event": "boundary", "stage": 1, "done": 1, "total": 4},
    {"event": "written", "stage": 1, "boundary": "dd", "bytes": 8_000_000, "rows": 960, "seconds": 2.0},
    {"event": "dropped", "stage": 1, "boundary": "ee", "bytes": 8_000_000},
    {"event": "recomputing", "stage": 1, "text": "boundary 2 is not in the store: made again"},
    {"event": "warning", "stage": 2, "text": "something [odd]"},
    {"event": "stopping", "text": "finishing the step in hand and saving"},
    {"event": "evaluating", "samples": 64},
    {"event": "failed", "stage": 2, "text": "out of memory"},
    {"event": "interrupted", "text": "stage 2 stopped at step 3"},
    {"event": "something new", "stage": 2},
    {"event": "done", "seconds": 75.0, "evaluation": None},
]


@pytest.fixture
def view() -> RunView:
    known = [{"depth": 0, "state": "done", "loss": 3.125, "step": 60, "steps": 60}]
    return RunView(StackWiseConfig.from_preset("smoke"), "runs/smoke", known)


def test_plain_lines(view: RunView, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(view, every=10)
    for event in EVENTS:
        lines(event)
    said = [line[9:] for line in capsys.readouterr().out.splitlines()]
    for facts in (
        ("a setting is unused",),
        ("stage 0", "(the same)"),
        ("stages 1–2", "60", "(not trained yet)"),
        ("stage 0", "(committed: the recipe is the same)"),
        ("stage 1", "60", "(changed: [x] → y)"),
        ("stage 1", "8.00 MB", "2.00 s", "4.00 MB/s"),
        ("1:15",),
    ):
        assert any(all(fact in line for fact in facts) for line in said), facts
    steps = [line for line in said if "step " in line and "loss" in line]
    assert [line.split("  ")[0] for line in steps] == ["stage 1: step 9/60", "stage 1: step 60/60"]
    assert all(figure in steps[0] for figure in ("2.1e-3", "8,420", "1.2%", "612 MB"))


def test_plain_lines_are_seconds_apart(
    view: RunView, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lines = Lines(view, every=10)
    for number in range(1, 61):  # half a minute: the first, the last, and one every few seconds
        now += 0.5
        lines(step(number))
    said = [line[9:].split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == [f"stage 0: step {number}/60" for number in (1, 11, 21, 31, 41, 51, 60)]


def test_work_of_unknown_length_is_said_as_it_begins(view: RunView, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(view, every=10)
    for _ in range(3):
        lines({"event": "preparing", "phase": "compiling a block", "done": 0, "total": None})
    (said,) = capsys.readouterr().out.splitlines()
    assert "compiling a block" in said


def test_a_step_that_takes_long_shows_its_passes(
    view: RunView, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    lines, live = Lines(view, every=10), Live(view, console)
    lines(EVENTS[8])
    for made in range(1, 10):
        now += 2.5
        passes = {"event": "passes", "stage": 1, "step": 1, "steps": 2, "done": 100 * made, "total": 1000}
        lines(passes | {"seconds": 2.5 * made})
        live(passes | {"seconds": 2.5 * made})
    said = capsys.readouterr().out.splitlines()
    assert [made for made in range(1, 10) if any(f"{100 * made} of 1,000" in line for line in said)] == [2, 4, 6, 8]
    console.print(live.render())
    bar, below = console.file.getvalue().splitlines()[-2:]  # type: ignore[attr-defined]
    assert "900 of 1,000" in below
    assert bar.count("━") == int(64 * 0.9 / 60)  # the share of the step in hand
    live(step(1, stage=1))
    assert view.stages[1].passes is None


def test_the_live_view_follows(view: RunView) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    with Live(view, console) as live:
        for event in EVENTS:
            live(event)
            console.print(live.render())
    drawn = out.getvalue()
    assert "smoke: 3 stages in runs/smoke" in drawn
    assert "something [odd]" in drawn
    assert "3.125" in drawn  # what the stage that is reused came to before
    assert "changed: [x] → y" not in drawn.rpartition("stage  blocks")[2]  # resumed since
    assert view.stages[1].state == "done"
    assert view.stages[2].state == "failed"


def test_a_deep_rack_shows_the_stages_around_the_running_one() -> None:
    view = RunView(StackWiseConfig.from_preset("llama-70b", {"training.block_size": 1}), "runs/x")
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    live = Live(view, console)
    live({"event": "training", "stage": 40, "recipe": "", "reason": "not trained yet", "steps": 60, "trunk": None})
    console.print(live.render())
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "32 above" in drawn
    assert "32 more" in drawn
    assert len(drawn.splitlines()) < 26


def test_the_running_stage_has_a_bar_and_its_figures_under_it(view: RunView) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    live = Live(view, console)
    for event in EVENTS[:12]:
        live(event)
    console.print(live.render())
    lines = [line.strip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert set(lines[-2]) <= set("━─")
    assert all(
        figure in lines[-1] for figure in ("stage 1", "10/60", "2.500", "2.1e-3", "8,420", "1.2%", "612 MB", "0:")
    )


def test_ranks_are_under_the_running_stage_the_slowest_marked(
    view: RunView, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    live, lines = Live(view, console), Lines(view, every=1)
    ranks = [
        {"rank": number, "step": 9, "tokens_per_second": 2100.0, "wait_fraction": 0.02, "memory": 612_000_000}
        | {"sync_fraction": 0.1 if number == 11 else 0.4}
        for number in range(12)
    ]
    for event in [*EVENTS[:11], {"event": "ranks", "stage": 1, "ranks": ranks, "slowest": 11}, EVENTS[11]]:
        live(event)
        lines(event)
    lines(step(60, stage=1))
    console.print(live.render())
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [line.split() for line in drawn.splitlines()]
    assert ["11", "2,100", "2.0%", "10%", "612", "MB", "slowest"] in rows
    assert ["…", "4", "more"] in rows
    assert any("11" in line and "40%" in line for line in capsys.readouterr().out.splitlines())


def test_time_left_follows_the_pace(view: RunView, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    view.observe({"event": "training", "stage": 0, "reason": "", "steps": 60})
    assert view.seconds_left is None
    for number in range(1, 11):
        now += 0.5
        view.observe(step(number))
    assert view.stages[0].seconds_left == pytest.approx(25.0)
    assert view.seconds_left == pytest.approx(25.0 + 60.0)


def test_every_event_of_the_runner_has_words() -> None:
    silent = {"start", "preparing", "step", "boundary", "checkpoint", "evaluating", "something new"}
    assert {event["event"] for event in EVENTS if wording(event) is None} == silent


def test_the_held_out_table_bears_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    result = {
        "bits_per_byte": None,
        "loss": {"0.15": 2.0, "1.0": None},
        "accuracy": {},
        "tokens": 10,
        "bytes": 0,
        "baselines": {"unigram": {"loss": {"0.15": 3.0}}},
    }
    say_all(held_out_table(result))
    shown = capsys.readouterr().out
    assert "loss 15%" in shown
    assert "baseline: unigram" in shown


def on_terminal(*args: str, **env: str) -> tuple[int, str]:
    """The command line on a terminal of 100 columns: exit code and what was drawn."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    with subprocess.Popen(
        [*COMMAND, *args], stdin=follower, stdout=follower, stderr=follower, env={**os.environ, **env}
    ) as process:
        os.close(follower)
        drawn = b""
        try:
            while data := os.read(leader, 65536):
                drawn += data
        except OSError:  # the other end is closed
            pass
    os.close(leader)
    return process.returncode, drawn.decode()


@pytest.mark.parametrize(("env", "styled"), [({"TERM": "xterm-256color"}, True), ({"TERM": "dumb"}, False)])
def test_a_finished_run_on_a_terminal(env: dict[str, str], styled: bool, finished: Path) -> None:
    code, drawn = on_terminal("run", "--run", str(finished), **env)
    assert code == 0
    assert ("\x1b[" in drawn) == styled
    assert "held out" in drawn
    assert "committed: the recipe is the same" in drawn


def test_no_color(finished: Path) -> None:
    code, drawn = on_terminal("status", "--run", str(finished), TERM="xterm-256color", NO_COLOR="1")
    assert code == 0
    assert "\x1b[3" not in drawn
    assert "stages done" in drawn
    assert "\x1b[3" in on_terminal("status", "--run", str(finished), TERM="xterm-256color")[1]
