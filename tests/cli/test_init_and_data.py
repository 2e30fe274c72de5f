"""`init` and `data prepare`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stackwise.config import StackWiseConfig
from stackwise.data import PreparedData
from stackwise.presets import PRESETS
from tests.cli.conftest import Cli


@pytest.mark.parametrize("preset", PRESETS)
def test_init_writes_a_file_that_loads(preset: str, here: Path, cli: Cli) -> None:
    assert cli("init", "new", "--preset", preset).exit_code == 0
    config = StackWiseConfig.from_yaml("new/stackwise.yaml")
    own = StackWiseConfig.from_preset(preset)
    assert config.name == "new"
    assert config.model_copy(update={"name": own.name}).model_dump() == own.model_dump()


def test_init_leaves_a_file_alone(here: Path, cli: Cli) -> None:
    Path("stackwise.yaml").write_text("mine")
    result = cli("init")
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert Path("stackwise.yaml").read_text() == "mine"
    assert cli("init", "--force").exit_code == 0
    assert StackWiseConfig.from_yaml("stackwise.yaml").name == here.name


def test_init_where_nothing_can_be(here: Path, cli: Cli) -> None:
    Path("file").write_text("")
    assert cli("init", "file/below").exit_code == 2
    assert cli("init", "--preset", "demmo").exit_code == 2
    assert not Path("stackwise.yaml").exists()


def test_data_prepare(here: Path, text: Path, cli: Cli) -> None:
    result = cli("data", "prepare", str(text), "--out", "set one", "--tokenizer", "bytes", "--held-out", "0.2")
    assert result.exit_code == 0
    assert f"'data.paths=[{here / 'set one'}]'" in result.stdout
    assert PreparedData.open(here / "set one").train.n_tokens > 1000
    again = cli("data", "prepare", str(text), "--out", "set one", "--tokenizer", "bytes", "--held-out", "0.2", "--json")
    summary = json.loads(again.stdout)
    assert summary["reused"]
    assert summary["train"]["documents"] + summary["held_out"]["documents"] == 12


def test_data_prepare_says_what_it_left_out(here: Path, cli: Cli) -> None:
    Path("in").mkdir()
    for name in "abc":
        Path(f"in/{name}.txt").write_text(f"some text of {name}\n" * 50)
    Path("in/picture.txt").write_bytes(b"\0\xff" * 500)
    result = cli("data", "prepare", "in", "--out", "out", "--tokenizer", "bytes")
    assert result.exit_code == 0
    assert "picture.txt" in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["nowhere"],
        ["in", "--held-out", "2"],
        ["in", "--tokenizer", "no/such.json"],
        ["in", "--vocab-size", "10"],
        [],
    ],
)
def test_data_prepare_that_cannot_be_writes_nothing(args: list[str], here: Path, cli: Cli) -> None:
    Path("in").mkdir()
    Path("in/a.txt").write_text("a\n" * 100)
    result = cli("data", "prepare", *args, "--out", "out")
    assert result.exit_code == 2
    assert not Path("out").exists()


def test_what_a_command_was_given_is_called_as_it_was_given(finished: Path, here: Path, cli: Cli) -> None:
    Path("texts").mkdir()
    for args, said in (
        (["eval", "--run", str(finished), "--data", "nowhere"], "stackwise: --data: nowhere does not exist"),
        (["data", "prepare", "nowhere", "--out", "d"], "stackwise: PATH: nowhere does not exist"),
        (["run", "texts"], "stackwise run -o 'data.paths=[texts]'"),
    ):
        refused = cli(*args)
        assert refused.exit_code == 2
        assert said in refused.stderr
