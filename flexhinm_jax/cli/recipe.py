"""Recipes: the options of `flexhinm prune` in a YAML file, to repeat a run.

A key is the name of an option, `rules` those of --rule as a mapping or a list. Every
value is text until its option reads it: YAML alone would take 2:4 for a number of
minutes. What the command line says comes first.
"""

import argparse
import difflib
from pathlib import Path
from typing import Any

import yaml

from flexhinm_jax.cli import flags

RECIPE = "recipe.yaml"

KEYS = (
    *("method", "pattern", "sparsity", "rules", "allocate", "calibration", "limit"),
    *("batch_size", "max_length", "sequential", "target", "share_orders", "seed"),
    *("statistics", "on_mismatch", "reconstruct", "reconstruct_steps"),
    *("reconstruct_rate", "reconstruct_target"),
    *("length", "samples", "dtype", "pack", "pack_values", "first_last", "memory"),
)
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False}
SWITCHES |= {"off": False}
SWITCH_KEYS = ("sequential", "share_orders", "pack")


UNREADABLE = (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError)
"""What the package raises about a text."""


class _Loader(yaml.BaseLoader):
    """Reads every scalar as text, and refuses a key that is there twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping, in order."""
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is there twice")
        return super().construct_mapping(node, deep=deep)


def options(path: Path) -> tuple[list[str], list[str]]:
    """The options of a recipe as on the command line, and its rules apart.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not valid, or has a key or value of another form.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a recipe")
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a valid recipe: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is not a valid recipe: need KEY: VALUE lines")
    words: list[str] = []
    for key, value in recipe.items():
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1, cutoff=0.0)
            raise ValueError(f"{path}: unknown key {key!r}; the nearest is {near[0]!r}")
        if key == "rules":
            continue
        if not isinstance(value, str) or not value:
            raise ValueError(f"{path}: {key} needs one value, got {value!r}")
        option = f"--{key.replace('_', '-')}"
        if key not in SWITCH_KEYS:
            words.append(f"{option}={value}")
        elif value.lower() not in SWITCHES:
            raise ValueError(f"{path}: {key}: write true or false, not {value!r}")
        elif SWITCHES[value.lower()]:
            words.append(option)
    return words, _rules(path, recipe.get("rules", []))


def _rules(path: Path, rules: Any) -> list[str]:
    if isinstance(rules, dict):
        rules = [f"{k}={v}" if isinstance(v, str) else v for k, v in rules.items()]
    if not isinstance(rules, list) or not all(isinstance(x, str) for x in rules):
        raise ValueError(f"{path}: rules: write REGEX: WHAT, or a list of REGEX=WHAT")
    return rules


def merged(
    parser: argparse.ArgumentParser, argv: list[str], path: Path
) -> argparse.Namespace:
    """What the command line asks for, completed by a recipe."""
    words, rules = options(path)
    command, *rest = argv
    args = parser.parse_args([command, *words, *rest])
    args.rule = [*args.rule, *rules]  # the first match wins
    return args


def text(args: argparse.Namespace) -> str:
    """The recipe that repeats a run; `options` reads it."""
    entries: dict[str, Any] = {}
    for key in KEYS:
        value = args.rule if key == "rules" else getattr(args, key)
        if isinstance(value, bool):
            value = "true" if value else None
        if value is not None and value != []:
            entries[key] = value if key == "rules" else flags.written(value)
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
