"""Settings that are given and not used: each has one line, and what is used or left alone has none."""

from __future__ import annotations

from typing import Any

import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.loading import build
from stackwise.config.unused import has_blocks_above, reading_depths, trains_heads_apart, unused_settings
from stackwise.config.yaml_files import dump, parse_yaml
from stackwise.errors import ConfigError
from stackwise.pipeline.schedule import FRONT, HEAD, schedule
from stackwise.presets import PRESETS

P = {"training.progressive.enabled": True}
Q = {**P, "training.progressive.trunk_strategy": "qlora", "training.progressive.qlora_rank": 4}
INDEPENDENT = {"training.mode": "independent"}
WHOLE = {"training.mode": "end_to_end"}
GROWING = {"training.mode": "fused", "training.fusion_mode": "trainable"}
PREPEND = {**P, "training.progressive.building_mode": "prepend"}
CLM = {"training.objective": "clm"}
DEPTH = {**P, "training.progressive.time_interpretation": "depth"}


def config(overrides: dict[str, Any]) -> StackWiseConfig:
    """Four blocks, each a stage, on the micro preset."""
    return StackWiseConfig.from_preset("micro", {"model.architecture.n_stacks": 4, **overrides})


def key(name: str) -> str:
    """Short names of settings of progressive training and of training."""
    where = {"p": "training.progressive", "m": "training.mode", "t": "training", "f": "training.fusion", "s": "store"}
    first, _, rest = name.partition(".")
    return f"{where[first]}.{rest}" if first in where else name


NO_BOUNDARY = "no stage of this schedule reads a boundary"
UNUSED: list[tuple[dict[str, Any], str, Any, str]] = [
    (Q, "p.qlora_enabled", False, "a QLoRA trunk learns by its adapters (trunk_strategy: frozen has none)"),
    ({**P, "training.progressive.new_stack_precision": "qlora", "training.progressive.qlora_rank": 4},
     "p.qlora_enabled", False, "weights in precision qlora learn by their adapters"),
    (P, "p.qlora_enabled", True, "the trunk is frozen"),
    (P, "p.qlora_rank", 4, "the trunk is frozen"),
    ({**P, "training.progressive.trunk_strategy": "qlora", "training.progressive.progressive_qlora": True},
     "p.qlora_alpha", 4.0, "beside progressive_qlora stacks have adapters by qlora_enabled"),
    (Q, "p.qlora_rank_pattern", "increasing", "qlora_strategy is simplified"),
    (Q, "p.qlora_configs", {0: {"rank": 2}}, "qlora_strategy is simplified"),
    (Q, "p.progressive_qlora_rank", 2, "training.progressive.progressive_qlora is false"),
    (Q, "p.cache_activations", True, "a QLoRA trunk changes with every step, so nothing of it is stored"),
    (PREPEND, "p.cache_activations", False, "with stacks added below, every stage reads tokens"),
    (P, "p.max_stacks", 6, "there are 4 stacks"),
    ({}, "p.max_stacks", 2, "training.progressive.enabled is false"),
    ({}, "p.stack_time_mapping", "linear", "training.progressive.enabled is false"),
    ({**P, "training.progressive.time_interpretation": "input"}, "p.time_per_stack", 50,
     "a stack sees masked shares, and no count of time steps"),
    (DEPTH, "p.time_per_stack", 50, "a stack sees masked shares, and no count of time steps"),
    (DEPTH, "p.time_embedding_dim", 64, "time is not an input"),
    (P, "p.stack_time_mapping", "custom", "custom is for fractions that go over depth (training.mask_schedule_over)"),
    (P, "t.mode", "fused", "training.progressive.enabled is true"),
    ({"training.mode": "blockwise"}, "t.fusion_mode", "trainable", "training.mode is blockwise"),
    ({**WHOLE, "training.block_size": 4}, "t.n_stages", 2, "training.mode is end_to_end"),
    ({"training.mode": "layerwise"}, "t.block_size", 2, "training.mode is layerwise"),
    ({}, "m.trial_steps", 5, "training.mode.block_size is a number"),
    (INDEPENDENT, "t.mask_schedule_over", "time", "independent stages go over depth, each alone"),
    (DEPTH, "t.mask_schedule_over", "time", "training.progressive.time_interpretation is depth"),
    (WHOLE, "t.mask_schedule_over", "depth", "there is one stage"),
    ({**P, "training.progressive.stack_time_mapping": "linear"}, "t.mask_schedule_type", "cosine",
     "training.progressive.stack_time_mapping is linear"),
    ({}, "t.mask_windows", [[0.15, 0.9]], "fractions go over time (training.mask_schedule_over)"),
    (CLM, "t.min_mask_fraction", 0.2, "clm masks nothing"),
    (CLM, "t.mask_pool", 64, "clm masks nothing"),
    (WHOLE, "t.fresh_masks", True, "there is one stage"),
    (WHOLE, "t.tied_head", "frozen", "no stage trains a head without the front"),
    (GROWING, "t.tied_head", "frozen", "no stage trains a head without the front"),
    (PREPEND, "t.tied_head", "frozen", "no stage trains a head without the front"),
    (WHOLE, "t.windows", 2, NO_BOUNDARY),
    (INDEPENDENT, "t.lookahead", "tail", "no stage of this schedule has blocks above it"),
    ({}, "t.lookahead_blocks", 2, "training.lookahead is none"),
    ({"training.swap": "never"}, "t.swap_parts", 2, "training.swap is never"),
    ({"training.swap": "never"}, "t.memory", 10**9, "training.swap is never"),
    ({}, "t.mlm_mask", 0.7, "training.objective is mask_diffusion"),
    ({"training.lr_schedule": "constant"}, "t.min_learning_rate", 0.5, "lr_schedule is constant"),
    ({}, "t.tokens", 4096, "steps is given"),
    ({}, "t.adaptation_anneal", 2, "a rack is made causal at once"),
    ({"training.adaptation": "causal"}, "t.adaptation.anneal", 2, "a rack is made causal at once"),
    ({}, "f.rounds", 3, "training.fusion is none"),
    ({}, "f.probe_steps", 2, "training.fusion is none"),
    (WHOLE, "t.fusion", "trainable", "there is one stage"),
    *((base, f"s.{name}", value, NO_BOUNDARY)
      for base in (Q, PREPEND, INDEPENDENT, WHOLE, GROWING)
      for name, value in (("every", 2), ("fuse_passes", True), ("codec", "fp8"), ("keep", "none"))),
    ({**P, "training.progressive.cache_activations": False}, "s.every", 2,
     "training.progressive.cache_activations is false"),
    ({}, "model.attention.window", 4, "with mask_diffusion attention sees in both directions"),
    ({"store.every": 9}, "s.fuse_passes", True, "store.every is 9: none is stored"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "name", "value", "why"), UNUSED, ids=[f"{n}={v}" for _, n, v, _ in UNUSED])
