"""A tracker from outside the package, in one file: it gets every figure, also of a run that was killed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml

from stackwise.config.yaml_files import dump
from tests.conftest import Micro
from tests.pipeline.storm import Command

TABLE = '''
import csv
from pathlib import Path

from stackwise.config.fields import Text
from stackwise.config.kinds import TRACKERS, Tracker


class Table:
    name = "table"

    def __init__(self, path):
        self.path = Path(path)

    def open(self, about, number, known):
        return known or f"{about.name}-{number}"

    def log(self, points):
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows([point.stage, point.name, point.step, point.value] for point in points)

    def close(self, state):
        pass


@TRACKERS.register("table")
class TableTracker(Tracker):
    """Rows of a CSV file."""

    path: Text

    def placed(self, absolute):
        return self.model_copy(update={"path": absolute(self.path)})

    def build(self):
        return Table(self.path)
'''


def test_it_gets_every_step_of_a_run_that_was_killed(
    micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "table.py").write_text(TABLE)
    monkeypatch.setenv("STACKWISE_PLUGINS", str(tmp_path / "table.py"))
    table = tmp_path / "figures.csv"
    # As text: this process may have loaded its plug-ins already, and knows no tracker of this name.
    tree = yaml.safe_load(dump(micro(training__steps=60)))
    tree["tracking"] = {"trackers": [{"kind": "table", "path": str(table)}]}
    (tmp_path / "stackwise.yaml").write_text(yaml.safe_dump(tree))
    command = Command(tmp_path / "stackwise.yaml", tmp_path / "run")
    command.until("checkpoint", 1)
    command.process.kill()
    command.end()
    code, err = Command(tmp_path / "stackwise.yaml", tmp_path / "run").end()
    assert code == 0, err
    with table.open(newline="") as file:
        losses = {(stage, int(step)) for stage, name, step, _ in csv.reader(file) if name == "loss"}
    assert losses == {(stage, step) for stage in "01" for step in range(1, 61)}
