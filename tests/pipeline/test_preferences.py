"""Runs over conversations and pairs: resident and swapped, with adapters, killed; the reference goes over rows once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.config import StackWiseConfig
from stackwise.config.loading import build
from stackwise.data.tokenizer import bytes_tokenizer
from stackwise.errors import UsageError
from stackwise.report.held_out import rows
from stackwise.store import ActivationStore
from tests.conftest import Micro, run
from tests.pipeline.storm import killed
from tests.pipeline.test_run import weights
from tests.pretrained.models import make


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make("llama", directory, vocab_size=258, hidden_size=32, num_hidden_layers=2)
    (directory / "tokenizer.json").write_text(bytes_tokenizer().json)
    return directory


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"{n} + 1 = ", "chosen": str(n + 1), "rejected": "no idea, sorry", "margin": 0.1} for n in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _settings(model: Path, pairs: Path, objective: Any, **more: Any) -> dict[str, Any]:
    common = {
        "init__weights": str(model),
        "data__paths": [str(pairs)],
        "data__held_out": 0.2,
        "training__objective": objective,
        "training__mode": "end_to_end",
        "training__seq_len": 64,
        "training__batch_size": 4,
        "training__steps": 4,
        "training__checkpoint_steps": 2,
        "training__eval_every": 2,
        "training__learning_rate": 1e-2,
    }
    return common | more


def _config(settings: dict[str, Any]) -> StackWiseConfig:
    return build(StackWiseConfig, {}, {key.replace("__", "."): value for key, value in settings.items()})


@pytest.fixture(scope="module")
def dpo(model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    at = tmp_path_factory.mktemp("dpo")
    return at, run(_config(_settings(model, pairs, "dpo")), at / "run")


def test_the_reference_says_what_transformers_computes(dpo: tuple[Path, list[Any]], model: Path) -> None:
    from transformers import AutoModelForCausalLM

    at, events = dpo
    first = next(event for event in events if event["event"] == "step")
    assert first["losses"][0] == pytest.approx(0.693147, abs=1e-5), "the policy begins as its reference"
    assert {"accuracy", "margin", "chosen", "rejected"} <= set(first["terms"])
    held_out = [event for event in events if event["event"] == "held_out"]
    assert held_out[-1]["nats"] < held_out[0]["nats"] < 0.693
    oracle = AutoModelForCausalLM.from_pretrained(model).eval()
    with ActivationStore(at / "run" / "store", create=False) as store:
        said = [info for info in store.boundaries() if info.shape[1:] == (2, 1)]
        assert len(said) == 2, "of the rows that train, and of those held out"
        info = max(said, key=lambda one: one.rows)
        tokens = [one for one in store.boundaries() if one.rowset == info.rowset and one.shape[1:] == (64, 1)]
        with store.reader(info.id) as reader, store.reader(tokens[0].id) as beside:
            ours = reader.read(torch.arange(info.rows).numpy())[..., 0]
            rows = beside.read(torch.arange(info.rows).numpy())[..., 0].long()
    for row, expected in zip(rows, ours, strict=True):
        for side, value in zip(row.chunk(2), expected, strict=True):
            text = side[: int((side == 256).nonzero()[0]) + 1]  # its answer ends with the separator
            start = int((text == ord("=")).nonzero()[0]) + 2
            with torch.no_grad():
                logits = oracle(text[None]).logits[0, :-1].log_softmax(-1)
            per_token = logits.gather(1, text[1:, None]).squeeze(1)
            assert float(per_token[start - 1 :].sum()) == pytest.approx(float(value), abs=2e-4)


def test_swapped_killed_and_with_the_reference_found(
    dpo: tuple[Path, list[Any]], model: Path, pairs: Path, tmp_path: Path
) -> None:
    at, _ = dpo
    settings = _settings(model, pairs, "dpo", training__swap="always")
    swapped = run(_config(settings), tmp_path / "swapped")
    assert weights(tmp_path / "swapped") == weights(at / "run")
    assert any(event["event"] == "teacher" for event in swapped)
    # Another beta is another run over the same reference.
    other = _config(_settings(model, pairs, {"name": "dpo", "beta": 0.5, "loss": "ipo"}))
    other.store.path = str(at / "run" / "store")
    events = run(other, tmp_path / "other")
    assert not [event for event in events if event["event"] == "boundary"], "the reference goes over the rows once"
    # What was killed between two checkpoints ends as what was not.
    killed(_config(_settings(model, pairs, "dpo")), tmp_path / "killed", 0)
    assert weights(tmp_path / "killed") == weights(at / "run")


def test_a_reward_model_trains_its_score_beside_adapters(model: Path, pairs: Path, tmp_path: Path) -> None:
    settings = _settings(model, pairs, "reward", training__adapters={"rank": 2})
    events = run(_config(settings), tmp_path / "run")
    first, *_, last = [event for event in events if event["event"] == "held_out"]
    assert last["nats"] < first["nats"]
    assert last["terms"]["accuracy"] > 0.5
    figures = events[-1]["evaluation"]["figures"]
    assert figures["loss"] == pytest.approx(last["nats"], abs=1e-5), "of the same held-out pairs"
    assert {name: figures[name] for name in last["terms"] if name in figures} == pytest.approx(last["terms"], abs=1e-5)
    assert not [event for event in events if event["event"] == "fill"], "scores are no text"
    table = rows(events[-1]["evaluation"])
    assert table[0][:2] == ["accuracy", "margin"]
    assert table[1][0].cells[0] == f"{figures['accuracy']:.4g}"
    swapped = _config(settings | {"training__swap": "always"})
    run(swapped, tmp_path / "swapped")
    assert weights(tmp_path / "swapped") == weights(tmp_path / "run")


def test_fine_tuning_goes_stage_by_stage(micro: Micro, tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    rows = [{"prompt": f"{n} then ", "completion": str(n + 1)} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = micro(training__objective="sft", data__paths=[str(path)], training__steps=4, training__batch_size=4)
    assert config.data.within_documents, "packed documents are kept apart unless that is asked for"
    done = run(config, tmp_path / "run")[-1]
    assert done["evaluation"]["likelihood"] is None
    assert 0 < done["evaluation"]["loss"]["0.5"] < 6


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"init__weights": None, "data__tokenizer": "bytes"}, "reference_model"),
        ({"training__mode": "layerwise"}, "end_to_end"),
        ({"training__seq_len": 63}, "odd"),
        ({"training__objective": {"name": "dpo", "beta": 0}}, "beta"),
        ({"training__objective": {"name": "dpo", "reference_model": "/nowhere"}}, "nowhere"),
    ],
)
def test_what_cannot_be_is_told(model: Path, pairs: Path, tmp_path: Path, more: dict[str, Any], what: str) -> None:
    from stackwise.errors import StackWiseError

    with pytest.raises(StackWiseError, match=what) as caught:
        run(_config(_settings(model, pairs, "dpo") | more), tmp_path / "run")
    assert caught.value.exit_code == UsageError("").exit_code


def test_a_run_over_pairs_is_a_language_model_to_others(dpo: tuple[Path, list[Any]]) -> None:
    from stackwise.pipeline.committed.load import load_model

    rack = load_model(str(dpo[0] / "run"), torch.device("cpu"), lambda line: None)
    assert rack.config.objective.name == "clm"
    assert len(list(rack.modules())) == 2
