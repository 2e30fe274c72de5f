"""What reaches a terminal, a file or a pipe: nothing that is obeyed, nothing that ends work, in any encoding."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stackwise.cli import app, drawing, output
from stackwise.errors import UsageError
from stackwise.pipeline.events import EVENTS
from tests.cli.conftest import COMMAND, Cli

ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e\x9b31m"
ROOT = Path(app.__file__).parent.parent


def test_escape_sequences_of_a_manifest_reach_no_terminal_and_no_page(finished: Path, here: Path, cli: Cli) -> None:
    manifest = json.loads((finished / "run.json").read_text())
    manifest["stages"][1]["reason"] = f"{ESCAPE}</script><b>[red]why"
    (finished / "run.json").write_text(json.dumps(manifest))
    for args in (["status"], ["stage", "list"], ["status", "--json"], ["compare", str(finished)]):
        result = cli(*args)
        assert result.exit_code == 0
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", result.output), args
    assert "\\x1b]0;owned" in cli("status").stdout
    assert json.loads(cli("status", "--json").stdout)["stages"][1]["reason"] == manifest["stages"][1]["reason"]
    cli("report")
    page = (finished / "report.html").read_text()
    assert "\x1b" not in page
    assert "<b>[red]" not in page


def test_escape_sequences_of_an_error_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (UsageError(f"no file {ESCAPE}", hint=ESCAPE), OSError(2, "missing", f"/{ESCAPE}"), KeyError(ESCAPE)):
        app.explain(error)
    said = capsys.readouterr().err
    assert "\\x1b]0;owned\\x07" in said
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", said)


def test_styles_go_through_the_gate_and_text_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        encoding = "utf-8"

        def __init__(self) -> None:
            self.written = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            self.written += text
            return len(text)

        def flush(self) -> None:
            pass

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout", terminal)
    table = drawing.Table("state")
    table.add_row(output.Styled(f"[red]{ESCAPE}", "green"))
    output.say_all(table.lines(200))
    output.say(output.Styled(ESCAPE, "green"))
    monkeypatch.undo()
    assert "[red]" in terminal.written
    assert "\x1b[32m" in terminal.written
    assert "\x1b]0" not in terminal.written
    assert "\x9b" not in terminal.written


@pytest.mark.parametrize("where", ["closed", "full"])
def test_a_run_goes_on_without_standard_output(where: str, base: list[str], tmp_path: Path) -> None:
    command = [*COMMAND, "run", *base, "-o", "training.steps=2", "--run", "r"]
    redirected = ["bash", "-c", f'"$@" {">&-" if where == "closed" else ">/dev/full"}', "bash", *command]
    done = subprocess.run(redirected, cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert "standard output" in done.stderr
    assert all(stage["state"] == "done" for stage in json.loads((tmp_path / "r" / "run.json").read_text())["stages"])


@pytest.mark.parametrize(("command", "unbuffered"), [(["status"], ""), (["--help"], "1"), (["init", "new"], "1")])
@pytest.mark.parametrize(("where", "code"), [(">&-", 1), (">/dev/full", 5), (">&- 2>&-", 1), ("<&-", 0)])
def test_a_command_that_only_prints_fails_as_others_do(
    where: str, code: int, command: list[str], unbuffered: str, finished: Path, here: Path
) -> None:
    program = ["bash", "-c", f'"$@" {where}', "bash", *COMMAND, *command]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert ("standard output: " in done.stderr) == (code > 0 and "2>" not in where)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_an_encoding_that_lacks_a_character_shows_another(encoding: str, finished: Path, here: Path) -> None:
    program = "from stackwise.cli import main; main(['stage', 'list'])"
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "boundary 1" in done.stdout.decode(encoding)


def test_a_table_fits_whatever_room_there_is() -> None:
    table = drawing.Table("stage", "run", "loss", "why", right=(0, 2))
    table.add_row("0", "runs/" + "long-" * 30, "12.345", "changed: training.learning_rate, and a/path/" + "x" * 90)
    table.add_row("1", "日本語の名前" * 9, "é" * 3, "日本語" * 40 + "\nand a second line")
    for room in (200, 80, 40, 30):
        lines = [
            "".join(piece if isinstance(piece, str) else piece.text for piece in line) for line in table.lines(room)
        ]
        assert max(map(drawing.columns_of, lines)) <= room
        assert all(line == line.rstrip() and "\n" not in line for line in lines)
        joined = "".join(lines).replace(" ", "")
        assert joined.count("x") == 90  # the last column is folded, not cut
        assert joined.count("日本語") >= 30
    wide = table.lines()
    assert len(wide) == 3


def test_what_stands_for_a_missing_character() -> None:
    assert "0–1 → ½ × é…".encode("ascii", errors="stackwise") == b"0-1 -> 12 x e..."


def test_every_event_that_is_emitted_has_a_row_in_the_table() -> None:
    """The list follows from the code: whatever is emitted anywhere must say how it is shown."""
    emitted = set()
    for path in [*(ROOT / "pipeline" / "runner").glob("*.py"), *(ROOT / "pipeline" / "worker").glob("*.py")]:
        emitted |= set(re.findall(r'"event": "([a-z_]+)"', path.read_text()))
        emitted |= set(re.findall(r'(?:_tell|tell|emit|_emit)\(\s*"([a-z_]+)"', path.read_text()))
    between_processes = {"ready", "error", "trial", "end", "alive", "meeting"}
    assert len(emitted - between_processes) > 20
    assert emitted - between_processes <= set(EVENTS)


NEEDED = ("rich", "torch", "lmdb", "zarr", "numpy", "pydantic", "yaml", "psutil")


def without(modules: tuple[str, ...], *args: str) -> subprocess.CompletedProcess[str]:
    """The command line where some packages are not installed."""
    program = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {modules!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition('.')[0])
sys.meta_path.insert(0, Missing())
from stackwise.cli import main
main(sys.argv[1:])
"""
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "bug report" not in done.stderr
    return done


def test_doctor_says_what_is_missing(here: Path) -> None:
    done = without(NEEDED, "doctor")
    assert done.returncode == 1
    for name in NEEDED:
        assert f"does not import: No module named '{name}'" in done.stdout


@pytest.mark.parametrize(("missing", "command"), [("lmdb", ["cache", "ls"]), ("yaml", ["run"])])
def test_a_command_says_what_it_misses(missing: str, command: list[str], finished: Path, here: Path) -> None:
    done = without((missing,), *command)
    assert done.returncode == 1
    assert f"{missing} is not installed" in done.stderr
    assert "stackwise doctor" in done.stderr
