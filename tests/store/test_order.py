"""The order of rows: a pure function of its arguments, every row once an epoch, a position of one integer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise.errors import UsageError
from stackwise.store import RowOrder


@settings(deadline=None)
@given(
    rows=st.integers(1, 400),
    chunk=st.integers(1, 60),
    window=st.integers(1, 9),
    size=st.integers(1, 50),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_batches_are_the_slices_of_one_endless_sequence(
    rows: int, chunk: int, window: int, size: int, seed: int, data: st.DataObject
) -> None:
    select = None
    if data.draw(st.booleans()):
        select = np.array(sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1))))
    order = RowOrder(rows, seed=(seed, "x"), chunk_rows=chunk, window_chunks=window, select=select)
    length = order.length
    sequence = order.at(0, 3 * length)
    for epoch in range(3):
        seen = np.sort(sequence[epoch * length : (epoch + 1) * length])
        assert (seen == (np.arange(rows) if select is None else select)).all()
    again = RowOrder(rows, seed=(seed, "x"), chunk_rows=chunk, window_chunks=window, select=select)
    number = data.draw(st.integers(0, 3 * length // size))
    batch = again.batch(number, size)
    assert batch.dtype == np.int64
    assert len(batch) == size
    inside = sequence[number * size : (number + 1) * size]
    assert (batch[: len(inside)] == inside).all()


def test_seed_and_epoch_change_it_and_windows_bound_it() -> None:
    order = RowOrder(1000, seed=(1,), chunk_rows=10, window_chunks=4)
    first, second = order.at(0, 1000), order.at(1000, 2000)
    assert (first != second).any()
    assert (first != RowOrder(1000, seed=(2,), chunk_rows=10, window_chunks=4).at(0, 1000)).any()
    for start in range(0, 1000, 40):
        assert len(np.unique(first[start : start + 40] // 10)) == 4, "a window touches its own chunks alone"
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.2
    rows, end = order.window_rows(45)
    assert end == 80
    assert (rows == first[40:80]).all()


def test_the_sequence_itself_is_fixed() -> None:
    """Changing it would silently give every run other batches: raise `identity.NUMERICS` with it."""
    order = RowOrder(10, seed=(7, "order", 2), chunk_rows=3, window_chunks=2)
    assert order.at(0, 12).tolist() == [7, 0, 2, 1, 8, 6, 5, 4, 9, 3, 3, 4]


@pytest.mark.parametrize(
    "bad",
    [
        {"rows": 0},
        {"chunk_rows": 0},
        {"window_chunks": 0},
        {"select": np.array([], np.int64)},
        {"select": np.array([10])},
        {"select": np.array([-1])},
    ],
)
def test_bad_arguments_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        RowOrder(**{"rows": 10, "seed": (1,), "chunk_rows": 3, **bad})  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        RowOrder(10, seed=(1,), chunk_rows=3).batch(-1, 4)
