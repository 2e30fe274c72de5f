"""Curricula: an order of rows that follows from seed and content, in runs that are swapped and killed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from stackwise.batch import TOKENS
from stackwise.config import StackWiseConfig
from stackwise.config.training import Curriculum
from stackwise.data import prepare
from stackwise.errors import UsageError
from stackwise.pipeline.committed.load import load_rack
from stackwise.pipeline.committed.use import export_rack
from stackwise.pipeline.rows import choose_samples
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.teacher import Judge
from stackwise.pretrained.writing import ExportOptions
from stackwise.store import ActivationStore, RowOrder
from stackwise.training.curriculum import CurriculumOrder, difficulties
from stackwise.training.feed import Feed, RowSource
from tests.conftest import Micro, raises_naming, run
from tests.pipeline.storm import kill_worker
from tests.pipeline.test_passes import run_stages
from tests.pipeline.test_run import named, weights


def order(**settings: Any) -> CurriculumOrder:
    plain = RowOrder(40, seed=(7, "order"), chunk_rows=4, window_chunks=2, select=np.arange(0, 40, 2))
    hard_N = np.arange(20, dtype=np.float64)[::-1]  # the last rows are the easiest
    return CurriculumOrder(plain, hard_N, Curriculum(**settings), step_rows=4, steps=20)


@pytest.mark.parametrize("competence", ["sqrt", "linear"])
def test_the_order_follows_from_the_seed(competence: str) -> None:
    whole = order(competence=competence, start=0.2, until=0.5).at(0, 200)
    again = order(competence=competence, start=0.2, until=0.5)
    np.testing.assert_array_equal(np.concatenate([again.batch(number, 2) for number in range(99, -1, -1)][::-1]), whole)
    assert set(whole[:4]) <= {32, 34, 36, 38}, "a fifth of 20 rows"
    for step in range(10):
        power = 1 if competence == "linear" else 2
        share = (step / 10 * (1 - 0.2**power) + 0.2**power) ** (1 / power)  # equations 4 and 7
        assert again.competence(step) == pytest.approx(share)
        assert whole[step * 4 : step * 4 + 4].min() >= 40 - 2 * np.ceil(20 * share)
    plain = RowOrder(40, seed=(7, "order"), chunk_rows=4, window_chunks=2, select=np.arange(0, 40, 2))
    np.testing.assert_array_equal(whole[40:], plain.at(0, 160))
    position = 0
    while position < 200:  # what a reader asks for ahead is what comes
        rows, end = again.window_rows(position)
        assert set(whole[position:end]) <= set(rows)
        position = end


def test_difficulties_follow_from_tokens() -> None:
    tokens = torch.tensor([[1, 1, 1, 1], [1, 2, 1, 2], [3, 4, 5, 6]]).repeat_interleave(16, dim=1)
    tokens[1] = torch.tensor([1, 2] * 32)
    feed = Feed(None, 64, {TOKENS: RowSource("", lambda rows: tokens[rows])})  # type: ignore[arg-type]
    for by in ("rarity", "compression"):
        hard = difficulties(feed, np.arange(3), by, 0)
        assert hard[0] < hard[1] < hard[2]
        np.testing.assert_array_equal(np.argsort(difficulties(feed, np.array([0, 2]), by, 0)), [0, 1])
    tokens = torch.tensor([[5, 0, 5, 5, 5, 0], [5, 5, 5, 5, 5, 5], [0, 5, 0, 0, 5, 0], [0, 0, 0, 0, 0, 0]])
    feed = Feed(None, 6, {TOKENS: RowSource("", lambda rows: tokens[rows])})  # type: ignore[arg-type]
    assert difficulties(feed, np.arange(4), "length", 0).tolist() == [2.0, 6.0, 1.0, 0.0]


def test_swapped_killed_and_resumed(micro: Micro, tmp_path: Path) -> None:
    values: dict[str, Any] = {"training__steps": 16, "training__curriculum": {"by": "compression"}}
    resident = run(micro(**values, training__swap="never"), tmp_path / "resident")
    kill_worker(micro(**values, training__swap="always"), tmp_path / "killed", 1, 4)
    run(micro(**values, training__swap="always"), tmp_path / "killed")
    assert weights(tmp_path / "killed") == weights(tmp_path / "resident")
    again = run(micro(**values, training__swap="never"), tmp_path / "resident")
    assert not named(again, "committed"), "what is committed is not trained again"
    del values["training__curriculum"]
    random = run(micro(**values), tmp_path / "random")
    recipes = [{event["recipe"] for event in named(events, "committed")} for events in (random, resident)]
    assert recipes[0].isdisjoint(recipes[1])


@pytest.fixture(scope="module")
def judge(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small causal model of the same text."""
    directory = tmp_path_factory.mktemp("judge")
    config = StackWiseConfig.from_preset("micro", {"data.paths": [str(text)], **CAUSAL, "training.steps": 6})
    run_stages(config, directory / "run")
    rack = load_rack(RunDirectory(directory / "run"), torch.device("cpu"))
    return export_rack(rack, directory / "model", ExportOptions()).directory


