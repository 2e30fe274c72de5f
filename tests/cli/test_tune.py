"""`stackwise tune` as a program: killed and gone on with, the same trials; what is shared; what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from stackwise.config import StackWiseConfig
from stackwise.pipeline.run import RunDirectory, status
from tests.cli.conftest import COMMAND, Cli, stackwise

RATE, DECAY = "stages.1.training.learning_rate", "stages.1.training.weight_decay"


@pytest.fixture(scope="module")
def args(base: list[str]) -> list[str]:
    small = [
        "-o",
        "training.steps=10",
        "-o",
        "evaluation.samples=8",
        "-o",
        "training.eval_every=5",
        "-o",
        "store.keep=none",
    ]
    return ["tune", *base, *small, "-s", f"{RATE}=1e-3..1e-2:log", "-s", f"{DECAY}=0,0.1", "--jobs", "2"]


@pytest.fixture(scope="module")
def whole(args: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A search of four trials, two at a time, and its result."""
    place = tmp_path_factory.mktemp("tune") / "whole"
    done = stackwise(*args, "--trials", "4", "--run", str(place), "--json")
    assert done.code == 0, done.err
    return place, json.loads(done.out)


def test_stages_in_common_train_once_and_the_best_is_kept(whole: tuple[Path, dict[str, Any]]) -> None:
    place, value = whole
    assert [trial["state"] for trial in value["trials"]] == ["done"] * 4
    # Two begin at once: one trains the lowest stage, the other waits for it.
    assert sorted((trial["stages_trained"], trial["stages_reused"]) for trial in value["trials"]) == [
        (1, 1), (1, 1), (1, 1), (2, 0),
    ]  # fmt: skip
    assert value["sharing"] == {"trained": 5, "stages": 8}
    # The boundary that all of them read is kept, whatever store.keep says.
    logs = [RunDirectory(Path(trial["run"])).events_file.read_text() for trial in value["trials"]]
    assert sum(log.count('"event": "written"') for log in logs) == 2, "it, and its held-out rows, once"
    assert not any('"event": "recomputing"' in log for log in logs)
    best = min(value["trials"], key=lambda trial: trial["value"])
    assert value["best"] == {key: best[key] for key in ("value", "settings", "run")}
    result = RunDirectory(Path(best["run"])).evaluation()
    assert result is None or result["bits_per_byte"] == best["value"]
    assert "Parzen" not in (place / "tune.html").read_text()
    assert "5 for 8 stages" in (place / "tune.html").read_text()
    chosen = StackWiseConfig.from_yaml(str(place / "best.yaml"))
    assert chosen.stage_training(1).learning_rate == best["settings"][RATE]
    assert chosen.store.path == str(place / "store"), "where its stages are"


