"""`run`, `stage run`, `eval`, `generate`, `export` as programs, with the exit codes of the contract."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stackwise.durable import FileLock
from stackwise.pipeline.run import RunDirectory, status
from tests.cli.conftest import COMMAND, Cli, Process, stackwise


def weights(run: Path) -> list[str]:
    return [stage["weights"] for stage in status(RunDirectory(run))["stages"]]


def named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == name]


def test_json_is_one_event_a_line_and_nothing_else(first: tuple[Path, Process]) -> None:
    events = first[1].events
    assert events[0]["event"] == "start"
    assert events[-1]["event"] == "done"
    assert {"data", "device", "fit", "training", "step", "committed", "written", "evaluation", "fill"} <= {
        event["event"] for event in events
    }
    assert named(events, "step")[-1]["step"] == 20
    assert set(named(events, "evaluation")[0]["result"]) >= {"bits_per_byte", "loss", "accuracy", "stages", "baselines"}


def test_the_report_is_beside_the_run(finished_run: Path) -> None:
    page = (finished_run / "report.html").read_text()
    assert "Loss by stage and step" in page
    assert "unigram frequencies" in page


def test_again_everything_is_reused_and_said(finished: Path, here: Path, base: list[str]) -> None:
    before = weights(finished)
    done = stackwise("run", *base, cwd=here)
    assert done.code == 0
    assert done.out.count("reused (committed: the recipe is the same)") == 2
    assert "stages 0–1" in done.out
    assert "baseline: unigram" in done.out
    assert f"report: {Path('runs/micro/report.html')}" in done.out
    assert "\x1b" not in done.out
    assert weights(finished) == before


def test_a_run_that_is_named_has_its_own_configuration(finished: Path) -> None:
    done = stackwise("run", "--run", str(finished), "--json")
    assert done.code == 0
    assert len(named(done.events, "reused")) == 2


def test_a_change_trains_what_it_changes(finished: Path) -> None:
    change = ["-o", "stages.1.training.learning_rate=1e-3", "-o", "training.log_every=5"]
    done = stackwise("run", "--run", str(finished), *change)
    assert done.code == 0
    assert "stage 0: reused" in done.out
    assert "stage 1: training, 20 steps (changed: stages.1.training.learning_rate: 0.003 → 0.001)" in done.out
    lines = [line for line in done.out.splitlines() if " stage 1: step " in line]
    assert 1 <= len(lines) <= 5
    assert all("loss " in line and "tokens/s" in line and "wait " in line for line in lines)


def test_stage_by_stage(base: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    refused = stackwise("stage", "run", "--depth", "1", "--run", str(run), *base)
    assert refused.code == 2
    assert "not committed" in refused.err
    done = stackwise("stage", "run", "--depth", "0", "--run", str(run), *base)
    assert done.code == 0
    assert [stage["state"] for stage in status(RunDirectory(run))["stages"]] == ["done", "pending"]
    done = stackwise("stage", "run", "--depth", "1", "--run", str(run), "--json")
    assert done.code == 0
    assert [event["stage"] for event in named(done.events, "reused")] == [0]
    assert None not in weights(run)


@pytest.mark.parametrize(
    "args",
    [
        ["run", "-o", "training.stepz=3"],
        ["run", "-o", "training.steps"],
        ["run", "--preset", "demmo"],
        ["run", "no-such.yaml"],
        ["run", "x.yaml", "--preset", "micro"],
        ["run", "--preset", "micro", "-o", "data.paths=[nowhere]"],
        ["run", "--preset", "micro", "-o", "model.n_heads=5"],
        ["run", "--preset", "micro", "-o", "device=cuda:99"],
        ["stage", "run", "--depth", "0"],
        ["stage", "run", "--depth", "-1", "--preset", "micro"],
    ],
)
def test_wrong_usage_ends_with_2_and_writes_nothing(args: list[str], here: Path) -> None:
    done = stackwise(*args, cwd=here)
    assert done.code == 2
    assert done.err.startswith("stackwise: ")
    assert done.out == "" or "device" in args[-1]
    assert not (here / "runs").exists()


def start(run: Path, base: list[str], *more: str) -> subprocess.Popen[str]:
    slow = ["-o", "training.steps=3000", "-o", "training.checkpoint_steps=50"]
    command = [*COMMAND, "run", "--run", str(run), *base, *slow, *more, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_ctrl_c_saves_and_says_how_to_go_on(base: list[str], tmp_path: Path, cli: Cli) -> None:
    run = tmp_path / "a run"
    with start(run, base) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "step" and event["step"] > 20:
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
                break
        rest = [json.loads(line) for line in process.stdout]
        said = process.stderr.read()
    assert process.returncode == 75
    assert named(rest, "stopping")
    assert named(rest, "interrupted")
    assert "go on with: stackwise run --preset micro --run" in said
    assert "Traceback" not in said
    assert status(RunDirectory(run))["state"] == "interrupted"
    assert cli("report", "--run", str(run)).exit_code == 0
    assert "interrupted" in (run / "report.html").read_text()
    assert "interrupted" in cli("status", "--run", str(run)).stdout


def test_a_reader_that_is_gone_stops_the_run_as_ctrl_c_does(base: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with start(run, base) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "step":
                break
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 75
    assert "Traceback" not in said
    assert status(RunDirectory(run))["stages"][0]["state"] in ("interrupted", "running")


def test_a_run_that_is_held_is_busy(finished: Path) -> None:
    with FileLock(finished / "run.lock", "the run"):
        done = stackwise("run", "--run", str(finished))
    assert done.code == 4
    assert f"pid {os.getpid()}" in done.err


def test_eval(finished: Path, here: Path, text: Path, cli: Cli) -> None:
    value = json.loads(cli("eval", "--json").stdout)
    assert set(value) >= {"bits_per_byte", "loss", "accuracy", "tokens", "bytes", "stages", "baselines"}
    assert set(value["loss"]) == set(value["accuracy"]) == {"0.15", "0.5", "0.9"}
    assert len(value["stages"]) == 2
    assert "bits/byte" in cli("eval", "--data", str(text / "csv.txt")).stdout
    assert cli("eval", "--data", "nowhere").exit_code == 2


def test_generate(finished: Path, here: Path, cli: Cli) -> None:
    value = json.loads(cli("generate", "def [MASK*4](x): return", "--json").stdout)
    assert value["before"].count("[MASK]") == 4
    assert value["after"].startswith("def ")
    assert cli("generate", "def [MASK*4](x): return").stdout.rstrip("\n") == value["after"]
    Path("hole.txt").write_text("def [MASK*4](x): return")
    assert json.loads(cli("generate", "--file", "hole.txt", "--json").stdout) == value
    assert "before" in cli("generate").stdout
    grown = json.loads(
        cli("generate", "no hole", "--length", "9", "--steps", "3", "--order", "random", "--json").stdout
    )
    assert grown["before"] == "no hole" + 9 * "[MASK]"
    assert grown["after"].startswith("no hole")
    assert "[MASK]" not in grown["after"]
    for wrong, said in (
        (["x", "--length", "90"], "takes 32"),
        ([""], "is empty"),
        (["x", "--causal"], "token by token"),
        (["x [MASK*n] y"], "[MASK*n] is no hole"),
        (["x [MASK*0] y"], "[MASK*0] is no hole"),
    ):
        refused = cli("generate", *wrong)
        assert refused.exit_code == 2
        assert said in refused.stderr
    assert "--exit auto is unused" in cli("generate", "x", "--exit", "auto").stderr
    assert cli("generate", "[MASK]", "--file", "hole.txt").exit_code == 2
    assert cli("generate", "--file", "nowhere.txt").exit_code == 2


def test_export(finished: Path, here: Path, cli: Cli) -> None:
    value = json.loads(cli("export", "--out", "out", "--json").stdout)
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(value["files"])
    assert cli("export", "--out", "out").exit_code == 2
    assert cli("export", "--out", "out", "--force").exit_code == 0
    assert value["architecture"] == "llama"
    native = ["--format", "native", "--dtype", "bfloat16", "--shard-size", "50kB"]
    value = json.loads(cli("export", "--out", "native", *native, "--json").stdout)
    assert value["architecture"] == "stackwise"
    assert "model.safetensors.index.json" in value["files"]
    assert cli("export", "--out", "other", "--shard-size", "much").exit_code == 2
    assert not Path("other").exists()


def test_an_unfinished_run_is_not_used(finished: Path, here: Path, cli: Cli) -> None:
    manifest = json.loads((finished / "run.json").read_text())
    manifest["stages"][1] |= {"state": "pending", "weights": None}
    (finished / "run.json").write_text(json.dumps(manifest))
    for args in (["eval"], ["generate"], ["export", "--out", "out"]):
        result = cli(*args)
        assert result.exit_code == 2
        assert "1 of 2 stages" in result.stderr


def test_the_name_of_a_run_is_one_plain_line(here: Path, base: list[str]) -> None:
    done = stackwise("run", *base, "--run", "a\nb", cwd=here)
    assert done.code == 2
    assert list(here.iterdir()) == []
