"""Several data sets as tasks: one tokenizer, rows of one task each, documents of each held out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from stackwise.cli import main
from stackwise.config import DataConfig, StackWiseConfig
from stackwise.config.loading import build
from stackwise.data import PreparedData, prepare, require_samples
from stackwise.errors import StackWiseError, UsageError
from tests.conftest import raises_naming

Tasks = Callable[..., DataConfig]


@pytest.fixture
def tasks(tmp_path: Path, library_texts: list[str]) -> dict[str, Path]:
    """Two folders of real sources, one of capitals: a character says which a token is of."""
    for number, text in enumerate(library_texts[:24]):
        name = "upper" if number % 2 else "lower"
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.txt").write_text(text.upper() if number % 2 else text.lower(), encoding="utf-8")
    return {name: tmp_path / name for name in ("lower", "upper")}


def settings(tasks: Mapping[str, Path], tmp_path: Path, **more: object) -> DataConfig:
    listed = [{"name": name, "paths": [str(path)]} for name, path in tasks.items()]
    return DataConfig.model_validate({"tasks": listed, "cache_dir": str(tmp_path / "cache"), "held_out": 0.2, **more})


def test_no_sample_holds_two_tasks(tasks: dict[str, Path], tmp_path: Path) -> None:
    data, _ = prepare(settings(tasks, tmp_path, tokenizer="bytes"))
    assert data.train.tasks == data.held_out.tasks == ("lower", "upper")
    for split in (data.train, data.held_out):
        of_sample = split.sample_tasks(64)
        assert len(of_sample) == split.n_samples(64)
        assert set(of_sample.tolist()) == {0, 1}
        rows = split.samples(np.arange(len(of_sample)), 64)
        texts = [data.tokenizer.decode(row[row != data.separator_id]) for row in rows]
        for text, task in zip(texts, of_sample, strict=True):
            wrong = str.islower if task else str.isupper
            assert not any(map(wrong, text)), text
        assert split.n_samples(64) == sum(n // 64 for n in split.task_tokens)
        marks = split.segments(np.arange(len(of_sample)), 64)
        ends = split.samples(np.arange(len(of_sample)), 64)[:, :-1] == data.separator_id
        assert (np.diff(marks, axis=1) == ends).all()  # a document begins after each separator
    # the tail of a task, which fills no sample, is no part of the next one's first
    last = data.train.samples([int((data.train.sample_tasks(64) == 0).sum())], 64)[0]
    assert last.tolist() == data.train.tokens[data.train.task_tokens[0] :][:64].tolist()


def test_tasks_are_part_of_the_content(tasks: dict[str, Path], tmp_path: Path) -> None:
    data, _ = prepare(settings(tasks, tmp_path, tokenizer="bytes"))
    again, reused = prepare(settings(tasks, tmp_path, tokenizer="bytes"))
    assert reused
    assert again.id == data.id
    swapped, _ = prepare(settings(dict(reversed(tasks.items())), tmp_path, tokenizer="bytes"))
    together, _ = prepare(
        DataConfig(
            paths=[str(path) for path in tasks.values()],
            tokenizer="bytes",
            held_out=0.2,
            cache_dir=str(tmp_path / "cache"),
        )
    )
    renamed = dict(zip(("a", "b"), tasks.values(), strict=True))
    other, _ = prepare(settings(renamed, tmp_path, tokenizer="bytes"))
    assert len({data.id, swapped.id, together.id, other.id}) == 4
    assert not together.train.tasks
    assert not together.train.sample_tasks(64).any()
    with raises_naming(UsageError, "upper"):
        require_samples(PreparedData.open(data.directory).held_out, data.held_out.task_tokens[1] + 1, "held-out")


def test_the_command_prepares_tasks(tasks: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    named = [word for name, path in tasks.items() for word in ("--task", f"{name}={path}")]
    result = CliRunner().invoke(main, ["data", "prepare", *named, "--tokenizer", "bytes", "--out", str(out), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["tasks"] == ["lower", "upper"]
    assert PreparedData.open(out).train.tasks == ("lower", "upper")
    for wrong in ([], ["--task", "lower"], ["--task", f"lower={tasks['lower']}"], [str(tasks["upper"]), *named]):
        result = CliRunner().invoke(main, ["data", "prepare", *wrong, "--out", str(tmp_path / "no")])
        assert result.exit_code == 2
        assert not (tmp_path / "no").exists()
        assert "Traceback" not in result.stderr


def _refused(make: Callable[[], object]) -> str:
    with pytest.raises(StackWiseError) as refusal:
        make()
    assert refusal.value.exit_code == 2
    return refusal.value.message.removeprefix("test: 1 fault\n")


def test_bad_tasks_are_one_line(tasks: dict[str, Path], tmp_path: Path) -> None:
    (empty := tmp_path / "empty").mkdir()
    lower, upper = (dict[str, object]({"name": name, "paths": [str(path)]}) for name, path in tasks.items())

    def config(*listed: Mapping[str, object], **more: object) -> Callable[[], object]:
        return lambda: build(StackWiseConfig, {"data": {"tasks": list(listed), **more}}, source="test")

    assert "lower" in _refused(config(lower))
    assert "lower" in _refused(config(lower, upper | {"name": "lower"}))
    assert "data.paths" in _refused(config(lower, upper, paths=["x"]))
    _refused(config(lower, {"name": "upper", "paths": []}))
    _refused(config(lower, {"name": "up per", "paths": ["x"]}))
    _refused(config(lower, {"name": "upper"}))
    file = next(tasks["lower"].iterdir())
    for more, what in (
        ({"upper": empty}, f"data.tasks: upper: .*{empty}"),
        ({"upper": tmp_path / "absent"}, "data.tasks: upper: .*absent does not exist"),
        ({"upper": file}, "is in lower and in upper"),
    ):
        message = _refused(partial(prepare, settings({**tasks, **more}, tmp_path)))
        assert re.search(what, message), message
    data, _ = prepare(settings(tasks, tmp_path, tokenizer="bytes"))
    assert "tokenizer" in _refused(lambda: prepare(settings({**tasks, "upper": data.directory}, tmp_path)))
