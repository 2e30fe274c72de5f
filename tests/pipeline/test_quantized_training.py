"""Stages trained for integers: resident and swapped alike, killed or not, and what is above them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stackwise.config import StackWiseConfig
from stackwise.errors import ConfigError
from stackwise.model.formats import format_named
from tests.conftest import Micro, run
from tests.pipeline.storm import killed
from tests.pipeline.test_run import weights

LEARNED = {"bits": 4, "group": 8, "symmetric": False, "scale": "learned", "activations": 8}


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        pytest.param("blockwise", {"quantization": LEARNED}, marks=pytest.mark.stress),
        ("end_to_end", {"quantization": LEARNED}),
        ("end_to_end", {"products": "fp8"}),
    ],
)
def test_swapped_and_resident_are_the_same(mode: str, how: dict[str, Any], micro: Micro, tmp_path: Path) -> None:
    settings = {"training__mode": mode, "training__steps": 4} | {f"training__{name}": v for name, v in how.items()}
    for swap in ("never", "always"):
        run(micro(**settings, training__swap=swap, store__path=str(tmp_path / swap / "store")), tmp_path / swap)
    assert weights(tmp_path / "never") == weights(tmp_path / "always")


RANGE = {
    "bits": 4,
    "group": 8,
    "activations": 8,
    "activations_range": "percentile",
    "calibration": 2,
    "percentile": 98.0,
}


def test_fixed_ranges_are_measured_once(micro: Micro, tmp_path: Path) -> None:
    """Swapped, resident, and killed in between: the same ranges, in what is committed, and the same weights."""
    settings = {"training__mode": "end_to_end", "training__quantization": RANGE, "training__checkpoint_steps": 4}
    runs = {
        name: micro(**settings, training__swap=swap, training__steps=20, store__path=str(tmp_path / name / "store"))
        for name, swap in (("never", "never"), ("always", "always"), ("killed", "never"))
    }
    run(runs["never"], tmp_path / "never")
    run(runs["always"], tmp_path / "always")
    killed(runs["killed"], tmp_path / "killed", 0)
    assert weights(tmp_path / "never") == weights(tmp_path / "always") == weights(tmp_path / "killed")
    spans = {
        f"{path.name}/{name}": tensor
        for path in (tmp_path / "never/store").rglob("block.*.safetensors")
        for name, tensor in load_file(path).items()
        if name.endswith(".span")
    }
    assert len(spans) >= 8
    assert all(float(low) < 0 < float(high) for low, high in spans.values())


def test_a_killed_run_ends_with_the_same_weights(micro: Micro, tmp_path: Path) -> None:
    config = micro(training__quantization=LEARNED, training__steps=60, training__checkpoint_steps=4)
    run(config, tmp_path / "undisturbed")
    killed(config, tmp_path / "run", 1)
    assert weights(tmp_path / "run") == weights(tmp_path / "undisturbed")


def test_scales_train_alone_over_codes_that_stand_still(micro: Micro, tmp_path: Path) -> None:
    """Blocks in turn, then their scales together, as EfficientQAT does (arXiv 2407.11062)."""
    bits = {"bits": 2, "group": 8, "symmetric": False}
    settings = {
        "training__quantization": bits,
        "training__steps": 8,
        "training__fusion": "trainable",
        "stages": {2: {"training": {"quantization": bits | {"trains": "scales"}}}},
    }
    for swap in ("never", "always"):
        run(micro(**settings, training__swap=swap, store__path=str(tmp_path / swap / "store")), tmp_path / swap)
    assert weights(tmp_path / "never") == weights(tmp_path / "always")
    files = {tuple(sorted(path.parent.glob("block.*"))) for path in (tmp_path / "never/store").rglob("stage.json")}
    packed = next(load_file(parts[0]) for parts in files if len(parts) == 2)
    trained = next(
        load_file(parts[0]) for parts in files if parts and parts[0].name == "block.0.safetensors" and len(parts) == 1
    )
    form = format_named("int2-g8-asym")
    before = form.pack(trained["attention.q.weight"])
    assert torch.equal(packed["attention.q.codes"], before["codes"])
    assert torch.equal(packed["attention_norm.weight"], trained["attention_norm.weight"])
    assert not torch.equal(packed["attention.q.scales"], before["scales"])


def test_scales_alone_without_integers_below_are_refused() -> None:
    for stages in ({0: {"bits": 4, "trains": "scales"}}, {2: {"bits": 4, "trains": "scales"}}):
        overrides = {depth: {"training": {"quantization": settings}} for depth, settings in stages.items()}
        with pytest.raises(ConfigError):
            StackWiseConfig.from_preset("micro", {"training.fusion": "trainable", "stages": overrides})


def test_torchao_trains_blocks(micro: Micro, tmp_path: Path) -> None:
    """With torchao's rounding blocks train to other weights than with ours: it is in the recipe."""
    pytest.importorskip("torchao")
    settings = {"training__mode": "end_to_end", "training__steps": 2, "store__path": str(tmp_path / "store")}
    bits = {"bits": 2, "group": 8}
    for name, quantization in (("ours", bits), ("theirs", bits | {"provider": "torchao"})):
        run(micro(training__quantization=quantization, **settings), tmp_path / name)
    assert weights(tmp_path / "ours") != weights(tmp_path / "theirs")


def test_what_is_above_reads_the_rounded_blocks(micro: Micro, tmp_path: Path) -> None:
    """A stage above others reads another trunk with each way of rounding them, and is not trained twice on one."""
    store = {"store__path": str(tmp_path / "store")}
    rounded = store | {"stages": {0: {"training": {"quantization": {"bits": 3}}}}}
    plain, bits = run(micro(**store), tmp_path / "plain"), run(micro(**rounded), tmp_path / "bits")
    again = run(micro(**rounded), tmp_path / "again")
    reused = [[event["stage"] for event in events if event["event"] == "reused"] for events in (plain, bits, again)]
    assert reused == [[], [], [0, 1]]
    assert not {*weights(tmp_path / "plain")} & {*weights(tmp_path / "bits")}
    assert weights(tmp_path / "bits") == weights(tmp_path / "again")
