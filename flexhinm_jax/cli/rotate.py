"""`flexhinm rotate`: the channels of a decoder turned so that N:M loses less."""

import argparse
from typing import Any

from flexhinm_jax.cli import flags
from flexhinm_jax.cli.console import Console
from flexhinm_jax.cli.reorder import add_arguments, show, written
from flexhinm_jax.streaming.rotate import Learning, rotate


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    first = Learning()
    parser = flags.command(
        commands,
        "rotate",
        help="turn the channels of a decoder so that 2:4 loses less, before pruning",
        description="""\
            Writes DIR: the same function with the residual stream and the values of
            every head in rotated channels, absorbed into the weights on both sides.
            The rotations are learned so that N:M takes as little as it can from the
            outputs; nothing is left to do at run time. Tied embeddings are written
            twice, since the scale of the last norm moves into the output layer.
            """,
        epilog="""\
            examples:
              flexhinm rotate SmolLM2-135M --out rotated --calibration text.txt
              flexhinm prune rotated --method sparsegpt --pattern 2:4 --out pruned
            """,
    )
    add_arguments(parser)
    add = parser.add_argument
    add(
        "--steps",
        type=flags.positive,
        metavar="N",
        default=first.steps,
        help=f"of learning, {first.blocks} blocks each (default: {first.steps})",
    )
    add(
        "--rate",
        type=float,
        metavar="RATE",
        default=first.rate,
        help=f"learning rate at the start (default: {first.rate})",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console) -> None:
    """Runs the command."""
    learning = Learning(args.steps, args.rate)
    result = written(args, console, "turning channels", rotate, learning=learning)
    rows = [(name, result.before[name], result.after[name]) for name in result.before]
    show(args, console, ("weights", ">kept before", ">after"), rows)
