"""From a file to its documents: text, JSON lines, JSON, parquet and Arrow; packed ones are unpacked as they are read.

Everything from outside is checked here: what comes out are documents, or one line that says what is wrong, and where. A
file that holds no text raises `SkippedFile`, a faulty one `UsageError`, one that cannot be read `OSError`.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import xxhash

from stackwise import files
from stackwise.data.documents import (
    ABSENT,
    CHAT_COLUMNS,
    LABELS,
    MASK,
    TARGETS,
    TOKENS,
    UNREAD,
    Reading,
    Rows,
    SkippedFile,
    TextDocument,
    as_row,
    cut,
    line_end,
    lookup,
    missing_column,
    text_document,
)
from stackwise.errors import StackWiseError, UsageError, line_of

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK_BYTES = 1 << 20
HEAD_BYTES = 8192
"""Of a text file, where a NUL or a line of JSON says that it is none."""

ROW_BYTES = 256 << 20
"""Most bytes of one line or row of JSON: it is held whole, a text file is not."""

BOMB_BYTES, BOMB_RATIO = 64 << 20, 200
"""A packed file that holds more than so many bytes, and so many times its own size, is taken for a bomb: text shrinks
to a third or a tenth, repeated logs to a hundredth."""

ROWS = 256
"""Rows taken at once from a parquet file; documents are small beside a batch of tokens."""

PACKED = (".gz", ".bz2", ".zst")
"""Suffixes of text and JSON that are unpacked as they are read."""

_BOM = codecs.BOM_UTF8
_OTHER_FORMATS = (b"%PDF-", rb"{\rtf", b"%!PS")
"""How files begin that may be ASCII and yet are no plain text."""

# Opening files, packed or not.


def open_file(path: Path) -> IO[bytes]:
    """A file of a corpus, unpacked as it is read. The user named it or its folder, so it may be reached by a link."""
    raw = os.fdopen(files.open_regular(Path(os.path.realpath(path))), "rb")
    if (suffix := path.suffix.lower()) not in PACKED:
        return raw
    try:
        return io.BufferedReader(_Unpacked(path, raw, suffix), BLOCK_BYTES)
    except BaseException:
        raw.close()
        raise


class _Unpacked(io.RawIOBase):
    """What a packed file holds, as a stream, within bounds."""

    def __init__(self, path: Path, raw: IO[bytes], suffix: str) -> None:
        self._path, self._raw, self._size, self._done = path, raw, os.fstat(raw.fileno()).st_size, 0
        self._stream: Any
        if suffix == ".gz":
            self._stream = gzip.GzipFile(fileobj=raw)
        elif suffix == ".bz2":
            self._stream = bz2.BZ2File(raw)
        else:
            require_pyarrow(path, "zstd files need")
            import pyarrow as pa

            self._stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        try:
            data = self._stream.read(len(view))
        except (EOFError, zlib.error) as error:
            raise self._damaged(error) from None
        except OSError as error:
            if error.errno is not None:  # the disk's fault, not the file's
                raise
            raise self._damaged(error) from None
        self._done += len(data)
        if self._done > max(BOMB_BYTES, BOMB_RATIO * self._size):
            raise UsageError(
                f"{self._path}: unpacks to more than {BOMB_RATIO} times its size",
                hint="unpack it yourself if it is meant to, and name what it holds",
            )
        view[: len(data)] = data
        return len(data)

    def _damaged(self, error: Exception) -> UsageError:
        return UsageError(f"{self._path}: damaged or cut off ({error})", hint="fetch it again, or leave it out")

    def close(self) -> None:
        self._stream.close()
        self._raw.close()
        super().close()


# Text.


def text_file(
    path: Path, limit: int | None = None, report: Callable[[int], None] | None = None, reading: Reading | None = None
) -> Iterator[TextDocument]:
    """A text file: one document, or none where it is empty (or cut to nothing by `limit` bytes)."""
    blocks = file_blocks(path, limit)
    head = next(blocks, b"")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SkippedFile("UTF-16 text: convert it to UTF-8")
    if b"\0" in head[:HEAD_BYTES]:
        raise SkippedFile("binary")
    if head.startswith(_OTHER_FORMATS):
        raise SkippedFile("a document of another format: save its text as .txt")
    if _is_row(head, reading or Reading()):
        raise SkippedFile("JSON lines: give it a name that ends in .jsonl")
    following = next(blocks, None)
    try:
        if following is None:
            head.decode()
            if head:
                yield text_document(head)
            return
        state, n_bytes = xxhash.xxh3_128(), 0
        decoder = codecs.getincrementaldecoder("utf-8")()
        for block in _chain(head, following, blocks):
            decoder.decode(block)
            state.update(block)
            n_bytes += len(block)
            if report is not None:
                report(len(block))
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise SkippedFile("not UTF-8 text") from None
    yield TextDocument(state.intdigest(), n_bytes, lambda: cut(file_blocks(path, limit)))


def _chain(*parts: bytes | Iterable[bytes]) -> Iterator[bytes]:
    for part in parts:
        if isinstance(part, bytes):
            yield part
        else:
            yield from part


def _is_row(head: bytes, reading: Reading) -> bool:
    """Whether a text begins with a line of JSON that would be a row: nobody means to train on its syntax."""
    if not head.lstrip().startswith(b"{"):
        return False
    with contextlib.suppress(ValueError):
        row = files.parse_json(head.lstrip().split(b"\n", 1)[0].decode())
        if not isinstance(row, dict):
            return False
        chat = reading.chat is not None and any(name in row for name in CHAT_COLUMNS)
        return chat or lookup(row, reading.column) is not ABSENT or TOKENS in row
    return False


def file_blocks(path: Path, limit: int | None = None) -> Iterator[bytes]:
    """A file's bytes, block by block, without a byte order mark; with `limit`, its whole lines within so many."""
    left = None if limit is None else _cut_at(path, limit)[0]
    with open_file(path) as file:
        first = True
        while block := file.read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left)):
            if left is not None:
                left -= len(block)
            yield block.removeprefix(_BOM) if first else block
            first = False


