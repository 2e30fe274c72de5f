"""The text of web pages and notebooks: without tags and scripts, without outputs of cells."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from stackwise import files
from stackwise.data.documents import SkippedFile, TextDocument, repair, text_document
from stackwise.data.readers import open_file

MOST_BYTES = 16 << 20
"""Of a page or a notebook: it is held whole."""

_PART = 1 << 16
"""Characters that the parser is given at once."""
_UNSEEN = frozenset({"script", "style", "template", "noscript", "title", "svg"})
"""Elements whose content is no text of the page. (A title is mostly repeated by a heading.)"""
_INLINE = frozenset(
    {
        *("a", "abbr", "b", "bdi", "bdo", "big", "cite", "code", "data", "del", "dfn", "em", "font", "i", "img", "ins"),
        *("kbd", "label", "mark", "q", "rp", "rt", "ruby", "s", "samp", "small", "span", "strike", "strong", "sub"),
        *("sup", "time", "tt", "u", "var", "wbr"),
    }
)
"""Elements that stand within a line; any other one begins a new line."""


def html_file(path: Path) -> Iterator[TextDocument]:
    """The text of a web page, one document."""
    page, html = _Page(), _text(path)
    start = 0
    try:
        while start < len(html):
            # The parser looks again at what is not closed yet: only at twice its length, or that would take for ever.
            part = max(_PART, len(page.rawdata))
            page.feed(html[start : start + part])
            start += part
        if len(page.rawdata) > _PART:
            raise SkippedFile("HTML with a tag or comment that is not closed")
        page.close()
    except AssertionError as error:  # how the parser says that a declaration is none
        raise SkippedFile("HTML with a broken declaration") from error
    if page.unseen:  # all that follows would be lost
        raise SkippedFile(f"HTML with a {page.unseen[-1]} that is not closed")
    if text := page.text():
        yield text_document(repair(text).encode())


class _Page(HTMLParser):
    """Collects text: one line for each block, blanks drawn together but in `pre`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._lines: list[str] = []
        self._line: list[str] = []
        self.unseen: list[str] = []
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _UNSEEN:
            self.unseen.append(tag)
        elif tag not in _INLINE:
            self._end_line()
        self._pre += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _INLINE:
            self._end_line()

    def handle_endtag(self, tag: str) -> None:
        if self.unseen and tag == self.unseen[-1]:
            self.unseen.pop()
        elif tag not in _INLINE:
            self._end_line()
        self._pre = max(0, self._pre - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if not self.unseen:
            self._line.append(data)

    def _end_line(self) -> None:
        text = "".join(self._line)
        self._line.clear()
        if self._pre:
            self._lines += text.strip("\n").split("\n") if text.strip() else []
        elif text := " ".join(text.split()):
            self._lines.append(text)

    def text(self) -> str:
        self._end_line()
        return "".join(f"{line}\n" for line in self._lines)


def notebook_file(path: Path) -> Iterator[TextDocument]:
    """The cells of a Jupyter notebook in order, one document, a blank line between; outputs are left out."""
    try:
        notebook = files.parse_json(_text(path))
    except ValueError as error:
        raise SkippedFile("a notebook that is not JSON") from error
    cells: Any = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise SkippedFile("not a notebook of format 4: `jupyter nbconvert --to notebook` makes it one")
    texts = []
    for cell in cells:
        source = cell.get("source")
        lines = source if isinstance(source, list) else [source]
        if not all(isinstance(line, str) for line in lines):
            raise SkippedFile("a notebook with a cell that is no text")
        texts.append("".join(lines).strip("\n"))
    if text := "\n\n".join(text for text in texts if text.strip()):
        yield text_document(repair(text).encode() + b"\n")


def _text(path: Path) -> str:
    with open_file(path) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise SkippedFile(f"a page or notebook of more than {MOST_BYTES >> 20} MB")
    declared = re.search(rb"charset\s*=\s*[\"']?\s*([-\w]+)", data[:2048])
    if data.startswith(b"%PDF") or b"\0" in data[:8192]:
        raise SkippedFile("binary")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        name = declared.group(1).decode() if declared else "another encoding"
        raise SkippedFile(f"not UTF-8 text but {name}: convert it") from None
