"""A Slurm of one machine, for tests: `sbatch`, `srun`, `scontrol` by the name that this file is started by.

A job's script runs in the background once the job that it depends on has succeeded; srun starts all its tasks here,
with what Slurm says to each. `kill -USR2` to the pid in `job-ID.pid` reaches all tasks, as a time limit's warning does.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

PLACE = Path(__file__).resolve().parent / "jobs"


def option(name: str, default: str, words: list[str]) -> str:
    return next((word.partition("=")[2] for word in words if word.startswith(f"--{name}=")), default)


def sbatch(script: Path) -> None:
    job = 100 + len(list(PLACE.glob("script-*")))
    kept = PLACE / f"script-{job}"
    kept.write_text(script.read_text())
    print(f"Submitted batch job {job}", flush=True)
    if os.fork():
        return
    os.setsid()
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(quiet, stream)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    asked = [line.removeprefix("#SBATCH ").strip() for line in kept.read_text().splitlines() if "#SBATCH" in line]
    after = option("dependency", "", asked).removeprefix("afterok:")
    while after and not (end := PLACE / f"job-{after}.code").exists():
        time.sleep(0.05)
    if after and end.read_text() != "0":
        (PLACE / f"job-{job}.code").write_text("cancelled")
        return
    environment = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NUM_NODES": option("nodes", "1", asked)}
    environment["SLURM_JOB_NODELIST"] = option("nodelist", "localhost", asked).strip("'")
    environment["FAKE_TASKS"] = option("ntasks-per-node", "1", asked)
    while True:
        code = subprocess.run(["bash", str(kept)], env={**os.environ, **environment}).returncode
        again = PLACE / f"requeue-{job}"
        if not again.exists():
            break
        again.rename(PLACE / f"requeued-{job}")
    (PLACE / f"job-{job}.code").write_text(str(code))


def srun(words: list[str]) -> int:
    job, nodes, tasks = (os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "FAKE_TASKS"))
    places: dict[str, str] = {}
    while words[0].startswith("--"):
        word = words.pop(0)
        if word in ("--output", "--error"):
            places[word] = words.pop(0)
    ranks, count = [], int(nodes) * int(tasks)
    for rank in range(count):
        about = {"PROCID": rank, "LOCALID": rank % int(tasks), "NODEID": rank // int(tasks), "NTASKS": count}
        about |= {"STEP_ID": 0, "STEP_NUM_TASKS": count, "STEP_NUM_NODES": nodes}
        environment = {f"SLURM_{name}": str(value) for name, value in about.items()}
        environment["SLURM_STEP_NODELIST"] = os.environ["SLURM_JOB_NODELIST"]
        out, errors = (
            os.open(re.sub("%t", str(rank), places[word].replace("%j", job)), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            for word in ("--output", "--error")
        )
        ranks.append(subprocess.Popen(words, env={**os.environ, **environment}, stdout=out, stderr=errors))
    signal.signal(signal.SIGUSR2, lambda *_: [rank.send_signal(signal.SIGUSR2) for rank in ranks])
    (PLACE / f"job-{job}.pid").write_text(str(os.getpid()))
    return max(abs(rank.wait()) for rank in ranks)


if __name__ == "__main__":
    command = Path(sys.argv[0]).name
    if command == "sbatch":
        sbatch(Path(sys.argv[1]))
    elif command == "srun":
        sys.exit(srun(sys.argv[1:]))
    elif command == "scontrol":
        (PLACE / f"requeue-{sys.argv[2]}").touch()
