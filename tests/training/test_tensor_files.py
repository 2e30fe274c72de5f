"""Files of tensors, through the page cache and past it, on a real disk."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stackwise.files import file_digest
from stackwise.training.lanes import Buffers
from stackwise.training.tensor_files import TensorFile, aligned_first, passes_cache, write_tensors

WAYS = ("cached", "direct")


@pytest.fixture
def staging(real_disk: Path) -> dict[str, Buffers | None]:
    """By way what lends memory for it."""
    assert passes_cache(real_disk)
    assert not list(real_disk.iterdir())
    return {"cached": None, "direct": Buffers()}


def state(large: int) -> dict[str, Tensor]:
    """Tensors of many kinds; so many numbers in the largest."""
    return {
        "a/b": torch.randn(3, 5),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "half": torch.randn(7).bfloat16(),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "none": torch.zeros(0, 4),
        "large": torch.randn(large),
        "sliced": torch.randn(8, 8)[:, ::2],
        "even": torch.randn(32),
    }


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("large", [10, 5_000_000])
def test_whatever_its_way_a_file_is_the_same_and_safetensors(
    real_disk: Path, staging: dict[str, Buffers | None], large: int, ordered: bool
) -> None:
    tensors = aligned_first(state(large)) if ordered else state(large)
    lend = Buffers().lend
    with ThreadPoolExecutor(2) as pool:
        threads = pool if ordered else None
        digests = {way: write_tensors(real_disk / way, tensors, threads, staging[way]) for way in WAYS}
        assert (real_disk / "cached").read_bytes() == (real_disk / "direct").read_bytes()
        for way in WAYS:
            path, other = real_disk / way, way != "direct"  # a file of one way is read the other way too
            assert digests[way] == file_digest(path) == digests["cached"]
            file = TensorFile(path)
            some = ["even", "half", "none", "a/b"]
            for back in (load_file(path), file, file.read(list(tensors), lend, threads, direct=other)):
                assert set(back) == set(tensors)
                for name, tensor in tensors.items():
                    assert back[name].dtype == tensor.dtype
                    assert torch.equal(back[name], tensor), name
            few = file.read(some, lend, threads, direct=other)
            assert list(few) == some
            for name, tensor in few.items():
                assert torch.equal(tensor, tensors[name]), name
                assert tensor.data_ptr() % 64 == 0, "what is computed may depend on it"


def test_what_is_aligned_stands_first_and_is_used_where_it_was_read(real_disk: Path) -> None:
    tensors = {"step": torch.tensor(1.0), "weight": torch.randn(1 << 10), "moment": torch.randn(1 << 10)}
    write_tensors(real_disk / "x", aligned_first(tensors))
    lent: list[int] = []

    def lend(nbytes: int) -> Tensor:
        lent.append(nbytes)
        return Buffers().lend(nbytes)

    file = TensorFile(real_disk / "x")
    back = file.read(["moment", "weight"], lend)
    assert back["moment"].data_ptr() == back["weight"].data_ptr() + back["weight"].nbytes
    assert lent == [3 * 4096], "whole pages of the file, and nothing beside them"


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_cut_off_is_named(real_disk: Path, staging: dict[str, Buffers | None], way: str) -> None:
    path = real_disk / "x"
    write_tensors(path, state(5_000_000), None, staging[way])
    file = TensorFile(path)
    for size in (path.stat().st_size - 100, 9_000_000, 8_500_001):
        os.truncate(path, size)
        with pytest.raises((ValueError, OSError), match="x"):
            file.read(list(file), Buffers().lend, direct=way == "direct")
    with pytest.raises(ValueError, match="x is cut off"):
        TensorFile(path)
