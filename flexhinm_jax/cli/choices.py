"""What `flexhinm prune` was asked, checked before anything is computed."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from flexhinm_jax import __version__, checks, methods, patterns
from flexhinm_jax.cli import directory, evaluate, flags
from flexhinm_jax.io.sources import read_sentences
from flexhinm_jax.models import images
from flexhinm_jax.models.load import Examples, Kind, Reads, is_decoder, load_config
from flexhinm_jax.sequential.request import Statistics, statistics_of
from flexhinm_jax.training.reconstruct import Reconstruct

ONLY_SEQUENTIAL = ("target", "statistics", "reconstruct", "resume")


@dataclasses.dataclass(frozen=True)
class Choices:
    """What to do, checked before anything is computed.

    Attributes:
      method: with its pattern.
      sparsity: fraction of weights removed, or None.
      rules: regular expression on leaf paths -> pattern or "skip".
      exceptions: regular expression on leaf paths -> sparsity; None for that of all.
      examples: calibration sentences of an encoder, or pixels of a classifier; empty
        for a method that needs none.
      reconstruct: how what is left is trained, or None.
      statistics: whose inputs a weight is judged by; None without --sequential.
    """

    method: methods.Method
    sparsity: float | None
    rules: dict[str, Any]
    exceptions: Mapping[str, float | None]
    examples: Examples
    reconstruct: Reconstruct | None = None
    statistics: Statistics | None = None


def check(args: argparse.Namespace, kind: Kind) -> Choices:
    """Everything that can be refused before the model is read."""
    pattern = patterns.parse(args.pattern)
    args.method = args.method or best(pattern, args.sparsity)
    method = methods.parse(args.method, pattern)
    low, high = pattern.sparsity_range()
    checks.sparsity(args.sparsity, low, high, pattern, f"--pattern {args.pattern}")
    rules, exceptions = flags.rules(args.rule)
    directory.check_out(args)
    if method.needs == "gradients":
        raise ValueError(
            f"--method {args.method} needs gradients of a loss, which the command line"
            " has not; use it from Python, or choose another method"
        )
    if only_learned(type(method)):
        raise ValueError(
            f"--method {args.method} learns from a loss: 'flexhinm prune' would write"
            " what it begins with; use 'flexhinm learn', or choose another method"
        )
    if args.allocate != "uniform" and low == high:
        raise ValueError(
            f"--allocate {args.allocate}: --pattern {args.pattern} has only one"
            f" sparsity, {low:g}, so there is nothing to spread; choose one that can"
            " have several (flexhinm, hinm, vector), or leave --allocate out"
        )
    flags.check_kind(args, kind.reads)
    if args.eval is not None:
        evaluate.check_text(args.eval, kind)
    decodes = kind.reads is Reads.TEXT
    examples = [] if decodes else _examples(args, method, kind)
    trained = reconstruct(args)
    statistics = None
    if args.sequential:
        statistics = statistics_of(method, args.statistics, trained)
    return Choices(
        method, args.sparsity, rules, exceptions, examples, trained, statistics
    )


def only_learned(method: type[methods.Method]) -> bool:
    """Whether what `solve` finds is no more than where learning begins."""
    return issubclass(method, methods.LearnedMethod) and not method.solve_learns


def reconstruct(args: argparse.Namespace) -> Reconstruct | None:
    """How what is left is trained, or None."""
    names = ("steps", "rate", "target")
    options = {name: getattr(args, f"reconstruct_{name}") for name in names}
    options = {name: value for name, value in options.items() if value is not None}
    window = args.reconstruct
    if window is None:
        if options:
            raise ValueError(
                f"--reconstruct-{next(iter(options))} is for --reconstruct; add that"
            )
        return None
    return Reconstruct(int(window) if window.isdecimal() else window, **options)


def best(pattern: patterns.Pattern, sparsity: float | None) -> str:
    """The method that lost least in our measurements, of those that do not train.

    To choose columns before weights is worth its time where more than half goes.
    """
    low, high = pattern.sparsity_range()
    columns = pattern.form is not None and low < high
    return "staged_alps" if columns and (sparsity or 0) > 0.5 else "alps"


def _examples(args: argparse.Namespace, method: methods.Method, kind: Kind) -> Examples:
    """The calibration sentences or images that an encoder needs."""
    if args.share_orders and args.sequential:
        raise ValueError("--share-orders is not for --sequential; drop one of them")
    for option in ONLY_SEQUENTIAL:
        if getattr(args, option) and not args.sequential:
            raise ValueError(f"--{option} is for --sequential; add that")
    plain = args.allocate in ("uniform", "global")
    if method.needs == "nothing" and not args.sequential and plain:
        return []
    return examples(args, kind)


def examples(args: argparse.Namespace, kind: Kind) -> Examples:
    """The sentences or images of --calibration."""
    if kind.reads is Reads.IMAGES:
        channels = load_config(args.model).num_channels
        return images.read(args.calibration, args.model, channels, args.limit)
    return read_sentences(args.calibration, args.limit)


def document(args: argparse.Namespace, choices: Choices) -> dict[str, Any]:
    """What decides about the result, as the report says it."""
    read = len(choices.examples) or is_decoder(args.model)
    return {
        "model": str(args.model),
        "out": str(args.out),
        "method": repr(choices.method),
        "sparsity": choices.sparsity,
        "rules": {regex: str(value) for regex, value in choices.rules.items()},
        "allocate": str(args.allocate),
        "exceptions": {k: x for k, x in choices.exceptions.items() if x is not None},
        "calibration": str(args.calibration) if read else None,
        "seed": args.seed,
        "target": (args.target or "seq") if args.sequential else None,
        "reconstruct": None
        if choices.reconstruct is None
        else repr(choices.reconstruct),
        "statistics": choices.statistics,
        "version": __version__,
    }
