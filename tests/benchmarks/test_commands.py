"""Each benchmark's command on tiny settings: it runs, and its figures are sane."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import benchmarks.__main__ as everything
from benchmarks import adapters, arithmetic, capture, demo, depth, document, feed, stage, swap
from benchmarks.common import Spread

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def small_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "SIDE", {"cpu": 128})
    monkeypatch.setattr(arithmetic, "REFERENCE_SECONDS", 0.02)


@pytest.fixture(autouse=True)
def own_document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing here writes into the real one."""
    path = tmp_path / "benchmarks.md"
    monkeypatch.setenv(document.VARIABLE, str(path))
    return path


def printed(capsys: Capture) -> Any:
    return json.loads(capsys.readouterr().out)


def is_spread(value: dict[str, float], low: float, high: float) -> bool:
    return low <= value["min"] <= value["median"] <= value["max"] <= high


def test_a_stage_is_measured(capsys: Capture, own_document: Path) -> None:
    given = ["--preset", "micro", "--device", "cpu", "--steps", "5", "--store-bytes", "400000", "--json", "--write"]
    assert stage.main(given) == 0
    result = printed(capsys)
    training, forward = result["training"], result["forward"]
    assert (result["blocks"], result["batch_size"], result["seq_len"]) == (1, 16, 32)
    assert result["rows"] == 400000 // 2 // (32 * 32 * 2)
    assert is_spread(training["share"], 1e-9, 10)
    assert is_spread(training["wait_share"], 0, 1)
    assert is_spread(training["tokens_per_second"], 1, 1e9)
    assert training["rounds"] == 5
    assert all(4 < loss < 8 for loss in training["losses"])
    assert forward["bytes"] == result["rows"] * 32 * 32 * 2
    assert result["peak_memory_bytes"] > 10**7
    assert "python -m benchmarks.stage --preset micro" in own_document.read_text()


