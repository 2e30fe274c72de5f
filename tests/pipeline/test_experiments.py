"""Experiments beside dense racks: real runs, their metrics, and criteria that no worse model passes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import stackwise
from stackwise import ExperimentConfig, Trainer, evaluate_success_criteria, run_single_experiment
from stackwise.errors import UsageError
from stackwise.model import build_rack
from stackwise.pipeline.events import read_log
from stackwise.pipeline.experiments import main
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pretrained import load_rack
from tests.conftest import raises_naming
from tests.pipeline.test_run import weights

SMALL = ExperimentConfig("small", batch_size=8, dropout=0.0)


@pytest.fixture(scope="module")
def base(text: Path) -> dict[str, Any]:
    sizes = {"seq_len": 32, "hidden_dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64, "num_experts": 4}
    sizes |= {"moe_layers": [1], "num_epochs": 2, "learning_rate": 3e-3, "vocab_size": 300}
    return sizes | {"data.paths": [str(text)], "data.max_bytes": 100_000, "training.rows": 80, "evaluation.samples": 8}


@pytest.fixture(scope="module")
def compared(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """An experiment beside a dense rack."""
    directory = tmp_path_factory.mktemp("experiments")
    return main(base, experiments=[SMALL], seeds=(0,), directory=directory), directory


def test_an_experiment_has_the_metrics_of_its_run(compared: Any) -> None:
    first = compared[0]["small"]["runs"][0]
    metrics, run = first["metrics"], RunDirectory(Path(first["run"]))
    assert metrics["steps"] == [10, 10]
    assert status(run)["stages"][0]["step"] == metrics["current_step"] == 20
    for split in ("train", "val"):
        total, plain, more = (metrics[f"{split}_{kind}"] for kind in ("losses", "ce_losses", "aux_losses"))
        assert len(total) == 2
        assert all(b > 0 and a == pytest.approx(p + b) for a, p, b in zip(total, plain, more, strict=True))
    assert first["loss"] == metrics["val_ce_losses"][-1]
    used = metrics["expert_stats_history"][-1]["experts"]["1"]
    assert used["least"] == min(used["shares"])
    assert all(speed > 0 for speed in metrics["tokens_per_sec"])
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in metrics["timing_breakdown"].values())


def test_a_stage_that_is_reused_has_the_figures_of_its_training(
    compared: Any, base: dict[str, Any], tmp_path: Path
) -> None:
    first = compared[0]["small"]["runs"][0]
    run = RunDirectory(Path(first["run"]))
    store = {"store.path": str(run.store_path(run.config())), "seed": 0}
    result = run_single_experiment(SMALL, base_config=base | store, directory=tmp_path)
    again = result["metrics"]
    assert not list(read_log(RunDirectory(Path(result["run"])).events_file, kinds=("step",)))
    names = [f"{split}_{kind}" for split in ("train", "val") for kind in ("losses", "ce_losses", "aux_losses")]
    assert {name: again[name] for name in names} == {name: first["metrics"][name] for name in names}


def test_parameters_are_those_of_the_rack(compared: Any) -> None:
    for result in (compared[0]["small"]["runs"][0], compared[0]["small"]["dense"][0]):
        config = RunDirectory(Path(result["run"])).config()
        rack = build_rack(config.model, result["vocab_size"], 0, config.training.seq_len)
        assert stackwise.count_parameters(rack) == result["params"]
    mine, dense = compared[0]["small"]["runs"][0], compared[0]["small"]["dense"][0]
    assert mine["active_params"] == dense["params"] + 32 * 4, "one expert is as wide as a dense block; the router"


def test_a_dense_rack_of_equal_training_stands_beside_it(compared: Any) -> None:
    results, directory = compared
    for mine, dense in zip(results["small"]["runs"], results["small"]["dense"], strict=True):
        assert dense["flops"] == pytest.approx(mine["flops"], rel=0.02)
        assert not dense["metrics"]["expert_stats_history"]
    saved = json.loads((directory / "experiment_results.json").read_text())
    assert saved["small"]["runs"] == results["small"]["runs"]
    assert saved["small"]["verdict"]["reason"] == results["small"]["verdict"]["reason"]
    rack = load_rack(directory / "dense_model")
    assert stackwise.count_parameters(rack) == results["small"]["dense"][0]["params"]
    assert list((directory / "dense_model").glob("*.safetensors"))


def test_what_is_done_is_not_trained_again(compared: Any, base: dict[str, Any]) -> None:
    results, directory = compared
    events: list[Any] = []
    again = run_single_experiment(SMALL, base_config=base, directory=directory, observe=events.append)
    assert again == results["small"]["runs"][0]
    assert "step" not in {event["event"] for event in events}


def test_epoch_by_epoch_is_the_whole(compared: Any, base: dict[str, Any], tmp_path: Path) -> None:
    trainer = Trainer(SMALL.settings(base | {"store.path": str(tmp_path / "store")}), tmp_path / "run")
    with raises_naming(UsageError, tmp_path / "run"):
        trainer.evaluate()
    for _ in range(2):
        figures = trainer.train_epoch(num_epochs=2)
    trainer.train(2)
    whole = compared[0]["small"]["runs"][0]
    assert weights(tmp_path / "run") == weights(Path(whole["run"]))
    assert figures["loss"] == pytest.approx(whole["metrics"]["train_losses"][-1])
    assert trainer.evaluate()["ce_loss"] == whole["loss"]


def test_patience_ends_a_run_at_its_best(base: dict[str, Any], tmp_path: Path) -> None:
    """At a rate at which training does harm."""
    harmful = {"learning_rate": 1.0, "training.lr_schedule": "constant", "training.warmup": 0.0}
    config = SMALL.settings(base | harmful | {"store.path": str(tmp_path / "store")})
    trainer = Trainer(config, tmp_path / "run", early_stopping_patience=1)
    trainer.train(2, eval_every=0.1)
    assert trainer.stopped_early
    assert trainer.current_step < 20
    assert trainer.evaluate()["loss"] == trainer.best_val_loss == min(trainer.val_losses)
    assert trainer.patience_counter == 1


def result(loss: float, flops: float = 1e9, vocab_size: int = 10_000) -> dict[str, Any]:
    return {"loss": loss, "flops": flops, "vocab_size": vocab_size, "metrics": {}}


def test_a_worse_model_is_refused() -> None:
    dense = [5.0, 5.1, 5.05]
    # Worse; better, but not with each seed; with each, but with one by so much more that chance would do.
    for losses in ([5.2, 5.3, 5.25], [5.05, 5.0, 5.0], [4.7, 5.09, 5.04]):
        runs = {"x": [result(loss) for loss in losses]}
        assert not evaluate_success_criteria(runs, dense, 1e9)["x"].passed
    # What a seed does to both alike says nothing of either: 0.02 to 0.04 ahead, though seeds differ by 0.1.
    verdict = evaluate_success_criteria({"x": [result(loss) for loss in (4.98, 5.06, 5.02)]}, dense, 1e9)["x"]
    assert verdict.passed
    assert verdict.gains == pytest.approx((0.02, 0.04, 0.03))
    better = [4.5, 4.6, 4.55]
    assert not evaluate_success_criteria({"x": [result(loss) for loss in better]}, dense[:2], 1e9)["x"].passed
    assert evaluate_success_criteria({"x": [result(loss) for loss in better]}, dense, 1e9)["x"].passed
    # Better, but with more training; with training that is not known; by one seed.
    assert not evaluate_success_criteria({"x": [result(loss, 1.1e9) for loss in better]}, dense, 1e9)["x"].passed
    assert not evaluate_success_criteria({"x": [result(loss) for loss in better]}, dense)["x"].passed
    assert not evaluate_success_criteria({"x": result(4.5)}, 5.0, 1e9)["x"].passed
    assert not evaluate_success_criteria({"x": [result(math.nan)] * 2}, dense, 1e9)["x"].passed


def test_one_that_has_learned_nothing_is_named(base: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    """A real run that hardly moves, beside dense racks that are worse still."""
    still = base | {"learning_rate": 1e-9, "num_epochs": 1}
    run = run_single_experiment(SMALL, base_config=still, directory=tmp_path)
    assert run["loss"] == pytest.approx(math.log(run["vocab_size"]), abs=0.05)
    capsys.readouterr()
    verdict = evaluate_success_criteria({"still": [run, run]}, [9.9, 9.8], run["flops"])["still"]
    assert verdict.learned_nothing
    assert not verdict.passed
    assert "still: failed: it has learned nothing" in capsys.readouterr().out
    # To be ahead of a dense rack that has learned nothing is no success either.
    verdict = evaluate_success_criteria({"x": [result(5.0), result(5.1)]}, [9.21, 9.22], 1e9)["x"]
    assert not verdict.passed
    assert not verdict.learned_nothing


def test_the_experiments_are_those_of_their_names(base: dict[str, Any]) -> None:
    configs = stackwise.get_experiment_configs()
    assert list(configs) == ["baseline", "top2", "strong_reg", "throughput_opt", "shared"]
    experts = {name: config.settings(base).model.ffn.plain() for name, config in configs.items()}
    assert {name: ffn["top_k"] for name, ffn in experts.items()} == dict.fromkeys(configs, 1) | {"top2": 2}
    model = configs["shared"].settings(base).model
    router = base.get("num_experts", 8) * model.d_model
    dense = 3 * model.d_model * model.ffn_width
    assert model.ffn.at is not None
    assert model.ffn.in_block(model.ffn.at[0]).active_parameters(model) == dense + router, "as many as in a dense rack"
    assert configs["throughput_opt"].settings(base).training.batch_size == 32
    assert configs["strong_reg"].to_dict()["weight_decay"] == 1e-3
    assert configs["strong_reg"].settings(base).training.objective.plain()["label_smoothing"] == 0.1


@pytest.mark.parametrize(
    ("config", "more", "fault"),
    [
        (SMALL, {"hidden": 3}, "hidden"),
        (SMALL, {"moe_layers": [2]}, "model.ffn.at"),
        (ExperimentConfig("x", top_k=5), {}, "model.ffn.top_k"),
        (ExperimentConfig("x", shared=1.0), {}, "shared"),
        (ExperimentConfig("x", label_smoothing=1.0), {}, "label_smoothing"),
        (ExperimentConfig("x", gating_temp_schedule={"start": 0.0, "end": 1.0, "epochs": 1}), {}, "temperature"),
        (ExperimentConfig("x", early_stopping_patience=-1), {}, "early_stopping_patience"),
        (ExperimentConfig("x", batch_size=4000), {}, "training.batch_size"),
        (SMALL, {"num_epochs": 0}, "num_epochs"),
        (SMALL, {"device": "abacus"}, "device"),
    ],
)
def test_bad_input_is_a_line(config: Any, more: Any, fault: str, base: dict[str, Any], tmp_path: Path) -> None:
    device = more.get("device", "cpu")
    with pytest.raises(UsageError, match=fault):
        run_single_experiment(config, base_config=base | more, directory=tmp_path / "x", device=device)
    assert not (tmp_path / "x").exists()
