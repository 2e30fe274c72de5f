"""Baselines: groups compose to valid configurations, the command trains them, and a sweep shares stages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

from baselines.compose import CONFIGS, configuration, experiments, options, refusal, register

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "baselines" / "scripts" / "train.py"
TINY = [
    "model=decoder/gpt2_family/tiny",
    "data=files",
    "data.paths=[text.txt]",
    "data.tokenizer=bytes",
    "data.vocab_size=null",
    "model.d_model=16",
    "training.steps=4",
    "training.seq_len=32",
    "training.batch_size=2",
    "evaluation.samples=4",
    "device=cpu",
]


@pytest.fixture(scope="module")
def compose():
    register()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield hydra.compose


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("model", options("model"))
def test_every_model_goes_with_every_way_of_training(compose, model):
    composed = compose("config", [f"model={model}", "~training"])
    for training in options("training"):
        # as Hydra merges the group; it takes a tenth of a second for each composition
        merged = OmegaConf.merge(composed, {"training": OmegaConf.load(CONFIGS / "training" / f"{training}.yaml")})
        config = configuration(merged, "x")
        assert config.n_stages >= 1
        assert config.unused == []


@pytest.mark.parametrize("training", options("training"))
def test_ways_of_training_compose(compose, training):
    composed = compose("config", ["model=decoder/llama_family/1b", f"training={training}"])
    base = compose("config", ["model=decoder/llama_family/1b", "~training"])
    merged = OmegaConf.merge(base, {"training": OmegaConf.load(CONFIGS / "training" / f"{training}.yaml")})
    assert configuration(composed, "x") == configuration(merged, "x")


def test_experiments_compose(compose):
    for name in experiments():
        composed = compose(name, ["data.paths=[corpus.txt]"])
        assert configuration(composed, "x").name != "x"


def test_a_sweep_trains_no_stage_twice(tmp_path):
    (tmp_path / "text.txt").write_text((ROOT / "stackwise" / "cli" / "views.py").read_text())
    done = train(tmp_path, "--multirun", "training=layerwise,blockwise", "evaluation=lm", *TINY)
    assert done.returncode == 0, done.stderr
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("multirun/*/*/*/result.json"))]
    assert len(results) == 2
    assert results[0]["suites"]["lm"]["likelihood"] == "exact"
    assert results[0]["evaluation"] == results[1]["evaluation"]  # stages of one block: the same recipes
    assert len(list((tmp_path / "runs" / "store" / "stages").iterdir())) == 2


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("model.attention.windw", "model.attention.window"),
        ("model.attention.window", "+model.attention.window"),
        ("model.attention.kv_heads", "gqa"),
        ("seeed", "seed"),
        ("seed.x", "seed"),
        ("xyz.a", "model.d_model"),
    ],
)
def test_a_wrong_key_names_what_there_is_settings_of_choices_too(compose, key, named):
    with pytest.raises(HydraException) as raised:
        compose("config", [f"{key}=3"])
    assert named in str(refusal(raised.value).hint)


def test_the_first_part_of_a_path_names_what_begins_so(compose):
    with pytest.raises(HydraException) as raised:
        compose("experiments/bert")
    assert "experiments/bert_reproduction/bert_base_glue" in str(refusal(raised.value).hint)


WRONG = [
    ["model=encoder/bert_family/tinny"],
    ["training=growht"],
    ["model.d_modl=3"],
    ["training.batch_size=many"],
    ["data=files"],
    ["evaluation=glue"],
    ["evaluation=lm", "suites.names=[ml]"],
    ["--config-name=experiments/none"],
    ["tiny"],
]
FORKED = """
import contextlib, io, json, os, runpy, sys
import baselines.scripts.train
for arguments in json.loads(sys.argv[1]):
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        out, errors, sys.argv[1:] = io.StringIO(), io.StringIO(), arguments
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = baselines.scripts.train.main()
        print(json.dumps([arguments, code, out.getvalue(), errors.getvalue()]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
"""The command with each of several lists of arguments; what is imported is imported once."""


def test_a_wrong_override_is_a_line_and_writes_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FORKED, json.dumps(WRONG)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [arguments for arguments, *_ in results] == WRONG, done.stderr
    for arguments, code, out, errors in results:
        assert code == 2, arguments
        assert len(errors.splitlines()) in (1, 2), arguments
        assert "Traceback" not in errors + out
    assert not (tmp_path / "runs").exists()
