from __future__ import annotations

from typing import Any

import pytest

from stackwise.config import ModelConfig, StackWiseConfig
from stackwise.config.choices import MODES, Mode
from stackwise.config.loading import build
from stackwise.pipeline.schedule import schedule, stage_below


def config(blocks: int = 7, **training: Any) -> StackWiseConfig:
    return build(StackWiseConfig, {"model": {"architecture": {"n_stacks": blocks}}, "training": training})


def rows(c: StackWiseConfig) -> list[tuple[int, int, bool, int]]:
    return [(s.first, s.last, s.reads_boundary, s.rowset) for s in schedule(c)]


def test_layerwise_is_blockwise_with_one_block() -> None:
    assert rows(config(3, mode="layerwise")) == [(0, 0, False, 0), (1, 1, True, 0), (2, 2, True, 0)]
    assert rows(config(3, mode="layerwise")) == rows(config(3, mode="blockwise", block_size=1))


def test_a_last_stage_takes_what_does_not_divide() -> None:
    assert rows(config(7, block_size=3)) == [(0, 2, False, 0), (3, 5, True, 0), (6, 6, True, 0)]


def test_end_to_end_is_one_stage() -> None:
    assert rows(config(7, mode="end_to_end")) == [(0, 6, False, 0)]


def test_fused_frozen_draws_fresh_rows_for_each_stage() -> None:
    assert rows(config(4, mode="fused", block_size=2)) == [(0, 1, False, 0), (2, 3, True, 1)]


def test_fused_trainable_grows_from_tokens() -> None:
    stages = schedule(config(4, mode="fused", block_size=2, fusion_mode="trainable"))
    assert [(s.first, s.last, s.reads_boundary) for s in stages] == [(0, 1, False), (0, 3, False)]
    assert stages[1].trains == ("front", "block.0", "block.1", "block.2", "block.3", "head")


def test_n_stages_spreads_the_blocks() -> None:
    assert [(s.first, s.last) for s in schedule(config(7, n_stages=3))] == [(0, 1), (2, 3), (4, 6)]


def test_progressive_wins_over_mode_and_stacks_are_its_stages() -> None:
    c = StackWiseConfig(
        model={"architecture": {"n_stacks": 3, "blocks_per_stack": 2}},
        training={"mode": "layerwise", "progressive": {"enabled": True}},
    ).validate()
    assert [(s.first, s.last) for s in schedule(c)] == [(0, 1), (2, 3), (4, 5)]


@pytest.mark.parametrize("mode", ["layerwise", "blockwise", "fused", "independent", "end_to_end"])
def test_every_block_is_trained_by_some_stage(mode: str) -> None:
    trained = {part for stage in schedule(config(5, mode=mode, block_size=2)) for part in stage.trains}
    assert trained == {"front", "head", *(f"block.{i}" for i in range(5))}


def test_fusion_follows_the_stages() -> None:
    def after(strategy: str, blocks: int = 5) -> list[tuple[int, int, bool]]:
        c = config(blocks, mode="layerwise", fusion={"strategy": strategy})
        return [(s.first, s.last, s.reads_boundary) for s in schedule(c)[c.n_sections :]]

    assert after("none") == []
    assert after("frozen") == [(4, 4, True)]
    assert after("trainable") == [(0, 4, False)]
    assert after("hierarchical") == [(0, 1, False), (2, 3, True), (0, 3, False), (0, 4, False)]
    assert after("hierarchical", 1) == []
    whole = schedule(config(2, mode="layerwise", fusion={"strategy": "trainable"}))[-1]
    assert whole.trains == ("front", "block.0", "block.1", "head")


def test_the_steps_of_a_fusion_are_shared() -> None:
    c = config(4, mode="layerwise", steps=100, fusion={"strategy": "hierarchical", "steps": 60})
    assert [c.stage_training(stage.depth).steps for stage in schedule(c)] == [100] * 4 + [20] * 3


def test_a_boundary_is_made_by_the_newest_stage_that_ends_below_it() -> None:
    stages = schedule(config(4, mode="layerwise", fusion={"strategy": "hierarchical"}))
    assert stage_below(stages, stages[3]) == stages[2]
    assert stage_below(stages, stages[5]) == stages[4], "the pair below, once fused"


def test_a_mode_from_outside_is_one_class_that_says_its_sections() -> None:
    with MODES.restored():

        @MODES.register("halves")
        class Halves(Mode):
            lower: int = 1

            def partition(self, model: ModelConfig) -> list[tuple[int, int]]:
                return [(0, self.lower - 1), (self.lower, model.n_blocks - 1)]

        assert [(s.first, s.last) for s in schedule(config(5, mode="halves"))] == [(0, 0), (1, 4)]
        assert [(s.first, s.last) for s in schedule(config(5, mode={"name": "halves", "lower": 3}))] == [(0, 2), (3, 4)]


def test_flat_settings_of_several_modes_are_those_of_the_mode_that_is_taken() -> None:
    tree = {"model": {"architecture": {"n_stacks": 4}}, "training": {"mode": "layerwise", "block_size": 2}}
    assert build(StackWiseConfig, tree).n_sections == 4
    overridden = build(StackWiseConfig, tree, {"training.mode": "blockwise"})
    assert overridden.n_sections == 2
    assert overridden.unused == []
