"""JSON objects in files: one, read with errors that name the file, or one a line."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flexhinm_jax import atomic

__all__ = ["parse", "read", "read_lines", "text", "write", "write_lines"]


def parse(text: str | bytes, where: Any) -> dict[str, Any]:
    """Reads a JSON object from text.

    Args:
      text: UTF-8 where it is bytes.
      where: what holds the text, for the message.

    Returns:
      The object.

    Raises:
      ValueError: the text is not valid, nested too deeply, or no object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is not valid JSON: nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a {type(value).__name__}, not a JSON object")
    return value


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not valid, or no object.
    """
    return parse(Path(path).read_bytes(), path)


def text(value: Any) -> str:
    """JSON for any reader: it has no word for NaN and infinity, which become null.

    Example:
      >>> text({"kept": [0.5, float("nan")]}).split()
      ['{', '"kept":', '[', '0.5,', 'null', ']', '}']
    """
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    lost = isinstance(value, float) and not math.isfinite(value)
    return None if lost else value


def write(path: str | os.PathLike, value: Mapping[str, Any]) -> None:
    """Writes a JSON object; an earlier file is replaced, whole or not at all."""
    with atomic.file(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")


def write_lines(path: Path, values: Iterable[Any], *, append: bool) -> None:
    """Writes values as lines of JSON.

    Args:
      path: the file; its folder is made.
      values: what JSON knows.
      append: whether the lines that are there stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if append else "w", encoding="utf-8") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def read_lines(path: Path) -> list[Any]:
    """The values of a file, none if it is missing; a torn last line is left out."""
    values = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return values
