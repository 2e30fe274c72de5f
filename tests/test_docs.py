"""Every Python example and configuration of the README and the docs runs; every command they name exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from stackwise.cli import main
from stackwise.config import StackWiseConfig
from stackwise.config.unused import unused_settings
from stackwise.pipeline.schedule import schedule
from tests.conftest import run

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (f"{page.name}-{number}", text)
        for page in PAGES
        for number, (kind, text) in enumerate(BLOCK.findall(page.read_text()))
        if kind == language
    ]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.name
)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's examples, one after another: a later one may use what an earlier one made."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "example"}
    for kind, text in BLOCK.findall(page.read_text()):
        if kind == "yaml":
            (tmp_path / "config.yaml").write_text(text)
        elif kind == "python":
            exec(compile(text, page.name, "exec"), names)


def test_the_site_builds_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, ""), "mkdocs.yml is strict: a warning ends it"
    assert "Samples.sums" in (tmp_path / "site" / "api" / "index.html").read_text(), "docstrings are in it"


CONFIGURATIONS = [pytest.param(text, id=name) for name, text in blocks("yaml")]


@pytest.mark.parametrize("text", CONFIGURATIONS)
def test_configurations_load_without_a_fault_or_a_note(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    config = StackWiseConfig.from_yaml(tmp_path / "config.yaml")
    assert schedule(config)
    assert not unused_settings(config)


@pytest.mark.stress
@pytest.mark.parametrize("text", [param for param in CONFIGURATIONS if param.id and not param.id.startswith("README")])
def test_configurations_of_the_pages_run(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    run(
        StackWiseConfig.from_yaml(tmp_path / "config.yaml", {"training.steps": 2, "evaluation.samples": 8}),
        tmp_path / "run",
    )


COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for name, text in blocks("") + blocks("bash") + blocks("sh")
        for line in text.replace("\\\n", " ").splitlines()
        if line.startswith("stackwise ")
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist_with_the_options_that_are_shown(command: str) -> None:
    words = shlex.split(command)[1:]
    names = [word for word in words if not word.startswith("-")]
    group = names[:2] if names[0] in ("stage", "cache", "data") else names[:1]
    answer = CliRunner().invoke(main, [*group, "--help"])
    assert answer.exit_code == 0, answer.output
    for word in words:
        if word.startswith("--"):
            assert word in answer.output


def test_the_two_commands_are_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in ("make demo", "make test"):
        assert command in (ROOT / "README.md").read_text()
        assert f"\n{command.split()[1]}:" in makefile
