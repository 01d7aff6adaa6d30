"""`flexhinm prune` of a decoder directory: block by block, in bounded memory."""

import argparse
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from flexhinm_jax import __version__, methods
from flexhinm_jax.cli import allocation, source
from flexhinm_jax.cli.console import Console, bytes_text, table
from flexhinm_jax.models import decoder
from flexhinm_jax.sequential.sequential import Layer
from flexhinm_jax.streaming import streaming, work
from flexhinm_jax.streaming.blocks import Blocks, open_blocks
from flexhinm_jax.streaming.budget import Budget

REPORT = "report.json"
BATCH = 4
OPTIONS = ("memory", "length", "samples", "dtype", "pack", "first_last")
SAMPLES = 128
LENGTH = 512

UNITS = {"": 1, "B": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
UNITS |= {f"{u}IB": UNITS[u] for u in "KMGT"}
UNITS |= {f"{u}B": 1000**k for k, u in enumerate("KMGT", 1)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that are for decoders."""
    add = parser.add_argument_group("decoders (with --sequential)").add_argument
    add(
        "--memory",
        type=size,
        metavar="SIZE",
        help="most memory to take besides that of the interpreter, such as 8GiB; hidden"
        " states that do not fit go to disk",
    )
    add(
        "--length",
        type=int,
        metavar="N",
        help=f"tokens of a sample (default: {LENGTH}, or what the model reads)",
    )
    add(
        "--samples",
        type=int,
        metavar="N",
        help=f"samples to calibrate on (default: all of TEXT, at most {SAMPLES})",
    )
    add(
        "--dtype",
        choices=("checkpoint", "float32"),
        help="what to compute in (default: the dtype of the checkpoint)",
    )
    add(
        "--pack",
        action="store_true",
        help="also write the weights as the sparse kernels read them, one file per"
        f" block in {streaming.PACKED}/",
    )
    add(
        "--first-last",
        metavar="WHAT",
        help="what the first and the last block get, before all rules: dense, a"
        " sparsity or a pattern",
    )


def check(args: argparse.Namespace) -> None:
    """Refuses what does not go together with a decoder."""
    if not args.sequential:
        raise ValueError(
            f"{args.model} is a decoder, which is pruned block by block in order of"
            " execution; add --sequential"
        )
    for option, why in {
        "resume": "a decoder goes on by itself from OUT.partial beside --out",
        "limit": "give --samples",
        "max_length": "give --length",
        "share_orders": "it is not for --sequential",
    }.items():
        if getattr(args, option):
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is for encoders; {why}")
    if args.calibration is None:
        raise ValueError("--sequential needs --calibration TEXT, a UTF-8 text file")
    for option in ("length", "samples"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option} {value} is not at least 1")


def run(
    args: argparse.Namespace,
    console: Console,
    method: methods.Method,
    sparsity: float | None,
    rules: Mapping[str, Any],
    exceptions: Mapping[str, float],
) -> None:
    """Prunes the decoder."""
    blocks = open_blocks(args.model)
    if args.first_last:
        first, last = map(decoder.block_prefix, (0, blocks.count - 1))
        regex = f"^({re.escape(first)}|{re.escape(last)})"
        own, numbers = allocation.split([f"{regex}={args.first_last}"])
        rules, exceptions = {**own, **rules}, {**numbers, **exceptions}
    longest = blocks.config.max_position_embeddings or LENGTH
    length = args.length or min(LENGTH, longest)
    if length > longest:
        raise ValueError(
            f"--length {length} is more than this model reads:"
            f" max_position_embeddings={longest}"
        )
    tokens = source.samples(
        args.model,
        source.read_whole(args.calibration),
        length,
        args.samples,
        SAMPLES,
        blocks.config.vocab_size,
    )
    notes: dict[str, str] = {}

    def planned(plan: Budget) -> None:
        console.note(plan_text(plan, tokens.shape))

    def progress(done: Layer | streaming.Told) -> None:
        if isinstance(done, Layer):
            console.progress(layer_text(done))
            if done.note:
                notes[done.path] = done.note
        elif isinstance(done, streaming.Surveyed):
            seconds = f"{done.seconds:.1f} s"
            console.progress(f"block {done.layer + 1}/{done.total} read, {seconds}")
        elif isinstance(done, streaming.Allocated):
            console.note(budgets_text(done, blocks))
        else:
            console.note(block_text(done))

    def document(result: streaming.Streamed) -> dict[str, Any]:
        return {
            "model": str(args.model),
            "out": str(args.out),
            "method": repr(method),
            "sparsity": sparsity,
            "rules": {regex: str(value) for regex, value in rules.items()},
            "allocate": str(args.allocate),
            "exceptions": dict(exceptions),
            "budgets": dict(result.targets),
            "seed": args.seed,
            "target": args.target or "seq",
            "samples": tokens.shape[0],
            "length": tokens.shape[1],
            "version": __version__,
            "errors": result.errors,
            **result.report.to_dict(),
        }

    partial = args.out.with_name(args.out.name + work.PARTIAL)
    if partial.exists():
        console.note(f"going on with {partial}")
    try:
        result = streaming.stream(
            args.model,
            args.out,
            tokens,
            method,
            sparsity=sparsity,
            allocate=args.allocate,
            exceptions=exceptions,
            key=jax.random.key(args.seed),
            target=args.target or "seq",
            rules=rules,
            memory_limit=args.memory,
            batch=args.batch_size or BATCH,
            dtype=args.dtype or "checkpoint",
            pack=args.pack,
            overwrite=args.force,
            planned=planned,
            progress=progress,
            extra=lambda result: {
                REPORT: json.dumps(document(result), indent=2) + "\n"
            },
        )
    except BaseException:
        if partial.exists():
            console.note(f"{partial} is kept: the same command goes on from there")
        raise
    console.result(document(result), *summary(args.out, result, notes))


def size(text: str) -> int:
    """Bytes of a text such as 8GiB, 800MB or 1000000."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = None if found is None else UNITS.get(found[2].upper())
    if found is None or unit is None or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 8GiB or 800MB")
    return int(float(found[1]) * unit)


def plan_text(plan: Budget, shape: tuple[int, ...]) -> str:
    """The plan of memory for people."""
    lines = [f"planned memory for {shape[0]} samples of {shape[1]} tokens:"]
    lines += [f"  {name:<28}{bytes_text(value):>10}" for name, value in plan.rows()]
    if plan.limit is not None:
        lines.append(f"  {'limit':<28}{bytes_text(plan.limit):>10}")
    return "\n".join(lines)


def budgets_text(made: streaming.Allocated, blocks: Blocks) -> str:
    """The sparsity of every block, in one paragraph."""
    found = []
    for layer in range(blocks.count):
        mine = [key for key in blocks.keys(layer) if key in made.sparsity]
        sizes = [math.prod(blocks.index.shape(key)) for key in mine]
        pairs = zip(mine, sizes, strict=True)
        removed = sum(made.sparsity[key] * size for key, size in pairs)
        found.append(f"{removed / sum(sizes):.3f}" if mine else "dense")
    return f"sparsity of the blocks: {' '.join(found)}"


def layer_text(layer: Layer) -> str:
    """One line about a finished matrix."""
    return (
        f"{layer.done}/{layer.total} {layer.path}: error {layer.error:.4f},"
        f" {layer.seconds:.1f} s, {bytes_text(layer.held)} held"
    )


def block_text(block: streaming.Block) -> str:
    """One line about a finished block."""
    left = f"{duration(block.left)} left"
    return (
        f"block {block.layer + 1}/{block.total}: error {block.error:.4f},"
        f" {block.seconds:.1f} s, peak {bytes_text(block.peak)}, {left}"
    )


def duration(seconds: float) -> str:
    """Hours and minutes, or seconds below two minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def summary(out: Path, result: streaming.Streamed, notes: dict[str, str]) -> list[Any]:
    """The table at the end."""
    made = table("weight", "shape", ">zeros", ">error", ">saliency kept")
    for row in result.report.rows:
        made.add_row(
            row.path,
            "x".join(map(str, row.shape)),
            f"{row.zeros:.2%}",
            f"{result.errors[row.path]:.4f}",
            f"{row.retained:.2%}",
        )
    total = result.report.total
    made.add_section()
    made.add_row(
        "all pruned weights",
        "",
        f"{total['zeros']:.2%}",
        "",
        f"{total['retained']:.2%}",
    )
    return [
        made,
        "",
        *(f"{path}: {text}" for path, text in notes.items()),
        f"{len(result.report.skipped)} leaves not pruned (flexhinm inspect says why)",
        f"wrote {out} with {REPORT}",
    ]
