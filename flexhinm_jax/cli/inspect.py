"""`flexhinm inspect`: every leaf of a model, prunable or skipped, and why."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from flexhinm_jax.cli import flags
from flexhinm_jax.cli.console import NUMBER, Console, bytes_text, groups, table
from flexhinm_jax.io import tensors
from flexhinm_jax.models.load import is_decoder, load
from flexhinm_jax.streaming.blocks import open_blocks
from flexhinm_jax.tracing.discover import discover
from flexhinm_jax.types import Use, Uses


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = flags.command(
        commands,
        "inspect",
        help="list every weight: prunable, or skipped and why",
        description="""\
            Lists every array of a Hugging Face model directory with its shape, size and
            share of zeros, and whether it can be pruned or why not. The matrix of a
            prunable array is [out, in], as patterns see it. Of a decoder only the
            headers of the files are read, so zeros are not counted.
            """,
        epilog="""\
            examples:
              flexhinm inspect all-MiniLM-L6-v2
              flexhinm inspect pruned --json > leaves.json
            """,
    )
    flags.add_model(parser)
    flags.add_shown(parser)
    flags.add_rows(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console) -> None:
    """Runs the command."""
    if is_decoder(args.model):
        with console.step("finding the weights"):
            leaves = _decoder_leaves(args.model)
    else:
        with console.step("reading the model"):
            model = load(args.model, tokenizer=False)
        with console.step("finding the weights"):
            uses = discover(
                model.apply, model.params, *model.sample(), rules=model.rules
            )
        leaves = [_describe(path, leaf, uses) for path, leaf in model.params.items()]
    console.result(
        _summary(args.model, leaves),
        _table(leaves, args.rows == "all"),
        *_totals(leaves),
    )


def _decoder_leaves(path: Path) -> list[dict[str, Any]]:
    """The leaves of a decoder, from the headers of its files alone."""
    blocks = open_blocks(path)
    uses = blocks.uses(None)
    every: list[Uses] = [uses.of(layer) for layer in range(blocks.count)]
    skipped = dict.fromkeys(blocks.index.files, "outside the blocks: never pruned")
    every_use = Uses(
        tuple(use for one in every for use in one),
        skipped | {path: why for one in every for path, why in one.skipped.items()},
    )
    leaves = every_use.leaves
    rows = []
    for key in blocks.index.files:
        name = blocks.index.dtype(key)
        known = {
            "path": key,
            "shape": list(blocks.index.shape(key)),
            "dtype": str(tensors.DTYPES.get(name, name)),
            "bytes": blocks.index.nbytes(key),
            "zeros": None,
        }
        rows.append(known | _use(leaves.get(key), every_use.skipped[key]))
    return rows


def _describe(path: str, leaf: np.ndarray, uses: Uses) -> dict[str, Any]:
    zeros = leaf.size - np.count_nonzero(leaf)
    return {
        "path": path,
        "shape": list(leaf.shape),
        "dtype": str(leaf.dtype),
        "bytes": int(leaf.nbytes),
        "zeros": float(zeros / max(leaf.size, 1)),
    } | _use(uses.leaves.get(path), uses.skipped.get(path))


def _use(use: Use | None, reason: str | None) -> dict[str, Any]:
    return {
        "prunable": use is not None,
        "matrix": list(use.layout.matrix_shape) if use else None,
        "stack": list(use.layout.stack_shape) if use else None,
        "reason": None if use else reason,
    }


def _summary(path: Path, leaves: list[dict[str, Any]]) -> dict[str, Any]:
    prunable = [leaf for leaf in leaves if leaf["prunable"]]
    return {
        "model": str(path),
        "leaves": leaves,
        "prunable": {
            "leaves": len(prunable),
            "bytes": sum(x["bytes"] for x in prunable),
        },
        "all": {"leaves": len(leaves), "bytes": sum(x["bytes"] for x in leaves)},
    }


def _table(leaves: list[dict[str, Any]], every: bool) -> Any:
    columns = ("leaf", "shape", "dtype", ">bytes", ">zeros", "prunable or why not")
    by_path = {leaf["path"]: leaf for leaf in leaves}
    kinds = {path: _kind(leaf, every) for path, leaf in by_path.items()}
    rows = []
    for name, paths, (shape, dtype, why) in groups(kinds, every):
        sizes = [by_path[path]["bytes"] for path in paths]
        zeros = [by_path[path]["zeros"] for path in paths]
        mean = "" if None in zeros else f"{sum(zeros) / len(zeros):.1%}"
        rows.append((name, shape, dtype, bytes_text(sum(sizes)), mean, why))
    return table(columns, rows)


def _kind(leaf: dict[str, Any], every: bool) -> tuple[str, ...]:
    stack = "".join(f"{size} x " for size in leaf["stack"] or ())
    matrix, reason = leaf["matrix"], str(leaf["reason"])
    if not every:  # it may name a leaf of the same layer
        reason = NUMBER.sub("*", reason)
    return (
        "x".join(map(str, leaf["shape"])) or "scalar",
        leaf["dtype"],
        f"yes, {stack}{matrix}" if matrix else f"no: {reason}",
    )


def _totals(leaves: list[dict[str, Any]]) -> list[str]:
    prunable = [leaf["bytes"] for leaf in leaves if leaf["prunable"]]
    everything = [leaf["bytes"] for leaf in leaves]
    return [
        "",
        f"{len(prunable)} of {len(everything)} leaves are prunable:"
        f" {bytes_text(sum(prunable))} of {bytes_text(sum(everything))}",
    ]
