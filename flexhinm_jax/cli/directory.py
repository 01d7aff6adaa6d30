"""A model directory as the commands need it: checked, pruned, written again."""

import argparse
import dataclasses
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
from flexhinm_jax.models.load import PACKED, PACKED_BLOCKS, Model
from flexhinm_jax.pruning import prune, report
from flexhinm_jax.tracing.describe import none_left
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import Uses

ONLY_PRUNED = f"# Of the model before it was tuned; {CARD} has both commands.\n"
"""What the recipe of a pruned directory says in one that was made from it."""


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
        if packed_name(args, decoder=model.is_decoder, whole=True):
            packed.write_packed(folder / PACKED, result.packed, overwrite=True)
        model_card.write(folder, texts)


def compared(result: prune.Pruned, model: Model) -> prune.Pruned:
    """The result with a report that says which leaves moved that were not pruned."""
    before, after = Leaves.of(model.params), Leaves.of(result.params)
    moved = report.moved(result.report.skipped, before, after)
    return dataclasses.replace(
        result, report=dataclasses.replace(result.report, moved=moved)
    )


def texts(args: argparse.Namespace, document: Mapping[str, Any]) -> dict[str, str]:
    """What is written beside the model: report, card, and how to get it again.

    Args:
      args: of the command.
      document: the report; that of a directory that was pruned before has the
        "commands" that made it.
    """
    commands = [*(document.get("commands") or ())]
    if commands[-1:] != [args.written]:
        commands.append(args.written)
    told = {**document, "commands": commands}
    return _recipe(args) | model_card.texts(args.model, told)


def _recipe(args: argparse.Namespace) -> dict[str, str]:
    """The recipe of a run, or that of the pruned directory that a run began with."""
    if hasattr(args, "recipe"):
        return {RECIPE: recipe.text(args)}
    before = None if getattr(args, "other", None) is None else args.other / RECIPE
    if before is None or not before.is_file():
        return {}
    text = before.read_bytes().decode("utf-8", "surrogateescape")
    return {RECIPE: ONLY_PRUNED + text.removeprefix(ONLY_PRUNED)}


def write_figures(
    args: argparse.Namespace, document: dict[str, Any], figures: dict[str, Any]
) -> None:
    """Adds what was measured to the card of a directory that is written."""
    card = model_card.cards(args.model, document, figures)[CARD]
    with atomic.file(args.out / CARD, overwrite=True) as temporary:
        model_card.write(temporary.parent, {temporary.name: card})


def packed_name(args: argparse.Namespace, *, decoder: bool, whole: bool) -> str | None:
    """What holds the packed form in --out, or None where it is not written.

    Args:
      args: "pack" of the command line.
      decoder: whether the model is one; others are always packed.
      whole: whether it was in memory as a whole, not block by block.
    """
    if decoder and not args.pack:
        return None
    return PACKED if whole else f"{PACKED_BLOCKS}/"


def ending(out: Path, told: report.Report, packed_form: str | None) -> list[str]:
    """The last lines that a person reads.

    Args:
      out: the directory that is written.
      told: the report of the run.
      packed_form: see `packed_name`.
    """
    kept = f"{len(told.skipped)} leaves not pruned (flexhinm inspect says why)"
    covered = told.coverage_lines
    if rounding := told.total["rounding"]:
        kept += f"; packed values are rounded by {rounding:.2%} of their norm"
    if packed_form is None:
        if any(row.product_zeros is not None for row in told.rows):
            covered.append(
                "warning: nothing sparse is written, as these weights have their zeros"
                " in packed form alone; give --pack"
            )
        return [*covered, kept, f"wrote {out} with {REPORT}"]
    dense, small = told.tree_dense_bytes, told.tree_packed_bytes
    return [
        *covered,
        f"whole model: {bytes_text(dense)} dense, {bytes_text(small)} packed; {kept}",
        f"wrote {out} with {packed_form} and {REPORT}",
    ]
