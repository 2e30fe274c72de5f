"""The laws of the house, held against the code: floors, light imports, no traces of stubs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "stackwise"

FLOORS = [
    {"errors", "identity", "presets", "version"},
    {"files", "host", "text", "words"},
    {"durable", "registry", "batch", "shapes"},
    {"config"},
    {"store", "data", "model", "objectives"},
    {"training", "evaluation", "inference", "pretrained"},
    {"pipeline"},
    {"report", "cli", "__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
PIPELINE = [
    {"."},
    {"committed", "tracking"},
    {"worker"},
    {"runner", "library"},
    {"batch", "planning", "suites"},
    {"search"},
    {"experiments"},
]
"""The rooms of the pipeline, "." for the files that both sides share."""
PIPELINE_FLOOR = {room: number for number, rooms in enumerate(PIPELINE) for room in rooms}
# Within a floor these may look sideways, in one direction.
BESIDE = {("cli", "report"), ("__main__", "cli")}


def rooms_imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stackwise":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("stackwise.")}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_from_below(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for other in rooms_imported(path) - {room, "__version__"}:
        assert FLOOR[other] < FLOOR[room] or (room, other) in BESIDE, f"{room} imports {other}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "pipeline").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT / "pipeline"))
)
def test_a_room_of_the_pipeline_imports_only_from_below(path: Path) -> None:
    room = str(path.parent.relative_to(ROOT / "pipeline"))
    for module in re.findall(r"^ *from stackwise\.pipeline(\S*) import", path.read_text(), re.MULTILINE):
        first = module.split(".")[1] if module else "."
        other = first if first in PIPELINE_FLOOR else "."
        assert other == room or PIPELINE_FLOOR[other] < PIPELINE_FLOOR[room], f"{room} imports {other}"


@pytest.mark.parametrize(
    "module",
    [
        "stackwise",
        "stackwise.cli",
        "stackwise.store",
        "stackwise.data",
        "stackwise.pipeline.runner.runner",
        "stackwise.pipeline.search.begin",
        "stackwise.pipeline.experiments",
        "stackwise.pipeline.tracking.trackers",
        "stackwise.report",
    ],
)
def test_torch_is_imported_where_it_is_used(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def documented(node: ast.ClassDef, method: str, classes: Mapping[str, Sequence[ast.ClassDef]]) -> bool:
    """Whether a class or what it is derived from says what a method does (`help` shows the inherited words)."""
    own = (m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == method)
    if any(ast.get_docstring(m) for m in own):
        return True
    # `Base`, `module.Base` and `Base[T]` are known by their last name.
    bases = [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases]
    return any(documented(above, method, classes) for base in bases for above in classes.get(base, ()))


def test_every_public_method_says_what_it_does_where_it_is_defined_first() -> None:
    nodes = [node for path in ROOT.rglob("*.py") for node in ast.parse(path.read_text()).body]
    classes = defaultdict(list)
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            classes[node.name].append(node)
    silent = {
        f"{node.name}.{method.name}"
        for same_name in classes.values()
        for node in same_name
        for method in node.body
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and not node.name.startswith("_")
        if not documented(node, method.name, classes)
    }
    assert not silent
