"""JSON of another shape is refused with the place where it differs."""

from __future__ import annotations

import pytest

from stackwise.errors import UsageError
from stackwise.shapes import (
    array,
    array_of,
    check_shape,
    count,
    hex_id,
    mapping,
    number,
    one_of,
    optional,
    record,
    text,
)
from tests.conftest import raises_naming

SHAPE = record(
    {"name": text, "stages": array_of(record({"blocks": array(count, count), "loss": optional(number)}))},
    {"ids": mapping(hex_id), "state": one_of("done", "failed")},
)


def test_what_has_the_shape_is_taken() -> None:
    value = {"name": "x", "stages": [{"blocks": [0, 1], "loss": None}], "ids": {"a": "0" * 32}, "more": object}
    assert SHAPE(value) is None


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"name": 1}, "name"),
        ({"name": "a\0b"}, "name"),
        ({"stages": {}}, "stages"),
        ({"stages": [{"blocks": [0, 1]}]}, "stages.0.loss"),
        ({"stages": [{"blocks": [0, True], "loss": 1}]}, "stages.0.blocks.1"),
        ({"stages": [{"blocks": [0, -1], "loss": 1}]}, "stages.0.blocks.1"),
        ({"stages": [{"blocks": [0, 1 << 70], "loss": 1}]}, "stages.0.blocks.1"),
        ({"stages": [{"blocks": [0], "loss": 1}]}, "stages.0.blocks"),
        ({"stages": [{"blocks": [0, 1], "loss": "1"}]}, "stages.0.loss"),
        ({"ids": {"a": "../../etc/passwd"}}, "ids.a"),
        ({"state": "[red]"}, "state"),
    ],
)
def test_what_has_not_is_refused_by_its_place(change: dict[str, object], place: str) -> None:
    with raises_naming(UsageError, "F", f" {place}: ", "remove it"):
        check_shape({"name": "x", "stages": []} | change, SHAPE, "F", "remove it")


def test_what_is_no_object_has_no_place() -> None:
    with raises_naming(UsageError, "F", "remove it"):
        check_shape([], SHAPE, "F", "remove it")
