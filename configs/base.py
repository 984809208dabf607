"""What every section of a configuration is made of: a strict, frozen model and the ranges of its values."""

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Counts = Annotated[tuple[Count, ...], AsTuple]
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def read_number_of_images(value):
    """``"200M"`` and ``"8Mi"`` as numbers; what is no text is left to the key's own checks."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(rf"(\d{{1,12}}(?:\.\d{{1,12}})?)({'|'.join(UNITS)})", value)
    number = match and float(match[1]) * UNITS[match[2]]
    if number is None or number != int(number):
        raise ValueError("must be a whole number of images, such as 50000, 200M or 8Mi (units: "
                         f"{', '.join(UNITS)[2:]}), given {value!r}")
    return int(number)


InImages = BeforeValidator(read_number_of_images)
Side = Annotated[int, Field(ge=1, le=4096)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False,
                              use_attribute_docstrings=True, protected_namespaces=())
