"""Out of memory: what is said then, what is proposed, and that it is enough; under real limits."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.model import ModelConfig
from stackwise.errors import UsageError
from stackwise.host import host_total
from stackwise.pipeline.costs import SAFETY, below_memory, oom_advice
from stackwise.pipeline.device import is_out_of_memory, memory
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.plan import Plan, Vocabulary
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.schedule import schedule
from tests.conftest import Micro

WIDE = {
    "model.d_model": 128,
    "training.seq_len": 128,
    "training.rows": 520,
    "training.steps": 1,
    "evaluation.samples": 4,
}


def limited(text: Path, run: Path, megabytes: int, **settings: object) -> subprocess.CompletedProcess[str]:
    """`stackwise stage run` under a limit on the data memory of each of its processes."""
    options = [f"{key}={value}" for key, value in {"data.paths": [str(text)], **WIDE, **settings}.items()]
    return subprocess.run(
        [sys.executable, "-m", "stackwise", "stage", "run", "--depth", "0", "--preset", "micro", "--run", str(run)]
        + [word for option in options for word in ("-o", option)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (megabytes * 10**6, megabytes * 10**6)),
        check=False,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts mapped memory on Linux alone")
def test_what_is_proposed_is_enough(text: Path, tmp_path: Path) -> None:
    done = limited(text, tmp_path / "run", 900, **{"training.batch_size": 512})
    assert done.returncode == 1
    assert "stackwise: out of memory: " in done.stderr
    assert "Traceback" not in done.stderr
    assert "go on with: stackwise stage run --depth 0 --preset micro" in done.stderr
    assert "of 900 MB of data memory (ulimit -d)" in done.stderr
    found = re.search(r"training\.batch_size: 512 → (\d+) \(with accumulation: 1 → (\d+) ", done.stderr)
    assert found is not None, done.stderr
    batch, accumulation = map(int, found.groups())
    assert batch * accumulation == 512
    assert "training.seq_len: 128 → " in done.stderr
    again = limited(
        text, tmp_path / "run", 900, **{"training.batch_size": batch, "training.accumulation": accumulation}
    )
    assert again.returncode == 0, again.stderr


def test_a_stage_beyond_the_machine_is_not_begun(micro: Micro, tmp_path: Path) -> None:
    rows = 1 << (host_total() // 10**4).bit_length()  # a row of micro takes about 0.1 MB
    changes = {"training__batch_size": rows, "training__rows": 64, "training__steps": 1, "training__swap": "never"}
    with pytest.raises(UsageError) as refused:
        Runner(micro(**changes), RunDirectory(tmp_path / "run"), lambda event: None).run(dry=True)
    with pytest.raises(UsageError):
        Runner(micro(**changes), RunDirectory(tmp_path / "runs" / "new"), lambda event: None).run()
    assert not (tmp_path / "runs").exists(), "what was refused left something"
    # What it says to change is enough, and the rows of a step stay.
    batch, accumulation = map(int, re.findall(r"→ (\d+)", refused.value.hint or "")[:2])
    assert batch * accumulation == rows
    fewer = micro(**{**changes, "training__batch_size": batch, "training__accumulation": accumulation})
    Runner(fewer, RunDirectory(tmp_path / "run"), lambda event: None).run(dry=True)


@pytest.mark.parametrize(
    ("batch", "length", "gigabytes", "expected"),
    [
        (64, 512, 12, "training.batch_size: 64 → "),
        (1, 8192, 3, "training.seq_len: 8192 → "),
        (1, 64, 1.2, "training.block_size: 8 → "),
    ],
)
def test_each_change_fits_alone(batch: int, length: int, gigabytes: float, expected: str) -> None:
    changes = {"model.architecture.n_stacks": 16, "training.block_size": 8, "training.batch_size": batch}
    changes |= {"training.seq_len": length, "model.max_seq_len": 8192}
    config = StackWiseConfig.from_preset("gpt2-small", {**changes, "precision": "fp32"})
    stage, limit = schedule(config)[1], int(gigabytes * 10**9)
    assert Estimate(config, 50_000, stage).memory > SAFETY * limit
    said = oom_advice(
        Estimate(config, 50_000, stage), {"limit": limit, "base": 0, "peak": limit // 2, "what": "GPU memory"}
    )
    assert expected in said, said
    for key, value in re.findall(r"(training\.\w+): \d+ → (\d+)", said):
        config = StackWiseConfig.from_preset("gpt2-small", {**changes, "precision": "fp32", key: int(value)})
        assert Estimate(config, 50_000, schedule(config)[1]).memory <= SAFETY * limit, key
        assert changes.get(key, 0) % int(value) == 0 or key == "training.block_size"


def test_a_worker_killed_as_the_system_kills_is_told_what_to_lower(text: Path, tmp_path: Path) -> None:
    options = (f"data.paths=[{text}]", "training.steps=100000", "training.rows=500")
    process = subprocess.Popen(
        [sys.executable, "-m", "stackwise", "run", "--preset", "micro", "--run", str(tmp_path / "run"), "--json"]
        + [word for option in options for word in ("-o", option)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if (event := json.loads(line))["event"] == "step":
            os.kill(event["pid"], signal.SIGKILL)
            break
    said = process.communicate()[1]
    assert process.returncode == 1
    assert "was killed by SIGKILL (often the system's way of saying: out of memory)" in said
    assert "training.batch_size: 16 → 8" in said


def test_what_says_that_memory_ran_out() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("out of memory"))
    now = memory()
    assert 0 < now.used < now.limit


def test_memory_below_a_stage_counts_what_the_feed_forward_itself_says(micro: Micro) -> None:
    config = micro()
    config.precision = "fp32"
    stage, below = schedule(config)[1], schedule(config)[0]

    class Wide(type(config.model.ffn)):  # type: ignore[misc]
        def kept(self, model: ModelConfig) -> int:
            return 10_000

    def estimated() -> int:
        plan = SimpleNamespace(config=config, vocabulary=Vocabulary(300, 299), rowset=lambda number: ("", 8))
        plan.base = lambda stage: (None, (below,))
        return below_memory(cast(Plan, plan), stage)

    before, kept = estimated(), config.model.ffn.kept(config.model)
    config.model.__dict__["ffn"] = Wide()
    rows = max(1, 8192 // config.training.seq_len)
    assert estimated() - before == 4 * rows * config.training.seq_len * (10_000 - kept)
