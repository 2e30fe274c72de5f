"""The configuration as a user meets it: what is accepted, and what is said of what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.loading import build, parse_overrides
from stackwise.config.unused import unused_settings
from stackwise.config.yaml_files import commented, dump, parse_yaml
from stackwise.errors import ConfigError, NotFound, UsageError
from stackwise.presets import PRESETS
from tests.conftest import raises_naming

SEED_YAML = """
model:
  d_model: 8192
  n_heads: 64
  d_ff: 28672
  architecture:
    n_stacks: 80
    blocks_per_stack: 1
training:
  mode: "blockwise"
  block_size: 4
  fusion_mode: "frozen"
  min_mask_fraction: 0.15
  max_mask_fraction: 0.90
  mask_schedule_type: "linear"
  mask_token_id: 0
  cache_mode: "layerwise"
  cache_dir: "./cache"
  fusion_evaluation: false
  save_fused_checkpoints: false
  epochs_per_layer: 1
  learning_rate: 1.0e-4
  batch_size: 4
  seq_len: 512
  progressive:
    enabled: true
    trunk_strategy: "frozen"
    new_stack_precision: "full"
    cache_activations: true
    qlora_enabled: true
    qlora_rank: 16
    qlora_alpha: 32
    qlora_strategy: "simplified"
    progressive_qlora: true
    progressive_qlora_rank: 8
    progressive_qlora_alpha: 16
    max_stacks: 12
    building_mode: "append"
    time_interpretation: "depth"
    time_embedding_dim: 512
    time_encoding_type: "sinusoidal"
    stack_time_mapping: "linear"
    time_per_stack: 100
    training_objective: "mlm"
    qlora_rank_pattern: increasing
    qlora_alpha_pattern: constant
    qlora_configs:
      0: {rank: 8, alpha: 16}
      1: {rank: 16, alpha: 32}
