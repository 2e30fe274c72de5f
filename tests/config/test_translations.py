"""Keys as they were written before: the seeds' documents, flat keys, configurations of earlier runs, overrides."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.loading import build
from stackwise.config.translations import TABLE
from stackwise.config.unused import unused_settings
from stackwise.config.yaml_files import dump, parse_yaml
from stackwise.errors import ConfigError
from tests.conftest import raises_naming

SEEDS = (
    """
training:
  mode: "layerwise" | "blockwise" | "fused"
  block_size: 4                    # Layers per block
  fusion_mode: "frozen" | "trainable"  # For fused mode
""",
    """
training:
  min_mask_fraction: 0.15         # Early layers (15%)
  max_mask_fraction: 0.90         # Late layers (90%)
  mask_schedule_type: "linear"    # linear | exponential | cosine
  mask_token_id: 0
""",
    """
training:
  cache_mode: "layerwise" | "fusion"
  cache_dir: "./cache"
  fusion_evaluation: false
  save_fused_checkpoints: false
""",
    """
training:
  epochs_per_layer: 1
  learning_rate: 1.0e-4
  batch_size: 4
  seq_len: 512
""",
    """
training:
  progressive:
    # Stack LoRA parameters (added to each stack)
    qlora_enabled: true
    qlora_rank: 16
    qlora_alpha: 32
    # Progressive QLoRA parameters (added to trunk when new stacks are added)
    progressive_qlora: true
    progressive_qlora_rank: 8
    progressive_qlora_alpha: 16
""",
    """
training:
  progressive:
    enabled: true
    trunk_strategy: "frozen"         # "frozen" or "qlora"
    new_stack_precision: "full"      # "full", "half", "bfloat16", "qlora"
    cache_activations: true
    # Simplified QLoRA configuration
    qlora_enabled: true              # Enable QLoRA adapters on all stacks
    qlora_rank: 16                   # QLoRA rank for all stacks
    qlora_alpha: 32                  # QLoRA alpha parameter
    qlora_strategy: "simplified"     # "simplified" - add LoRA to all stacks
    max_stacks: 12
    building_mode: "append"          # "append" or "prepend"
    # Time interpretation
    time_interpretation: "input" | "depth"
    time_embedding_dim: 512          # For time-as-input
    time_encoding_type: "sinusoidal" | "learned"
    stack_time_mapping: "linear" | "exponential"
    time_per_stack: 100              # For time-as-depth
    training_objective: "mlm" | "mask_diffusion"
""",
    """
model:
  d_model: 8192
  n_heads: 64
  d_ff: 28672
  architecture:
    n_stacks: 80
    blocks_per_stack: 1
training:
  progressive:
    enabled: true
    trunk_strategy: "frozen"
    new_stack_precision: "fp16"
    cache_activations: true
