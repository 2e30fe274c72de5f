"""What the benchmarks count and write: operations, spreads, sections."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import document, moe
from benchmarks.arithmetic import matrix_parameters, work_of
from benchmarks.common import Spread, shown, table
from benchmarks.document import Section
from benchmarks.gains import write_gains
from benchmarks.setting import Setting
from benchmarks.workbench import fresh_model, trains_projection, workbench
from stackwise.config import StackWiseConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", ["copy", "frozen"])
def test_the_operations_are_those_that_torch_counts(tmp_path: Path, tied: str) -> None:
    config = StackWiseConfig.from_preset("micro", {"precision": "fp32", "training.tied_head": tied})
    setting = Setting(config, 2, CPU, 1 << 20, most_rows=16)
    with workbench(setting, tmp_path) as bench, bench.feed() as feed:
        model = fresh_model(setting)
        batch = next(feed.shuffled(bench.order, 8, 0))
        with FlopCounterMode(display=False) as counter:
            (term,) = model(batch).values()
            term.sum.backward()
    scored = term.count
    assert scored == bench.scored_R[batch.rows_B].sum()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for name, count in counts.items() if "mm" in str(name))
    # At a sample of no length attention takes nothing: what is left are the matrices and the head.
    trained = trains_projection(config)
    work = work_of(config.model, 2, 0, setting.vocab_size, causal=False, trained_head=trained)
    assert products == work.training(8 * 32, scored)


def test_the_attention_term() -> None:
    model = StackWiseConfig.from_preset("llama-70b").model
    assert matrix_parameters(model) == model.block_parameters - 2 * model.d_model
    full = work_of(model, 3, 2048, 32000, causal=False, trained_head=True)
    none = work_of(model, 3, 0, 32000, causal=False, trained_head=True)
    half = work_of(model, 3, 2048, 32000, causal=True, trained_head=True)
    assert full.training(10, 0) - none.training(10, 0) == 12 * 3 * model.d_model * 2048 * 10
    assert 2 * (full.blocks - half.blocks) == full.blocks - none.blocks
    assert full.forward(10) * 3 == full.training(10, 0)


def test_a_spread_and_a_table() -> None:
    spread = Spread.of([3.0, 1.0, 2.0])
    assert spread.plain() == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert shown(spread.plain(), lambda value: f"{value:g}") == "2 (1 to 3)"
    lines = table(["a", "long"], [["wide cell", "b"]]).splitlines()
    assert len({len(line) for line in lines}) == 1


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "page.md"
    monkeypatch.setenv(document.VARIABLE, str(path))
    return path


def section(key: str, body: str) -> Section:
    return Section(key, f"Of {key}", "How.", body, "CPU", {})


def test_a_section_is_replaced_alone(page: Path) -> None:
    page.write_text("# Mine\n\nBy hand.\n")
    document.write(section("one", "old"), "command one")
    document.write(section("two", "second"), "command two")
    document.write(section("one", r"new \1"), "command one")
    text = page.read_text()
    assert text.startswith("# Mine\n\nBy hand.\n")
    assert "old" not in text
    assert r"new \1" in text
    assert text.index(r"new \1") < text.index("second")
    assert text.count("## Of one") == 1


def test_the_document_has_a_place_for_every_section() -> None:
    text = document.PATH.read_text(encoding="utf-8")
    for key in ("stage on a CPU", "stage on a GPU", "feed on a CPU", "depth", "demo"):
        first, last = document.marks(key)
        assert text.count(first) == text.count(last) == 1
        assert text.index(first) < text.index(last)


def test_mixtures_that_are_not_measured_yet_are_unfinished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert moe.main(["--dir", str(tmp_path), "--most", "0", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["experiments"]
    assert {name: (entry["done"], entry["wanted"]) for name, entry in entries.items()} == dict.fromkeys(
        ("baseline", "top2", "strong_reg", "throughput_opt", "shared"), (0, 12)
    )
    assert all(entry["verdict"] is None for entry in entries.values())
    (tmp_path / "experiment_results.json").write_text(json.dumps({"base": {"seq_len": 1}, "runs": {}}))
    assert moe.main(["--dir", str(tmp_path), "--most", "0"]) == 2


def test_mixtures_of_several_lengths_stand_beside_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe, "PLOT", tmp_path / "gains.svg")
    monkeypatch.setattr(moe, "save_dense", lambda run, out: None)
    shared = {"flops": 1.0, "vocab_size": 100, "metrics": {}, "run": "run", "seed": 0}
    for rows, gain in ((640, -0.5), (6400, 0.25)):
        runs = {"shared | experts | 0": shared | {"loss": 3.0 - gain}, "shared | flops | 0": shared | {"loss": 3.0}}
        results = {"base": moe.SIZES | {"training.rows": rows}, "runs": runs}
        (tmp_path / str(rows)).mkdir()
        (tmp_path / str(rows) / "experiment_results.json").write_text(json.dumps(results))
    directories = ["--dir", str(tmp_path / "6400"), "--other", str(tmp_path / "640")]
    assert moe.main([*directories, "--most", "0", "--seeds", "2", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert {rows: gains["shared"] for rows, gains in measured["lengths"].items()} == {"640": [-0.5], "6400": [0.25]}
    write_gains(tmp_path / "gains.svg", {"shared": [0.25, -0.5], "none": []}, "nats")
    circles = ElementTree.parse(tmp_path / "gains.svg").findall("{http://www.w3.org/2000/svg}circle")
    left, right = sorted(float(circle.attrib["cx"]) for circle in circles)
    assert left < right
