"""Racks that begin shallow and grow: where new blocks come from, what is trained once, engines and kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stackwise.config import StackWiseConfig
from stackwise.config.growth import Grown, Growth
from stackwise.config.unused import unused_settings
from stackwise.errors import ConfigError
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.schedule import schedule
from tests.conftest import Micro, run
from tests.pipeline.storm import killed
from tests.pipeline.test_passes import run_stages
from tests.pipeline.test_run import named, weights

GROWS: dict[str, Any] = {"model__architecture__n_stacks": 4, "precision": "fp32", "model__dropout": 0.1}


def growth(**values: Any) -> list[dict[str, Any]]:
    return [{"blocks": 2, "until": 0.6, "commit": 0.2} | values]


@pytest.fixture(scope="module")
def grown(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> tuple[StackWiseConfig, Path, list[dict[str, Any]]]:
    """A run of four blocks, grown from two at 0.6 of its 20 steps; the two are committed at every fifth of them."""
    directory = tmp_path_factory.mktemp("growth")
    config = micro(**GROWS, training__growth=growth(warmup=0.1), store__path=str(directory / "store"))
    return config, directory / "run", run_stages(config, directory / "run")


def record(directory: Path, place: int) -> dict[str, Any]:
    """What a committed stage says of itself."""
    run_directory = RunDirectory(directory)
    with run_directory.open_store(run_directory.config()) as store:
        stage = store.stage(status(run_directory)["stages"][place]["recipe"])
    assert stage is not None
    return stage.record


def parts(directory: Path, place: int) -> dict[str, dict[str, torch.Tensor]]:
    """The committed parts of a stage."""
    row = status(RunDirectory(directory))["stages"][place]
    store = RunDirectory(directory).config().store.path or directory / "store"
    files = (Path(store) / "stages" / row["recipe"]).glob("*.safetensors")
    return {path.stem: load_file(path) for path in files}


def test_it_is_entries_of_the_schedule_under_one_budget(grown: tuple[StackWiseConfig, Path, Any]) -> None:
    config, directory, events = grown
    rows = status(RunDirectory(directory))["stages"]
    assert [(r["depth"], r["window"], r["blocks"], r["steps"]) for r in rows] == [
        *((0, window, [0, 1], 4) for window in range(3)),
        (1, 0, [0, 3], 8),
    ]
    assert config.training.lr_schedule == "wsd", "no rate falls before the last expansion"
    rates = [event["learning_rate"] for event in named(events, "step")]
    assert set(rates[:3]) == {config.training.learning_rate}, "one step of twenty warms up, and no phase does again"
    (event,) = named(events, "grown")
    after = record(directory, 3)
    assert event["blocks"] == [2, 4]
    assert event["after"] == {"loss": after["losses"][0], "gradient_norm": after["norms"][0]}
    assert event["before"]["loss"] == pytest.approx(rows[2]["loss"], rel=0.05)


def test_where_it_is_committed_and_how_it_is_held_change_no_weight(
    grown: tuple[StackWiseConfig, Path, Any], micro: Micro, tmp_path: Path
) -> None:
    config, directory, _ = grown
    once = micro(**GROWS, training__growth=growth(warmup=0.1, commit=1.0), store__path=config.store.path)
    events = run_stages(once, tmp_path / "once")
    assert [event["stage"] for event in named(events, "reused")] == [1], "what it grew from is the same, bit for bit"
    swapped = micro(**GROWS, training__growth=growth(warmup=0.1), training__swap="always", training__swap_parts=2)
    run_stages(swapped, tmp_path / "swapped")
    assert weights(tmp_path / "swapped") == weights(directory)


def test_another_until_trains_only_what_is_not_in_common(
    grown: tuple[StackWiseConfig, Path, Any], micro: Micro, tmp_path: Path
) -> None:
    config, _, _ = grown
    for until, reused in ((0.4, 2), (0.5, 2), (0.8, 3)):
        other = micro(**GROWS, training__growth=growth(warmup=0.1, until=until), store__path=config.store.path)
        events = run_stages(other, tmp_path / str(until))
        assert [event["stage"] for event in named(events, "reused")] == list(range(reused))


@pytest.mark.parametrize(
    ("new", "ends", "begins"),
    [
        ("identity", False, [0, 1, None, None]),
        ("copy", False, [0, 1, 0, 1]),
        ("double", False, [0, 0, 1, 1]),
        ("fresh", False, [0, 1, None, None]),
        ("identity", True, [0, None, None, 3]),
        ("double", True, [0, 0, 3, 3]),
    ],
)
def test_new_blocks_begin_as_they_are_said_to(
    micro: Micro, tmp_path: Path, new: str, ends: bool, begins: list[int | None]
) -> None:
    config = micro(**GROWS, training__growth=growth(new=new, ends=ends, commit=None), training__learning_rate=1e-12)
    run_stages(config, tmp_path / "run")
    shallow, deep = parts(tmp_path / "run", 0), parts(tmp_path / "run", 1)
    for block, origin in enumerate(begins):
        found = deep[f"block.{block}"]
        if origin is not None:
            assert all(torch.allclose(found[name], shallow[f"block.{origin}"][name], atol=1e-8) for name in found)
        else:
            written = [f"attention.{name}" for name in config.model.attention.residual]
            written += [f"ffn.{name}" for name in config.model.ffn.residual]
            silent = [bool(found[name].abs().max() < 1e-8) for name in written]
            assert silent == [new == "identity"] * len(written)
    # What was there goes on with its moments: a state that began anew would have seen fewer steps.
    steps = {name: int(tensors["losses"].numel()) for name, tensors in shallow.items() if name == "state.0"}
    assert steps == {"state.0": 12}


def test_a_rack_that_grows_from_identity_has_the_loss_that_it_had(micro: Micro, tmp_path: Path) -> None:
    quiet = {**GROWS, "model__dropout": 0.0, "training__learning_rate": 1e-12}
    run_stages(micro(**quiet, training__growth=growth(commit=None)), tmp_path / "grown")
    shallow = quiet | {"model__architecture__n_stacks": 2, "training__mode": "end_to_end"}
    run_stages(micro(**shallow), tmp_path / "shallow")
    after, plain = record(tmp_path / "grown", 1)["losses"], record(tmp_path / "shallow", 0)["losses"]
    assert after == pytest.approx(plain[12:], abs=1e-5), "and it goes on through the rows as end to end does"


def test_killed_after_it_grew_it_ends_with_the_same_weights(micro: Micro, tmp_path: Path) -> None:
    config = micro(**GROWS, training__growth=growth(commit=0.3, new="double"), training__steps=120)
    run(config, tmp_path / "undisturbed")
    killed(config, tmp_path / "run", 2)
    assert weights(tmp_path / "run") == weights(tmp_path / "undisturbed")


def test_several_phases_add_up() -> None:
    phases = [Growth(blocks=2, until=0.2, ends=True, new="double"), Growth(blocks=4, until=0.7, new="copy")]
    grown = Grown(phases)
    assert grown.blocks(0, 8) == [0, 7]
    assert grown.origins(1, 8) == {0: 0, 1: 0, 2: 7, 3: 7}
    assert grown.inherited(1, 8) == {0: 0, 3: 7}
    assert grown.origins(2, 8) == {block: block % 4 for block in range(8)}
    assert Growth(blocks=2, until=0.5).commits_at(0.0, 20) == [0.5], "commits cost a worker: not for a few steps"
    assert Growth(blocks=2, until=0.55).commits_at(0.3, 1000) == [0.4, 0.5, 0.55]
    assert Growth(blocks=2, until=0.5, commit=0.001).commits_at(0.0, 4)[-1] == 0.5


def test_what_the_phases_share_is_named_as_unused(micro: Micro) -> None:
    config = micro(
        **GROWS, training__growth=growth(), training__fusion__strategy="trainable", training__lookahead="tail"
    )
    lines = "\n".join(unused_settings(config))
    assert "training.fusion " in lines
    assert "training.lookahead " in lines
    assert len(schedule(config)) == 4


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"training__growth": growth(until=1.0)}, r"training.growth.0.until: .*1"),
        ({"training__growth": growth(until=0.0)}, r"training.growth.0.until: .*0"),
        (
            {"training__growth": [*growth(), {"blocks": 3, "until": 0.5}]},
            "training.growth.1.until: 0.5 is not after 0.6",
        ),
        ({"training__growth": [*growth(), {"blocks": 2, "until": 0.7}]}, "training.growth.1.blocks: 2 are no more"),
        ({"training__growth": growth(commit=1e-9)}, "training.growth.0.commit: must be at least 0.001"),
        ({"training__growth": growth(blocks=4)}, "training.growth.0.blocks: 4 leave nothing to grow"),
        (
            {"training__growth": growth(blocks=1, new="copy"), "model__first_norm": False},
            "training.growth.0.new: copy, but block 1 has other layers than block 0",
        ),
        ({"training__growth": growth(blocks=9)}, "training.growth.0.blocks: 9 leave nothing to grow"),
        ({"training__growth": growth(blocks=1, ends=True)}, "training.growth.0.ends: .* two blocks"),
        ({"training__growth": growth(), "training__mode": "independent"}, "training.growth: independent stages"),
        (
            {
                "training__growth": growth(),
                "training__progressive": {"enabled": True, "building_mode": "prepend"},
            },
            "training.growth: training.progressive adds stacks below",
        ),
        ({"training__growth": growth(), "stages__1__training__steps": 3}, "stages.1.training.steps: the phases"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_a_line(micro: Micro, settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what) as refused:
        micro(**GROWS, **settings)
    assert len(refused.value.faults) == 1 if hasattr(refused.value, "faults") else True
