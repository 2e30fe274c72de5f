"""What messages tell people to do can be done: the options, commands and keys that they name exist."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from stackwise.cli import app, main
from stackwise.config import StackWiseConfig, choices, kinds, model
from stackwise.errors import ConfigError
from stackwise.registry import Registry
from tests.cli.conftest import Cli

ROOT = Path(app.__file__).parent.parent
SECTIONS = "data|training|store|model|tracking|slurm|evaluation"


def messages() -> Iterator[str]:
    """Every message of an error that is raised, and every hint, with a blank for what is filled in."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "hint":
                yield from texts(node.value)
            elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                for argument in node.exc.args:
                    yield from texts(argument)


def texts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else " " for part in node.values)  # type: ignore[misc]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from texts(child)


MESSAGES = sorted(set(messages()))


def commands() -> dict[str, set[str]]:
    """The options of every command, by its words."""
    options: dict[str, set[str]] = {}

    def visit(words: str, command: click.Command) -> None:
        options[words] = {name for param in command.params for name in param.opts} | {"--help"}
        if isinstance(command, click.Group):
            with click.Context(command) as context:
                for name in command.list_commands(context):
                    below = command.get_command(context, name)
                    assert below is not None
                    visit(f"{words} {name}", below)

    visit("stackwise", main)
    return options


def test_options_and_commands_that_messages_name_exist() -> None:
    options = commands()
    every = set().union(*options.values())
    named = 0
    for message in MESSAGES:
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", message):
            named += 1
            assert option in every | {"--force-reinstall", "--to", "--nnodes"}, message  # pip, jupyter, torchrun
        for words in re.findall(r"`(stackwise [^`]*)`", message):
            known = [command for command in options if re.match(rf"{command}(?= |$)", words)]
            command = max(known, key=len)
            assert command != "stackwise" or words.startswith("stackwise -"), message
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", words):
                assert option in options[command], message
    assert named > 10


def test_keys_that_messages_name_exist() -> None:
    keys = {key for message in MESSAGES for key in re.findall(rf"(?<![\w/.])(?:{SECTIONS})\.[a-z_.]*[a-z]\b", message)}
    assert len(keys) > 30
    files = (".json", ".safetensors", ".mdb")
    assert [key for key in sorted(keys) if not key.endswith(files) and not known(key)] == []


CHOICES: dict[str, Registry[Any]] = {
    "model.attention": kinds.ATTENTIONS,
    "model.ffn": kinds.FEED_FORWARDS,
    "model.time_embedding": model.TIME_EMBEDDINGS,
    "training.optimizer": kinds.OPTIMIZERS,
    "training.objective": kinds.OBJECTIVES,
    "training.divergence": choices.DIVERGENCES,
    "training.lookahead": choices.LOOKAHEADS,
    "training.fusion": choices.FUSIONS,
    "training.adaptation": choices.ADAPTATIONS,
}


def known(key: str) -> bool:
    """Whether a configuration may have a key, whatever its values are, with one of the kinds of a choice."""
    bases: list[dict[str, object]] = [{}]
    for section, choice in CHOICES.items():
        if key.startswith(section):
            bases += [{section: name} for name in choice.names()]
    return any(not unknown(base | {key: object}) for base in bases)


def unknown(values: dict[str, object]) -> bool:
    try:
        StackWiseConfig.from_preset("micro", values)
    except ConfigError as error:
        return any("unknown key" in fault for fault in error.faults)
    return False


def test_preparing_names_its_own_options(here: Path, cli: Cli) -> None:
    Path("a.jsonl").write_text("".join(json.dumps({"body": f"word {i}"}) + "\n" for i in range(50)))
    refused = cli("data", "prepare", "a.jsonl", "--out", "o", "--tokenizer", "bytes")
    assert refused.exit_code == 2
    assert "--text-column" in refused.stderr
    assert "data.text_column" not in refused.stderr
    refused = cli("data", "prepare", "a.jsonl", "--out", "o", "--held-out", "7")
    assert "--held-out" in refused.stderr


@pytest.mark.parametrize("force", [False, True])
def test_a_second_export_names_the_way_to_replace_the_first(force: bool, finished: Path, here: Path, cli: Cli) -> None:
    assert cli("export", "--out", "e").exit_code == 0
    again = cli("export", "--out", "e", *(["--force"] if force else []))
    assert again.exit_code == (0 if force else 2)
    assert ("--force" in again.stderr) != force


def test_a_wrong_value_of_a_setting_that_a_kind_requires_is_a_line(here: Path, cli: Cli) -> None:
    wrong = ("-o", "model.attention=gqa", "-o", "model.attention.kv_heads=x")
    refused = cli("stage", "list", "--preset", "micro", *wrong)
    assert refused.exit_code == 2
    assert "model.attention.kv_heads: " in refused.stderr
