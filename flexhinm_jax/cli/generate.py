"""`flexhinm generate`: a smoke look at what a decoder says."""

import argparse
from typing import Any

import jax

from flexhinm_jax.cli import evaluate, flags
from flexhinm_jax.cli.console import Console, bytes_text
from flexhinm_jax.models import generation


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = flags.command(
        commands,
        "generate",
        help="continue a text with a decoder",
        description="""\
            Continues TEXT with the decoder in MODEL (llama, qwen3, gemma3, ...)
            and prints the continuation. Takes the likeliest token every time unless
            --temperature is given. Stops at the model's own end token.
            """,
        epilog="""\
            examples:
              flexhinm generate pruned --prompt "Once upon a time" --tokens 40
              flexhinm generate pruned --prompt "Once" --temperature 0.8 --top-k 50
              flexhinm generate pruned --prompt "Once" --packed
            """,
    )
    flags.add_model(parser)
    add = parser.add_argument
    add("--prompt", required=True, metavar="TEXT", help="text to continue")
    add(
        "--tokens",
        type=flags.positive,
        default=32,
        metavar="N",
        help="new tokens at most (default: 32)",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="draw from softmax(logits / T); 0, the default, draws nothing",
    )
    add(
        "--top-k",
        type=flags.positive,
        metavar="K",
        help="draw among the K likeliest tokens only",
    )
    flags.add_packed(
        parser,
        "run on the packed weights, and again with zeros in place; shows bytes and"
        " tokens per second of both",
    )
    flags.add_seed(parser)
    flags.add_shown(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console) -> None:
    """Runs the command."""
    document, lines = _continued(args, args.packed, console)
    if args.packed:
        dense, others = _continued(args, False, console)
        document, lines = document | {"dense": dense}, lines + others
    console.result(document, *lines)


def _continued(
    args: argparse.Namespace, packed: bool, console: Console
) -> tuple[dict[str, Any], list[str]]:
    """The document and the lines of one form of the model."""
    model, size = evaluate.read(args.model, packed, console)
    with console.step("generating"):
        continued = generation.continue_text(
            model,
            args.prompt,
            steps=args.tokens,
            key=jax.random.key(args.seed) if args.temperature else None,
            timed=args.packed,
            temperature=args.temperature,
            top_k=args.top_k,
        )
    document = {
        "model": str(args.model),
        "prompt": args.prompt,
        "text": continued.text,
        "tokens": continued.tokens,
        "ended": continued.ended,
    }
    if continued.seconds is None:
        return document, [continued.text]
    speed = len(continued.tokens) / continued.seconds
    document |= {"packed": packed, "stored_bytes": size, "tokens_per_second": speed}
    told = f"{'packed' if packed else 'dense'}: {bytes_text(size)}, {speed:,.1f} tokens"
    return document, [continued.text, f"({told} per second)"]
