"""Checkpoints from elsewhere: each fault is one line with exit code 2, before a weight is read or a file written."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from stackwise.data.tokenizer import bytes_tokenizer
from stackwise.errors import UsageError
from stackwise.pretrained import Checkpoint
from tests.conftest import raises_naming
from tests.pretrained.models import make

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in ("llama", "mistral", "qwen2", "gpt2", "bert"):
        make(name, root / name)
    make("llama", root / "single", shard="1GB")
    return {path.name: path for path in root.iterdir()}


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        os.link(path, target / path.name) if path.suffix == ".safetensors" else (target / path.name).write_bytes(
            path.read_bytes()
        )
    return target


def configured(directory: Path, **keys: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def one_line(error: UsageError) -> str:
    assert "\n" not in error.message
    assert "\x1b" not in error.message
    assert len(error.message) < 500
    return error.message


def refused(directory: Path) -> str:
    before = sorted(directory.iterdir())
    with pytest.raises(UsageError) as caught:
        Checkpoint(directory, str(directory.parent / "cache"))
    message = one_line(caught.value)
    assert caught.value.exit_code == 2
    assert str(directory) in message
    assert sorted(directory.iterdir()) == before
    return message


ASKED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "turns": 3}}, "turns"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "factor is missing"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized, by gptq"),
    ("llama", {"quantization_config": {"load_in_8bit": True}}, "load_in_8bit"),
    ("llama", {"dtype": "bfloat16"}, "the weights in the files are float32"),
    ("llama", {"dtype": "int8"}, "dtype is 'int8'"),
    ("llama", {"torch_dtype": "float16", "dtype": None}, "dtype is float16"),
    ("llama", {"num_local_experts": 8}, "num_local_experts"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("llama", {"hidden_size": 1 << 40}, "hidden_size"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ("llama", {"num_hidden_layers": 5000}, "n_stacks"),
    ("llama", {"num_attention_heads": 10**6}, "has shape"),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ("llama", {"vocab_size": 100}, "has shape"),
    ("llama", {"intermediate_size": 49}, "has shape"),
    ("llama", {"num_key_value_heads": 3}, "3"),
    ("llama", {"num_hidden_layers": 4}, "is missing"),
    ("llama", {"num_hidden_layers": 2}, "belongs to no part"),
    ("llama", {"tie_word_embeddings": True}, "differs from the embedding"),
    ("llama", {"model_type": "mamba"}, "mamba"),
    ("llama", {"model_type": ["llama"]}, "model_type"),
    ("llama", {"model_type": "\x1b[2J"}, "model_type"),
    ("llama", {"stackwise": {"format": 99}}, "format 99"),
    ("mistral", {"sliding_window": -5}, "sliding_window"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    ("qwen2", {"layer_types": ["linear_attention"] * 3}, "layer_types"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt2", {"activation_function": "silu"}, "silu"),
    ("gpt2", {"n_inner": 50}, "has shape"),
    ("bert", {"position_embedding_type": "relative_key"}, "relative_key"),
    ("bert", {"is_decoder": True}, "is_decoder"),
    ("bert", {"hidden_act": "quick_gelu"}, "quick_gelu"),
    ("bert", {"hidden_dropout_prob": -3}, "hidden_dropout_prob"),
]


@pytest.mark.parametrize(("name", "keys", "said"), ASKED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_done_exactly_is_refused_by_name(
    name: str, keys: dict[str, Any], said: str, models: dict[str, Path], tmp_path: Path
) -> None:
    directory = copied(models[name], tmp_path / "model")
    configured(directory, **keys)
    assert said in refused(directory)


def _rewritten(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def rewrite(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})

    return rewrite


def _header(change: Callable[[dict[str, Any]], object]) -> Change:
    def rewrite(directory: Path) -> None:
        path = directory / "model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        table = json.loads(data[8 : 8 + length])
        change(table)
        text = json.dumps(table).encode()
        path.unlink()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return rewrite


def _replaced(name: str, data: bytes) -> Change:
    def replace(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).write_bytes(data)

    return replace


Q = "model.layers.1.self_attn.q_proj.weight"
FILES: dict[str, tuple[Change, str]] = {
    "a shape": (_rewritten(lambda t: t.update({Q: torch.zeros(32, 31)})), "has shape [32, 31], not [32, 32]"),
    "a dtype": (_rewritten(lambda t: t.update({Q: torch.zeros(32, 32, dtype=torch.int8)})), "I8"),
    "a narrower one": (_rewritten(lambda t: t.update({Q: t[Q].half()})), f"{Q} is float16"),
    "one missing": (_rewritten(lambda t: t.pop(Q)), f"{Q} is missing"),
    "one too many": (_rewritten(lambda t: t.update({"model.layers.1.x": torch.zeros(1)})), "belongs to no part"),
    "overlapping": (_header(lambda t: t[Q].update(data_offsets=t["lm_head.weight"]["data_offsets"])), "bytes"),
    "moved": (_header(lambda t: t["model.norm.weight"].update(data_offsets=[0, 128])), "one behind the other"),
    "beyond its end": (_header(lambda t: t[Q].update(data_offsets=[1 << 40, (1 << 40) + 4096])), "cut off"),
    "a shape without end": (_header(lambda t: t[Q].update(shape=[1 << 62, 1 << 62])), "other bytes"),
    "a shape of text": (_header(lambda t: t[Q].update(shape="32")), "no tensor can be"),
    "an entry of nothing": (_header(lambda t: t.update({Q: None})), "no tensor can be"),
    "brackets without end": (_replaced("config.json", b"[" * 200_000), "nested"),
    "a number without end": (_replaced("config.json", b'{"model_type": ' + b"9" * 5000 + b"}"), "cannot be read"),
    "half a character": (_replaced("config.json", b'{"model_type": "\xff"}'), "cannot be read"),
    "no mapping": (_replaced("config.json", b"3"), "no mapping"),
    "a large config": (_replaced("config.json", b" " * (5 << 20)), "larger"),
    "a header without end": (_replaced("model.safetensors", (1 << 62).to_bytes(8, "little") + b"{}"), "cut off"),
    "a header of brackets": (
        _replaced("model.safetensors", (200_000).to_bytes(8, "little") + b"[" * 200_000),
        "nested",
    ),
}


@pytest.mark.parametrize("fault", FILES)
def test_files_that_are_not_those_of_config_json_are_refused(
    fault: str, models: dict[str, Path], tmp_path: Path
) -> None:
    change, said = FILES[fault]
    directory = copied(models["single"], tmp_path / "model")
    change(directory)
    assert said in refused(directory)


INDEX = "model.safetensors.index.json"


def test_an_index_is_held_against_its_files(models: dict[str, Path], tmp_path: Path) -> None:
    directory = copied(models["llama"], tmp_path / "model")
    index = json.loads((directory / INDEX).read_text())
    where = index["weight_map"]
    shards = sorted(set(where.values()))

    def indexed(**names: Any) -> str:
        (directory / INDEX).write_text(json.dumps({"weight_map": where | names}))
        return refused(directory)

    for outside in ("../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", ".x.safetensors", "x.bin", 3, None):
        assert repr(outside) in indexed(**{Q: outside})
    other = next(name for name in shards if name != where[Q])
    assert other in indexed(**{Q: other})
    assert "tensor x " in indexed(x=where[Q])
    for broken in (
        "{}",
        "[]",
        "[1]",
        '{"weight_map": [1]}',
        '{"weight_map": []}',
        '{"weight_map": {}}',
        "{",
        "[" * 100_000,
    ):
        (directory / INDEX).write_text(broken)
        assert INDEX in refused(directory)
    (directory / INDEX).write_text(json.dumps(index))
    Checkpoint(directory, str(tmp_path / "cache"))
    (directory / shards[1]).rename(tmp_path / "elsewhere")
    assert shards[1] in refused(directory)
    (directory / shards[1]).symlink_to(tmp_path / "elsewhere")
    assert shards[1] in refused(directory)
    (directory / shards[1]).unlink()
    (directory / shards[1]).write_bytes((tmp_path / "elsewhere").read_bytes()[:-8])
    assert shards[1] in refused(directory)


def test_wider_tensors_are_read_as_they_are_and_said(models: dict[str, Path], tmp_path: Path) -> None:
    directory = copied(models["single"], tmp_path / "model")
    _rewritten(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].double()}))(directory)
    checkpoint = Checkpoint(directory, str(tmp_path / "cache"))
    assert any("1 of its tensors" in note for note in checkpoint.notes)
    assert checkpoint.load("head")["norm.weight"].dtype == torch.float64


def test_weights_of_another_format_are_named(models: dict[str, Path], tmp_path: Path) -> None:
    directory = copied(models["single"], tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "model-q4.gguf")
    assert "model-q4.gguf" in refused(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    directory = copied(models["single"], tmp_path / "model")
    (directory / "model.safetensors").rename(directory / name)
    assert "pickle" in refused(directory)
    with pytest.raises(UsageError) as caught:
        Checkpoint(directory)
    assert "save_pretrained" in str(caught.value.hint)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_config_is_read_or_refused(data: st.DataObject, models: dict[str, Path]) -> None:
    name = data.draw(st.sampled_from(["llama", "mistral", "qwen2", "gpt2", "bert"]))
    config = json.loads((models[name] / "config.json").read_text())
    keys = st.sampled_from([*config, "rope_scaling", "layer_types", "head_dim", "stackwise"]) | st.text(max_size=8)
    config |= data.draw(st.dictionaries(keys, JSON, min_size=1, max_size=3))
    directory = models[name].parent / f"fuzzed-{name}"
    if not directory.exists():
        copied(models[name], directory)
    (directory / "config.json").write_text(json.dumps(config))
    try:
        Checkpoint(directory, str(directory.parent / "cache"))
    except UsageError as error:
        one_line(error)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), data=st.binary(min_size=1, max_size=40))
def test_any_header_is_read_or_refused(place: float, data: bytes, models: dict[str, Path]) -> None:
    whole = (models["single"] / "model.safetensors").read_bytes()
    at = int(place * (8 + int.from_bytes(whole[:8], "little")))
    directory = models["single"].parent / "header"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_bytes((models["single"] / "config.json").read_bytes())
    (directory / "model.safetensors").write_bytes(whole[:at] + data + whole[at + len(data) :])
    try:
        Checkpoint(directory, str(directory.parent / "cache"))
    except UsageError as error:
        one_line(error)


def _sparse(directory: Path, name: str) -> int:
    """A checkpoint of zeros, 64 MB a block, that takes no room on the disk; the bytes of its largest part."""
    model = make(name, directory, shard="1GB")
    config = json.loads((directory / "config.json").read_text())
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "n_embd": 1024, "n_inner": 4096, "num_key_value_heads": 4}
    config |= {key: size for key, size in sizes.items() if key in config} | {"vocab_size": 8000}
    config.pop("head_dim", None)
    (directory / "config.json").write_text(json.dumps(config))
    kind = type(model)._from_config if hasattr(type(model), "_from_config") else type(model)
    with torch.device("meta"):
        empty = kind(type(model.config)(**config))
    table: dict[str, Any] = {}
    end = 0
    blocks: dict[str, int] = {}
    for key, tensor in empty.state_dict().items():
        if name == "gpt2" and key == "lm_head.weight":  # tied
            continue
        table[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + 4 * tensor.numel()]}
        end += 4 * tensor.numel()
        part = ".".join(key.split(".")[:3]) if ".h." in key or ".layers." in key else key
        blocks[part] = blocks.get(part, 0) + 4 * tensor.numel()
    text = json.dumps(table).encode()
    path = directory / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)
    return max(blocks.values())


PEAK = """
import sys, torch
from pathlib import Path
from stackwise.pretrained import Checkpoint, load_rack
from stackwise.pretrained.writing import ExportOptions, export_checkpoint

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

