"""`flexhinm learn` of a decoder: block by block, in bounded memory."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from flexhinm_jax import __version__, methods
from flexhinm_jax.cli import directory, progress
from flexhinm_jax.cli.console import Console, report_table
from flexhinm_jax.cli.prune_decoder import limits, samples
from flexhinm_jax.cli.unfinished import Unfinished
from flexhinm_jax.methods import LearnedMethod
from flexhinm_jax.streaming import learned, streaming
from flexhinm_jax.streaming.blocks import open_blocks
from flexhinm_jax.streaming.memory import Budget
from flexhinm_jax.training import few_steps
from flexhinm_jax.training.optimizers import warmed_adam


@dataclasses.dataclass(frozen=True)
class Choices:
    """What to do, checked before anything is computed.

    Attributes:
      method: with its pattern.
      start: the method whose plans come first, or None for the own start.
      rate: of the optimiser.
      rules: regular expression on leaf paths -> pattern or "skip".
    """

    method: methods.Method
    start: methods.Method | None
    rate: float
    rules: dict[str, Any]


def document(args: argparse.Namespace, choices: Choices) -> dict[str, Any]:
    """What decides about the result, as the report says it."""
    return {
        "model": str(args.model),
        "out": str(args.out),
        "commands": [args.written],
        "method": repr(choices.method),
        "start": None if choices.start is None else repr(choices.start),
        "sparsity": args.sparsity,
        "rules": {regex: str(value) for regex, value in choices.rules.items()},
        "calibration": str(args.calibration),
        "seed": args.seed,
        "steps": args.steps,
        "rate": choices.rate,
        "noise": args.noise,
        "weights_rate": args.weights_rate,
        "version": __version__,
    }


def run(args: argparse.Namespace, choices: Choices, console: Console) -> None:
    """Learns and writes block by block."""
    tokens = samples(args, open_blocks(args.model))
    method: Any = choices.method
    if not isinstance(method, LearnedMethod):  # it has a loop of its own
        method = dataclasses.replace(
            method, steps=args.steps, learning_rate=choices.rate
        )

    rates = {"rate": choices.rate, "weights_rate": args.weights_rate}
    weights_tx = None
    if args.weights_rate is not None:
        weights_tx = warmed_adam(args.weights_rate, args.steps)

    left = Unfinished(args.out, console)

    def tell(done: learned.Told) -> None:
        if isinstance(done, Budget):
            console.note(progress.plan_text(done, tokens.shape))
        elif isinstance(done, streaming.GoingOn):
            left.going_on(done)
        elif isinstance(done, learned.Judged):
            console.progress(progress.judged_text(done))
        elif isinstance(done, streaming.Block):
            console.note(progress.block_text(done))

    def told(result: learned.Learned) -> dict[str, Any]:
        return document(args, choices) | {
            "target": args.target or "seq",
            "window": args.window or "block",
            "samples": tokens.shape[0],
            "length": tokens.shape[1],
            "validation": [list(pair) for pair in result.values],
            "errors": result.errors,
            **result.report.to_dict(),
        }

    def texts(result: Any) -> dict[str, str]:
        return directory.texts(args, told(result))

    with left.kept():
        result = learned.learn_blocks(
            args.model,
            args.out,
            tokens,
            streaming.Request(
                method=method,
                key=jax.random.key(args.seed),
                sparsity=args.sparsity,
                rules=choices.rules,
                target=args.target or "seq",
            ),
            learned.Learning(
                tx=few_steps.optimiser(
                    args.method, choices.rate, args.steps, args.noise
                ),
                steps=args.steps,
                start=choices.start,
                config={"method": args.method, "noise": args.noise} | rates,
                weights_tx=weights_tx,
                window=args.window or "block",
            ),
            limits=limits(args),
            output=streaming.Output(args.pack, args.force, texts, args.pack_values),
            progress=tell,
        )
    form = directory.packed_name(args, decoder=True, whole=False)
    console.result(
        told(result),
        report_table(
            result.report, result.errors, packed=args.pack, every=args.rows == "all"
        ),
        "",
        *directory.ending(args.out, result.report, form),
        *_gained(result.values),
    )


def _gained(values: Sequence[tuple[float, ...]]) -> list[str]:
    """A line about the loss; none of a method with a loop of its own."""
    pairs = [pair for pair in values if pair]
    if not pairs:
        return []
    first, best = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return [
        f"loss of the blocks on held-back text: {first:.4f} of the first masks,"
        f" {best:.4f} now"
    ]
