"""The fields of a model's configuration: read from a file, their types and ranges."""

import dataclasses
import math
import typing
from collections.abc import Collection, Mapping
from typing import Any

NEEDS = {bool: "true or false", int: "an integer > 0", float: "a number > 0"}


def check(config: Any) -> None:
    """Refuses sizes below 1, numbers that are not positive and flags that are none.

    Args:
      config: a dataclass; fields of type bool, int and float are looked at, also where
        they may be None, and every one of a tuple of them.

    Raises:
      ValueError: names the field and its value.
    """
    for field in dataclasses.fields(config):
        value: Any = getattr(config, field.name)
        kinds = typing.get_args(field.type) or (field.type,)
        if value is None and type(None) in kinds:
            continue
        kind = next((k for k in NEEDS if k in kinds), None)
        if kind is None:
            continue
        if typing.get_origin(field.type) is tuple:
            fine = isinstance(value, tuple) and all(_is(kind, x) for x in value)
        else:
            fine = _is(kind, value)
        if not fine:
            raise _wrong(field.name, value, kind)


def checked(name: str, value: Any, kind: type) -> Any:
    """The value of a field; ask before it is calculated with.

    Args:
      name: of the field.
      value: what a file has there; None where it is missing.
      kind: bool, int or float, see `NEEDS`.

    Raises:
      ValueError: it is missing or of another kind; names the field.
    """
    if value is None:
        raise _missing(name)
    if not _is(kind, value):
        raise _wrong(name, value, kind)
    return value


def _wrong(name: str, value: Any, kind: type) -> ValueError:
    return ValueError(f"{name} must be {NEEDS[kind]}, got {value!r}")


def _missing(name: str) -> ValueError:
    return ValueError(f"{name} is missing from the configuration")


def integer(name: str, value: Any) -> int:
    """The value of a field that is any integer, such as the number of a token.

    Raises:
      ValueError: it is something else; names the field.
    """
    if type(value) is not int:
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return value


def integers(name: str, value: Any) -> list[int]:
    """The value of a field that is a list of integers.

    Raises:
      ValueError: it is something else; names the field.
    """
    if not isinstance(value, list | tuple) or not all(type(x) is int for x in value):
        raise ValueError(f"{name} must be a list of integers, got {value!r}")
    return list(value)


def _is(kind: type, value: Any) -> bool:
    """Whether a value is of a kind, and in its range."""
    if kind is float:
        number = isinstance(value, int | float) and type(value) is not bool
        return number and 0 < value < math.inf
    return type(value) is kind and (kind is bool or value > 0)


def read(
    config: type,
    given: Mapping[str, Any],
    known: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The arguments of a configuration, from the contents of a `config.json`.

    Args:
      config: a dataclass.
      given: contents of the file; fields that are null or not known are passed over.
      known: field -> value, whatever the file says.
      names: field -> its name in the file, where that is another.

    Returns:
      Field -> value; what is neither known nor in the file and has a default is left
      out.

    Raises:
      ValueError: a field without a default is missing.
    """
    values = dict(known)
    for field in dataclasses.fields(config):
        name = (names or {}).get(field.name, field.name)
        if field.name in values:
            continue
        if given.get(name) is not None:
            value = given[name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
        elif field.default is dataclasses.MISSING:
            raise _missing(name)
    return values


def chosen(name: str, value: Any, known: Collection[Any]) -> Any:
    """The value, one that is known.

    Raises:
      ValueError: it is none of them; names the field and what is supported.
    """
    if value not in list(known):
        raise ValueError(
            f"{name}={value!r} is not supported; supported are"
            f" {', '.join(map(str, known))}"
        )
    return value


def label_count(given: Mapping[str, Any]) -> int:
    """Classes of a classifier: those of `id2label`, else `num_labels`, else 2."""
    labels = given.get("id2label") or {}
    if not isinstance(labels, Mapping):
        raise ValueError(f"id2label must be an object, got {labels!r}")
    return len(labels) or given.get("num_labels", 2)


def architecture(given: Mapping[str, Any], known: Collection[str]) -> str:
    """Name of the class that `transformers` would make; the first where none is said.

    Raises:
      ValueError: it is none of those known.
    """
    names = given.get("architectures") or [next(iter(known))]
    if not isinstance(names, list):
        raise ValueError(f"architectures must be a list of names, got {names!r}")
    return chosen("architectures", names[0], known)