def test_a_setting_that_is_not_used_has_one_line(base: dict[str, Any], name: str, value: Any, why: str) -> None:
    before, after = unused_settings(config(base)), unused_settings(config({**base, key(name): value}))
    (line,) = [each for each in after if each not in before]
    assert line.startswith(f"{key(name)} ")
    assert why in line
    again = build(StackWiseConfig, parse_yaml(dump(config(base)), "dump"))
    assert unused_settings(again) == before, "a saved configuration has no setting in vain that was not"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"training.block_size": 99}, "training.mode.block_size: 99 is more than the model's blocks: 4 is used"),
        (
            {"training.lookahead": "tail", "training.lookahead_blocks": 9},
            "training.lookahead.blocks: 9 is more than the blocks above the lowest stage: 3 is used",
        ),
        (
            {**P, "training.block_size": 2, "training.n_stages": 2},
            "training.mode is unused: training.progressive.enabled is true",
        ),
        (
            {"training.n_stages": 2, "training.block_size": 3},
            "training.mode.block_size is unused: training.mode.n_stages is given",
        ),
        ({"store.every": 2, "store.keep": 1, **Q}, f"store.every, keep: unused, {NO_BOUNDARY}"),
        (
            {"training.optimizer": "muon", "stages.1.training": {"optimizer": "adamw", "muon_momentum": 0.5}},
            "stages.1.training.muon_momentum is unused: stages.1.training.optimizer is adamw",
        ),
        ({"stages.3.precision": "fp8", "training.block_size": 2, "training.fusion.strategy": "hierarchical"}, None),
        ({"data.tasks": [{"name": "a", "paths": ["a"]}, {"name": "b", "paths": ["b"]}],
          "training.meta": {"permutations": 9}},
         "training.meta.permutations is unused: data.tasks names the tasks"),
        ({"tracking.project": "a", "tracking.group": "b"},
         "tracking.group, project: unused, no tracker in use knows runs by name"),
    ],
)  # fmt: skip
def test_what_is_cut_and_what_is_said_together(overrides: dict[str, Any], line: str | None) -> None:
    found = unused_settings(
        config({"model.architecture.n_stacks": 8, **overrides}) if line is None else config(overrides)
    )
    assert found == ([] if line is None else [line])


