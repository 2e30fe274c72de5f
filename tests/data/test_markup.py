"""Web pages and notebooks: their text is read, and not what is around it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stackwise.config import DataConfig
from stackwise.data import prepare
from stackwise.errors import UsageError

from .conftest import documents_of

Settings = Callable[..., DataConfig]

PAGE = """<!DOCTYPE html><html><head><meta charset="utf-8"><title>A &amp; B</title>
<style>p { color: red }</style><script>if (a < b) { document.write("<p>no</p>") }</script></head>
<body><!-- not seen --><h1>Cats &amp; dogs</h1>
<p>One <b>line</b> of
   text,<br>and another&nbsp;one.<ul><li>first<li>second</ul>
<pre>
def f():
    return 1
</pre><svg><text>drawn</text></svg><noscript>turn it on</noscript></body></html>"""

CELLS = [
    {"cell_type": "markdown", "source": ["# Title\n", "\n", "Some text.\n"]},
    {"cell_type": "code", "source": "print(1)", "outputs": [{"text": ["secret output"]}], "execution_count": 1},
    {"cell_type": "code", "source": [], "outputs": []},
]


def texts(settings: DataConfig) -> list[str]:
    data, _ = prepare(settings)
    return sorted(t for split in (data.train, data.held_out) for t in documents_of(split, data.tokenizer.decode))


def test_a_page_is_its_text(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "a.html").write_text(PAGE)
    (tmp_path / "b.txt").write_text("<b>as it stands</b>\n")
    assert texts(settings(tmp_path / "a.html", tmp_path / "b.txt", tokenizer="bytes")) == [
        "<b>as it stands</b>\n",
        "Cats & dogs\nOne line of text,\nand another one.\nfirst\nsecond\ndef f():\n    return 1\n",
    ]


def test_a_notebook_is_its_cells(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": CELLS, "metadata": {}, "nbformat": 4}))
    (tmp_path / "b.txt").write_text("other\n")
    assert texts(settings(tmp_path, tokenizer="bytes")) == ["# Title\n\nSome text.\n\nprint(1)\n", "other\n"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.ipynb", b"{", "not JSON"),
        ("a.ipynb", b"[" * 100_000, "not JSON"),
        ("a.ipynb", b'{"worksheets": []}', "not a notebook of format 4"),
        ("a.ipynb", b'{"cells": [{"source": [1]}]}', "no text"),
        ("a.html", b"<p>\xe9", "not UTF-8"),
        ("a.html", b"<p>a</p><noscript>all of it", "noscript that is not closed"),
        ("a.html", b"a <!-- " + b"x" * 100_000, "not closed"),
        ("a.html", b"a " + b"<!" * 1_500_000, "not closed"),
        ("a.html", b"a <![&x]> b", "broken declaration"),
        ("a.html", b"<a " + b'a="' * 300_000, "not closed"),
        ("a.txt", b"%PDF-1.4\n1 0 obj\n", "another format"),
        ("a.rtf", rb"{\rtf1 text}", "plain text: save"),
    ],
)
def test_what_has_no_sound_text_is_left_out_by_name(
    tmp_path: Path, settings: Settings, name: str, content: bytes, why: str
) -> None:
    (tmp_path / name).write_bytes(content)
    started = time.monotonic()
    with pytest.raises(UsageError, match=why):
        prepare(settings(tmp_path / name, tokenizer="bytes"))
    assert time.monotonic() - started < 20
