"""Other programs open a boundary without this project."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr

from stackwise.store import ActivationStore, codec_named, codec_names

from .tools import pairs, values, write


@pytest.mark.parametrize("codec", codec_names())
def test_zarr_python_reads_a_boundary(store: ActivationStore, codec: str) -> None:
    x = values(10)
    info = write(store, x, codec=codec, attributes={"from": "test"})
    group = zarr.open_group(store.path / "boundaries" / info.id, mode="r", zarr_format=3)
    assert group.attrs["stackwise"]["trunk"] == info.trunk
    assert group.attrs["attributes"] == {"from": "test"}
    stored = group["activations"][:]
    expected = codec_named(codec).encode(x)
    assert stored.dtype == expected[0].dtype
    assert (stored == expected[0]).all()
    assert group["activations"].attrs["dtype"] == codec_named(codec).stored
    if len(expected) > 1:
        assert (group["scale"][:] == expected[1]).all()
    samples, masks = pairs(10)
    assert (group["sample"][:] == samples).all()
    bits = int(group["mask"].attrs["bits"])
    assert (np.unpackbits(group["mask"][:], axis=1, count=bits).view(bool) == masks).all()


@pytest.mark.parametrize("codec", ["fp32", "fp32-blosc", "int8-zstd"])
def test_xarray_opens_a_boundary(store: ActivationStore, codec: str) -> None:
    x = values(10)
    info = write(store, x, codec=codec)
    with xarray.open_zarr(store.path / "boundaries" / info.id, consolidated=False, zarr_format=3) as data:
        assert data["activations"].dims == ("row", "position", "feature")
        assert (data["activations"].to_numpy() == codec_named(codec).encode(x)[0]).all()
        assert data["sample"].dims == ("row", "id_byte")


def test_a_chunk_of_nothing_but_zeros_is_a_file(store: ActivationStore) -> None:
    info = write(store, np.zeros((9, 12, 8), np.float32))
    files = sorted(Path(store.path / "boundaries" / info.id / "activations" / "c").rglob("0/0"))
    assert [f.stat().st_size for f in files if f.is_file()] == [4 * 12 * 8 * 4] * 3


@pytest.mark.parametrize("codec", ["fp32", "bf16", "bf16-blosc", "fp16-zstd"])
def test_tensorstore_opens_a_boundary(store: ActivationStore, codec: str) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    info = write(store, values(10), codec=codec)
    place = {"driver": "file", "path": str(store.path / "boundaries" / info.id / "activations")}
    array = tensorstore.open({"driver": "zarr3", "kvstore": place}).result()
    assert (array.read().result() == codec_named(codec).encode(values(10))[0]).all()
