"""A run directory that somebody else made, or that was damaged: the report is written, or refused in a line."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from stackwise import report
from stackwise.errors import StackWiseError
from stackwise.report.compare import Entry, cells, compare, markdown
from tests.report.conftest import HandMade
from tests.report.test_report import Checked

JUNK = [None, True, -1, 0, 10**30, 1.5, float("nan"), float("inf"), "", "x", "\x1b[2J</script>", [], [1], {}, {"x": 1}]


def mutated(value: Any, draw: random.Random) -> Any:
    """One place of a value replaced, removed or doubled."""
    value = copy.deepcopy(value)
    place = value
    for _ in range(20):
        if not isinstance(place, dict | list) or not place:
            break
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], dict | list) and place[key] and draw.random() < 0.8:
            place = place[key]
            continue
        if draw.random() < 0.2:
            del place[key]
        else:
            place[key] = draw.choice(JUNK)
        break
    return value


@pytest.fixture
def whole(made: HandMade) -> HandMade:
    made.device()
    made.event("data", reused=False, directory="/d", seconds=2.0, documents=3, tokens=9000, bytes=9000)
    for depth in range(3):
        made.stage(depth)
        made.event("held_out", stage=depth, step=60, nats=2.5, best=2.5)
        made.event("writing", stage=depth, boundary=f"{depth:032x}", depth=depth + 1, chunks=4)
        made.event("written", stage=depth, boundary=f"{depth:032x}", bytes=10**6, seconds=1.0, depth=depth + 1)
        made.event("dropped", stage=depth + 1, boundary=f"{depth:032x}", bytes=10**6)
    made.event("diverged", stage=1, step=3, text="stage 1, step 3 diverged", why="x")
    made.event("warning", text="something")
    made.event("fill", before="a [MASK]", after="a b", spans=[["a ", "given"], ["b", "right"]])
    made.event("done", seconds=9.0)
    made.evaluate(3)
    made.save()
    return made


@pytest.mark.parametrize("name", ["run.json", "events.jsonl", "evaluation.json"])
def test_a_report_of_anything(name: str, whole: HandMade) -> None:
    draw = random.Random(name)
    path = whole.run.path / name
    if name == "evaluation.json":
        manifest = json.loads(whole.run.manifest_file.read_text())
        path.write_text(json.dumps(manifest.pop("evaluation")["result"]))
        whole.run.manifest_file.write_text(json.dumps(manifest))
    original = path.read_text()
    written = 0
    for _ in range(20):
        if name == "events.jsonl":
            lines = [json.loads(line) for line in original.splitlines()]
            path.write_text("\n".join(json.dumps(mutated(line, draw)) for line in lines))
        else:
            path.write_text(json.dumps(mutated(json.loads(original), draw)))
        try:
            page = report.write(whole.run).read_text()
            value = compare([Entry(whole.run), Entry(whole.run)])
        except StackWiseError:
            continue
        assert "\x1b" not in markdown(value, "x")
        assert cells(value)
        Checked(page)
        assert "</script>" not in page.rpartition("<script>")[0]
        written += 1
    assert written > (15 if name == "events.jsonl" else 2)


@pytest.mark.parametrize("name", ["events.jsonl", "evaluation.json", "run.json", "report.html"])
@pytest.mark.parametrize("kind", ["fifo", "link", "directory"])
def test_what_is_no_file_is_neither_waited_for_nor_written_through(
    name: str, kind: str, whole: HandMade, tmp_path: Path
) -> None:
    elsewhere, path = tmp_path / "elsewhere", whole.run.path / name
    elsewhere.write_text("mine")
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(elsewhere)
    else:
        path.mkdir()
    with contextlib.suppress(StackWiseError, OSError):  # a line that names it
        report.write(whole.run)
    assert elsewhere.read_text() == "mine"
