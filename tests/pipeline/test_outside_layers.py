"""An attention and a feed-forward with a loss of its own, each from outside the package: they do all that ours do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise import registry
from stackwise.config import StackWiseConfig
from stackwise.config.yaml_files import dump
from stackwise.errors import UsageError
from stackwise.model import Cache, add_adapters, build_block
from stackwise.pipeline.committed.generate import Sampling, generate
from stackwise.pipeline.committed.load import load_rack
from stackwise.pipeline.committed.use import export_rack
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.schedule import schedule
from stackwise.pretrained import load_rack as load_export
from tests.conftest import Micro, run
from tests.pipeline.storm import killed
from tests.pipeline.test_run import named, weights

registry.load_plugins()  # before the environment names a file that is imported here by itself

from tests.pipeline import outside_layers  # noqa: E402

PLUGIN = Path(outside_layers.__file__)
LAYERS: dict[str, Any] = {
    "model__attention": {"kind": "near", "reach": 5},
    "model__ffn": {"kind": "experts", "balance": 0.1},
    "model__d_ff": 64,
}
"""One of each kind, together in every block."""
SMALL = {"training__steps": 30, "training__checkpoint_steps": 4, "training__eval_every": 6, "evaluation__samples": 8}


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers and commands find the kinds as a user's would."""
    monkeypatch.setenv(registry.PLUGINS, str(PLUGIN))


@pytest.fixture(scope="module")
def staged(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its configuration, and a run of it in stages that nothing disturbed."""
    directory = tmp_path_factory.mktemp("staged")
    config = micro(**SMALL, **LAYERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(registry.PLUGINS, str(PLUGIN))
        events = run(config, directory / "run")
    return config, directory / "run", events


def test_a_killed_run_ends_with_the_same_weights(staged: Any, tmp_path: Path) -> None:
    config, undisturbed, _ = staged
    killed(config, tmp_path / "run", 1)
    assert weights(tmp_path / "run") == weights(undisturbed)


def test_swapped_and_resident_are_the_same(micro: Micro, tmp_path: Path) -> None:
    values = {**SMALL, **LAYERS, "training__mode": "end_to_end", "training__accumulation": 2}
    run(micro(**values, training__swap="never"), tmp_path / "resident")
    events = run(micro(**values, training__swap="always", training__swap_parts=2), tmp_path / "swapped")
    assert any("is swapped" in event["text"] for event in named(events, "note"))
    assert weights(tmp_path / "swapped") == weights(tmp_path / "resident")


def test_an_export_computes_the_same(staged: Any, tmp_path: Path) -> None:
    config, directory, _ = staged
    out = export_rack(load_rack(RunDirectory(directory), torch.device("cpu")), tmp_path / "out").directory
    assert json.loads((out / "config.json").read_text())["model_type"] == "stackwise"
    back, rack = load_export(out), load_rack(RunDirectory(directory), torch.device("cpu"))
    ids = torch.randint(0, 200, (2, config.training.seq_len), generator=torch.Generator().manual_seed(0))
    x = rack.front()(ids)
    (tmp_path / "ask.py").write_text(f"from stackwise.pretrained import load_rack\nload_rack({str(out)!r})\n")
    bare = {key: value for key, value in os.environ.items() if key != registry.PLUGINS}
    done = subprocess.run([sys.executable, str(tmp_path / "ask.py")], env=bare, capture_output=True, text=True)
    assert "UsageError" in done.stderr
    assert registry.PLUGINS in done.stderr, "which file is missing"
    for section in rack.modules():
        x = section.forward(x)
        head = section.head
    with torch.no_grad():
        assert torch.equal(back(ids), head(x))


def test_text_is_made(staged: Any) -> None:
    rack = load_rack(RunDirectory(staged[1]), torch.device("cpu"))
    made = generate(rack, "import [MASK*3]", Sampling(steps=2))
    assert made["after"].startswith("import ")
    assert "[MASK]" not in made["after"]


def test_a_loss_of_its_own_is_recorded_and_plays_no_part_in_evaluation(staged: Any) -> None:
    config, directory, events = staged
    step = named(events, "step")[-1]
    assert set(step["terms"]) == {"cross_entropy", "balance"}
    total = step["terms"]["cross_entropy"] + config.model.ffn.balance * step["terms"]["balance"]
    assert step["loss"] == pytest.approx(total, rel=1e-5)
    loss = json.loads((directory / "evaluation.json").read_text())["loss"]["0.5"]
    assert 0 < loss < 6


def test_what_it_keeps_for_its_backward_pass_is_what_it_says(staged: Any) -> None:
    shape = {"precision": "fp32", "model.d_model": 256, "model.n_heads": 8, "model.d_ff": 512, "training.seq_len": 128}
    config = StackWiseConfig.from_preset("micro", shape)
    config.model.attention, config.model.ffn = staged[0].model.attention, staged[0].model.ffn
    block, rows = build_block(config.model, 0, 0), 4
    assert sum(p.numel() for p in block.parameters()) == config.model.block_parameters
    fixed = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), *block.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(torch.randn(rows, 128, 256, requires_grad=True), causal=False, segments_BS=None)
    taken = sum(tensor.untyped_storage().nbytes() for at, tensor in saved.items() if at not in fixed)
    kept = config.row_positions * Estimate(config, 258, schedule(config)[1]).kept_bytes(config.model)
    assert kept == pytest.approx(taken / rows, rel=0.15)


def test_matrices_that_stay_wide_carry_no_adapters(micro: Micro) -> None:
    config = micro(**LAYERS)
    block = build_block(config.model, 0, 0)
    add_adapters(block, 2, 2.0, 0, "block.0")
    carrying = {name.split(".adapters.")[0] for name in block.state_dict() if ".adapters." in name}
    assert carrying == {"attention.qkv", "attention.o"}
    with pytest.raises(UsageError, match="keeps no cache"):
        block(torch.zeros(1, 4, config.model.d_model), causal=True, cache=Cache())


def test_other_code_is_another_recipe(staged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is edited: what it trained before is not taken for what it would train now."""
    config, directory, _ = staged
    (tmp_path / "stackwise.yaml").write_text(dump(config))
    edited = tmp_path / "edited.py"
    ask = [sys.executable, "-m", "stackwise", "run", str(tmp_path / "stackwise.yaml"), "--run", str(directory)]

    def states(file: Path) -> list[str]:
        monkeypatch.setenv(registry.PLUGINS, str(file))
        done = subprocess.run([*ask, "--dry-run", "--json"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        (plan,) = [event for event in events if event["event"] == "plan"]
        return [stage["action"] for stage in plan["stages"]]

    code = PLUGIN.read_text()
    edited.write_text(code)
    assert "train" not in states(edited)
    edited.write_text(code.replace("F.gelu(x @ up)", "F.relu(x @ up)").replace("<= self.reach", "< self.reach"))
    assert set(states(edited)) == {"train"}


def test_a_run_without_its_file_is_refused_in_a_line(staged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.PLUGINS)
    done = subprocess.run(
        [sys.executable, "-m", "stackwise", "eval", "--run", str(staged[1])], capture_output=True, text=True
    )
    assert done.returncode in (1, 2, 3)
    assert "near" in done.stderr or "experts" in done.stderr
    assert "Traceback" not in done.stderr
