"""Export: transformers and `load_rack` give the logits that the rack gives."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from stackwise.config.model import ArchitectureConfig, ModelConfig
from stackwise.data import bytes_tokenizer
from stackwise.errors import NotFound, UsageError
from stackwise.model import Front, Rack, StageModules, add_adapters, build_rack, part_digest
from stackwise.pretrained import Checkpoint, load_rack, writing
from stackwise.pretrained.writing import Exported, ExportOptions, export_checkpoint
from tests.conftest import raises_naming
from tests.pretrained.models import FAMILIES, make

V, L = 67, 24


def config(**settings: object) -> ModelConfig:
    values: dict[str, object] = {"d_model": 32, "n_heads": 4, "norm_eps": 1e-6, "rope_theta": 5000.0}
    values["architecture"] = ArchitectureConfig(n_stacks=3, blocks_per_stack=1)
    return ModelConfig(**(values | settings))  # type: ignore[arg-type]


def rack(c: ModelConfig) -> Rack:
    model = build_rack(c, V, 3, L)
    with torch.no_grad():  # fresh norms and biases would hide a mistake
        for i, p in enumerate(model.parameters()):
            if p.ndim < 2:
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


def stages(model: Rack, causal: bool) -> Iterator[StageModules]:
    for depth, stack in enumerate(model.stacks):
        yield StageModules(depth, list(stack.blocks), model.head, causal)


def export(
    directory: Path, front: Front, stages: Iterable[StageModules], model: ModelConfig, **options: Any
) -> Exported:
    return writing.export(directory, front, stages, model, ExportOptions(**options))


def ids() -> torch.Tensor:
    return torch.randint(0, V, (2, L), generator=torch.Generator().manual_seed(0))


def tokenizer() -> str:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return str(backend.to_str())


LLAMA = [
    {},
    {"attention": {"kind": "gqa", "kv_heads": 2}, "tie_embeddings": False},
    {"bias": True},
    {"attention": {"kind": "gqa", "kv_heads": 1}, "d_ff": 80, "max_seq_len": 64},
]
OTHER = [
    {"norm": "layernorm", "ffn": "gelu", "positions": "learned", "bias": True},
    {"ffn": "gelu"},
    {"norm": "layernorm", "tie_embeddings": False, "attention": {"kind": "gqa", "kv_heads": 2}},
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("settings", LLAMA)
def test_transformers_gives_equal_logits(
    settings: dict[str, object], causal: bool, attention: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    c = config(**settings)
    model = rack(c)
    told = export(tmp_path / "out", model.front, stages(model, causal), c)
    assert told.family == "llama"
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation=attention
    )
    assert isinstance(loaded, LlamaForCausalLM)
    assert not any(info.values()), "weights that transformers missed or did not expect"
    assert loaded.config.tie_word_embeddings == c.tie_embeddings
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids()).logits, model(ids(), causal=causal), rtol=1e-4, atol=2e-5)


def test_a_bidirectional_rack_can_be_recorded_as_causal(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = rack(config())
    export(tmp_path / "out", model.front, stages(model, False), config(), causal=True)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids()).logits
        torch.testing.assert_close(logits, model(ids(), causal=True), rtol=1e-4, atol=2e-5)


def test_transformers_generates_what_the_rack_continues(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from stackwise.inference import LoadedModel, sample_causal

    model = rack(config())
    export(tmp_path / "out", model.front, stages(model, True), config())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = ids()[:1, :5]
    ours = sample_causal(LoadedModel(model.front, model, True), prompt, 10)
    theirs = loaded.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False, pad_token_id=0
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("settings", LLAMA + OTHER)
def test_load_rack_gives_equal_logits(settings: dict[str, object], tmp_path: Path) -> None:
    c = config(**settings)
    model = rack(c)
    told = export(
        tmp_path / "out", model.front, stages(model, False), c, mask_token_id=5, separator_id=6, shard_bytes=9000
    )
    assert len(told.files) > 3
    assert told.parameters == sum(p.numel() for p in model.parameters())
    back = load_rack(tmp_path / "out")
    assert torch.equal(back(ids()), model(ids()))
    assert torch.equal(back(ids(), causal=True), model(ids(), causal=True))
    assert back.head.tied == c.tie_embeddings
    assert [part_digest(b) for b in back.blocks] == [part_digest(b) for b in model.blocks]
    assert all(p.requires_grad for p in back.parameters())
    about = Checkpoint(tmp_path / "out").description
    assert (about.special_ids["mask_token_id"], about.special_ids["eos_token_id"], about.causal) == (5, 6, False)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw.get("is_causal", False) is False


def test_shards_load_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = rack(config())
    told = export(tmp_path / "out", model.front, stages(model, True), config(), shard_bytes=20_000)
    assert told.files[0] == f"model-00001-of-{len(told.files):05d}.safetensors"
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids()).logits
    torch.testing.assert_close(logits, model(ids(), causal=True), rtol=1e-4, atol=2e-5)


def test_a_copied_head_is_untied_and_an_equal_one_stays_tied(tmp_path: Path) -> None:
    model = rack(config())
    model.head.untie()
    assert export(tmp_path / "equal", model.front, stages(model, True), config()).tied
    with torch.no_grad():
        model.head.weight[3] += 1.0
    assert not export(tmp_path / "moved", model.front, stages(model, True), config()).tied
    back = load_rack(tmp_path / "moved")
    assert not back.head.tied
    assert torch.equal(back(ids()), model(ids()))
    assert json.loads((tmp_path / "moved" / "config.json").read_text())["tie_word_embeddings"] is False


def test_adapters_are_merged_and_left_in_the_rack(tmp_path: Path) -> None:
    model = rack(config())
    add_adapters(model.blocks[1], 4, 8.0, 0, "block.1")
    with torch.no_grad():
        for name, p in model.blocks[1].named_parameters():
            if name.endswith(".b"):
                p.normal_(0.0, 0.1)
    keys = set(model.state_dict())
    export(tmp_path / "out", model.front, stages(model, False), config())
    torch.testing.assert_close(load_rack(tmp_path / "out")(ids()), model(ids()), rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == keys


def test_dtype(tmp_path: Path) -> None:
    model = rack(config())
    export(tmp_path / "out", model.front, stages(model, False), config(), dtype=torch.bfloat16)
    back = load_rack(tmp_path / "out")
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(back(ids()).float(), model(ids()), rtol=0.1, atol=0.1)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("as_path", [True, False])
def test_tokenizer_comes_along(as_path: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = tokenizer()
    (tmp_path / "tokenizer.json").write_text(source)
    model = rack(config())
    given = tmp_path / "tokenizer.json" if as_path else source
    export(tmp_path / "out", model.front, stages(model, True), config(), tokenizer_json=given)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("a b a")["input_ids"] == [0, 1, 0]


def test_transformers_knows_the_special_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    own = bytes_tokenizer()
    model = build_rack(config(), own.mask_id + 1, 3, L)
    given = {"tokenizer_json": own.json, "separator_id": own.separator_id, "mask_token_id": own.mask_id}
    export(tmp_path / "out", model.front, stages(model, True), config(), **given)  # type: ignore[arg-type]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.eos_token_id, loaded.mask_token_id) == (own.separator_id, own.mask_id) == (256, 257)
    assert loaded(f"ab{loaded.mask_token}{loaded.eos_token}")["input_ids"] == [97, 98, 257, 256]
    assert loaded.decode([97, 257, 98, 256], skip_special_tokens=True) == "ab"
    assert json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())["mask_token"] == "<|mask|>"


def test_targets(tmp_path: Path) -> None:
    model = rack(config())

    def write(name: str, **settings: bool) -> None:
        export(tmp_path / name, model.front, stages(model, True), config(), **settings)  # type: ignore[arg-type]

    write("out")
    with raises_naming(UsageError, tmp_path / "out"):
        write("out")
    before = (tmp_path / "out" / "model.safetensors").stat().st_ino
    write("out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").stat().st_ino != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with raises_naming(UsageError, tmp_path / "mine"):
        write("mine", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        write("file")
    (tmp_path / "empty").mkdir()
    write("empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "mine", "out"]


def test_nothing_is_left_of_a_failed_export(tmp_path: Path) -> None:
    model = rack(config())
    with raises_naming(UsageError, "2 blocks", 3):
        export(tmp_path / "out", model.front, list(stages(model, True))[:2], config())
    with raises_naming(UsageError, "tokenizer", "line 1"):
        export(tmp_path / "out", model.front, stages(model, True), config(), tokenizer_json="{no json")
    assert not list(tmp_path.iterdir())


def test_bad_directories(tmp_path: Path) -> None:
    model = rack(config())
    with raises_naming(NotFound, tmp_path / "nowhere"):
        load_rack(tmp_path / "nowhere")
    export(tmp_path / "out", model.front, stages(model, True), config(), shard_bytes=20_000)
    index = tmp_path / "out" / "model.safetensors.index.json"
    good = index.read_text()
    index.write_text(good.replace("model-00002", "../model-00002"))
    with raises_naming(UsageError, index, "'../model-00002"):
        load_rack(tmp_path / "out")
    index.write_text("{")
    with raises_naming(UsageError, index):
        load_rack(tmp_path / "out")
    index.write_text(good)
    shard = next((tmp_path / "out").glob("model-00002*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with raises_naming(UsageError, shard):
        load_rack(tmp_path / "out")
    shard.unlink()
    with pytest.raises(UsageError, match="missing"):
        load_rack(tmp_path / "out")
    shard.write_bytes(content)
    path = tmp_path / "out" / "config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"stackwise": told["stackwise"] | {"format": 99}}))
    with pytest.raises(UsageError, match="format 99"):
        load_rack(tmp_path / "out")
    path.write_text(json.dumps(told | {"vocab_size": V + 1}))
    with raises_naming(UsageError, "model.embed_tokens.weight", [V, 32], [V + 1, 32]):
        load_rack(tmp_path / "out")
    path.write_text(json.dumps({"model_type": "llama"}))
    with raises_naming(UsageError, path, "hidden_size"):
        load_rack(tmp_path / "out")


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _set(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.__setitem__(name, value)


Q, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"

WEIGHTS: dict[str, Callable[[Path], object]] = {
    "another shape": lambda path: rewrite(path, _set(Q, torch.zeros(32, 31))),
    "another rank": lambda path: rewrite(path, _set(NORM, torch.zeros(32, 1))),
    "whole numbers": lambda path: rewrite(path, _set(NORM, torch.zeros(32, dtype=torch.int64))),
    "a tensor too few": lambda path: rewrite(path, lambda tensors: tensors.pop(Q)),
    "a tensor too many": lambda path: rewrite(path, _set("model.layers.9.x", torch.zeros(1))),
    "a name with an escape sequence": lambda path: rewrite(path, _set("\x1b]0;owned\x07", torch.zeros(1))),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "empty": lambda path: path.write_bytes(b""),
    "a header without end": lambda path: path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}"),
    "a header of spaces": lambda path: path.write_bytes((50 << 20).to_bytes(8, "little") + b" " * (50 << 20)),
    "a header that is no JSON": lambda path: path.write_bytes((8).to_bytes(8, "little") + b"[[[[[[[["),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link": lambda path: (path.rename(path.with_suffix(".moved")), path.symlink_to(path.with_suffix(".moved"))),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("fault", WEIGHTS)
def test_weights_that_are_not_those_of_the_rack_are_refused_in_one_line(fault: str, tmp_path: Path) -> None:
    model = rack(config())
    export(tmp_path / "out", model.front, stages(model, True), config())
    WEIGHTS[fault](tmp_path / "out" / "model.safetensors")
    with pytest.raises(UsageError) as caught:
        load_rack(tmp_path / "out")
    line = caught.value.message
    assert str(tmp_path / "out") in line
    assert "\n" not in line
    assert "\x1b" not in line
    assert caught.value.exit_code == 2


ABOUT: list[dict[str, object]] = [
    {"vocab_size": 10**30},
    {"vocab_size": "67"},
    {"vocab_size": True},
    {"seq_len": -1.5},
    {"mask_token_id": "1"},
    {"causal": "no"},
    {"format": "new"},
    {"model": []},
    {"model": {"architecture": {"n_stacks": 10**12}}},
    {"model": {"d_model": 10**12, "n_heads": 1}},
    {"model": {"n_heads": 10**12}},
    {"model": {"d_ff": 10**18}},
    {"model": {"norm": "\x1b[2J"}},
]


@pytest.mark.parametrize("change", ABOUT, ids=str)
def test_a_description_that_cannot_be_is_refused_in_one_line(change: dict[str, object], tmp_path: Path) -> None:
    model = rack(config())
    export(tmp_path / "out", model.front, stages(model, True), config(), native=True)
    path = tmp_path / "out" / "config.json"
    about = json.loads(path.read_text())
    entry = about["stackwise"]
    model_change = change.get("model")
    if isinstance(model_change, dict):
        change = {"model": entry["model"] | model_change}
    path.write_text(json.dumps(about | {"stackwise": entry | change}))
    with pytest.raises(UsageError) as caught:
        load_rack(tmp_path / "out")
    assert "\n" not in caught.value.message
    assert "\x1b" not in caught.value.message
    assert caught.value.exit_code == 2


def test_a_long_context_costs_nothing_until_it_is_used(tmp_path: Path) -> None:
    c = config(max_seq_len=1 << 24)
    model = rack(c)
    export(tmp_path / "out", model.front, stages(model, True), c)
    assert torch.equal(load_rack(tmp_path / "out")(ids()), model(ids()))


def test_a_description_may_not_be_a_link(tmp_path: Path) -> None:
    model = rack(config())
    export(tmp_path / "out", model.front, stages(model, True), config())
    path = tmp_path / "out" / "config.json"
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with raises_naming(UsageError, path):
        load_rack(tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with raises_naming(UsageError, tmp_path / "link"):
        export(tmp_path / "link", model.front, stages(model, True), config(), overwrite=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_import_and_export_give_the_same_tensors_and_what_transformers_loads(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path / "model", dtype=torch.bfloat16 if name in ("qwen3", "gpt2") else torch.float32)
    checkpoint = Checkpoint(tmp_path / "model", str(tmp_path / "cache"))
    exported = export_checkpoint(tmp_path / "out", checkpoint, ExportOptions(shard_bytes=20_000))
    assert exported.family == checkpoint.family.model_type
    before, after = (tensors_of(tmp_path / directory) for directory in ("model", "out"))
    assert list(before) == list(after)
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    auto = AutoModelForMaskedLM if checkpoint.description.masked_head else AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not any(info.values())
    assert loaded.dtype == model.dtype
    origin = auto.from_pretrained(tmp_path / "model", dtype="auto")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids()).logits, origin.eval()(ids()).logits)
    assert Checkpoint(tmp_path / "out").description.config == checkpoint.description.config


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rack_of_a_family_is_exported_as_one(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model", str(tmp_path / "cache"))
    about, loaded = checkpoint.description, load_rack(checkpoint)
    exported = export(tmp_path / "out", loaded.front, stages(loaded, about.causal), about.config, source=checkpoint)
    assert exported.family == checkpoint.family.model_type
    before, after = (tensors_of(tmp_path / directory) for directory in ("model", "out"))
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.config.eos_token_id == json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"]


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    files = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    return dict(sorted((name, tensor) for file in files for name, tensor in file.items()))


def test_a_checkpoint_in_the_native_format_comes_back(tmp_path: Path) -> None:
    make("bert", tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model", str(tmp_path / "cache"))
    assert export_checkpoint(tmp_path / "out", checkpoint, ExportOptions(native=True)).family == "stackwise"
    back = Checkpoint(tmp_path / "out", str(tmp_path / "cache"))
    assert [back.digest(part) for part in back.parts] == [checkpoint.digest(part) for part in checkpoint.parts]
    with torch.no_grad():
        assert torch.equal(load_rack(back)(ids()), load_rack(checkpoint)(ids()))


def test_the_tokens_of_a_source_stay_and_its_files_come_along(tmp_path: Path) -> None:
    make("llama", tmp_path / "model", bos_token_id=7, eos_token_id=[8, 9])
    (tmp_path / "model" / "tokenizer.json").write_text(tokenizer())
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"chat_template": "x", "model_max_length": 5}')
    (tmp_path / "model" / "generation_config.json").write_text('{"temperature": 0.6}')
    checkpoint = Checkpoint(tmp_path / "model", str(tmp_path / "cache"))
    back = load_rack(checkpoint)
    about = checkpoint.description.config
    given = {"source": checkpoint, "separator_id": 3, "mask_token_id": 4, "tokenizer_json": tokenizer()}
    export(tmp_path / "out", back.front, stages(back, True), about, **given)
    read = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in JSONS}
    assert (read["config"]["bos_token_id"], read["config"]["eos_token_id"]) == (7, [8, 9])
    assert read["config"]["stackwise"]["mask_token_id"] == 4
    assert read["tokenizer_config"]["chat_template"] == "x"
    assert read["generation_config"] == {"temperature": 0.6}


JSONS = ("config", "tokenizer_config", "generation_config")
