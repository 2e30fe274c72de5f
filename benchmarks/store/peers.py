"""The peers: each stores rows of bfloat16 bits, and reads a batch of any rows into a buffer that it is given."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint16]
Read = Callable[[list[int], Bits], object]
"""Reads rows into out [n, seq, d_model]."""


def readinto(path: Path, x: Bits) -> Read:
    """A bare file, a bare `readinto`: what any reader is measured against."""
    x.tofile(path / "flat")
    file = (path / "flat").open("rb", buffering=0)
    size = x[0].nbytes

    def read(rows: list[int], out: Bits) -> None:
        view = memoryview(out.reshape(-1).view(np.uint8).data)
        for at, row in enumerate(rows):
            file.seek(row * size)
            file.readinto(view[at * size : (at + 1) * size])

    return read


def memmap(path: Path, x: Bits) -> Read:
    """numpy's memmap."""
    x.tofile(path / "mapped")
    mapped = np.memmap(path / "mapped", x.dtype, "r", shape=x.shape)
    # With another mode numpy takes into a buffer of its own, and copies that.
    return lambda rows, out: np.take(mapped, rows, axis=0, out=out, mode="clip")


def safetensors(path: Path, x: Bits) -> Read:
    """One safetensors file, read by slices."""
    save = importlib.import_module("safetensors.numpy").save_file
    save({"x": x}, path / "x.safetensors")
    opened = importlib.import_module("safetensors").safe_open(path / "x.safetensors", "np").__enter__()
    part = opened.get_slice("x")

    def read(rows: list[int], out: Bits) -> None:
        for at, row in enumerate(rows):
            out[at] = part[row : row + 1][0]

    return read


def h5py(path: Path, x: Bits) -> Read:
    """One HDF5 data set, contiguous."""
    module: Any = importlib.import_module("h5py")
    with module.File(path / "x.h5", "w") as file:
        file["x"] = x
    data = module.File(path / "x.h5", "r")["x"]

    def read(rows: list[int], out: Bits) -> None:
        for at, row in enumerate(rows):
            data.read_direct(out, np.s_[row], np.s_[at])

    return read


def _zarr(path: Path, x: Bits) -> Path:
    zarr: Any = importlib.import_module("zarr")
    target = path / "x.zarr"
    if not target.exists():
        array = zarr.create_array(target, shape=x.shape, chunks=(1, *x.shape[1:]), dtype=x.dtype, compressors=None)
        array[:] = x
    return target


def zarr_python(path: Path, x: Bits) -> Read:
    """zarr-python, one row a chunk, uncompressed."""
    zarr: Any = importlib.import_module("zarr")
    array = zarr.open_array(_zarr(path, x), mode="r")

    def read(rows: list[int], out: Bits) -> None:
        for at, row in enumerate(rows):
            out[at] = array[row]

    return read


def zarrs(path: Path, x: Bits) -> Read:
    """zarr-python over the zarrs pipeline."""
    importlib.import_module("zarrs")
    zarr: Any = importlib.import_module("zarr")
    target = _zarr(path, x)
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        array = zarr.open_array(target, mode="r")

    def read(rows: list[int], out: Bits) -> None:
        for at, row in enumerate(rows):
            out[at] = array[row]

    return read


def tensorstore(path: Path, x: Bits) -> Read:
    """TensorStore, the same Zarr array, a batch of reads at once."""
    module: Any = importlib.import_module("tensorstore")
    array = module.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(_zarr(path, x))}}).result()
    return lambda rows, out: np.copyto(out, array[rows].read().result())


def mosaicml(path: Path, x: Bits) -> Read:
    """MosaicML streaming, raw arrays in local shards, by index."""
    streaming: Any = importlib.import_module("streaming")
    with streaming.MDSWriter(out=str(path / "mds"), columns={"x": "bytes"}, size_limit=8 << 20) as writer:
        for row in x:
            writer.write({"x": row.tobytes()})
    data = streaming.StreamingDataset(local=str(path / "mds"), shuffle=False, batch_size=1)

    def read(rows: list[int], out: Bits) -> None:
        for at, row in enumerate(rows):
            out[at] = np.frombuffer(data[row]["x"], np.uint16).reshape(out[at].shape)

    return read


def litdata(path: Path, x: Bits) -> Read:
    """LitData, raw arrays in local chunks, by index."""
    os.environ.setdefault("DATA_OPTIMIZER_CACHE_FOLDER", str(path / "cache"))
    module: Any = importlib.import_module("litdata.streaming.cache")
    cache = module.Cache(str(path / "lit"), chunk_bytes=8 << 20)
    for index, row in enumerate(x):
        cache[index] = {"x": row.tobytes()}
    cache.done()
    cache.merge()
    reading: Any = importlib.import_module("litdata").StreamingDataset(str(path / "lit"))

    def read(rows: list[int], out: Bits) -> None:
        for at, row in enumerate(rows):
            out[at] = np.frombuffer(reading[row]["x"], np.uint16).reshape(out[at].shape)

    return read


PEERS: dict[str, Callable[[Path, Bits], Read]] = {
    "readinto": readinto,
    "memmap": memmap,
    "safetensors": safetensors,
    "h5py": h5py,
    "zarr-python": zarr_python,
    "zarrs": zarrs,
    "TensorStore": tensorstore,
    "MosaicML streaming": mosaicml,
    "LitData": litdata,
}
