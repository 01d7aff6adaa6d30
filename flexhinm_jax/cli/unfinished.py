"""What a run left unfinished, for people: who goes on with it, and who cannot."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from flexhinm_jax.cli.console import Console
from flexhinm_jax.io import fingerprint
from flexhinm_jax.streaming import streaming, work

VERSION = "the version of flexhinm_jax"

PARTS: Mapping[str, str] = {
    "allocate": "--allocate",
    "batch": "--batch-size",
    "batches": "--calibration, --limit, --batch-size or --max-length",
    "block": VERSION,
    "center": VERSION,
    "config": "--method, --rate, --noise or --weights-rate",
    "dtype": "--dtype",
    "exceptions": "--rule or --first-last with a sparsity",
    "held": VERSION,
    "key": "--seed",
    "leaves": "--rule",
    "length": "--length",
    "looks": VERSION,
    "method": "--method",
    "model": "MODEL or its files",
    "pack": "--pack or --pack-values",
    "params": "MODEL or its files",
    "pattern": "--pattern",
    "reconstruct": "--reconstruct or its options",
    "rules": "--rule or --first-last",
    "samples": "--samples or --calibration",
    "sparsity": "--sparsity",
    "start": "--start",
    "statistics": "--statistics",
    "steps": "--steps",
    "target": "--target",
    "token_mask": "--calibration, --limit, --batch-size or --max-length",
    "tokens": "--calibration",
    "version": VERSION,
    "window": "--window",
}
"""Part of a fingerprint -> the options that decide about it."""

VALUES = ("batch", "length", "samples", "sparsity", "statistics", "steps", "target")
VALUES += ("window",)
"""Parts whose text is what was given."""

CUT = ("batch", "length", "samples")
"""Parts that change the tokens of a text too."""


class Unfinished:
    """The folder `OUT.partial` of a run of a decoder."""

    def __init__(self, out: Path, console: Console):
        """Looks whether there is one already, which may be of another run."""
        self.folder, self.console = work.partial(out), console
        self.own = not self.folder.exists()

    def going_on(self, told: streaming.GoingOn) -> None:
        """The folder that was there is that of this run."""
        self.own = True
        self.console.note(f"going on with {told.folder}")

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Says where the state of a run is that ends inside the block."""
        try:
            yield
        except BaseException:
            if self.own and self.folder.exists():
                self.console.note(
                    f"{self.folder} is kept: the same command goes on from there;"
                    " remove it to begin anew"
                )
            raise


def differing_text(error: fingerprint.Differs) -> str:
    """Which options differ from those that a folder was begun with.

    Args:
      error: names parts of two fingerprints.
    """
    where, remedy = error.where, "remove it to begin anew, or give another folder"
    if any(None in pair for pair in error.parts.values()):
        return (
            f"{where} was begun by another command, or another version of"
            f" flexhinm_jax; {remedy}"
        )
    names = _telling(error.parts)
    shown = dict.fromkeys(_part_text(name, *error.parts[name]) for name in names)
    return (
        f"{where} was begun with other options: {'; '.join(shown)}. Give those again"
        f" to go on with it, {remedy}"
    )


def _telling(parts: Mapping[str, tuple[str, str]]) -> list[str]:
    """The parts without those that differ because another one does."""
    names = set(parts)
    if names & set(CUT):
        names.discard("tokens")
    if "method" in names:  # which prefers statistics of its own
        names.discard("statistics")
    if {"method", "pattern"} <= names:  # the text of a method holds its pattern
        before, now = (text.partition("(")[0] for text in parts["method"])
        names -= {"method"} if before == now else set()
    return sorted(names)


def _part_text(name: str, before: str, now: str) -> str:
    option = PARTS.get(name, name)
    if name == "key":  # the last word of the key is the seed
        before, now = (text.strip("[]").rpartition(" ")[2] for text in (before, now))
    elif name not in VALUES:
        return option
    before, now = ("none" if text == "None" else text for text in (before, now))
    return f"{option} ({before} before, {now} now)"
