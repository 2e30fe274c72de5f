"""The small columns and the Zarr metadata that make a finished boundary self-describing.

With `sample`, `mask` and `digest` beside the activations, every row can be checked and the index be rebuilt from
the boundary alone; with `zarr.json`, any Zarr reader opens it.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from stackwise.errors import NotFound
from stackwise.store import zarr_meta
from stackwise.store.backend import Backend
from stackwise.store.index import Index
from stackwise.store.masks import Masks
from stackwise.store.publishing import array_key
from stackwise.store.records import BoundaryInfo, ChunkRecord, chunk_key
from stackwise.store.rowset import Rowset


def write_metadata(index: Index, backend: Backend, masks: Masks, rowset: Rowset, info: BoundaryInfo) -> None:
    """Write the columns and the Zarr metadata of a boundary whose chunks are all published; `zarr.json` last.

    The columns make it self-describing: with them the index can be rebuilt, and every row checked.
    """
    bits = masks.packed(rowset.mask_ids[:1])[1]
    metadata = zarr_meta.columns(info, bits)
    step = min(info.rows, zarr_meta.COLUMN_ROWS)
    spans = [(number, start, min(start + step, info.rows)) for number, start in enumerate(range(0, info.rows, step))]
    backend.prepare(
        [array_key(info.id, name, number, 1 if name == "digest" else 2) for name in metadata for number, _, _ in spans]
        + [f"{info.id}/{spec.name}/zarr.json" for spec in info.codec_object.arrays]
    )
    for number, start, stop in spans:
        packed, _ = masks.packed(rowset.mask_ids[start:stop], bits)
        values: dict[str, npt.NDArray[Any]] = {
            "sample": np.ascontiguousarray(rowset.sample_ids[start:stop]),
            "mask": packed,
            "digest": _digests(index, info, start, stop),
        }
        for name, value in values.items():
            padded = np.zeros((step, *value.shape[1:]), value.dtype.newbyteorder("<"))
            padded[: stop - start] = value
            backend.put(array_key(info.id, name, number, value.ndim), padded.tobytes())
    for name, described in metadata.items():
        backend.put(f"{info.id}/{name}/zarr.json", _json(described))
    for spec in info.codec_object.arrays:
        backend.put(f"{info.id}/{spec.name}/zarr.json", _json(zarr_meta.activations(info, spec)))
    backend.put(f"{info.id}/zarr.json", _json(zarr_meta.group(info, bits)))


def _digests(index: Index, info: BoundaryInfo, start: int, stop: int) -> npt.NDArray[np.uint64]:
    """Row digests uint64 [stop - start] from the chunks' records."""
    parts = []
    with index.read() as view:
        for chunk in range(start // info.chunk_rows, -(-stop // info.chunk_rows)):
            first, last = info.chunk_span(chunk)
            raw = view.get("chunks", chunk_key(info.id, chunk))
            if raw is None:
                raise NotFound(f"chunk {chunk} of boundary {info.id} is no longer published")
            digests = ChunkRecord.decode(raw, rows=last - first, files=len(info.codec_object.arrays)).rows
            parts.append(digests[max(start - first, 0) : stop - first])
    return np.concatenate(parts)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()