checkpoint = Checkpoint(sys.argv[1], sys.argv[2])
torch.cat([torch.zeros(1024, 256).T] * 3, 1)  # libraries and threads that are loaded when they are used
Path("/proc/self/clear_refs").write_text("5")
base = peak()
for part in checkpoint.parts:
    checkpoint.digest(part)
    tensors = checkpoint.load(part)
    del tensors
print(peak() - base)
export_checkpoint(sys.argv[3], checkpoint, ExportOptions(shard_bytes=100_000_000))
print(peak() - base)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.stress), "gpt2"])  # gpt2's are turned, too
def test_no_more_than_a_part_is_in_memory(name: str, tmp_path: Path) -> None:
    largest = _sparse(tmp_path / "model", name)
    arguments = [str(tmp_path / place) for place in ("model", "cache", "out")]
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True)
    reading, writing = map(int, done.stdout.split())
    assert reading <= 1.2 * largest
    assert writing <= 1.2 * largest


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_named_before_anything_is_written(
    value: float, models: dict[str, Path], tmp_path: Path
) -> None:
    """While digests are made, which every run needs, and while a part is read, turned or not."""
    for name, tensor in (("llama", "model.layers.2.mlp.up_proj.weight"), ("gpt2", "transformer.h.1.mlp.c_fc.weight")):
        directory = copied(models[name], tmp_path / name)
        (file,) = (path for path in directory.glob("*.safetensors") if tensor in load_file(path))
        tensors = load_file(file)
        tensors[tensor][-1, -1] = value
        file.unlink()
        save_file(tensors, file)
        checkpoint = Checkpoint(directory, str(tmp_path / "cache"))
        part = f"block.{tensor.split('.')[2]}"
        for read in (checkpoint.digest, checkpoint.load):
            with pytest.raises(UsageError, match="nan or infinite") as caught:
                read(part)
            assert tensor in one_line(caught.value)