"""


def faults(tree: dict[str, Any], **overrides: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(StackWiseConfig, tree, {key.replace("__", "."): value for key, value in overrides.items()})
    assert caught.value.exit_code == 2
    return list(caught.value.faults)


def test_the_keys_of_the_original_documents_are_accepted_as_they_stand() -> None:
    config = build(StackWiseConfig, parse_yaml(SEED_YAML, "seed"))
    assert config.model.n_blocks == 12, "max_stacks bounds the stacks that are grown"
    assert config.objective.name == "mlm"
    assert config.time_as_depth
    assert config.store.path == "./cache"
    said = "\n".join(unused_settings(config))
    for unused in ("cache_mode", "mode is unused", "qlora_rank"):
        assert unused in said


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_their_commented_files_say_the_same(name: str) -> None:
    config = StackWiseConfig.from_preset(name)
    assert config.validate() is config
    assert build(StackWiseConfig, parse_yaml(commented(name), name)) == config
    assert unused_settings(config) == []


@pytest.mark.parametrize("name", PRESETS)
def test_the_resolved_configuration_reads_back_as_itself(name: str) -> None:
    paths = ["1e3", "no", "0x1F", "é 🙂/a: b", "- x"]
    config = StackWiseConfig.from_preset(name, {"stages.0.training.learning_rate": 1e-3, "data.paths": paths})
    again = build(StackWiseConfig, parse_yaml(dump(config), "dump"))
    assert again.model_dump() == config.model_dump()
    assert again.stage_training(0).learning_rate == 1e-3


def test_a_saved_configuration_decides_as_the_one_that_was_given() -> None:
    """What is null may be decided by something else; a saved configuration writes it out, and must not decide it."""
    given = {"training.progressive.enabled": True, "training.mask_schedule_type": "cosine"}
    config = StackWiseConfig.from_preset("micro", given)
    again = build(StackWiseConfig, parse_yaml(dump(config), "dump"))
    assert config.training.mask_schedule_type == again.training.mask_schedule_type == "cosine"


def test_every_setting_is_documented() -> None:
    text = commented("demo")
    assert text.count("#") > 100
    for key in ("checkpoint_minutes", "qlora_alpha", "within_documents", "max_bytes"):
        assert key in text


def test_an_unknown_key_in_a_mapping_of_sections() -> None:
    found = faults(
        {"training": {"progressive": {"qlora_configs": {0: {"rnk": 2}}}}, "stages": {3: {"precison": "fp8"}}}
    )
    near = {fault.partition(":")[0]: fault for fault in found}
    assert "training.progressive.qlora_configs.0.rank" in near["training.progressive.qlora_configs.0.rnk"]
    assert "stages.3.precision" in near["stages.3.precison"]


def test_a_whole_number_may_have_an_exponent() -> None:
    assert parse_yaml("[1e3, 1e-3, 2.0]", "x") == [1000, 0.001, 2.0]
    assert isinstance(parse_yaml("1e3", "x"), int)
    (fault,) = faults({"training": {"mask_windows": [[0.1, 0.2, 0.3]]}})
    assert fault.startswith("training.mask_windows")
    assert "[[0.1, 0.2, 0.3]]" in fault


def test_all_faults_of_a_file_are_reported_at_once() -> None:
    found = faults(
        {
            "modle": {},
            "learning_rate": 1,
            "model": {"n_heads": 3, "d_model": 64},
            "training": {"lerning_rate": 1, "mode": "x", "min_mask_fraction": 0, "steps": "3", "batch_size": 0},
            "store": {"keep": -1},
            "data": {"paths": [1]},
            "device": "gpu",
            "stages": {0: {"training": {"seq_len": 2}}},
        }
    )
    at_fault = dict(fault.split(": ", 1) for fault in found)
    for key, value in {
        "training.mode": "'x'", "training.min_mask_fraction": "0", "training.steps": "'3'", "training.batch_size": "0",
        "model.n_heads": "64", "store.keep": "-1", "data.paths": "[1]", "device": "'gpu'",
    }.items():  # fmt: skip
        assert value in at_fault[key]
    for key, meant in {
        "modle": "model", "learning_rate": "training.learning_rate", "training.lerning_rate": "training.learning_rate",
        "stages.0.training.seq_len": "training.seq_len",
    }.items():  # fmt: skip
        assert meant in at_fault[key]
    assert len(found) == 12


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"training__max_mask_fraction": 1.5}, "training.max_mask_fraction"),
        ({"training__min_mask_fraction": 0.95}, "training.min_mask_fraction"),
        ({"model__ffn": {"kind": "moe", "experts": 2, "at": [1, 1]}}, "model.ffn.at"),
        ({"training__n_stages": 9}, "training.mode.n_stages"),
        ({"stages": {7: {}}}, "stages.7"),
        ({"model__n_kv_heads": 3}, "model.attention.kv_heads"),
        ({"model__head_size": 7}, "model.head_size"),
        ({"model__position_offset": 2}, "model.position_offset"),
        (
            {"model__attention": {"kind": "linear", "window": 4}},
            "model.attention.window",
        ),
        ({"model__attention": {"kind": "mla", "qk_norm": True}}, "model.attention.qk_norm"),
        ({"model__attention": {"kind": "mha", "window_blocks": [1]}}, "model.attention.window_blocks"),
        ({"model__attention": {"kind": "mha", "window": 3, "window_blocks": [4]}}, "model.attention.window_blocks"),
        ({"model__rope_scaling": {"kind": "longrope"}}, "model.rope_scaling"),
        (
            {"model__positions": "learned", "model__rope_scaling": {"kind": "linear", "factor": 2.0}},
            "model.rope_scaling.kind",
        ),
        (
            {
                "model__attention": "mla",
                "model__rope_scaling": {"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 8},
            },
            "model.rope_scaling.attention_factor",
        ),
        ({"data__vocab_size": 100}, "data.vocab_size"),
        ({"training__learning_rate": float("nan")}, "training.learning_rate"),
        ({"store__keep": "some"}, "store.keep"),
        ({"seed": -1}, "seed"),
        ({"name": "../up"}, "name"),
        ({"training": 3}, "training"),
    ],
)
def test_faults(overrides: dict[str, Any], key: str) -> None:
    tree = {"model": {"architecture": {"n_stacks": 4}}, "training": {"block_size": 2}}
    assert [fault.partition(": ")[0] for fault in faults(tree, **overrides)] == [key]


def test_numbers_in_scientific_notation_are_numbers() -> None:
    assert parse_overrides(["training.learning_rate=1e-3", "a=[1e3, x]"]) == {
        "training.learning_rate": 1e-3,
        "a": [1000.0, "x"],
    }
    with raises_naming(UsageError, "training.learning_rate"):
        parse_overrides(["training.learning_rate"])


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a: [1", "line 1"),
        ("name: x\nname: y\n", "line 2, column 1"),
        ("- 1\n", "[1]"),
        ("? [1]\n: 2\n", "line 1, column 3"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1, column 4"),
    ],
)
def test_what_is_no_configuration(text: str, where: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with raises_naming(ConfigError, where):
        StackWiseConfig.from_yaml(str(path))


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with raises_naming(NotFound, tmp_path / "none.yaml"):
        StackWiseConfig.from_yaml(str(tmp_path / "none.yaml"))
    with raises_naming(UsageError, tmp_path):
        StackWiseConfig.from_yaml(str(tmp_path))
    with raises_naming(NotFound, "'dmo'", "demo"):
        StackWiseConfig.from_preset("dmo")


def test_a_section_whose_keys_are_all_commented_out_is_empty() -> None:
    assert build(StackWiseConfig, {"training": None, "model": {"architecture": None}}).n_stages == 1


def test_assignment_is_checked_too() -> None:
    config = StackWiseConfig()
    config.training.mode = "layerwise"
    with pytest.raises(ValueError, match="mode"):
        config.training.mode = "sideways"  # type: ignore[assignment]
