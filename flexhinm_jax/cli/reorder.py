"""`flexhinm reorder`: the channels of a decoder in orders that suit N:M groups."""

import argparse
from collections.abc import Callable
from typing import Any

import jax

from flexhinm_jax import patterns
from flexhinm_jax.cli import flags, prune_decoder
from flexhinm_jax.cli.console import Console, table
from flexhinm_jax.streaming.blocks import open_blocks
from flexhinm_jax.streaming.reorder import reorder


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = flags.command(
        commands,
        "reorder",
        help="put the channels of a decoder into orders that suit 2:4, before pruning",
        description="""\
            Writes DIR: the same function with the channels of the residual stream, of
            every head and of every gated block in another order, folded into the
            weights on both sides. Channels that compete for a place get into different
            groups, so that 2:4 loses less, and nothing is gathered at run time.
            """,
        epilog="""\
            examples:
              flexhinm reorder SmolLM2-135M --out ordered --calibration text.txt
              flexhinm prune ordered --method sparsegpt --pattern 2:4 --out pruned
            """,
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what every command has that writes the same function in other channels."""
    flags.add_model(parser)
    add = parser.add_argument
    add("--pattern", default="2:4", metavar="N:M", help="the groups (default: 2:4)")
    flags.add_calibration(parser)
    flags.add_samples(add)
    flags.add_written(parser)


def run(args: argparse.Namespace, console: Console) -> None:
    """Runs the command."""
    result = written(args, console, "searching orders of blocks", reorder)
    rows = [(name, *result.mean(name)) for name in ("stream", "heads", "inner")]
    show(args, console, ("channels", ">costs kept before", ">after"), rows)


def written(
    args: argparse.Namespace,
    console: Console,
    name: str,
    write: Callable[..., Any],
    **options: Any,
) -> Any:
    """What `reorder` or `rotate` returns, `write`, called as the command line says."""
    n, m = form_of(args.pattern)
    tokens = prune_decoder.samples(args, open_blocks(args.model))
    key, options = jax.random.key(args.seed), options | {"overwrite": args.force}
    with console.step(name, long=True) as tell:
        return write(
            args.model, args.out, tokens, key, n=n, m=m, progress=tell, **options
        )


def show(
    args: argparse.Namespace,
    console: Console,
    columns: tuple[str, str, str],
    rows: list[tuple[str, float, float]],
) -> None:
    """Prints what was kept before and after; NaN where there was nothing to keep."""
    document = {
        "model": str(args.model),
        "out": str(args.out),
        "pattern": args.pattern,
        "kept": {name: {"before": a, "after": b} for name, a, b in rows},
    }
    shown = [(name, f"{a:.4f}", f"{b:.4f}") for name, a, b in rows if a == a]
    console.result(
        document,
        table(columns, shown),
        f"{args.out}: the same function; prune it with --pattern {args.pattern}",
    )


def form_of(pattern: str) -> tuple[int, int]:
    """N and M of what --pattern says."""
    form = patterns.parse(pattern).form
    if form is None:
        raise ValueError(
            f"--pattern {pattern}: channels are arranged for groups; give N:M, such as"
            " 2:4"
        )
    return form
