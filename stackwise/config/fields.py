"""What every section of the configuration is made of: bounded numbers, plain text, `auto`, and the section itself.

Bounds are those of what a machine could hold: a number beyond them is a slip, and would end in a crash far from here.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from stackwise.text import has_control


def _plain(text: str) -> str:
    if has_control(text):
        raise PydanticCustomError("control_characters", "must be one line of plain text, without control characters")
    return text


Text = Annotated[str, Field(max_length=4096), AfterValidator(_plain)]
"""Text of one line: it may become part of a script, a page or a path."""

PositiveInt = Annotated[int, Field(ge=1, le=2**53)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Size = Annotated[int, Field(ge=1, le=1 << 24)]
"""A length, a width, a number of rows or ids: what an axis of a tensor can be."""
Small = Annotated[int, Field(ge=1, le=1024)]
"""A number of blocks, stages, parts: what a loop runs over."""
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, le=1e15)]
NonNegative = Annotated[float, Field(ge=0.0, le=1e15)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Auto(int):
    """A number that is still to be found; 0 until then."""


AUTO = _Auto(0)
"""What `auto` is read as where a number stands otherwise: it is settled before anything is done with it."""


def _number_or_auto(value: Any, handler: ValidatorFunctionWrapHandler) -> int:
    if value == "auto" or isinstance(value, _Auto):
        return AUTO
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("auto_number", "must be auto or a whole number")
    return int(handler(value))


AutoInt = Annotated[
    Size,
    WrapValidator(_number_or_auto),
    PlainSerializer(lambda value: "auto" if isinstance(value, _Auto) else value, return_type=int | str),
]


AS_AUTO = PlainSerializer(lambda value: "auto" if value is None else value, return_type=bool | str)


def _switch_or_auto(value: Any) -> bool | None:
    if value is not None and value != "auto" and not isinstance(value, bool):
        raise PydanticCustomError("auto_switch", "must be auto, true or false")
    return None if value == "auto" else value


AutoBool = Annotated[bool | None, BeforeValidator(_switch_or_auto), AS_AUTO]
"""A switch that may be `auto`: None, and so off, until it is settled."""


class Section(BaseModel):
    """A part of the configuration: unknown keys and wrong types are refused, also on assignment."""

    model_config = ConfigDict(
        extra="forbid", strict=True, validate_assignment=True, allow_inf_nan=False, protected_namespaces=()
    )


def changed(section: Section) -> list[str]:
    """The settings of a section that were given, and differ from their defaults."""
    fields = type(section).model_fields
    return [
        name
        for name in fields
        if name in section.model_fields_set
        and getattr(section, name) != fields[name].get_default(call_default_factory=True)
    ]
