"""How `flexhinm prune` spreads the sparsity: --allocate, and numbers in --rule."""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from flexhinm_jax.cli import options
from flexhinm_jax.pruning.allocate import MODES, Mode
from flexhinm_jax.pruning.owl import OWL

NUMBER = re.compile(r"[01]|[01]?\.\d+")
DENSE = "dense"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what decides about the sparsity of single weights."""
    add = parser.add_argument
    add(
        "--rule",
        action="append",
        default=[],
        metavar="REGEX=WHAT",
        help="what the weights get whose name matches: another pattern, a sparsity (the"
        " other weights make up for it), dense (or skip), or prune; repeatable, the"
        " first match wins, for patterns and for sparsities apart ('flexhinm inspect'"
        " lists the names)",
    )
    add(
        "--allocate",
        type=mode,
        default="uniform",
        metavar="MODE",
        help="uniform: the same sparsity for every weight (default); global: more where"
        " less is lost; owl: less in blocks with many outliers, with options such as"
        " owl:multiple=5,spread=0.08. The total over all pruned weights is --sparsity",
    )


def mode(text: str) -> Mode:
    """The type of --allocate: a mode, or owl with options."""
    name, _, rest = text.partition(":")
    if name not in MODES or (rest and name != "owl"):
        raise argparse.ArgumentTypeError(f"{text!r}: choose {', '.join(MODES)}")
    if not rest:
        return text  # type: ignore[return-value]
    found: dict[str, Any] = {}
    for option in rest.split(","):
        key, _, value = option.partition("=")
        try:
            if key not in ("multiple", "spread"):
                raise ValueError("owl takes multiple= and spread=")
            found[key] = float(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{option!r}: {error}") from error
    try:
        return OWL(**found)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def split(texts: Sequence[str]) -> tuple[dict[str, Any], dict[str, float]]:
    """Every --rule: ({regex: pattern or action}, {regex: sparsity})."""
    others, numbers = [], {}
    for text in texts:
        regex, _, value = text.rpartition("=")
        if regex and NUMBER.fullmatch(value):
            options.rules([f"{regex}=skip"])  # a regular expression
            numbers[regex] = float(value)
        elif regex and value == DENSE:
            others.append(f"{regex}=skip")
        else:
            others.append(text)
    return options.rules(others), numbers
