"""What the commands that write a model directory read of their command line alike."""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from flexhinm_jax import patterns
from flexhinm_jax.io import atomic, huggingface

ACTIONS = ("skip", "prune")
"""What a rule may ask for besides a pattern; "prune" takes that of --pattern."""


def add_writing(parser: argparse.ArgumentParser) -> None:
    """Adds what says where results go and what is printed."""
    add = parser.add_argument
    add("--force", action="store_true", help="replace DIR if it is a model directory")
    add("-q", "--quiet", action="store_true", help="show errors only")
    add("--json", action="store_true", help="print the report as one JSON document")


def check_out(args: argparse.Namespace) -> None:
    """Refuses an --out that must not be written, and a model that cannot be copied."""
    huggingface.check_copy(args.model, args.out)
    atomic.check_directory(args.out, overwrite=args.force)


def rules(texts: Sequence[str]) -> dict[str, Any]:
    """Regular expression -> pattern or action, of every --rule."""
    return dict(map(_rule, texts))


def _rule(text: str) -> tuple[str, Any]:
    """(regex, pattern or action) of one --rule; the regex may hold "=" too."""
    first: ValueError | None = None
    cut = text.find("=")
    while cut > 0:
        regex, value = text[:cut], text[cut + 1 :]
        try:
            action = value if value in ACTIONS else patterns.parse(value)
        except ValueError as error:
            first = first or error
            cut = text.find("=", cut + 1)
            continue
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(
                f"--rule {text!r}: {regex!r} is no regular expression: {error}"
            ) from error
        return regex, action
    if first is None:
        raise ValueError(f"--rule {text!r} is not REGEX=PATTERN or REGEX=skip")
    raise ValueError(f"--rule {text!r}: {first}, {', '.join(ACTIONS)}")


def positive(text: str) -> int:
    """The type of an option that counts from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value
