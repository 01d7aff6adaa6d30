"""The directory that a command writes, and what it says about it."""

import argparse
import json
from pathlib import Path
from typing import Any

from flexhinm_jax.cli import source
from flexhinm_jax.cli.console import bytes_text, table
from flexhinm_jax.io import atomic, huggingface, packed
from flexhinm_jax.pruning import prune
from flexhinm_jax.pruning.report import Report

PACKED = "packed.safetensors"
REPORT = "report.json"


def write(
    args: argparse.Namespace,
    result: prune.Pruned,
    model: source.Source,
    document: dict[str, Any],
) -> None:
    """Writes the directory: the model with zeros in place, packed file, report."""
    with atomic.directory(args.out, overwrite=args.force) as folder:
        huggingface.write(
            folder, result.params, source=model.checkpoint, overwrite=True
        )
        packed.write_packed(folder / PACKED, result.packed, overwrite=True)
        (folder / REPORT).write_text(json.dumps(document, indent=2) + "\n")


def summary(out: Path, result: Report, notes: dict[str, str]) -> list[Any]:
    """What a person reads at the end."""
    made = table(
        "weight", "shape", ">zeros", ">dense", ">packed", ">saliency kept", "note"
    )
    for row in result.rows:
        made.add_row(
            row.path,
            "x".join(map(str, row.shape)),
            f"{row.zeros:.2%}",
            bytes_text(row.dense_bytes),
            bytes_text(row.packed_bytes),
            f"{row.retained:.2%}",
            row.note,
        )
    total = result.total
    made.add_section()
    made.add_row(
        "all pruned weights",
        "",
        f"{total['zeros']:.2%}",
        bytes_text(int(total["dense_bytes"])),
        bytes_text(int(total["packed_bytes"])),
        f"{total['retained']:.2%}",
        "",
    )
    return [
        made,
        "",
        *(f"{path}: {text}" for path, text in notes.items()),
        f"whole model: {bytes_text(result.tree_dense_bytes)} dense,"
        f" {bytes_text(result.tree_packed_bytes)} packed;"
        f" {len(result.skipped)} leaves not pruned (flexhinm inspect says why)",
        f"wrote {out} with {PACKED} and {REPORT}",
    ]
