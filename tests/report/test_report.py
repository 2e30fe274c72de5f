"""report.html: whole, self-contained and true, for a run in any state."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import pytest

from stackwise import report
from stackwise.errors import NotFound
from stackwise.pipeline.run import RunDirectory
from tests.report.conftest import HandMade

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Checked(HTMLParser):
    """Fails on tags that do not match, and gathers what a page would fetch and what it says."""

    RESOURCES: ClassVar = {"src", "href", "data", "poster", "srcset", "action"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in self.RESOURCES]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in self.RESOURCES]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data


def read(run: RunDirectory) -> Checked:
    page = report.write(run).read_text(encoding="utf-8")
    for svg in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.partition("</svg>")[0] + "</svg>")
    assert "@import" not in page
    assert "url(http" not in page
    checked = Checked(page)
    assert checked.fetched == []
    return checked


def complete(made: HandMade) -> None:
    made.event("start", run="runs/smoke", name="smoke", stages=3)
    made.event("data", reused=False, directory="/d", seconds=4.0, documents=3, tokens=9000, bytes=9000)
    made.device()
    for depth in range(3):
        made.stage(depth)
        if depth < 2:
            made.event("writing", stage=depth, boundary=f"{depth:032x}", chunks=1)
            made.event("written", 3.0, stage=depth, boundary=f"{depth:032x}", bytes=8_000_000, rows=960, seconds=3.0)
    made.event("dropped", stage=1, boundary="0" * 32, bytes=8_000_000)
    made.event("evaluating", samples=64)
    made.evaluate(3)
    made.event("evaluation", 5.0, reused=False, result=made.evaluation)
    spans = [["def ", "given"], ["f", "right"], ["(x)", "given"], ["<b>", "wrong"]]
    made.event("fill", before="def [MASK](x)[MASK][MASK]", after="def f(x)<b>", spans=spans)
    made.event("done", seconds=20.0, evaluation=None)


def test_a_finished_run(made: HandMade) -> None:
    complete(made)
    page = read(made.save())
    for said in (
        "done",
        "3 of 3",
        "bits per byte, held out",
        "2.800",
        "unigram frequencies",
        "first stage only",
        "stages 0–2",
        "Loss by depth, at each masked share",
        "boundary 1",
        "bf16, dropped",
        "writing boundaries",
        "preparation",
        "▒▒",
        "training:",
        "60",
    ):
        assert said in page.text, said
    assert "<b>" in page.text
    assert page.tags.count("mark") == 2 + 2 + 2  # holes, what fills them, the legend


def test_time_by_phase(made: HandMade) -> None:
    complete(made)
    made.save()
    from stackwise.report.facts import read_history

    phases = read_history(made.run.events_file).phases
    assert phases["preparation"] == 4.0
    assert phases["training"] == pytest.approx(3 * 7.0)
    assert phases["writing boundaries"] == pytest.approx(2 * 3.0)
    assert phases["evaluation"] == pytest.approx(7.0)


def test_the_time_between_two_sittings_is_nobodys(made: HandMade) -> None:
    made.device()
    made.stage(0, "running", 20)
    made.event("interrupted", text="stopped")
    made.event("device", 10_000.0, device="cpu", name="x", memory=0, precision="fp32")
    made.event("training", stage=0, recipe="0" * 32, reason="not finished yet", steps=60, trunk=None)
    made.time += 50_000.0  # killed here
    made.device()
    made.event("done", seconds=0.0, evaluation=None)
    from stackwise.report.facts import read_history

    history = read_history(made.run.events_file)
    assert sum(history.phases.values()) < 10
    assert history.sittings == 3
    # The curve of a recipe that goes on is kept.
    assert len(history.curves[0].points) == 20


def test_steps_told_twice_count_once_and_another_recipe_starts_anew(made: HandMade) -> None:
    made.device()
    made.stage(0, "running", 40)
    made.stages.clear()
    made.stage(0, "running", 20)
    from stackwise.report.facts import read_history

    assert [x for x, _ in read_history(made.run.events_file).curves[0].points] == list(range(1, 41))
    made.event("training", stage=0, recipe="f" * 32, reason="changed", steps=60, trunk=None)
    assert read_history(made.run.events_file).curves[0].points == []


@pytest.mark.parametrize("state", ["running", "failed", "interrupted", "pending"])
def test_a_run_in_any_state(state: str, made: HandMade) -> None:
    made.device()
    made.stage(0)
    made.stage(1, state, 0 if state == "pending" else 20)
    if state == "failed":
        made.event("failed", stage=1, text="out of memory <here>")
    page = read(made.save())
    assert "1 of 2" in page.text
    assert "On held-out text" not in page.text
    if state == "failed":
        assert "The run failed: out of memory <here>" in page.text
    if state in ("running", "interrupted"):  # nobody works on it
        assert "the same command resumes" in page.text


def test_a_run_that_has_hardly_begun(made: HandMade) -> None:
    page = read(made.run)
    assert "No stage has begun yet" in page.text
    assert "0 of 3" in page.text


def test_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        report.write(RunDirectory(tmp_path / "nowhere"))


def test_text_from_a_run_is_never_markup(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script>&\"'"
    made = HandMade(tmp_path / "run", data__paths=[evil])
    made.device()
    made.stage(0, reason=evil)
    made.event("warning", stage=0, text=evil)
    made.event("fill", before=evil + "[MASK]", after=evil + evil, spans=[[evil, "given"], [evil, "wrong"]])
    made.evaluate(1)
    assert made.evaluation is not None
    made.evaluation["baselines"][evil] = {"bits_per_byte": 4.0, "loss": {}, "accuracy": {}}
    page = read(made.save())
    assert page.tags.count("script") == 1
    assert page.text.count("alert(1)") >= 5


def test_a_log_with_broken_lines(made: HandMade) -> None:
    complete(made)
    with made.run.events_file.open("a") as file:
        file.write('[1]\n{"no": "event"}\n\n{"time": 1, "event": "st')
    assert "3 of 3" in read(made.save()).text


def test_a_deep_rack(tmp_path: Path) -> None:
    made = HandMade(tmp_path / "run", model__architecture__n_stacks=80)
    made.device()
    for depth in range(80):
        made.stage(depth)
    made.evaluate(80)
    page = read(made.save())
    assert "80 of 80" in page.text
    assert made.run.report_file.stat().st_size < 3_000_000


def test_the_first_stage_and_one_point(tmp_path: Path) -> None:
    made = HandMade(tmp_path / "run", model__architecture__n_stacks=1)
    made.device()
    made.stage(0, "running", 10)
    made.evaluate(1)
    assert "the rack" in read(made.save()).text


def test_what_was_not_measured_is_left_open(made: HandMade) -> None:
    complete(made)
    assert made.evaluation is not None
    made.evaluation["bits_per_byte"] = None
    for stage in made.evaluation["stages"]:
        stage["bits_per_byte"] = None
        stage["loss"]["0.9"] = None
    made.evaluation["bytes"] = 0
    assert "not measured" in read(made.save()).text


def test_no_torch(made: HandMade) -> None:
    complete(made)
    made.save()
    program = "import sys; from pathlib import Path; from stackwise import report\n"
    program += "from stackwise.pipeline.run import RunDirectory\n"
    program += f"report.write(RunDirectory(Path({json.dumps(str(made.run.path))}))); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
