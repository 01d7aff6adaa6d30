"""`flexhinm generate`: a smoke look at what a decoder says."""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp

from flexhinm_jax.cli import directory, flags
from flexhinm_jax.cli.console import Console
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
            """,
    )
    flags.add_model(parser)
    add = parser.add_argument
    add("--prompt", required=True, metavar="TEXT", help="text to continue")
    add(
        "--tokens",
        type=int,
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
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens only")
    flags.add_seed(parser)
    flags.add_shown(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console) -> None:
    """Runs the command."""
    with console.step("reading the model"):
        model = directory.read_decoder(args.model)
    tokens, _ = model.encode(args.prompt)
    if tokens.size == 0:
        raise ValueError("--prompt has no tokens; give at least one")
    go_on = functools.partial(
        generation.generate,
        config=model.config,
        steps=args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        ends=model.ends,
    )
    with console.step("generating"):
        key = jax.random.key(args.seed) if args.temperature else None
        made = jax.jit(go_on)(model.params, jnp.asarray(tokens[None]), key=key)
    length = int(made.lengths[0])
    new = made.tokens[0, :length].tolist()
    # The text behind the prompt: a token decoded alone may lack its leading space.
    whole = model.tokenizer.decode([*tokens.tolist(), *new])
    before = model.tokenizer.decode(tokens.tolist())
    text = whole.removeprefix(before)
    document = {
        "model": str(args.model),
        "prompt": args.prompt,
        "text": text,
        "tokens": new,
        "ended": bool(new and new[-1] in model.ends),
    }
    console.result(document, text)
