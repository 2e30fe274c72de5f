"""Cutting text, and dividing the only document: nothing is lost, whatever the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackwise.data.documents import HeldOut, TextDocument, cut, repair, text_document
from stackwise.errors import UsageError

TEXT = st.one_of(
    st.text(), st.lists(st.sampled_from(["\n", " ", "word", "é", "🙂", "\r\n", "\n\n", "x" * 30])).map("".join)
)


@given(text=TEXT, size=st.integers(8, 64), blocks=st.lists(st.integers(1, 20), max_size=20))
def test_pieces_are_the_text_however_it_comes(text: str, size: int, blocks: list[int]) -> None:
    data = text.encode()
    pieces = list(cut([data], size))
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= size for piece in pieces)
    parts, at = [], 0
    for block in blocks:
        parts.append(data[at : at + block])
        at += block
    assert list(cut([*parts, data[at:]], size)) == pieces


def test_pieces_end_with_lines_where_they_can() -> None:
    text = "".join(f"line {i}\nnext\n\n  indented\n\n" for i in range(200))
    pieces = list(cut([text.encode()], 200))
    assert len(pieces) > 10
    assert all(piece.endswith("\n") and piece[-2] != "\n" for piece in pieces[:-1])


@given(text=TEXT.filter(bool), share=st.floats(0.001, 0.999))
def test_dividing_loses_nothing(text: str, share: float) -> None:
    document = text_document(text.encode())
    try:
        (_, head), (_, tail) = HeldOut(share, 0, single=True).divide(document)
    except UsageError:
        assert len(text) == 1
        return
    assert isinstance(head, TextDocument)
    assert isinstance(tail, TextDocument)
    texts = ["".join(part.pieces()) for part in (head, tail)]
    assert "".join(texts) == text
    assert [len(part.encode()) for part in texts] == [head.n_bytes, tail.n_bytes]
    assert all(texts)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_two_lines_are_enough(share: float) -> None:
    (_, head), (_, tail) = HeldOut(share, 0, single=True).divide(text_document(b"one\ntwo\n"))
    assert isinstance(head, TextDocument)
    assert isinstance(tail, TextDocument)
    assert ["".join(head.pieces()), "".join(tail.pieces())] == ["one\n", "two\n"]


def test_repair() -> None:
    assert repair("plain é") == "plain é"
    assert repair("\ud83d\ude42 \ud83d") == "🙂 �"
