"""Mixtures of experts that begin as dense models: as one, and as several that were trained apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.errors import StackWiseError
from stackwise.pipeline.job import committed_stages
from stackwise.pipeline.parts import load_part
from stackwise.pipeline.run import RunDirectory
from tests.conftest import Micro, run
from tests.pipeline.test_run import named, weights

DENSE: dict[str, Any] = {"training__steps": 3, "training__mode": "end_to_end", "evaluation__samples": 8}
STILL = DENSE | {"training__steps": 1, "training__learning_rate": 1e-9, "training__eval_every": 1}
MIXTURE = {"kind": "moe", "experts": 4, "at": [1]}


@pytest.fixture(scope="module")
def dense(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two dense runs, from different weights."""
    directory = tmp_path_factory.mktemp("dense")
    for seed in range(2):
        run(micro(**DENSE, seed=seed), directory / str(seed))
    return [directory / str(seed) for seed in range(2)]


def begun(dense: list[Path], **ffn: Any) -> dict[str, Any]:
    return {"init__weights": str(dense[0]), "init__experts": [str(p) for p in dense[1:]], "model__ffn": MIXTURE | ffn}


def parts(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    one = RunDirectory(directory)
    sources = committed_stages(one, one.config(), one.manifest())[-1][1]
    return {name: load_part(sources[name]) or {} for name in ("front", "block.0", "block.1")}


def held_out(events: list[Any]) -> float:
    return float(named(events, "held_out")[-1]["nats"])


@pytest.mark.parametrize("ffn", [{"top_k": 2}, {"top_k": 2, "shared_experts": 1, "shared_gate": True}])
def test_what_begins_as_one_dense_model_computes_what_it_does(
    ffn: dict[str, Any], dense: list[Path], micro: Micro, tmp_path: Path
) -> None:
    width = 32
    inner = parts(dense[0])["block.1"]["ffn.down.weight"].shape[1]
    more = {"shared_dim": inner - width, "expert_dim": width} if "shared_gate" in ffn else {}
    plain = {"aux_weight": 0.0} | ffn | more
    before = held_out(run(micro(**STILL, init__weights=str(dense[0])), tmp_path / "dense"))
    after = held_out(run(micro(**STILL, **begun(dense[:1], **plain)), tmp_path / "mixture"))
    # A gate opens by half only about: what it is drawn with is small.
    assert after == pytest.approx(before, abs=1e-6 if not more else 1e-2)


def test_experts_begin_as_several_models_and_the_rest_as_their_mean(
    dense: list[Path], micro: Micro, tmp_path: Path
) -> None:
    """Also swapped, to the same bits; a repeated run trains nothing."""
    values = micro(**STILL, **begun(dense))
    run(values, tmp_path / "run")
    mixture, models = parts(tmp_path / "run"), [parts(path) for path in dense]
    for number in range(4):
        begins = models[number % 2]["block.1"]
        for side, weight in (("gate", 1.0), ("up", 1.0), ("down", 4.0)):  # a fresh router gives an expert a fourth
            tensor = mixture["block.1"][f"ffn.experts.{number}.{side}.weight"]
            torch.testing.assert_close(tensor, begins[f"ffn.{side}.weight"] * weight, rtol=0, atol=1e-6)
    for part, name in (("front", "embedding.weight"), ("block.0", "ffn.up.weight"), ("block.1", "attention.q.weight")):
        mean = (models[0][part][name] + models[1][part][name]) / 2
        torch.testing.assert_close(mixture[part][name], mean, rtol=0, atol=1e-6)
    run(micro(**STILL, **begun(dense), training__swap="always"), tmp_path / "swapped")
    assert weights(tmp_path / "swapped") == weights(tmp_path / "run")
    assert not named(run(values, tmp_path / "run"), "training")


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"model__ffn": "swiglu", "init__experts": ["gone"]}, "init.experts: .*gone: there is no such directory"),
        ({"model__ffn": "swiglu", "init__experts": ["/"]}, "init.experts: / holds no checkpoint"),
        ({"init__weights": "/"}, "init.weights: / holds no checkpoint"),
        ({"model__ffn": MIXTURE | {"expert_dim": 8}}, "init.experts: block 1: expert_dim .* make 8"),
        ({"model__ffn": MIXTURE | {"experts": 1}}, "2 models for 1 experts"),
        ({"model__ffn": "gelu"}, "init.experts: block 0: model.ffn: gelu"),
    ],
)
def test_bad_input_is_a_line(more: dict[str, Any], fault: str, dense: list[Path], micro: Micro, tmp_path: Path) -> None:
    with pytest.raises(StackWiseError, match=fault):
        run(micro(**STILL | begun(dense) | more), tmp_path / "run")
    assert not (tmp_path / "run").exists()
