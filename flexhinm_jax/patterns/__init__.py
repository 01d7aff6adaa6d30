"""Patterns: which supports are allowed, and the best one for given scores.

`PATTERNS` maps the command-line name to the class; a new pattern is one file and one
line here.
"""

import dataclasses
import re
from typing import Any

from flexhinm_jax import arguments
from flexhinm_jax.patterns.base import Levels, Pattern, Units
from flexhinm_jax.patterns.flexhinm import FlexHiNM
from flexhinm_jax.patterns.hinm import HiNM
from flexhinm_jax.patterns.nm import NM
from flexhinm_jax.patterns.permute import ChannelSearch, Gyro, RandomRows
from flexhinm_jax.patterns.tiles import Tiles
from flexhinm_jax.patterns.transposable import Transposable
from flexhinm_jax.patterns.unstructured import Unstructured
from flexhinm_jax.patterns.vector import Vector

PATTERNS: dict[str, type[Pattern]] = {
    "unstructured": Unstructured,
    "nm": NM,
    "transposable": Transposable,
    "vector": Vector,
    "hinm": HiNM,
    "flexhinm": FlexHiNM,
    "tiles": Tiles,
}

__all__ = [
    "NM",
    "PATTERNS",
    "ChannelSearch",
    "FlexHiNM",
    "Gyro",
    "HiNM",
    "Levels",
    "Pattern",
    "RandomRows",
    "Tiles",
    "Transposable",
    "Units",
    "Unstructured",
    "Vector",
    "parse",
]


def parse(text: str) -> Pattern:
    """Reads a pattern from its command-line form.

    Args:
      text: "2:4" (n:m), or a name with options: "flexhinm:v=32,permute=none". Options
        are field names or their letters; values are integers, or names where the
        pattern lists some.

    Returns:
      The pattern.

    Raises:
      ValueError: an unknown name, option or value; the message lists what is known.

    Example:
      >>> parse("hinm:v=64,permute=none")
      HiNM(vector_size=64, n=2, m=4, permute=None, hardware=False)
    """
    known = "n:m such as 2:4, " + ", ".join(PATTERNS)
    if not isinstance(text, str):
        raise ValueError(
            f"pattern {arguments.shown(text)}: parse reads text such as '2:4'; a "
            "pattern can be used as it is"
        )
    if group := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(group[1]), int(group[2]))
    name, _, options = text.partition(":")
    if name not in PATTERNS:
        near = arguments.similar(name, PATTERNS)
        raise ValueError(f"unknown pattern {text!r}; known: {known}{near}")
    cls = PATTERNS[name]
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    chosen: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        letter, equals, value = option.partition("=")
        field = cls.letters.get(letter, letter)
        if not equals or field not in fields:
            names = ", ".join(f"{k}=" for k in cls.letters) or "no options"
            raise ValueError(
                f"pattern {text!r}: unknown option {option!r}; {name} takes {names}"
            )
        if field in cls.choices:
            if value not in cls.choices[field]:
                raise ValueError(
                    f"pattern {text!r}: unknown value {option!r}; choose "
                    + ", ".join(cls.choices[field])
                )
            chosen[field] = cls.choices[field][value]
        elif isinstance(fields[field].default, int):
            if not value.isdigit():
                raise ValueError(
                    f"pattern {text!r}: {letter}={value}: need digits, such as "
                    f"{letter}={fields[field].default}"
                )
            chosen[field] = int(value)
        else:
            chosen[field] = value
    return cls(**chosen)
