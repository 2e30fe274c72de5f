"""A corpus that must not fit: memory stays flat while hundreds of megabytes go by."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, resource, sys
from stackwise.config import DataConfig
from stackwise.data import prepare
data, _ = prepare(DataConfig(paths=[sys.argv[1]], cache_dir=sys.argv[2], vocab_size=2048))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"peak": peak / 1024, **{k: data.summary()[k] for k in ("bytes", "documents", "tokens")}}))
"""


def peak_of(corpus: Path, cache: Path) -> dict[str, float]:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(corpus), str(cache)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    found: dict[str, float] = json.loads(run.stdout)
    return found


def grow(path: Path, texts: list[str], megabytes: int, *, rows: bool) -> int:
    """Write so much text of ever different words; returns its bytes."""
    size = number = 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes << 20:
            text = texts[number % len(texts)].replace("self", f"self{number:x}")
            file.write(json.dumps({"text": text}) + "\n" if rows else text)
            size += len(text.encode())
            number += 1
    return size


@pytest.mark.stress
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "one document"])
def test_memory_is_flat(tmp_path: Path, library_texts: list[str], rows: bool) -> None:
    name = "corpus.jsonl" if rows else "corpus.txt"
    peaks = {}
    for megabytes in (40, 240):
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        size = grow(folder / name, library_texts, megabytes, rows=rows)
        found = peak_of(folder / name, tmp_path / "cache")
        assert found["bytes"] == size
        peaks[megabytes] = found["peak"]
    print(peaks)
    assert peaks[240] < peaks[40] + 30
