"""What every section of a configuration is made of: a strict, frozen model and the ranges of its values."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Counts = Annotated[tuple[Count, ...], AsTuple]
Side = Annotated[int, Field(ge=1, le=4096)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False,
                              use_attribute_docstrings=True)
