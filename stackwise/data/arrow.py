"""Parquet files and Hugging Face data sets on disk, batch by batch. pyarrow is imported here, when needed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise.data.documents import TARGETS, TOKENS, missing_column
from stackwise.errors import NotFound, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 256
"""Rows read at once from a parquet file; documents are small beside a batch of tokens."""

_DATASET, _DICT = "state.json", "dataset_dict.json"


def require_pyarrow(path: Path) -> None:
    """Check that pyarrow is there.

    Raises:
        UsageError: It is not; the message says how to install it.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UsageError(
            f"{path}: parquet files and Hugging Face data sets need pyarrow", hint="pip install 'stackwise[arrow]'"
        ) from None


def parquet_rows(path: Path, column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a parquet file, only the columns that documents need, each with where it stands.

    Raises:
        UsageError: It is not a parquet file, or has no such column.
        OSError: It cannot be read.
    """
    require_pyarrow(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = _wanted(path, column, file.schema_arrow.names)
            yield from _rows(path, file.iter_batches(batch_size=ROWS, columns=names, use_threads=True))
    except pa.ArrowException as error:
        raise _damaged(path, "parquet", error) from None


def arrow_rows(path: Path, column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of an Arrow file in either of its formats (Hugging Face writes the streaming one).

    Raises:
        UsageError: It is not an Arrow file, or has no such column.
        OSError: It cannot be read.
    """
    require_pyarrow(path)
    import pyarrow as pa

    try:
        with contextlib.closing(pa.memory_map(str(path))) as source:
            yield from _rows(path, _batches(path, column, source))
    except pa.ArrowException as error:
        raise _damaged(path, "Arrow", error) from None


def _batches(path: Path, column: str, source: Any) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    if source.read(6) == b"ARROW1":
        source.seek(0)
        with pa.ipc.open_file(source) as file:
            names = _wanted(path, column, file.schema.names)
            for index in range(file.num_record_batches):
                yield file.get_batch(index).select(names)
        return
    source.seek(0)
    with pa.ipc.open_stream(source) as stream:
        names = _wanted(path, column, stream.schema.names)
        for batch in stream:
            yield batch.select(names)


def _wanted(path: Path, column: str, names: list[str]) -> list[str]:
    if column in names:
        return [column]
    if TOKENS in names:
        return [name for name in (TOKENS, TARGETS) if name in names]
    raise missing_column(str(path), column, names)


def _rows(path: Path, batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    number = 0
    for whole in batches:
        for start in range(0, whole.num_rows, ROWS):
            for row in whole.slice(start, ROWS).to_pylist():
                number += 1
                yield f"{path}, row {number}", row


def _damaged(path: Path, kind: str, error: Exception) -> UsageError:
    return UsageError(f"{path}: not a readable {kind} file ({str(error).splitlines()[0]})")


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a Hugging Face data set, or a dictionary of them, as `save_to_disk` writes it."""
    # os.path: a folder that may not be looked into is none
    return os.path.isfile(folder / _DICT) or (os.path.isfile(folder / _DATASET) and any(folder.glob("*.arrow")))


def dataset_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The Arrow files of a data set in order, and the names of the splits that are left out.

    Of a dictionary with a `train` split only that is read: the others are there to be kept from training.

    Raises:
        UsageError: Its description is damaged, or it was saved with an indices mapping.
        NotFound: A file that it names is missing.
    """
    if not (folder / _DICT).is_file():
        return _files(folder), []
    splits = _describe(folder / _DICT).get("splits")
    if not isinstance(splits, list) or not splits or not all(_plain(name) for name in splits):
        raise UsageError(f"{folder / _DICT}: names no splits")
    used = ["train"] if "train" in splits else splits
    return [file for name in used for file in _files(folder / name)], [name for name in splits if name not in used]


def _files(folder: Path) -> list[Path]:
    state = _describe(folder / _DATASET)
    if state.get("_indices_data_files"):
        raise UsageError(f"{folder}: saved with an indices mapping", hint="save it again after flatten_indices()")
    entries = state.get("_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or ()]
    if not names or not all(_plain(name) for name in names):
        raise UsageError(f"{folder / _DATASET}: names no data files")
    for name in names:
        if not (folder / str(name)).is_file():
            raise NotFound(f"{folder / str(name)}: missing, though {_DATASET} names it")
    return [folder / str(name) for name in names]


def _plain(name: object) -> bool:
    """Whether a name from a file is one component of a path and nothing more."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _describe(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFound(f"{path}: missing; {path.parent} is not a whole data set folder") from None
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: not a JSON object")
    return value