def test_run_and_eval_name_the_tensor_that_holds_no_numbers(tmp_path: Path) -> None:
    directory, text, run = tmp_path / "model", tmp_path / "text.txt", tmp_path / "run"
    make("llama", directory, shard="1GB", vocab_size=258)
    (directory / "tokenizer.json").write_text(bytes_tokenizer().json)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, directory / "model.safetensors")
    text.write_text("some words for a model " * 200)
    settings = (
        f"data.paths=[{text}]",
        "training.seq_len=16",
        "training.steps=1",
        f"data.cache_dir={tmp_path / 'cache'}",
    )
    for words in (
        ["run", "--init", str(directory), "--run", str(run), *(word for one in settings for word in ("-o", one))],
        ["eval", "--model", str(directory), "--data", str(text)],
    ):
        command = [sys.executable, "-m", "stackwise", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "tensor model.norm.weight has values that are nan" in done.stderr
        assert "Traceback" not in done.stderr
    assert not run.exists()


def test_a_value_that_no_model_has_is_to_be_corrected_not_called_inexact(
    models: dict[str, Path], tmp_path: Path
) -> None:
    directory = copied(models["llama"], tmp_path / "model")
    configured(directory, num_hidden_layers=0)
    with raises_naming(UsageError, "num_hidden_layers", "config.json") as caught:
        Checkpoint(directory, str(tmp_path / "cache"))
    assert "config.json" in str(caught.value.hint)
