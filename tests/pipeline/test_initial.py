"""Runs from pretrained models: what follows from a checkpoint, and that training goes on from its weights exactly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from stackwise.config import DataConfig, StackWiseConfig
from stackwise.config.loading import build
from stackwise.data import PreparedData, prepare
from stackwise.data.tokenizer import Tokenizer, bytes_tokenizer
from stackwise.errors import ConfigError, UsageError
from stackwise.identity import generator
from stackwise.pipeline.committed.load import load_model, load_rack
from stackwise.pipeline.committed.use import export_rack
from stackwise.pipeline.initial import settle_mask, with_checkpoint
from stackwise.pipeline.job import committed_stages
from stackwise.pipeline.parts import load_part
from stackwise.pipeline.recipe import SHUFFLED_CHUNKS, order_rows
from stackwise.pipeline.rows import choose_samples
from stackwise.pipeline.run import RunDirectory
from stackwise.pretrained.checkpoint import Checkpoint
from stackwise.store import RowOrder
from stackwise.training.trainer import learning_rate
from tests.conftest import run
from tests.pipeline.storm import killed
from tests.pretrained.models import make

SETTINGS: dict[str, Any] = {
    "training.mode": "end_to_end",
    "training.steps": 20,
    "training.seq_len": 24,
    "training.batch_size": 2,
    "training.accumulation": 2,
    "training.learning_rate": 3e-3,
    "training.grad_clip": 0.5,
    "evaluation.samples": 4,
}


def configuration(weights: Path, text: Path, **more: Any) -> StackWiseConfig:
    """A run from a checkpoint on some text."""
    values = SETTINGS | {"init.weights": str(weights), "data.paths": [str(text)]} | more
    return with_checkpoint(build(StackWiseConfig, {}, values))


def rows_of(directory: RunDirectory, config: StackWiseConfig) -> Any:
    """The microbatches of a finished run of one stage, as token ids and masks, in order."""
    manifest = directory.manifest()
    data = PreparedData.open(Path(manifest["data"]["directory"]))
    rowset, rows = next(iter(manifest["rowsets"].values()))
    samples_RS = data.train.samples(choose_samples(config, data.train, 0), config.training.seq_len)
    with directory.open_store(config) as store:
        masks_RS = store.masks(store.rowset(rowset).mask_ids, config.training.seq_len)
    order = RowOrder(
        rows, seed=(config.seed, 0, "order"), chunk_rows=order_rows(config, rows), window_chunks=SHUFFLED_CHUNKS
    )
    number = 0
    while True:
        rows_B = order.batch(number, config.training.batch_size)
        yield torch.from_numpy(samples_RS[rows_B].astype(np.int64)), torch.from_numpy(masks_RS[rows_B])
        number += 1


def losses_of(directory: RunDirectory) -> list[float]:
    """The loss of every step of a run of one stage."""
    events = [json.loads(line) for line in directory.events_file.read_text().splitlines()]
    return [loss for event in events if event["event"] == "step" for loss in event["losses"]]


def wide_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The norm of transformers without its rounding to float32."""
    scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (hidden_states * scale)


def loop_of_transformers(model: Any, directory: RunDirectory, config: StackWiseConfig) -> list[float]:
    """The same rows through a plain loop: AdamW, clipping, the same rates. It trains the model; the losses."""
    settings, steps = config.stage_training(0), config.training.steps or 0
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(settings.optimizer.beta1, settings.optimizer.beta2),  # type: ignore[attr-defined]
        eps=settings.optimizer.eps,  # type: ignore[attr-defined]
    )
    rows, losses = rows_of(directory, config), []
    for step in range(steps):
        total = torch.zeros((), dtype=torch.float64)
        for _ in range(settings.accumulation):
            ids_BS, _ = next(rows)
            total = total + F.cross_entropy(model(ids_BS).logits[:, :-1].transpose(1, 2), ids_BS[:, 1:])
        loss = total / settings.accumulation
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights_of(directory: RunDirectory) -> dict[str, dict[str, torch.Tensor]]:
    """The committed parts of a run's last stage."""
    config, manifest = directory.config(), directory.manifest()
    with directory.open_store(config) as store:
        stage = store.stage(manifest["stages"][-1]["recipe"])
        assert stage is not None
        return {part: load_file(stage.path(part)) for part in stage.record["parts"]}


