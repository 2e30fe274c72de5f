"""The report's small parts: words, scales, curves."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stackwise import words
from stackwise.report.charts import label, smooth, spread, thin, ticks
from stackwise.report.held_out import footnote
from stackwise.report.page import holes_marked


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0 B"), (999, "999 B"), (54_100_000, "54.1 MB"), (999_600, "1.00 MB"), (1.3e15, "1300 TB"), (24e9, "24.0 GB")],
)
def test_sizes(value: float, said: str) -> None:
    assert words.size(value) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.42, "0.42 s"), (25.06, "25.1 s"), (59.97, "1:00"), (185, "3:05"), (7800, "2:10:00"), (357_000, "4 d 03:10")],
)
def test_durations(seconds: float, said: str) -> None:
    assert words.duration(seconds) == said


@pytest.mark.parametrize(("number", "said"), [(842, "842"), (35_600, "35.6 k"), (3.21e6, "3.21 M"), (7e10, "70.0 G")])
def test_counts(number: float, said: str) -> None:
    assert words.count(number) == said


def test_other_words() -> None:
    assert [words.rate(x) for x in (3e-3, 2.1e-4, 1.0, 0.0)] == ["3e-3", "2.1e-4", "1e0", "0e0"]
    assert [words.percent(x) for x in (0, 0.004, 0.5, 1)] == ["0%", "0.4%", "50%", "100%"]
    assert [words.clock(x) for x in (-1, 6.2, 7800)] == ["0:00", "0:07", "2:10:00"]
    assert (words.plural(1, "stage"), words.plural(2, "stage")) == ("1 stage", "2 stages")
    assert (words.fraction("0.15"), words.fraction("all")) == ("15%", "all")
    assert (words.span(3, 3), words.span(0, 1)) == ("3", "0–1")


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 10))
def test_ticks_are_round_few_and_within(low: float, width: float, count: int) -> None:
    found = ticks(low, low + width, count)
    assert len(found) <= count + 2
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in found)
    if len(found) > 1:
        step = found[1] - found[0]
        assert len({label(tick, step) for tick in found}) == len(found)


@given(st.floats(1e-6, 1e6), st.floats(0, 1e-5), st.integers(2, 10))
@example(213726.0625, 1.8734328075513522e-06, 2)  # no multiple of the first step lies within
def test_a_range_next_to_nothing_has_ticks_that_can_be_told_apart(low: float, share: float, count: int) -> None:
    placed = ticks(low, low * (1 + share), count)
    assert placed
    assert all(b > a for a, b in itertools.pairwise(placed))
    assert all(label(tick, b - a) for a, b in itertools.pairwise(placed) for tick in (a, b))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_labels_keep_their_distance_and_order(wanted: list[float]) -> None:
    placed = spread(wanted, 10, 0, 100)
    ordered = sorted(placed)
    assert all(b - a >= 10 - 1e-6 for a, b in itertools.pairwise(ordered))
    for i, j in itertools.combinations(range(len(wanted)), 2):
        if wanted[i] < wanted[j]:
            assert placed[i] < placed[j]


def test_smoothing_has_no_pull_at_the_start() -> None:
    points = [(float(x), 2.0) for x in range(50)]
    assert smooth(points, 10) == [(x, pytest.approx(2.0)) for x, _ in points]


def test_thinning_keeps_the_ends() -> None:
    points = [(float(x), float(x)) for x in range(1000)]
    few = thin(points, 50)
    assert len(few) == 50
    assert (few[0], few[-1]) == (points[0], points[-1])
    assert thin(points[:20], 50) == points[:20]


def test_runs_of_holes_are_one_mark() -> None:
    shown = holes_marked("a<[MASK][MASK] b [MASK]")
    assert shown.count("<mark") == 2
    assert "a&lt;" in shown
    assert 'data-tip="2 tokens masked">▒▒<' in shown


def test_a_rack_that_has_learned_less_than_frequencies_is_said_to_be_behind_them() -> None:
    behind, ahead = ({"bits_per_byte": bits, "baselines": {"unigram": {"bits_per_byte": 3.0}}} for bits in (3.1, 2.9))
    assert "behind unigram" in footnote(behind)
    assert "behind" not in footnote(ahead)
    assert "behind" not in footnote({"bits_per_byte": 2.9}), "there may be no baseline"