def test_killed_it_goes_on_with_the_same_trials(
    args: list[str], whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    place = tmp_path / "killed"
    with subprocess.Popen(
        [*COMMAND, *args, "--trials", "4", "--run", str(place)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            known = (
                json.loads((place / "study.json").read_text()) if (place / "study.json").exists() else {"trials": []}
            )
            if len(known["trials"]) >= 3:  # two may begin between two looks
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL  # in its middle, whichever trials had ended
    done = stackwise("tune", "--run", str(place), "--trials", "4", "--json")
    assert done.code == 0, done.err
    value = json.loads(done.out)

    def told(found: dict[str, Any]) -> list[Any]:
        return [(trial["settings"], trial["value"], trial["state"]) for trial in found["trials"]]

    assert told(value) == told(whole[1])
    assert value["sharing"] == whole[1]["sharing"]


@pytest.mark.stress
def test_interrupted_it_is_saved_and_trials_behind_are_ended(args: list[str], tmp_path: Path) -> None:
    place = tmp_path / "stopped"
    command = [*args, "--run", str(place), "--trials", "9", "--jobs", "1", "--pruner", "median", "--sampler", "random"]
    with subprocess.Popen([*COMMAND, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if "trial 0 (1 of 9)" in line:
                process.send_signal(signal.SIGINT)
                break
        said = process.stderr.read()
    assert process.returncode == 75, said
    assert "go on with: stackwise tune --preset micro" in said
    done = stackwise(*command, "--json")
    assert done.code == 0, done.err
    trials = json.loads(done.out)["trials"]
    assert "pruned" in [trial["state"] for trial in trials]
    for trial in trials:
        if trial["state"] == "pruned":
            assert trial["value"] is None
            assert status(RunDirectory(Path(trial["run"])))["stages"][-1]["state"] in ("interrupted", "done")


def test_several_objectives_and_a_function_of_ones_own(
    args: list[str], whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "import yaml\n\n\ndef decay(run):\n    config = yaml.safe_load((run / 'stackwise.yaml').read_text())\n"
        "    return 1.0 - config['stages'][1]['training']['weight_decay']\n"
    )
    store = f"store.path={whole[0] / 'store'}"  # everything is there: nothing trains
    command = [*args[:-6], "-s", f"{DECAY}=0,0.1", "--sampler", "grid", "-o", store, "--run", "front", "--json"]
    done = stackwise(*command, "--objective", "bits_per_byte", "--objective", "mine:decay", cwd=tmp_path)
    assert done.code == 0, done.err
    value = json.loads(done.out)
    first, second = value["trials"]
    assert (first["values"]["mine:decay"], second["values"]["mine:decay"]) == (1.0, 0.9)
    beaten = first["value"] >= second["value"]
    assert value["front"] == ([1] if beaten else [0, 1])


SLURM = {
    "sbatch": """#!/bin/sh
n=$$; queue={place}
sed 's/^srun /exec srun /' "$1" > "$queue/script-$n"
touch "$queue/job-$n"
export SLURM_JOB_ID=$n SLURM_NTASKS=1 SLURM_LOCALID=0 SLURM_PROCID=0 SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1
setsid sh -c 'sh "$0"; rm -f "$1"' "$queue/script-$n" "$queue/job-$n" > /dev/null 2>&1 < /dev/null &
echo "Submitted batch job $n"
""",
    "srun": """#!/bin/sh
while [ "${1#-}" != "$1" ]; do
  case "$1" in --output|--error) shift;; esac
  shift
done
echo $$ > "{place}/pid-$SLURM_JOB_ID"
exec "$@" 2> "{place}/err-$SLURM_JOB_ID" > "{place}/out-$SLURM_JOB_ID"
""",
    "squeue": """#!/bin/sh
ls {place} | sed -n 's/^job-//p'
""",
    "scancel": """#!/bin/sh
echo "$1" >> {place}/cancelled
pkill -TERM --parent "$(cat {place}/pid-$1)"
""",
    "sacct": "#!/bin/sh\n",
}


@pytest.mark.parametrize("ended", [False, True], ids=["while they run", "after they end"])
def test_trials_as_jobs_of_slurm_which_go_on_when_the_search_is_killed(
    ended: bool, args: list[str], whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a Slurm of a few lines, which runs what it is given."""
    tools, queue, place = tmp_path / "bin", tmp_path / "queue", tmp_path / "jobs"
    tools.mkdir()
    queue.mkdir()
    for name, text in SLURM.items():
        (tools / name).write_text(text.replace("{place}", str(queue)))
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    command = [*args, "--trials", "2", "--engine", "slurm", "--run", str(place), "-o", "device=cpu"]
    with subprocess.Popen([*COMMAND, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 60
        while time.monotonic() < end and len(list(place.glob("trials/*/jobs.json"))) < 2:  # both known as queued
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    while ended and time.monotonic() < end and list(queue.glob("job-*")):
        time.sleep(0.05)
    done = stackwise(*command, "--json")
    assert done.code == 0, done.err
    trials = json.loads(done.out)["trials"]
    assert [(one["settings"], one["value"]) for one in trials] == [
        (one["settings"], one["value"]) for one in whole[1]["trials"][:2]
    ], "those of a search here"
    assert sorted(one["stages_trained"] for one in trials) == [1, 2]
    assert len(list(queue.glob("script-*"))) == 2, "what was queued was followed, not queued again"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--trials", "0", "-s", f"{RATE}=1,2"], "0 is not in the range"),
        (["--trials", "3"], "nothing is searched"),
        (["-s", f"{RATE}=1e-3..1e-2"], "how many trials"),
        (["--trials", "3", "-s", "training.log_every=1,2"], "changes nothing"),
        (["--trials", "3", "-s", f"{RATE}=1e-3..1e-2", "--sampler", "grid"], "range of fractions"),
        (["--trials", "3", "-s", f"{RATE}=1e-3..1e-2", "--objective", "speed"], "no such figure"),
        (["--trials", "3", "-s", f"{RATE}=1e-3..1e-2", "--pruner", "median"], "training.eval_every"),
        (["--trials", "3", "-s", f"{RATE}=1e-3..1e-2", "-o", f"{RATE}=1e-3"], "both fixed"),
        (["--trials", "3", "-s", "training.growth.0.until=0.5,0.8"], "has no list to change item 0 of"),
        (["--trials", "3", "-s", f"{RATE}=1,2", "--engine", "slurm"], "there is no Slurm here"),
        (["--trials", "3", "-s", f"{RATE}=1,2", "--engine", "local", "--max-time", "9m"], "--max-time is for"),
    ],
)
def test_refused_before_anything_is_written(
    more: list[str], says: str, base: list[str], here: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = cli("tune", *base, *more)
    assert (done.exit_code, says in done.output) == (2, True), done.output
    assert not any(here.iterdir())


@pytest.mark.parametrize(("engine", "used", "unused"), [("local", "minutes", "partition"), ("ray", "cpus", "minutes")])
def test_what_an_engine_does_not_read_of_slurm_is_named(
    engine: str, used: str, unused: str, base: list[str], here: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stackwise.pipeline.search.study import Study

    monkeypatch.setattr(Study, "run", lambda *_: None)
    monkeypatch.setattr("stackwise.pipeline.batch.cluster.job_parameters", lambda *_, **__: {})
    values = {"minutes": "9", "partition": "x", "cpus": "3"}
    given = [word for name in (used, unused) for word in ("-o", f"slurm.{name}={values[name]}")]
    done = cli("tune", *base, *given, "--trials", "2", "-s", f"{RATE}=1,2", "--engine", engine)
    (line,) = [line for line in done.output.splitlines() if "--engine" in line]
    assert f"slurm.{unused}" in line
    assert used not in line


def test_without_optuna_the_extra_is_named(
    base: list[str], here: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = cli("tune", *base, "--trials", "2", "-s", f"{RATE}=1,2")
    assert done.exit_code == 2
    assert "stackwise[tune]" in done.output


def test_a_population_takes_over_stages_by_their_recipes(base: list[str], here: Path) -> None:
    small = ["-o", "training.steps=6", "-o", "evaluation.samples=8", "-o", "training.eval_every=6"]
    command = ["tune", *base, *small, "--sampler", "pbt", "-s", "training.learning_rate=1e-4..1e-1:log"]
    assert stackwise(*command, "--trials", "3").code == 2
    assert stackwise(*command, "--trials", "4", "-s", "model.d_model=16,32").code == 2
    assert not any(here.iterdir())
    process = subprocess.Popen([*COMMAND, *command, "--trials", "4", "--run", "p"], stdout=subprocess.DEVNULL)
    record, end = here / "p" / "study.json", time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if record.exists() and '"scores": []' not in record.read_text():  # the first generation is over
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = stackwise("tune", "--run", "p", "--json")
    assert done.code == 0, done.err
    trials = json.loads(record.read_text())["trials"]
    first = [trial["scores"][0] for trial in trials]
    best, worst = first.index(min(first)), first.index(max(first))
    assert [trial["origins"] for trial in trials] == [[best if n == worst else n] for n in range(4)]
    runs = [status(RunDirectory(here / "p" / "trials" / f"{n:04d}"))["stages"] for n in (best, worst)]
    assert runs[0][0]["weights"] == runs[1][0]["weights"], "taken over"
    assert runs[0][1]["weights"] != runs[1][1]["weights"], "and changed above"
    rates = [trials[n]["settings"]["stages.1.training.learning_rate"] for n in (best, worst)]
    assert rates[1] / rates[0] == pytest.approx(0.8, rel=1e-4) or rates[1] / rates[0] == pytest.approx(1.25, rel=1e-4)
    assert json.loads(done.out)["trials"][worst]["stages_reused"] == 1
