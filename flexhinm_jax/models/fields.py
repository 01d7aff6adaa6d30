"""Types and ranges of the fields of a model's configuration."""

import dataclasses
import math
import typing
from typing import Any

NEEDS = {bool: "true or false", int: "an integer > 0", float: "a number > 0"}


def check(config: Any) -> None:
    """Refuses sizes below 1, numbers that are not positive and flags that are none.

    Args:
      config: a dataclass; fields of type bool, int and float are looked at, also where
        they may be None.

    Raises:
      ValueError: names the field and its value.
    """
    for field in dataclasses.fields(config):
        value: Any = getattr(config, field.name)
        kinds = typing.get_args(field.type) or (field.type,)
        if value is None and type(None) in kinds:
            continue
        kind = next((k for k in NEEDS if k in kinds), None)
        if kind is bool:
            fine = type(value) is bool
        elif kind is int:
            fine = type(value) is int and value > 0
        elif kind is float:
            fine = (
                isinstance(value, int | float)
                and type(value) is not bool
                and 0 < value < math.inf
            )
        else:
            continue
        if not fine:
            raise ValueError(f"{field.name} must be {NEEDS[kind]}, got {value!r}")