def test_a_stage_that_cannot_fit_is_refused_in_a_line(capsys: Capture) -> None:
    assert stage.main(["--preset", "llama-70b", "--device", "cpu", "--blocks", "40"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "40 blocks" in said[0]
    assert "of memory" in said[0]
    assert "--blocks" in said[1]
    assert stage.main(["--preset", "micro", "--device", "cpu", "--blocks", "3"]) == 2
    assert stage.main(["--preset", "micro", "--device", "cpu", "--store-bytes", "1000"]) == 2
    assert stage.main(["--preset", "nonsense", "--device", "cpu"]) == 2


def test_the_profile_of_a_step(tmp_path: Path, capsys: Capture) -> None:
    table = tmp_path / "profile.txt"
    given = ["--preset", "micro", "--device", "cpu", "--steps", "1", "--store-bytes", "200000", "--json"]
    assert stage.main([*given, "--profile", str(table)]) == 0
    assert "addmm" in table.read_text() or "aten::mm" in table.read_text()


def test_adapters_read_what_they_would_compute_again(capsys: Capture) -> None:
    small = ["--width", "64", "--blocks", "2", "--rows", "8", "--batch-size", "4", "--seq-len", "16", "--epochs", "2"]
    assert adapters.main([*small, "--device", "cpu", "--json"]) == 0
    result = printed(capsys)
    assert result["losses_identical"]
    assert is_spread(result["ratio"], 0.01, 100)
    assert adapters.main(["--blocks", "2", "--above", "2", "--device", "cpu"]) == 2


def test_the_feed_gives_the_same_losses(capsys: Capture) -> None:
    assert feed.main(["--preset", "micro", "--device", "cpu", "--rounds", "5", "--steps", "2", "--json"]) == 0
    result = printed(capsys)
    assert result["losses_identical"]
    assert result["rounds"] == 5
    assert result["rows"] == (4 + 2) * 16
    sources = result["sources"]
    assert sources[feed.MEMORY]["speed_of_memory"] == Spread(1, 1, 1).plain()
    assert sources[feed.MEMORY]["wait_share"] == Spread(0, 0, 0).plain()
    for source in (feed.LATER, feed.FIRST):
        assert is_spread(sources[source]["speed_of_memory"], 1e-3, 1e3)
        assert is_spread(sources[source]["wait_share"], 0, 1)


@pytest.mark.stress
def test_depth_compares_equal_work(text: Path, capsys: Capture) -> None:
    given = ["--preset", "micro", "--device", "cpu", "--steps", "3", "--repeats", "1", "--json"]
    assert depth.main([*given, "-o", f"data.paths=[{text}]", "-o", "evaluation.samples=8"]) == 0
    (pair,) = printed(capsys)["repeats"]
    staged, whole = pair["staged"], pair["whole"]
    assert staged["updates"] == [3, 3]
    assert whole["updates"] == [6]
    assert staged["rowset"] == whole["rowset"]
    assert (staged["rows"], staged["rows_read"]) == (48, 96)
    assert (whole["rows"], whole["rows_read"]) == (48, 48)
    assert (len(staged["by_depth"]), len(whole["by_depth"])) == (2, 1)
    assert staged["unigram"] == whole["unigram"]  # the same passages under the same masks
    assert staged["written_bytes"] == staged["read_bytes"] == 48 * 32 * 32 * 2
    assert whole["written_bytes"] == whole["read_bytes"] == 0
    assert 0 < staged["training_seconds"] < staged["seconds"]


def test_depth_gives_the_whole_rack_its_own_learning_rate() -> None:
    given = ["--preset", "micro", "--learning-rate", "1e-3", "--whole-learning-rate", "5e-4", "--steps", "7"]
    options = depth._parser().parse_args([*given, "-o", "model.architecture.n_stacks=4", "-o", "training.block_size=2"])
    staged, whole = depth.configurations(options)
    assert (staged.training.learning_rate, whole.training.learning_rate) == (1e-3, 5e-4)
    assert sum(depth.block_updates(staged)) == sum(depth.block_updates(whole)) == 7 * 4
    assert staged.training.rows == whole.training.rows == 7 * 16


@pytest.mark.stress
def test_the_demo_is_measured_twice(text: Path, capsys: Capture) -> None:
    settings = [f"data.paths=[{text}]", "training.steps=3", "evaluation.samples=8", "device=cpu"]
    assert demo.main(["--preset", "micro", "--json", *(word for one in settings for word in ("-o", one))]) == 0
    result = printed(capsys)
    first, second = result["first"], result["second"]
    assert (first["stages_trained"], first["stages_reused"]) == (2, 0)
    assert (second["stages_trained"], second["stages_reused"]) == (0, 2)
    assert 0 < first["phases"]["training"] < first["seconds"]
    assert second["phases"]["training"] == 0
    assert first["outside_phases"] > 0
    assert first["largest_process_bytes"] > 10**7
    (boundary,) = result["bytes"]["boundaries"]
    assert boundary["bytes"] >= 48 * 32 * 32 * 2
    assert result["bytes"]["run"] > result["bytes"]["stages"] > 10**4


def test_an_unknown_benchmark_is_refused(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        everything.main(["nonsense"])
    assert ended.value.code == 2


def test_the_commands_come_up_without_torch() -> None:
    names = ", ".join(f"benchmarks.{name}" for name in ("__main__", "stage", "feed", "depth", "demo"))
    check = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_swapped_training_is_measured(capsys: Capture) -> None:
    small = ["--width", "16", "--blocks", "2", "--rows", "2", "--seq-len", "16", "--repeats", "2"]
    assert swap.main([*small, "--microbatches", "1,2", "--depths", "2", "--json"]) == 0
    result = printed(capsys)
    assert [one["microbatches"] for one in result["timed"]] == [1, 2]
    for one in result["timed"]:
        assert one["same_weights"]
        ratios = {name: value for name, value in one.items() if name.endswith("_ratio")}
        assert {"resident_ratio", "swapped_ratio"} < set(ratios)
        assert all(is_spread(ratio, 0, 1e6) for ratio in ratios.values())
    assert [one["blocks"] for one in result["peaks"]] == [2]
    assert result["peaks"][0]["swapped"] > 0


def test_a_capture_is_measured(capsys: Capture) -> None:
    assert capture.main(["--width", "64", "--blocks", "1", "--rows", "4", "--seq-len", "16", "--json"]) == 0
    result = printed(capsys)
    assert (result["rows"], result["rounds"], result["codec"]) == (4, 5, "bf16")
    (model,) = result["models"]
    for name in ("forward", "capture", "read"):
        assert is_spread(model[name], 1, 1e9)
    assert is_spread(model["share"], 1e-9, 100)
    assert is_spread(model["share_of_processor"], 1e-9, 100)
    assert model["share_with_start"]["max"] <= model["share"]["max"]
