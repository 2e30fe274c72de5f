"""`stackwise sweep` and `stackwise compare` as programs."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

from stackwise.pipeline.run import RunDirectory, status
from stackwise.store import ActivationStore
from tests.cli.conftest import COMMAND, Cli, stackwise


def test_interrupted_a_sweep_goes_on_and_a_failed_run_stops_no_other(text: Path, tmp_path: Path, cli: Cli) -> None:
    place = tmp_path / "sweep"
    # The second diverges: it is in the table, and the third goes on.
    args = ["--preset", "micro", "--dir", str(place), "-o", f"data.paths=[{text}]", "-o", "training.steps=8"]
    args += ["-o", "stages.1.training.learning_rate=1e-3,1e14,2e-3"]
    with subprocess.Popen(
        [*COMMAND, "sweep", *args, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "committed" and event["stage"] == 1:
                process.send_signal(signal.SIGINT)
                break
        rest = [json.loads(line) for line in process.stdout]
        said = process.stderr.read()
    assert process.returncode == 75, said
    assert "go on with: stackwise sweep --preset micro --dir" in said
    assert rest[-1]["event"] == "sweep", "as far as it went, there is a table"
    again = stackwise("sweep", *args)
    assert again.code == 1
    assert "1 of 3 combinations failed: stage1.learning_rate-100000000000000" in again.err
    assert again.out.count("no longer a finite number") >= 1
    table = json.loads((place / "sweep.json").read_text())
    assert table["keys"] == ["stages.1.training.learning_rate"]
    assert [run["state"] for run in table["runs"]] == ["done", "failed", "done"]
    good = [run for run in table["runs"] if run["state"] == "done"]
    assert [(run["trained"], run["reused"]) for run in good] == [(2, 0), (1, 1)]
    assert all(run["bits_per_byte"] > 0 and run["seconds"] > 0 for run in good)
    assert "stage1.learning_rate-0.002" in (place / "sweep.md").read_text()
    names = [run["name"] for run in good]
    with ActivationStore(place / "store", create=False) as store:
        assert {Path(run).name for run in store.runs()} >= set(names), "each is a root of the store"
    first = [status(RunDirectory(place / name))["stages"][0] for name in names]
    assert first[0]["weights"] == first[1]["weights"]
    third = stackwise("sweep", *args[:-1], "stages.1.training.learning_rate=1e-3,2e-3", "--json")
    assert third.code == 0
    assert [e["reused"] for e in third.events if e["event"] == "combination"] == [True, True]
    assert not [e for e in third.events if e["event"] == "training"]
    seen = json.loads(cli("sweep", *args, "--dry-run", "--json").stdout)
    assert [run["stages"] for run in seen["runs"]] == [["store", "store"], ["store", "train"], ["store", "store"]]
    # The same table falls out for any runs.
    drawing = tmp_path / "held-out.svg"
    runs = [str(place / name) for name in names]
    value = json.loads(cli("compare", *runs, "--plot", str(drawing), "--json").stdout)
    assert value["keys"] == ["stages.1.training.learning_rate"]
    assert [run["values"] for run in value["runs"]] == [{value["keys"][0]: 1e-3}, {value["keys"][0]: 2e-3}]
    assert value["runs"][0]["bits_per_byte"] == good[0]["bits_per_byte"]
    assert [round(group["held_out"]["mean"], 4) for group in value["groups"]] == [
        round(run["bits_per_byte"], 4) for run in value["runs"]
    ]
    assert value["groups"][1]["against"]["low"] < value["groups"][1]["against"]["high"]
    assert drawing.read_text().startswith("<svg")
    assert cli("compare", *runs, "--plot", str(tmp_path / "no" / "x.svg")).exit_code == 2
    assert "stage1.learning_rate" in cli("compare", *runs).stdout
    assert cli("compare", str(place / "nowhere")).exit_code == 2