@pytest.mark.parametrize(("name", "swap"), [("llama", "never"), ("llama-biases", "always"), ("gpt2", "always")])
def test_it_stays_with_a_loop_of_transformers(
    name: str, swap: str, tmp_path: Path, text: Path, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", wide_norm)
    # A model of transformers in training drops out; the checkpoint's own rates would.
    still = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if name == "gpt2" else {}
    weights = checkpoints(name, **still)
    more = {"training.swap_parts": 2} if swap == "always" else {}
    config = configuration(weights, text, precision="fp64", **{"training.swap": swap} | more)
    run(config, tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float64)
    losses = loop_of_transformers(model, directory, directory.config())
    np.testing.assert_allclose(losses_of(directory), losses, rtol=1e-6)  # which are logged in float32
    theirs, ours = model.state_dict(), weights_of(directory)
    checkpoint = Checkpoint(weights)
    for part in checkpoint.parts:
        for name, ref in checkpoint.names(part).items():
            tensor = theirs[ref.name].T if ref.transpose else theirs[ref.name]
            tensor = tensor if ref.rows is None else tensor[slice(*ref.rows)]
            torch.testing.assert_close(ours[part][name], tensor, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"model.d_model": 64}, "model.d_model: is 64, and 32 in the checkpoint"),
        ({"model.attention": {"kind": "gqa", "kv_heads": 4}}, "model.attention.kv_heads: is 4, and 2 in the"),
        ({"model.positions": "learned"}, "model.positions: is 'learned', and 'rope' in the checkpoint"),
        ({"model.architecture.blocks_per_stack": 2}, "model.architecture: 1 stacks of 2 blocks, and 3 blocks in"),
        ({"model.max_seq_len": 128}, "model.max_seq_len: is 128, and 64 in the checkpoint"),
        ({"data.tokenizer": "bytes"}, "data.tokenizer: is 'bytes', and"),
        ({"training.seq_len": 65}, "model.max_seq_len: 64 is less than training.seq_len 65"),
        ({"init.blocks": [0, 2], "model.d_model": 64}, "model.d_model: is 64, and 32 in the checkpoint"),
        ({"init.blocks": [0, 2], "model.architecture.n_stacks": 3}, "model.architecture: 3 stacks of 1 blocks"),
    ],
)
def test_a_setting_that_contradicts_is_refused(more: dict[str, Any], line: str, text: Path, checkpoints: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration(checkpoints("llama"), text, **more)
    assert any(line in fault for fault in caught.value.faults), caught.value.faults


def test_settings_that_follow_agree_with_those_that_are_given(text: Path, checkpoints: Any) -> None:
    more = {"model.d_model": 32, "model.dropout": 0.1, "model.architecture.blocks_per_stack": 3, "model.d_ff": None}
    config = configuration(checkpoints("llama"), text, **more)
    assert (config.model.n_blocks, config.model.architecture.n_stacks, config.model.dropout) == (3, 1, 0.1)
    assert (config.model.kv_heads, config.model.rope_theta, config.objective.name) == (2, 5000.0, "clm")
    assert with_checkpoint(config) == config
    assert configuration(checkpoints("bert"), text).objective.name == "mlm"


@pytest.mark.parametrize(
    ("name", "size", "mask"),
    [("llama", 310, 300), ("gpt2", 300, 300), ("bert", 300, 300)],
    ids=["free", "added", "bert"],
)
def test_a_mask_token_is_an_unused_id_or_an_added_one(
    name: str, size: int, mask: int, tmp_path: Path, text: Path, checkpoints: Any
) -> None:
    weights = checkpoints(name, vocab_size=size)
    more = {"training.objective": "mask_diffusion", "training.steps": 2}
    events = run(configuration(weights, text, **more), tmp_path / "run")
    assert any(event["event"] == "note" and f"id {mask}" in event["text"] for event in events)
    manifest = RunDirectory(tmp_path / "run").manifest()
    assert manifest["vocabulary"] == {"size": max(size, mask + 1), "mask": mask}
    assert weights_of(RunDirectory(tmp_path / "run"))["front"]["embedding.weight"].shape[0] == max(size, mask + 1)


MODES: dict[str, dict[str, Any]] = {
    "layerwise": {"training.mode": "layerwise"},
    "blockwise": {"training.mode": {"name": "blockwise", "block_size": 2}},
    "independent": {
        "training.mode": {"name": "independent", "block_size": 1},
        "training.objective": "mask_diffusion",
    },
    "QLoRA": {
        "training.progressive.enabled": True,
        "training.progressive.trunk_strategy": "qlora",
        "training.progressive.new_stack_precision": "qlora",
    },
    "frozen": {"training.progressive.enabled": True, "training.objective": "mlm"},
    "bf16, windows": {"training.steps": 2, "training.windows": 2, "precision": "bf16", "training.mode": "layerwise"},
    "fp16": {"training.mode": {"name": "blockwise", "block_size": 3}, "precision": "fp16"},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_stage_begins_with_the_weights_of_the_checkpoint(
    mode: str, tmp_path: Path, text: Path, checkpoints: Any
) -> None:
    weights = checkpoints("qwen2")
    # A rate so low that hardly anything moves: what a stage commits is then what it began with.
    more = {"training.steps": 1, "training.learning_rate": 1e-9, "training.weight_decay": 0.0} | MODES[mode]
    run(configuration(weights, text, **more), tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    parts = committed_stages(directory, directory.config(), directory.manifest())[-1][1]
    checkpoint = Checkpoint(weights)
    for part in checkpoint.parts:
        ours, theirs = load_part(parts[part]), checkpoint.load(part)
        assert ours is not None
        for name, tensor in theirs.items():
            if name in ours and ours[name].is_floating_point():  # else packed in few bits
                torch.testing.assert_close(ours[name][: len(tensor)], tensor, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(("blocks", "chosen"), [(2, [0, 2]), ([2, 0, 0], [2, 0, 0])])
def test_a_rack_of_some_of_the_blocks(
    blocks: Any, chosen: list[int], tmp_path: Path, text: Path, checkpoints: Any
) -> None:
    """Weights as they were, windows with their blocks; what it is exported as is of the checkpoint's family."""
    weights = checkpoints("qwen2-windows", max_window_layers=2)  # the last one alone has the window
    more = {"training.steps": 1, "training.learning_rate": 1e-9, "training.weight_decay": 0.0, "init.blocks": blocks}
    config = configuration(weights, text, **more)
    assert with_checkpoint(config) == config
    windows = [config.model.at(block).attention.window for block in range(len(chosen))]  # type: ignore[attr-defined]
    assert windows == [5 if block == 2 else None for block in chosen]
    run(config, tmp_path / "run")
    checkpoint, parts = Checkpoint(weights), weights_of(RunDirectory(tmp_path / "run"))
    for place, block in enumerate(chosen):
        for name, tensor in checkpoint.load(f"block.{block}").items():
            torch.testing.assert_close(parts[f"block.{place}"][name], tensor, rtol=0.0, atol=1e-6)
    if blocks == 2:  # the layers with windows are the highest ones, as the family has it
        export_rack(load_rack(RunDirectory(tmp_path / "run"), torch.device("cpu")), tmp_path / "out")
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (written["model_type"], written["num_hidden_layers"]) == ("qwen2", 2)


def test_blocks_that_are_not_there_are_refused(text: Path, checkpoints: Any) -> None:
    for blocks, wrong in (([0, 3], 3), (7, 7)):
        with pytest.raises(UsageError, match=f"init.blocks: there is no block {wrong}"):
            configuration(checkpoints("llama"), text, **{"init.blocks": blocks})


def test_two_directories_with_the_same_weights_are_one_and_a_change_is_another(
    tmp_path: Path, text: Path, checkpoints: Any
) -> None:
    weights, more = checkpoints("llama"), {"training.steps": 2, "store.path": str(tmp_path / "store")}
    run(configuration(weights, text, **more), tmp_path / "first")
    shutil.copytree(weights, tmp_path / "copy")
    events = run(configuration(tmp_path / "copy", text, **more), tmp_path / "second")
    assert not [event for event in events if event["event"] == "step"]
    file = next((tmp_path / "copy").glob("*.safetensors"))
    tensors = load_file(file)
    tensors[max(tensors)].view(-1)[0] += 1.0
    save_file(tensors, file)
    events = run(configuration(tmp_path / "copy", text, **more), tmp_path / "third")
    assert [event for event in events if event["event"] == "step"]


@pytest.mark.parametrize("swap", [pytest.param("never", marks=pytest.mark.stress), "always"])
def test_killed_and_resumed_it_ends_with_the_same_weights(
    swap: str, tmp_path: Path, text: Path, checkpoints: Any
) -> None:
    weights, options = checkpoints("llama"), ["-o", f"data.paths=[{text}]", "-o", f"training.swap={swap}"]
    for key, value in (SETTINGS | {"training.checkpoint_steps": 4, "training.log_every": 1, "seed": 1}).items():
        options += ["-o", f"{key}={value}"]
    command = [sys.executable, "-m", "stackwise", "run", "--init", str(weights), *options]
    with subprocess.Popen(
        [*command, "--run", str(tmp_path / "killed")], stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        saved = tmp_path / "killed" / "checkpoints"
        for _ in range(600):
            if process.poll() is not None or any(path.is_file() for path in saved.rglob("*")):
                break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    for name in ("killed", "whole"):
        done = subprocess.run([*command, "--run", str(tmp_path / name)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    status = [RunDirectory(tmp_path / name).manifest()["stages"][0]["weights"] for name in ("killed", "whole")]
    assert status[0] == status[1]


INTEGERS = {"bits": 4, "group": 8, "symmetric": False}
WAYS: dict[str, dict[str, Any]] = {
    "from causal to diffusion": {"training.objective": "mask_diffusion"},
    "integers block by block, then their scales": {
        "training.mode": "layerwise",
        "training.quantization": INTEGERS,
        "training.fusion.strategy": "trainable",
        "training.fusion.steps": 40,
        "stages": {3: {"training": {"quantization": INTEGERS | {"trains": "scales"}}}},
    },
}


@pytest.mark.stress
@pytest.mark.parametrize("way", WAYS)
def test_killed_in_its_last_stage_it_ends_with_the_same_weights(
    way: str, tmp_path: Path, text: Path, checkpoints: Any
) -> None:
    more = WAYS[way] | {"training.steps": 40, "training.checkpoint_steps": 4}
    config = configuration(checkpoints("llama"), text, **more)
    run(config.model_copy(deep=True), tmp_path / "whole")
    killed(config, tmp_path / "killed", config.n_stages - 1)
    assert weights_of(RunDirectory(tmp_path / "killed")).keys() == weights_of(RunDirectory(tmp_path / "whole")).keys()
    ends = [RunDirectory(tmp_path / name).manifest()["stages"][-1]["weights"] for name in ("killed", "whole")]
    assert ends[0] == ends[1]


def test_a_run_goes_on_from_another_run(tmp_path: Path, micro: Any, text: Path) -> None:
    run(micro(training__steps=2), tmp_path / "first")
    before = RunDirectory(tmp_path / "first")
    config = configuration(tmp_path / "first", text, **{"training.steps": 1, "training.learning_rate": 1e-9})
    assert config.objective.name == "mask_diffusion"
    events = run(config, tmp_path / "second")
    assert not [event for event in events if event["event"] == "note" and "masked positions" in event["text"]]
    parts = committed_stages(before, before.config(), before.manifest())[-1][1]
    after = weights_of(RunDirectory(tmp_path / "second"))
    for part in ("front", "block.0", "block.1"):
        for name, tensor in (load_part(parts[part]) or {}).items():
            torch.testing.assert_close(after[part][name], tensor, rtol=0.0, atol=1e-6)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path, text: Path, checkpoints: Any) -> None:
    weights = checkpoints("llama", vocab_size=280)
    with pytest.raises(UsageError, match=r"has 301 ids, and the embedding of .* 280 rows") as caught:
        run(configuration(weights, text), tmp_path / "run")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_no_torch_comes_into_the_runner(text: Path, checkpoints: Any) -> None:
    code = (
        "import sys\nfrom stackwise.config import StackWiseConfig\nfrom stackwise.config.loading import build\n"
        "from stackwise.pipeline.initial import initial_sources, with_checkpoint\n"
        "import stackwise.pipeline.runner.runner\n"
        f"config = with_checkpoint(build(StackWiseConfig, {{}}, {{'init.weights': {str(checkpoints('llama'))!r}}}))\n"
        "assert initial_sources(config)\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_is_scored_and_exported_as_it_stands(tmp_path: Path, text: Path, checkpoints: Any) -> None:
    from transformers import AutoModelForCausalLM

    weights = checkpoints("gpt2")
    run_command = [sys.executable, "-m", "stackwise"]
    asked = [*run_command, "eval", "--model", str(weights), "--data", str(text), "--json", "--device", "cpu"]
    result = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    tokenizer = Tokenizer.load(weights / "tokenizer.json")
    model = AutoModelForCausalLM.from_pretrained(weights)
    prepared, _ = prepare(
        DataConfig(paths=[str(text)], tokenizer=str(weights / "tokenizer.json")),
        out=tmp_path / "data",
        all_held_out=True,
    )
    split = prepared.held_out
    chosen = generator(0, "held-out").permutation(split.n_samples(64))[:128]
    ids = torch.from_numpy(split.samples(np.sort(chosen), 64).astype(np.int64))
    asked_ids = torch.cat([torch.full((len(ids), 1), tokenizer.separator_id), ids[:, :-1]], 1)
    with torch.no_grad():
        nats = F.cross_entropy(model(asked_ids).logits.transpose(1, 2), ids, reduction="sum").item()
    assert result["likelihood"] == "exact"
    assert result["bits_per_byte"] == pytest.approx(nats / np.log(2) / result["bytes"], rel=1e-4)
    asked = [*run_command, "export", "--model", str(weights), "--out", str(tmp_path / "out"), "--json"]
    assert subprocess.run(asked, capture_output=True, check=True).returncode == 0
    before = {key: value for file in weights.glob("*.safetensors") for key, value in load_file(file).items()}
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_model_with_the_tokenizer_of_another_one_is_refused(tmp_path: Path) -> None:
    make("llama", tmp_path)  # of 99 ids
    (tmp_path / "tokenizer.json").write_text(bytes_tokenizer().json)
    with pytest.raises(UsageError, match="258 ids"):
        load_model(str(tmp_path), torch.device("cpu"), print)


def test_an_export_has_the_tokens_of_the_model_that_the_run_began_from_and_of_no_other(
    tmp_path: Path, text: Path, tokenizer_json: Path
) -> None:
    rack, ends = None, []
    for name, eos in (("llama", 7), ("bert", 9)):  # another model in the same place
        make(name, tmp_path / "model", vocab_size=300, eos_token_id=eos, shard="1GB")
        shutil.copy(tokenizer_json, tmp_path / "model" / "tokenizer.json")
        if rack is None:
            run(configuration(tmp_path / "model", text, **{"training.steps": 1}), tmp_path / "run")
            rack = load_rack(RunDirectory(tmp_path / "run"), torch.device("cpu"))
        export_rack(rack, tmp_path / name)
        ends.append(json.loads((tmp_path / name / "config.json").read_text())["eos_token_id"])
    assert ends == [7, rack.data.tokenizer.separator_id]


def test_an_export_names_no_id_that_the_model_has_no_row_for(tmp_path: Path, text: Path, tokenizer_json: Path) -> None:
    assert Tokenizer.load(tokenizer_json).mask_id == 300, "ours, behind those of the file"
    make("llama", tmp_path / "model", vocab_size=300, shard="1GB")
    shutil.copy(tokenizer_json, tmp_path / "model" / "tokenizer.json")
    run(configuration(tmp_path / "model", text, **{"training.steps": 1}), tmp_path / "run")
    export_rack(load_rack(RunDirectory(tmp_path / "run"), torch.device("cpu")), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["stackwise"]["mask_token_id"]) == (300, None)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 300


@pytest.mark.parametrize("command", ["eval", "generate", "export"])
def test_a_run_and_a_model_are_not_both_meant(command: str, tmp_path: Path) -> None:
    more = ["--out", str(tmp_path / "out")] if command == "export" else []
    done = subprocess.run(
        [sys.executable, "-m", "stackwise", command, "--run", "a", "--model", "b", *more],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--run and --model are two models" in done.stderr


def test_an_id_that_the_tokenizer_reserves_stands_for_masked_tokens(
    tmp_path: Path, text: Path, checkpoints: Any
) -> None:
    shutil.copytree(checkpoints("llama"), tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"].pop()
    vocabulary = content["model"]["vocab"]
    last = vocabulary.pop(max(vocabulary, key=vocabulary.get))
    reserved = {"id": last, "content": "<|reserved_special_token_0|>", "special": True, "normalized": False}
    content["added_tokens"].append(reserved | {"single_word": False, "lstrip": False, "rstrip": False})
    file.write_text(json.dumps(content))
    config = configuration(tmp_path / "model", text, **{"training.objective": "mask_diffusion"})
    line = settle_mask(config, Tokenizer.load(file))
    assert line is not None
    assert "reserves" in line
    assert config.training.mask_token_id == last
