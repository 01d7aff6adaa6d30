"""`flexhinm prune` of a decoder: block by block, in bounded memory."""

import argparse
import dataclasses
import re
from typing import Any

import jax

from flexhinm_jax.cli import directory, flags, hosts, progress
from flexhinm_jax.cli.choices import Choices
from flexhinm_jax.cli.choices import document as document_of
from flexhinm_jax.cli.console import Console, report_table
from flexhinm_jax.cli.evaluate import evaluated
from flexhinm_jax.cli.unfinished import Unfinished
from flexhinm_jax.io.sources import read_text
from flexhinm_jax.models import decoder
from flexhinm_jax.models.batches import pieces
from flexhinm_jax.models.load import TOKENIZER, load_tokenizer, token_ids
from flexhinm_jax.sequential.cuts import Layer
from flexhinm_jax.sequential.trained import Trained
from flexhinm_jax.streaming import streaming
from flexhinm_jax.streaming.blocks import Blocks, open_blocks
from flexhinm_jax.streaming.memory import Budget


def run(args: argparse.Namespace, choices: Choices, console: Console) -> None:
    """Prunes and writes block by block."""
    blocks = open_blocks(args.model)
    if args.first_last:
        choices = _with_first_last(choices, args.first_last, blocks)
    tokens = samples(args, blocks)
    notes: dict[str, str] = {}
    left = Unfinished(args.out, console)

    def tell(done: streaming.Told) -> None:
        if isinstance(done, Budget):
            console.note(progress.plan_text(done, tokens.shape))
        elif isinstance(done, streaming.GoingOn):
            left.going_on(done)
        elif isinstance(done, Layer):
            console.progress(progress.layer_text(done))
            if done.note:
                notes[done.path] = done.note
        elif isinstance(done, Trained):
            console.note(progress.window_text(done))
        elif isinstance(done, streaming.Surveyed):
            seconds = f"{done.seconds:.1f} s"
            console.progress(f"block {done.layer + 1}/{done.total} read, {seconds}")
        elif isinstance(done, streaming.Allocated):
            console.note(progress.budgets_text(done, blocks))
        else:
            console.note(progress.block_text(done))

    def document(result: streaming.Streamed) -> dict[str, Any]:
        return document_of(args, choices) | {
            "commands": [args.written],
            "budgets": dict(result.targets),
            "samples": tokens.shape[0],
            "length": tokens.shape[1],
            "errors": result.errors,
            **result.report.to_dict(),
        }

    with left.kept():
        result = streaming.stream(
            args.model,
            args.out,
            tokens,
            streaming.Request(
                method=choices.method,
                key=jax.random.key(args.seed),
                sparsity=choices.sparsity,
                rules=choices.rules,
                target=args.target or "seq",
                statistics=choices.statistics,
                reconstruct=choices.reconstruct,
                on_mismatch=args.on_mismatch or "error",
            ),
            spread=streaming.Spread(args.allocate, choices.exceptions),
            limits=limits(args),
            output=streaming.Output(
                args.pack,
                args.force,
                lambda result: directory.texts(args, document(result)),
                args.pack_values,
            ),
            progress=tell,
        )
    hosts.part()
    if not hosts.first():
        return
    shown, more = evaluated(args, document(result), console)
    form = directory.packed_name(args, decoder=True, whole=False)
    console.result(
        shown,
        report_table(
            result.report,
            result.errors,
            packed=args.pack,
            every=args.rows == "all",
        ),
        "",
        *(f"{path}: {text}" for path, text in notes.items()),
        *directory.ending(args.out, result.report, form),
        *more,
    )


def _with_first_last(choices: Choices, what: str, blocks: Blocks) -> Choices:
    """The choices with a rule for the first and the last block before all others.

    A sparsity is one of the pattern of the method, and a pattern has its own, whatever
    later rules say.
    """
    first, last = map(decoder.block_prefix, (0, blocks.count - 1))
    regex = f"^({re.escape(first)}|{re.escape(last)})"
    rules, numbers = flags.rules([f"{regex}={what}"])
    exceptions: dict[str, float | None] = {**numbers}
    if exceptions:
        rules = {regex: "prune"}
    elif rules[regex] != "skip" and choices.exceptions:
        exceptions = {regex: None}
    return dataclasses.replace(
        choices,
        rules=rules | choices.rules,
        exceptions={**exceptions, **choices.exceptions},
    )


def limits(args: argparse.Namespace) -> streaming.Limits:
    """In how much memory, and in what, a run computes."""
    return streaming.Limits(
        args.memory, args.batch_size or flags.BATCH_SAMPLES, args.dtype or "checkpoint"
    )


def samples(args: argparse.Namespace, blocks: Blocks) -> Any:
    """The calibration text as i32[samples, length]."""
    longest = blocks.config.max_position_embeddings or flags.LENGTH
    length = args.length or min(flags.LENGTH, longest)
    if length > longest:
        raise ValueError(
            f"--length {length} is more than this model reads:"
            f" max_position_embeddings={longest}"
        )
    tokens, _ = token_ids(
        load_tokenizer(args.model / TOKENIZER),
        read_text(args.calibration),
        blocks.config.vocab_size,
        count=(args.samples or flags.SAMPLES) * length,
    )
    name = f"--calibration {args.calibration}"
    return pieces(tokens, length, args.samples, flags.SAMPLES, name)


def batches(args: argparse.Namespace, size: int) -> list[tuple[Any, ...]]:
    """The same in steps of so many samples, for a decoder that is read whole."""
    tokens = samples(args, open_blocks(args.model))
    return [(tokens[k : k + size],) for k in range(0, len(tokens), size)]
