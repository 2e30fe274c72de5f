"""What every section of the configuration is made of: bounded numbers, `auto`, and the section itself."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidatorFunctionWrapHandler, WrapValidator

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Auto(int):
    """A number that is still to be found; 0 until then."""


AUTO = _Auto(0)
"""What `auto` is read as where a number stands otherwise: it is settled before anything is done with it."""


def _number_or_auto(value: Any, handler: ValidatorFunctionWrapHandler) -> int:
    return AUTO if value == "auto" or isinstance(value, _Auto) else int(handler(value))


AutoInt = Annotated[
    PositiveInt,
    WrapValidator(_number_or_auto),
    PlainSerializer(lambda value: "auto" if isinstance(value, _Auto) else value, return_type=int | str),
]


class Section(BaseModel):
    """A part of the configuration: unknown keys and wrong types are refused, also on assignment."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True, protected_namespaces=())


def changed(section: Section) -> list[str]:
    """The settings of a section that were given, and differ from their defaults."""
    fields = type(section).model_fields
    return [
        name
        for name in fields
        if name in section.model_fields_set
        and getattr(section, name) != fields[name].get_default(call_default_factory=True)
    ]
