"""The command line as a whole: help, near misses, what is imported, how errors end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import click
import pytest

from stackwise.cli import main
from stackwise.cli.app import COMMANDS, explain
from stackwise.errors import BusyError, ConfigError, DamageError, InterruptedRun, NoSpaceError, UsageError
from stackwise.version import __version__
from tests.cli.conftest import COMMAND, Cli, stackwise


def test_help_names_every_command_and_every_exit_code(cli: Cli) -> None:
    result = cli("--help")
    assert result.exit_code == 0
    assert all(f"  {name} " in result.output for name in COMMANDS)
    assert "75 interrupted" in result.output


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_command_says_of_itself_what_the_table_says(name: str, cli: Cli) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.get_short_help_str(200) == COMMANDS[name][1] or name == "stage"
    assert cli(name, "--help").exit_code == 0


@pytest.mark.parametrize("command", [[], ["cache"], ["stage"], ["data"]])
def test_a_group_alone_shows_its_help_and_is_wrong_usage(command: list[str]) -> None:
    done = stackwise(*command)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(" ".join(["Usage: stackwise", *command]))
    assert "..." not in done.err.replace("[ARGS]...", "")  # no sentence is cut


def test_version_and_module() -> None:
    done = stackwise("--version")
    assert (done.code, done.out.strip()) == (0, f"stackwise {__version__}")


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["rum"], "did you mean run?"),
        (["stage", "lst"], "did you mean list?"),
        (["cache", "verfy"], "did you mean verify?"),
        (["status", "--jsn"], "--json"),
        (["run", "micro"], "--preset micro"),
        (["plan", "llama-1b"], "--preset llama-1b"),
    ],
)
def test_a_near_miss_is_answered_with_what_was_meant(args: list[str], meant: str, cli: Cli) -> None:
    result = cli(*args)
    assert result.exit_code == 2
    assert meant in result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("stackwise: ")


def test_a_fault_in_an_option_is_laid_to_the_option(here: Path, cli: Cli) -> None:
    Path("sound.yaml").write_text("name: sound\n")
    Path("faulty.yaml").write_text("seed: many\n")
    blamed = {
        ("--preset", "micro"): "-o trainig.steps (over preset micro): 1 fault",
        ("sound.yaml",): "-o trainig.steps (over sound.yaml): 1 fault",
        ("faulty.yaml",): "faulty.yaml: 2 faults",
    }
    for named, line in blamed.items():
        result = cli("run", *named, "-o", "trainig.steps=3")
        assert result.exit_code == 2
        assert f"stackwise: {line}\n" in result.stderr


def test_what_answers_without_torch(finished_run: Path, tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import sys
        from stackwise.cli import main
        for args in (
            ["--help"], ["run", "--help"], ["init", "x"], ["stage", "list", "--preset", "llama-70b"],
            ["stage", "list", "--run", {str(finished_run)!r}], ["status", "--run", {str(finished_run)!r}, "--json"],
            ["cache", "inspect", "--run", {str(finished_run)!r}], ["cache", "ls", "--run", {str(finished_run)!r}],
            ["cache", "du", "--run", {str(finished_run)!r}], ["cache", "verify", "--run", {str(finished_run)!r}],
            ["cache", "unlock", "--run", {str(finished_run)!r}], ["report", "--run", {str(finished_run)!r}],
            ["data", "prepare", "x/stackwise.yaml", "--out", "d", "--tokenizer", "bytes"],
        ):
            try:
                main(args, standalone_mode=False)
            except SystemExit as error:
                assert not error.code, args
            assert "torch" not in sys.modules, args
        """
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_imports_neither_rich_nor_pydantic() -> None:
    program = "import sys; from stackwise.cli import main; main(['--help'], standalone_mode=False);"
    program += "print(sorted({'rich', 'pydantic', 'numpy', 'yaml'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("wrong", hint="do this"), 2),
        (ConfigError(["a: b"]), 2),
        (DamageError("damaged", hint="do this"), 3),
        (BusyError("busy"), 4),
        (NoSpaceError("full"), 5),
        (InterruptedRun("stopped"), 75),
        (OSError(28, "No space left on device", "/somewhere"), 5),
        (PermissionError(13, "Permission denied", "/somewhere"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(7), 7),
        (BrokenPipeError(), 141),
    ],
)
def test_each_error_ends_with_its_code(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(error) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    if isinstance(error, UsageError | DamageError) and error.hint:
        assert said.err == f"stackwise: {error.message}\n  do this\n"


def test_what_nobody_foresaw_is_one_line_and_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert explain(ZeroDivisionError("a\nb")) == 1
    said = capsys.readouterr().err
    assert said.startswith("stackwise: ZeroDivisionError: a\n")
    (kept,) = tmp_path.iterdir()
    assert str(kept) in said
    assert "ZeroDivisionError: a" in kept.read_text()


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        print(1 / 0)
    assert explain(raised.value, debug=True) == 1
    assert "Traceback" in capsys.readouterr().err


def test_output_that_nobody_reads_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen([*COMMAND, "stage", "list", "--json"], stdout=write, stderr=subprocess.PIPE) as process:
        os.close(write)
        assert process.communicate()[1] == b""
    assert process.returncode == 141


@pytest.mark.parametrize(
    "args",
    [
        ["stage", "run", "--depth", "9" * 20],
        ["stage", "run", "--depth", "9" * 5000],
        ["run", "--max-time", "9" * 400 + "h"],
        ["run", "--max-time", "-1"],
        ["generate", "x", "--length", "9" * 20],
        ["generate", "x", "--temperature", "nan"],
        ["generate", "x", "--temperature", "1e999"],
        ["generate", "x", "--seed", "-" + "9" * 30],
        ["generate", "--file", "/dev/zero", "--run", "run"],
        ["data", "prepare", "text", "--out", "d", "--vocab-size", "9" * 20],
        ["data", "prepare", "text", "--out", "d", "--held-out", "nan"],
        ["status", "--run", "text"],
        ["status", "--run", "fifo"],
        ["status", "--run", "/dev/null"],
        ["status", "--run", "x" * 300],
        ["run", "--preset", "micro", "--run", "text"],
        ["run", "--preset", "micro", "--run", "fifo"],
        ["run", "--preset", "micro", "--run", "/dev/null/x"],
        ["report", "--run", "text/below"],
        ["eval", "--run", "\udcff"],
        ["run", "--preset", "\x1b[31m"],
        ["run", "-o", "name=\udcff", "--preset", "micro"],
        ["run", "\udcff.yaml"],
    ],
    ids=lambda args: " ".join(args)[:40].encode("ascii", "backslashreplace").decode(),
)
def test_what_cannot_be_meant_is_refused_in_a_line(
    args: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text").write_text("some text\n" * 200)
    os.mkfifo("fifo")
    with pytest.raises(SystemExit) as ended:
        main(args, prog_name="stackwise")
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert "bug report" not in said
    assert 1 <= said.count("\n") <= 3
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", said)