def exceeds(path: Path, limit: int) -> bool:
    """Whether a file holds more than `limit` bytes."""
    return _cut_at(path, limit)[1]


def _cut_at(path: Path, limit: int) -> tuple[int, bool]:
    """Where a file that is read to at most `limit` bytes is cut, and whether there is more."""
    start = max(0, limit - BLOCK_BYTES)
    with open_file(path) as file:
        if path.suffix.lower() not in PACKED:
            if (size := os.fstat(file.fileno()).st_size) <= limit:
                return size, False
            file.seek(start)
        else:  # how much it holds is known from unpacking it alone
            passed = 0
            while passed < start:
                if not (block := file.read(min(BLOCK_BYTES, start - passed))):
                    return passed, False
                passed += len(block)
        window = file.read(limit - start + 1)
    if start + len(window) <= limit:
        return start + len(window), False
    return start + line_end(window, limit - start), True


# Rows.


def jsonl_rows(path: Path) -> Rows:
    """The objects of a JSON-lines file. Blank lines are passed over."""
    with open_file(path) as file:
        number = 0
        while line := file.readline(ROW_BYTES + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > ROW_BYTES:
                raise UsageError(f"{where}: longer than {ROW_BYTES} bytes", hint="a line is one row, a JSON object")
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield where, as_row(where, _parsed(where, line))


def _parsed(where: str, line: bytes) -> Any:
    try:
        return files.parse_json(line.decode())
    except UnicodeDecodeError:
        raise UsageError(f"{where}: not UTF-8 text") from None
    except ValueError as error:
        raise UsageError(f"{where}: not JSON ({error})") from None


def json_rows(path: Path) -> Rows:
    """The rows of a `.json` file: the objects of one array, or objects one after another (JSON lines)."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    scan = json.JSONDecoder().raw_decode
    text, at, number, size, in_array, ended = "", 0, 0, BLOCK_BYTES, False, False
    with open_file(path) as file:
        while True:
            where = f"{path}, row {number + 1}"
            at = _skip_blanks(text, at)
            if text[at : at + 1] == "[" and not in_array and not number:
                in_array, at = True, _skip_blanks(text, at + 1)
            elif in_array and number and text[at : at + 1] == ",":
                at = _skip_blanks(text, at + 1)
            complete = at < len(text) and not (in_array and text[at] == "]")
            if complete:
                try:
                    value, end = scan(text, at)
                except (json.JSONDecodeError, RecursionError) as error:
                    if ended or isinstance(error, RecursionError) or len(text) - at > ROW_BYTES:
                        what = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
                        raise UsageError(f"{where}: not JSON ({what})") from None
                except ValueError as error:  # a number of too many digits
                    raise UsageError(f"{where}: not JSON ({error})") from None
                else:
                    number, at = number + 1, end
                    yield where, as_row(where, value)
                    continue
            elif at < len(text):  # the end of the array
                if _skip_blanks(text, at + 1) < len(text) or file.read(1).strip():
                    raise UsageError(f"{path}: something follows the array")
                return
            elif ended:
                if in_array:
                    raise UsageError(f"{where}: the file ends within its array")
                return
            try:
                block = file.read(size)
                text, at, ended = text[at:] + decode(block, not block), 0, not block
            except UnicodeDecodeError:
                raise UsageError(f"{where}: not UTF-8 text") from None
            size = max(
                BLOCK_BYTES, len(text)
            )  # a row that is not whole yet is looked at again only at twice its length


def _skip_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def require_pyarrow(path: Path, what: str = "parquet files and Hugging Face data sets need") -> None:
    """Check that pyarrow is there."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UsageError(f"{path}: {what} pyarrow", hint="pip install 'stackwise[arrow]'") from None


def parquet_rows(path: Path, reading: Reading) -> Rows:
    """Rows of a parquet file, only the columns that documents need."""
    require_pyarrow(path)
    import pyarrow.parquet as pq

    with _arrow_faults(path, "parquet"), open_file(path) as file, pq.ParquetFile(file) as table:
        names, unread = _wanted(path, reading, table.schema_arrow)
        yield from _rows(path, table.iter_batches(batch_size=ROWS, columns=names, use_threads=True), unread)


def arrow_rows(path: Path, reading: Reading) -> Rows:
    """Rows of an Arrow file in either of its formats (Hugging Face writes the streaming one)."""
    require_pyarrow(path)
    import pyarrow as pa

    with _arrow_faults(path, "Arrow"), open_file(path) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        # not memory-mapped: a file that is cut while it is read would end the process
        with pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file) as table:
            names, unread = _wanted(path, reading, table.schema)
            batches = map(table.get_batch, range(table.num_record_batches)) if is_file else table
            yield from _rows(path, (batch.select(names) for batch in batches), unread)