CAUSAL: dict[str, Any] = {
    "model.architecture.n_stacks": 2,
    "model.d_model": 32,
    "training.objective": "clm",
    "training.mode": "end_to_end",
    "training.steps": 8,
    "training.batch_size": 4,
    "training.seq_len": 32,
    "evaluation.samples": 2,
    "precision": "fp32",
    "tracking.trackers": [],
}


def test_by_the_loss_of_a_model(micro: Micro, judge: Path, tmp_path: Path) -> None:
    """Rows come in the order of the losses that the model's own classes of Hugging Face give; by content."""
    curriculum = {"by": "model", "model": str(judge), "start": 0.25, "until": 1}
    events = run_stages(micro(**CAUSAL, training__curriculum=curriculum), tmp_path / "run")
    assert [event["rows"] for event in named(events, "teacher")] == [32], "once over its rows"
    with ActivationStore(tmp_path / "run" / "store") as store:
        recorded = next(info for info in store.boundaries() if (info.seq_len, info.d_model) == (1, 1))
        with store.reader(recorded.id) as reader:
            losses_R = reader.read(np.arange(recorded.rows)).flatten()
        rowset = store.rowset(recorded.rowset)
    config = RunDirectory(tmp_path / "run").config()
    split = prepare(config.data)[0].train
    samples = choose_samples(config, split, 0)
    assert len(samples) == rowset.rows
    tokens = torch.from_numpy(split.samples(samples, 32).astype(np.int64))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(judge).eval()
    with torch.no_grad():
        expected = torch.stack([theirs(input_ids=row[None], labels=row[None]).loss for row in tokens])
    torch.testing.assert_close(losses_R, expected, rtol=1e-4, atol=1e-4)
    shutil.copytree(judge, tmp_path / "elsewhere")
    moved = micro(**CAUSAL, training__curriculum=curriculum | {"model": str(tmp_path / "elsewhere")})
    assert not named(run_stages(moved, tmp_path / "run"), "committed"), "the same model in another place"


def test_by_its_own_loss(micro: Micro, tmp_path: Path) -> None:
    """Each window is ordered by what the one before it left; swapped it comes to the same weights."""
    values = CAUSAL | {"training.curriculum": {"by": "loss", "until": 1}, "training.windows": 2}
    resident = run_stages(micro(**values, training__swap="never"), tmp_path / "resident")
    assert [event["stage"] for event in named(resident, "past")] == [1], "in the first window it knows nothing"
    run_stages(micro(**values, training__swap="always"), tmp_path / "swapped")
    assert weights(tmp_path / "swapped") == weights(tmp_path / "resident")


@pytest.mark.stress
def test_self_paced_killed_and_resumed(micro: Micro, tmp_path: Path) -> None:
    values = CAUSAL | {"training.curriculum": {"by": "loss", "until": 1}, "training.windows": 2}
    run_stages(micro(**values), tmp_path / "whole")
    kill_worker(micro(**values, training__swap="always"), tmp_path / "killed", 1, 2)
    run(micro(**values, training__swap="always"), tmp_path / "killed")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"training__curriculum": {"by": "mood"}}, r"training\.curriculum\.by"),
        ({"training__curriculum": {"start": 0}}, r"training\.curriculum\.start"),
        ({"training__curriculum": {"until": 2}}, r"training\.curriculum\.until"),
        ({"training__curriculum": {"by": "model"}}, r"training\.curriculum: by: model needs model"),
        ({"training__curriculum": {"by": "loss"}}, r"training\.curriculum: by: loss .* set training\.windows"),
        ({"training__curriculum": {"by": "loss"}, "training__objective": "dpo"}, "compares two answers"),
        ({"training__curriculum": {}, "training__objective": "ppo"}, "which have no order"),
    ],
)
def test_refused(micro: Micro, values: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        micro(**values)


def test_a_model_that_is_not_there_is_named_with_its_key(micro: Micro, tmp_path: Path) -> None:
    with raises_naming(UsageError, "training.curriculum.model: ", tmp_path / "gone"):
        Judge(str(tmp_path / "gone"), micro(**CAUSAL), 300, 299, "0" * 32)
