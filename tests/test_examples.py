"""The examples of several steps run as their pages say, with a small rack and text of the standard library."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.unused import unused_settings
from stackwise.pipeline.schedule import schedule
from tests.conftest import run

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {"model.d_model": 32, "training.seq_len": 32, "training.rows": 320, "evaluation.samples": 16}


def step(example: str, script: str, *words: str, cwd: Path) -> str:
    """Run a step of an example as its user does; what it prints."""
    command = [sys.executable, str(EXAMPLES / example / script), *words]
    environment = os.environ | {"XDG_CACHE_HOME": str(cwd / "cache")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_gpt2_by_stages_and_fused(tmp_path: Path) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [str(library / name) for name in ("ast.py", "argparse.py", "bdb.py", "calendar.py")]
    step("gpt2_fusion", "data_loader.py", "--prepare", *texts, "--vocab-size", "300", cwd=tmp_path)
    settings = [f"{key}={value}" for key, value in (SMALL | {"training.steps": 12}).items()]
    step("gpt2_fusion", "simple_train.py", *settings, cwd=tmp_path)
    step("gpt2_fusion", "fuse.py", *settings, "training.fusion.steps=30", cwd=tmp_path)
    compared = step("gpt2_fusion", "evaluate.py", cwd=tmp_path)
    stages, fused = (re.search(rf"^runs/{name} .*", compared, re.MULTILINE) for name in ("stages", "fused"))
    assert stages is not None
    assert fused is not None
    assert fused[0].split()[-2:] == ["1", "3"], "the fusion alone trained; the three stages were there"
    figure = [float(row[0].split()[-4]) for row in (stages, fused)]
    assert figure[1] < figure[0], "bits per byte: fused training gains"
    assert (tmp_path / "exported" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", sorted(path.stem for path in (EXAMPLES / "progressive_training").glob("*.yaml")))
def test_a_rack_built_stack_by_stack(name: str, text: Path, tmp_path: Path) -> None:
    overrides = SMALL | {"training.steps": 2, "data.paths": [str(text)], "data.vocab_size": 300}
    config = StackWiseConfig.from_yaml(EXAMPLES / "progressive_training" / f"{name}.yaml", overrides)
    assert not unused_settings(config)
    stages = schedule(config)
    events = run(config, tmp_path / "run")
    assert [event["stage"] for event in events if event["event"] == "committed"] == list(range(len(stages)))
