"""Precisions and adapters of stacks: what they mean by stage, what is refused, what is in vain."""

from __future__ import annotations

from typing import Any

import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.precision import stack_adapters, stack_precision, trunk_precision
from stackwise.config.unused import unused_settings
from stackwise.errors import ConfigError

KEY = "training.progressive"


def config(**settings: Any) -> StackWiseConfig:
    """Three progressive stacks on the micro preset; dots are written as `__`."""
    keys = {name.replace("__", "."): value for name, value in settings.items()}
    inside = {key if "." in key or key == "precision" else f"{KEY}.{key}": value for key, value in keys.items()}
    return StackWiseConfig.from_preset("micro", {"model.architecture.n_stacks": 3, f"{KEY}.enabled": True, **inside})


def test_precision_by_stack() -> None:
    mixed = config(
        precision="fp32", new_stack_precision="half", stages__1__precision="fp4", stages__2__precision="full"
    )
    assert [stack_precision(mixed, depth) for depth in range(3)] == ["fp16", "nvfp4", "full"]
    same = config(precision="bf16", new_stack_precision="bfloat16")
    assert [stack_precision(same, depth) for depth in range(3)] == ["full"] * 3, "the run's own precision is no other"
    plain = StackWiseConfig.from_preset("micro", {"stages.1.precision": "fp8"})
    assert [stack_precision(plain, depth) for depth in range(2)] == ["full", "fp8"]
    assert not plain.training.progressive.holds_trunk


def test_precision_of_the_trunk() -> None:
    qlora = config(trunk_strategy="qlora", qlora_rank=4, stages__1__precision="fp8")
    assert [trunk_precision(qlora, depth) for depth in range(3)] == ["qlora", "fp8", "qlora"], "no second rounding"
    assert [trunk_precision(config(trunk_strategy="qlora", qlora_rank=4, trunk_precision="full"), 0)] == ["full"]
    assert [trunk_precision(config(building_mode="prepend", trunk_precision="fp4"), 0)] == ["nvfp4"]
    assert [trunk_precision(config(building_mode="prepend"), 0)] == ["full"]
    assert config(building_mode="prepend").training.progressive.holds_trunk
    assert not config(cache_activations=False).training.progressive.holds_trunk


def test_adapters_by_stack_and_over_the_trunk() -> None:
    both = config(
        trunk_strategy="qlora", qlora_enabled=True, qlora_rank=2, qlora_strategy="progressive",
        qlora_rank_pattern="increasing", progressive_qlora=True, progressive_qlora_rank=3, progressive_qlora_alpha=6.0,
    )  # fmt: skip
    assert stack_adapters(both, 0, 0) == {"stack": (2, 32.0)}
    assert stack_adapters(both, 0, 2) == {"stack": (2, 32.0), "trunk_1": (3, 6.0), "trunk_2": (3, 6.0)}
    assert stack_adapters(both, 2, 2) == {"stack": (8, 32.0)}
    implied = config(trunk_strategy="qlora", qlora_rank=4)
    assert list(stack_adapters(implied, 0, 1)) == ["stack"], "a QLoRA trunk without adapters could not learn"
    assert list(stack_adapters(config(trunk_strategy="qlora", progressive_qlora=True), 0, 1)) == ["trunk_1"]
    assert stack_adapters(config(), 0, 1) == {}
    assert list(stack_adapters(config(new_stack_precision="qlora", qlora_rank=4), 1, 1)) == ["stack"]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"trunk_strategy": "qlora", "qlora_rank": 33}, r"progressive.qlora_rank: adapters of rank 33 \(stack 0\)"),
        (
            {"trunk_strategy": "qlora", "qlora_strategy": "progressive", "qlora_rank_pattern": "increasing"},
            r"qlora_rank: adapters of rank 64 \(stack 2, by the pattern increasing\) .*: at most 32",
        ),
        (
            {"trunk_strategy": "qlora", "progressive_qlora": True, "progressive_qlora_rank": 64},
            "progressive_qlora_rank: adapters of rank 64",
        ),
        (
            {"trunk_strategy": "qlora", "qlora_strategy": "variable", "qlora_configs": {0: {"rank": 4}}},
            "qlora_configs: no entry for stack 1: give entries",
        ),
        (
            {"new_stack_precision": "qlora", "qlora_strategy": "variable",
             "qlora_configs": {k: {"rank": 4 + 40 * k} for k in range(3)}},
            r"qlora_configs.1.rank: adapters of rank 44 \(stack 1\)",
        ),
        ({"trunk_strategy": "qlora", "trunk_precision": "bf16"}, "bf16 is no way to hold a trunk"),
    ],
)  # fmt: skip
def test_faults(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"trunk_strategy": "qlora", "cache_activations": True}, "cache_activations is unused: a QLoRA trunk changes"),
        ({"qlora_enabled": True, "progressive_qlora": True}, "progressive_qlora, qlora_enabled: unused, the trunk is"),
        ({"new_stack_precision": "qlora", "qlora_rank": 4, "progressive_qlora": True}, "progressive_qlora is unused"),
        ({"trunk_precision": "fp8"}, "trunk_precision is unused: a stage reads activations, and holds no trunk"),
    ],
)
def test_what_is_in_vain_has_one_line(settings: dict[str, Any], note: str) -> None:
    (line,) = unused_settings(config(**settings))
    assert note in line


def test_what_is_used_has_none() -> None:
    assert not unused_settings(config(trunk_strategy="qlora", qlora_enabled=True, qlora_rank=4, trunk_precision="fp8"))
    assert not unused_settings(config(building_mode="prepend", trunk_precision="fp8"))