@contextlib.contextmanager
def _arrow_faults(path: Path, kind: str) -> Iterator[None]:
    """Whatever the library raises about a file's content, as one line."""
    try:
        yield
    except (StackWiseError, GeneratorExit):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        what = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else line_of(error, "?")
        raise UsageError(f"{path}: not a readable {kind} file ({what})") from None


def _wanted(path: Path, reading: Reading, schema: pa.Schema) -> tuple[list[str], list[str]]:
    """The columns to read, and those that only matter by being there."""
    import pyarrow as pa

    names: list[str] = schema.names
    if reading.chat is not None and TOKENS not in names:
        return [name for name in CHAT_COLUMNS if name in names], []
    for name in (reading.column, reading.column.partition(".")[0]):
        if name in names:
            return [name], [TOKENS] if TOKENS in names and name != TOKENS else []
    if TOKENS not in names:
        raise missing_column(str(path), reading.column, names)
    used = [name for name in (TOKENS, TARGETS, MASK, LABELS, *reading.columns) if name in names]
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return used, [name for name in names if name not in used and any(test(schema.field(name).type) for test in lists)]


def _rows(path: Path, batches: Iterable[pa.RecordBatch], unread: list[str]) -> Rows:
    beside = dict.fromkeys(unread, UNREAD)
    number = 0
    for whole in batches:
        whole.validate(full=True)  # offsets that lead out of a damaged file's buffers would end the process
        for start in range(0, whole.num_rows, ROWS):
            for row in whole.slice(start, ROWS).to_pylist():
                number += 1
                yield f"{path}, row {number}", row | beside
