"""A model directory as the commands need it: checked, pruned, written again."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexhinm_jax import atomic
from flexhinm_jax.cli import recipe
from flexhinm_jax.cli.console import Console, bytes_text
from flexhinm_jax.cli.recipe import RECIPE
from flexhinm_jax.io import huggingface, model_card, packed
from flexhinm_jax.io.model_card import CARD, REPORT
from flexhinm_jax.io.sources import BUILTIN
from flexhinm_jax.models import decoder
from flexhinm_jax.models.load import PACKED, Model
from flexhinm_jax.pruning import prune
from flexhinm_jax.pruning.report import Report
from flexhinm_jax.tracing.describe import none_left
from flexhinm_jax.types import Uses


def note_builtin(args: argparse.Namespace, console: Console) -> None:
    """Says that nobody chose the text to calibrate on."""
    if args.calibration == BUILTIN:
        console.note(
            "calibrating on the bundled text, which is short; give --calibration a text"
            " like those that the model will read"
        )


def rules(model: Model, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What never is pruned, the rules of the command line, those of the model."""
    never = decoder.rules(model.config) if model.is_decoder else {}
    own = {k: v for k, v in model.rules.items() if k not in asked}
    return never | dict(asked) | own


def check_uses(model: Path, uses: Uses) -> None:
    """Refuses a model in which rules and pattern leave nothing to prune."""
    if not uses.leaves:
        raise ValueError(f"{model}: {none_left([uses])}")


def check_out(args: argparse.Namespace) -> None:
    """Refuses an --out that must not be written, and a model that cannot be copied.

    A --resume in one of the directories is refused too: it would be in their way.
    """
    huggingface.check_copy(args.model, args.out)
    huggingface.check_place(args.out, overwrite=args.force)
    resume = getattr(args, "resume", None)
    for place in (args.out, args.model, getattr(args, "other", None)):
        if resume is not None and place is not None:
            outer, inner = Path(place).resolve(), Path(resume).resolve()
            if outer in (inner, *inner.parents):
                raise ValueError(
                    f"--resume {resume} lies in {place}; give a folder of its own"
                )


def write(
    args: argparse.Namespace,
    result: prune.Pruned,
    model: Model,
    texts: Mapping[str, str],
) -> None:
    """Writes the directory: the model with zeros in place, packed file, other texts."""
    with atomic.directory(args.out, overwrite=args.force) as folder:
        huggingface.write(folder, result.params, source=model.directory, overwrite=True)
        if args.pack or not model.is_decoder:
            packed.write_packed(folder / PACKED, result.packed, overwrite=True)
        model_card.write(folder, texts)


def texts(args: argparse.Namespace, document: Mapping[str, Any]) -> dict[str, str]:
    """What is written beside the model: report, card, and how to get it again."""
    again = {RECIPE: recipe.text(args)} if hasattr(args, "recipe") else {}
    return again | model_card.texts(args.model, document, command=args.written)


def write_figures(
    args: argparse.Namespace, document: dict[str, Any], figures: dict[str, Any]
) -> None:
    """Adds what was measured to the card of a directory that is written."""
    told = {"command": args.written} | document
    card = model_card.cards(args.model, told, figures)[CARD]
    with atomic.file(args.out / CARD, overwrite=True) as temporary:
        model_card.write(temporary.parent, {temporary.name: card})


def ending(out: Path, report: Report, packed_file: str | None = None) -> list[str]:
    """The last lines that a person reads."""
    kept = f"{len(report.skipped)} leaves not pruned (flexhinm inspect says why)"
    covered = report.coverage_lines
    if rounding := report.total["rounding"]:
        kept += f"; packed values are rounded by {rounding:.2%} of their norm"
    if packed_file is None:
        return [*covered, kept, f"wrote {out} with {REPORT}"]
    dense, small = report.tree_dense_bytes, report.tree_packed_bytes
    return [
        *covered,
        f"whole model: {bytes_text(dense)} dense, {bytes_text(small)} packed; {kept}",
        f"wrote {out} with {packed_file} and {REPORT}",
    ]