""",
)
"""The YAML blocks of the original documents; `a | b` stands for either, as it does there."""


def blocks(text: str) -> list[str]:
    """A block with one of each alternatives."""
    alternatives = [re.findall(r'"[^"]*"', found) for found in re.findall(r'"[^"]*"(?: \| "[^"]*")+', text)]
    pieces = re.split(r'"[^"]*"(?: \| "[^"]*")+', text)
    return [
        "".join(map("".join, zip(pieces, (*chosen, ""), strict=True))) for chosen in itertools.product(*alternatives)
    ]


def made(overrides: dict[str, Any]) -> StackWiseConfig:
    return StackWiseConfig.from_preset("micro", overrides)


@pytest.mark.parametrize("text", SEEDS)
def test_the_blocks_of_the_original_documents_are_accepted(text: str) -> None:
    for block in blocks(text):
        config = build(StackWiseConfig, parse_yaml(block, "seed"))
        assert build(StackWiseConfig, parse_yaml(dump(config), "saved")) == config


def test_what_the_original_documents_say_is_what_is_done() -> None:
    config = build(StackWiseConfig, parse_yaml(blocks(SEEDS[5])[0], "seed"))
    assert config.model.time_embedding.plain() == {"kind": "sinusoidal", "width": 512}
    assert config.objective.name == "mlm"
    assert not config.time_as_depth
    depth = build(StackWiseConfig, parse_yaml(blocks(SEEDS[5])[-1], "seed"))
    assert depth.time_as_depth
    assert depth.training.mask_schedule_type == "exponential"
    cached = build(StackWiseConfig, parse_yaml(blocks(SEEDS[2])[0], "seed"))
    assert cached.store.path == "./cache"
    assert [line.split()[0] for line in unused_settings(cached)] == ["training.cache_mode"]


def test_the_configuration_of_an_earlier_run_is_read_as_it_was_meant() -> None:
    earlier = StackWiseConfig.from_yaml(str(Path(__file__).parent / "earlier.yaml"))
    optimizer = {"name": "muon", "beta1": 0.8, "beta2": 0.95, "eps": 1e-8, "momentum": 0.9}
    assert earlier.training.optimizer.plain() == optimizer
    assert earlier.stage_training(1).optimizer.plain() == optimizer | {"momentum": 0.5}
    assert earlier.stage_training(0).optimizer.plain() == {"name": "adamw", "beta1": 0.8, "beta2": 0.95, "eps": 1e-8}
    assert unused_settings(earlier) == []
    assert build(StackWiseConfig, parse_yaml(dump(earlier), "saved")) == earlier


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"model.n_kv_heads": 1}, {"model.attention": {"kind": "gqa", "kv_heads": 1}}),
        ({"model.attention": "mla", "model.kv_rank": 8}, {"model.attention": {"kind": "mla", "kv_rank": 8}}),
        ({"model.attention": "linear", "model.n_kv_heads": 1}, {"model.attention": {"kind": "linear", "kv_heads": 1}}),
        ({"training.optimizer": "muon", "training.muon_momentum": 0.9, "training.beta1": 0.8},
         {"training.optimizer": {"name": "muon", "momentum": 0.9, "beta1": 0.8}}),
        ({"training.objective": "mlm", "training.mlm_mask": 0.7},
         {"training.objective": {"name": "mlm", "mask_share": 0.7}}),
        ({"training.diffusion_block": 8, "training.loss_weight": "inverse_time"},
         {"training.objective": {"name": "mask_diffusion", "block": 8, "weight": "inverse_time"}}),
        ({"training.on_divergence": "rollback", "training.rollback_factor": 0.3, "training.divergence_factor": 2.0},
         {"training.divergence": {"policy": "rollback", "rate_factor": 0.3, "factor": 2.0}}),
        ({"training.lookahead": "tail", "training.lookahead_blocks": 1}, {"training.lookahead": "tail"}),
        ({"training.adaptation": {"kind": "causal", "steps": 5, "anneal": 0}},
         {"training.adaptation": "causal", "training.adaptation_steps": 5}),
        ({"training.fusion.strategy": "adaptive", "training.fusion.steps": 16},
         {"training.fusion": {"strategy": "adaptive", "steps": 16}}),
        ({"model.time_embedding": "learned", "model.time_embedding_dim": 16},
         {"model.time_embedding": {"kind": "learned", "width": 16}}),
        ({"stages.1.training.muon_momentum": 0.5, "training.optimizer": "muon"},
         {"training.optimizer": "muon", "stages.1.training.optimizer": {"name": "muon", "momentum": 0.5}}),
        ({"tracking.wandb": "offline", "tracking.mlflow": "runs.db", "tracking.tensorboard": False},
         {"tracking.trackers": [{"kind": "wandb"}, {"kind": "mlflow", "uri": "runs.db"}]}),
        ({"stages": {1: {"training": {"on_divergence": "skip"}}}}, {"stages.1.training.divergence": "skip"}),
        ({"training.progressive.enabled": True, "training.progressive.time_interpretation": "depth"},
         {"training.progressive.enabled": True, "training.mask_schedule_over": "depth"}),
    ],
    ids=str,
)  # fmt: skip
def test_old_and_new_keys_are_one_setting(old: dict[str, Any], new: dict[str, Any]) -> None:
    first, second = made(old), made(new)
    assert first == second
    assert [first.stage_training(depth) for depth in (0, 1)] == [second.stage_training(depth) for depth in (0, 1)]
    if len(first.tracking.trackers) < 2:
        assert made(dict(reversed(old.items()))) == first, "the order of overrides decides nothing"
    assert build(StackWiseConfig, parse_yaml(dump(first), "saved")) == first


def test_a_setting_given_in_both_forms_is_refused_with_both_values() -> None:
    tree = {"training": {"muon_momentum": 0.9, "optimizer": {"name": "muon", "momentum": 0.8}}}
    with raises_naming(ConfigError, "training.muon_momentum", 0.9, "training.optimizer.momentum", 0.8):
        build(StackWiseConfig, tree)
    build(StackWiseConfig, {"training": {"muon_momentum": 0.8, "optimizer": {"name": "muon", "momentum": 0.8}}})
    with raises_naming(ConfigError, "training.cache_dir", "'a'", "store.path", "'b'"):
        build(StackWiseConfig, {"training": {"cache_dir": "a"}, "store": {"path": "b"}})


def test_an_override_by_name_keeps_what_both_kinds_have() -> None:
    tree = {"training": {"optimizer": {"name": "muon", "momentum": 0.9, "beta1": 0.8}}}
    config = build(StackWiseConfig, tree, {"training.optimizer": "adamw"})
    assert config.training.optimizer.plain() == {"name": "adamw", "beta1": 0.8, "beta2": 0.95, "eps": 1e-8}
    whole = build(StackWiseConfig, tree, {"training.optimizer": {"name": "adamw"}})
    assert whole.training.optimizer.plain()["beta1"] == 0.9
    one = build(StackWiseConfig, tree, {"training.optimizer.momentum": 0.7})
    assert (
        one.training.optimizer.plain() | {"name": "muon", "momentum": 0.7, "beta1": 0.8}
        == one.training.optimizer.plain()
    )
    assert build(StackWiseConfig, tree, {"training.optimizer": None}).training.optimizer.plain()["name"] == "adamw"


def test_old_keys_that_a_kind_lacks_are_accepted_and_named() -> None:
    lines = unused_settings(made({"training.muon_momentum": 0.9, "training.mlm_mask": 0.5, "model.kv_rank": 3}))
    assert [line.partition(" ")[0] for line in lines] == [
        "training.muon_momentum",
        "training.mlm_mask",
        "model.kv_rank",
    ]


def test_no_old_key_is_a_setting_too() -> None:
    flat = StackWiseConfig.model_fields, StackWiseConfig().model_dump()
    for row in TABLE:
        section, _, name = row.old.rpartition(".")
        tree: Any = flat[1]
        for part in section.split("."):
            tree = tree[part]
        assert row.old == row.new or name not in tree, row.old
