"""Meta-learning in whole runs: tasks by permuted tokens and by data set, killed and resumed, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stackwise.batch import TOKENS, Batch
from stackwise.config.continual import Meta
from stackwise.errors import UsageError
from stackwise.pipeline.run import RunDirectory, status
from stackwise.training.tasks import PermutedTasks
from tests.conftest import Micro, run
from tests.pipeline.storm import kill_worker
from tests.pipeline.test_run import named, weights

META = {"method": "fomaml", "support": 3, "inner_steps": 2, "permutations": 4, "held_out": 2}
END_TO_END = {"training__mode": "end_to_end", "training__batch_size": 6, "training__steps": 12}


def permuted(**values: Any) -> PermutedTasks:
    return PermutedTasks(Meta.model_validate({**META, **values}), 7, 6, np.arange(5, 25), 32)


def test_tasks_follow_from_seed_and_number() -> None:
    tasks = permuted()
    assert [sorted(tasks.at(turn * 4 + place)[0] for place in range(4)) for turn in range(3)] == [[0, 1, 2, 3]] * 3
    tables = [tasks.table(task) for task in range(6)]
    for table in tables:
        assert sorted(table.tolist()) == list(range(32))
        assert torch.equal(table[:5], torch.arange(5)), "ids that no text has stay as they are"
    assert len({tuple(table.tolist()) for table in tables}) == 6
    assert torch.equal(permuted().table(5), tables[5])
    assert int((permuted(permuted=0.25).table(3) != torch.arange(32)).sum()) <= 5
    batch = Batch(np.arange(6), None, {TOKENS: torch.arange(24).reshape(6, 4)})
    number = next(number for number in range(4) if tasks.at(number)[0] == 2)
    assert torch.equal(tasks.of_microbatch(batch, number)[TOKENS], tables[2][batch[TOKENS]])


def test_permuted_tasks_killed_and_resumed(micro: Micro, tmp_path: Path) -> None:
    values = {**END_TO_END, "training__meta": META, "training__checkpoint_steps": 3}
    events = run(micro(**values), tmp_path / "whole")
    (judged,) = named(events, "held_out")
    assert judged["step"] == 12
    assert len(judged["adaptation"]) == 3
    assert judged["nats"] == pytest.approx(judged["adaptation"][-1])
    (stage,) = status(RunDirectory(tmp_path / "whole"))["stages"]
    assert stage["adaptation"] == judged["adaptation"]
    kill_worker(micro(**values), tmp_path / "killed", 0, 4)
    run(micro(**values), tmp_path / "killed")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    fewer = {**values, "training__meta": {**META, "held_out": 3}}
    assert not named(run(micro(**fewer), tmp_path / "whole"), "committed"), "tasks held out shape no weights"


def text(directory: Path, words: str) -> list[str]:
    directory.mkdir()
    draw = np.random.default_rng(len(words))
    for number in range(12):
        (directory / f"{number}.txt").write_text(" ".join(draw.choice(words.split(), 150)))
    return [str(directory)]


def test_data_sets_are_tasks_of_stages_that_read_boundaries(micro: Micro, tmp_path: Path) -> None:
    sets = {"red": "a b c d", "green": "house tree sky", "blue": "one two three four five"}
    tasks = [{"name": name, "paths": text(tmp_path / name, words)} for name, words in sets.items()]
    values: dict[str, Any] = {"data__tasks": tasks, "data__paths": [], "data__held_out": 0.3, "training__rows": 400}
    values |= {"training__batch_size": 6, "training__steps": 6, "training__objective": "clm"}
    meta = {"support": 3, "inner_steps": 1, "inner_rate": 0.5}
    events = run(micro(**values, training__meta=meta | {"method": "reptile"}), tmp_path / "run")
    first, second = named(events, "held_out")
    assert first["adaptation"][1] < first["adaptation"][0]
    assert len(second["adaptation"]) == 2
    for more, line in (
        ({"held_out": 2}, "2 of 3 tasks leave 1 to train on"),
        ({"support": 299}, "rows of task .* are fewer than support and query"),
    ):
        wrong = micro(**values | {"training__batch_size": more.get("support", 5) + 1}, training__meta=meta | more)
        with pytest.raises(UsageError, match=line):
            run(wrong, tmp_path / "refused")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"training__meta": {"inner_steps": 0}}, r"training\.meta\.inner_steps"),
        ({"training__meta": {"inner_rate": 0}}, r"training\.meta\.inner_rate"),
        ({"training__meta": {"inner_rate": -0.1}}, r"training\.meta\.inner_rate"),
        ({"training__meta": {"inner_rate": float("nan")}}, r"training\.meta\.inner_rate"),
        ({"training__meta": {"permutations": 1}}, r"training\.meta\.permutations"),
        ({"training__meta": {"support": 16}}, r"training\.meta\.support: 16 rows of a task of 16"),
        ({"training__meta": {"query": 9}}, r"training\.meta\.query: support and query are 13 rows"),
        ({"training__meta": {"method": "anil"}}, r"training\.meta\.method"),
        ({"training__meta": {}, "training__swap": "always"}, r"training\.meta: .*leave swap out"),
        ({"training__meta": {}, "precision": "fp16"}, r"training\.meta: .*bf16"),
        ({"training__meta": {}, "training__compile": True}, r"training\.meta: .*compile"),
    ],
)
def test_refused(micro: Micro, values: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        micro(**values)
