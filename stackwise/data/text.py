"""Long text in bounded memory: cut into pieces that can be tokenized one by one."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path

PIECE_BYTES = 128 << 10
"""About the most text that is tokenized at once; longer documents go piece by piece."""

BLOCK_BYTES = 1 << 20
_BLANKS = b" \t\r\n\v\f"
_BOM = codecs.BOM_UTF8


def cut(blocks: Iterable[bytes], size: int = PIECE_BYTES) -> Iterator[str]:
    """Cut UTF-8 text into pieces of at most `size` bytes; joined they are the text again.

    The cut depends on the text alone, not on how it came in blocks. It falls on a line end between two lines that
    touch it with something else than blanks, where there is one: there the usual pre-tokenizers begin a new word
    anyway, so the tokens are those of the uncut text.

    Raises:
        UnicodeDecodeError: The text is not UTF-8.
    """
    held = bytearray()
    for block in blocks:
        held += block
        while len(held) > size:
            at = _place(held, size)
            yield held[:at].decode()
            del held[:at]
    if held:
        yield held.decode()


def _place(data: bytearray, size: int) -> int:
    """Where to cut `data`, which is longer than `size`: in (0, size]."""
    low, at = size // 2, size
    while (at := data.rfind(b"\n", low, at)) > 0:
        if data[at - 1] not in _BLANKS and data[at + 1] not in _BLANKS:
            return at + 1
    for mark, keep in ((b"\n", 1), (b" ", 0)):
        if (at := data.rfind(mark, low, size)) > 0:
            return at + keep
    return boundary(data, size)


def boundary(data: bytes | bytearray, at: int) -> int:
    """The last start of a character at or before `at`."""
    while 0 < at < len(data) and data[at] & 0xC0 == 0x80:
        at -= 1
    return at


def line_end(data: bytes, at: int) -> int:
    """A place to divide `data` near `at`: after the last line end before it, else between two characters."""
    found = data.rfind(b"\n", 0, at)
    return found + 1 if found >= 0 else boundary(data, at)


def file_blocks(path: Path, limit: int | None = None) -> Iterator[bytes]:
    """A file's bytes, block by block, without a byte order mark; with `limit`, its whole lines within so many.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        left = None if limit is None else _end(file, limit)
        first = True
        while block := file.read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left)):
            if left is not None:
                left -= len(block)
            yield block.removeprefix(_BOM) if first else block
            first = False


def _end(file: BufferedReader, limit: int) -> int:
    """Where a file that is read to at most `limit` bytes is cut."""
    size = os.fstat(file.fileno()).st_size
    if size <= limit:
        return size
    start = max(0, limit - BLOCK_BYTES)
    window = os.pread(file.fileno(), BLOCK_BYTES + 1, start)
    return start + line_end(window, limit - start)


def is_utf8(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Pass blocks on while they are UTF-8.

    Raises:
        UnicodeDecodeError: They are not.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    for block in blocks:
        decoder.decode(block)
        yield block
    decoder.decode(b"", final=True)


def repair(text: str) -> str:
    """Text that UTF-8 can hold: halves of surrogate pairs, which JSON's escapes can carry, joined or replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