@pytest.mark.parametrize(
    "overrides",
    [
        {"stages.1.precision": "half", "training.loss_scale": 1024.0},
        {"stages.1.precision": "qlora", "training.progressive.qlora_rank": 4, "training.progressive.qlora_alpha": 8.0},
        {}, P, Q, PREPEND, DEPTH, INDEPENDENT, CLM,
        {**P, "training.progressive.max_stacks": 2},
        {**Q, "training.progressive.progressive_qlora": True, "training.progressive.qlora_enabled": False,
         "training.progressive.qlora_rank": 16},
        {**Q, "training.progressive.qlora_enabled": True},
        {**P, "training.progressive.cache_activations": True, "training.progressive.qlora_enabled": False},
        {**Q, "training.progressive.qlora_strategy": "progressive",
         "training.progressive.qlora_rank_pattern": "linear"},
        {**P, "training.progressive.time_interpretation": "input", "training.progressive.time_embedding_dim": 64},
        {**P, "training.progressive.stack_time_mapping": "exponential"},
        {"training.mask_schedule_over": "time"}, {"training.mask_schedule_over": "depth"},
        {"training.block_size": "auto", "training.trial_steps": 5}, {"training.block_size": 4},
        {"training.lookahead": "tail", "training.lookahead_blocks": 3},
        {**GROWING, "training.lookahead": "tail"},
        {**GROWING, "training.fusion.strategy": "hierarchical", "store.codec": "fp8", "training.tied_head": "frozen"},
        {"store.every": 2, "store.fuse_passes": True, "store.codec": "fp8", "store.keep": "none"},
        {"training.tied_head": "frozen", "training.fresh_masks": True, "training.swap_parts": 2},
        {"training.swap": "never", "training.memory": 10**9, "training.block_size": "auto"},
        {**CLM, "model.attention.window": 4}, {"training.adaptation": "causal", "model.attention.window": 4},
        {"training.objective": {"name": "mask_diffusion", "block": 4}, "model.attention.window": 4},
    ],
)  # fmt: skip
def test_what_is_used_has_no_line(overrides: dict[str, Any]) -> None:
    assert unused_settings(config(overrides)) == []
    assert unused_settings(build(StackWiseConfig, parse_yaml(dump(config(overrides)), "dump"))) == []


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("every", [False, True], ids=["as it stands", "with every default written out"])
def test_presets_and_defaults_have_no_line(name: str, every: bool) -> None:
    preset = StackWiseConfig.from_preset(name)
    assert unused_settings(build(StackWiseConfig, parse_yaml(dump(preset), "dump")) if every else preset) == []


@pytest.mark.parametrize("fusion", ["none", "frozen", "trainable", "hierarchical"])
@pytest.mark.parametrize(
    "base",
    [{}, {"training.mode": "layerwise"}, {"training.mode": "fused"}, GROWING, WHOLE, INDEPENDENT, P, Q, PREPEND,
     {"training.adaptation": "causal"}, {"training.block_size": 3}],
)  # fmt: skip
def test_what_settings_are_for_is_what_the_schedule_does(base: dict[str, Any], fusion: str) -> None:
    if fusion != "none" and (base == INDEPENDENT or (base == PREPEND and fusion == "hierarchical")):
        with pytest.raises(ConfigError, match="fusion"):
            config({**base, "training.fusion.strategy": fusion})
        return
    made = config({**base, "training.fusion.strategy": fusion})
    stages = schedule(made)
    assert reading_depths(made) == [stage.depth for stage in stages if stage.reads_boundary]
    assert trains_heads_apart(made) == any({FRONT, HEAD} & set(stage.trains) == {HEAD} for stage in stages)
    looking = schedule(config({**base, "training.fusion.strategy": fusion, "training.lookahead": "auxiliary"}))
    assert has_blocks_above(made) == any(stage.lookahead for stage in looking)
