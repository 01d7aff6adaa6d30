"""`flexhinm prune`: a model directory in, a pruned one with a packed file out.

An encoder is read whole and pruned in memory. A decoder is pruned block by block, in
bounded memory, by `streaming`.
"""

import argparse
import contextlib
import textwrap
from pathlib import Path
from typing import Any

from flexhinm_jax import atomic, methods, patterns
from flexhinm_jax.cli import (
    choices,
    directory,
    flags,
    hosts,
    prune_decoder,
    prune_encoder,
)
from flexhinm_jax.cli.console import Console
from flexhinm_jax.cli.directory import REPORT
from flexhinm_jax.cli.recipe import RECIPE
from flexhinm_jax.models.load import PACKED, Reads, kind_of
from flexhinm_jax.sequential.request import STATISTICS, TARGETS
from flexhinm_jax.training.reconstruct import Reconstruct


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = flags.command(
        commands,
        "prune",
        help="prune a Hugging Face model directory",
        description=f"""\
            Prunes the model in MODEL and writes DIR: the same files with zeros in
            place, {PACKED} with the weights as the sparse kernels read them, and
            {REPORT}. DIR appears complete or not at all.

            Encoders of text (bert, roberta, xlm-roberta, mpnet, distilbert) and
            classifiers of images (vit, deit, resnet) are pruned as a whole.
            A decoder (llama, qwen3, gemma3, ...) is pruned block by block in order
            of execution, which takes the memory of one block: --memory gives a limit.
            A run that is stopped or killed goes on by itself when the same command is
            given again: its state is in DIR.partial, beside DIR.
            """,
        epilog=_epilog(),
    )
    add = parser.add_argument
    flags.add_model(parser)
    add(
        "--recipe",
        type=Path,
        metavar="FILE",
        help=f"options from a YAML file, such as the {RECIPE} that every run writes;"
        " those given here come first",
    )
    _add_what(parser)
    flags.add_calibration(parser)
    flags.add_sentences(
        parser,
        "calibration sentences (or samples of a decoder) in one step (default:"
        f" {prune_encoder.BATCH_EXAMPLES}, or {flags.BATCH_SAMPLES})",
    )
    _add_order(parser)
    add(
        "--eval",
        type=Path,
        metavar="TEXT",
        help="compare the pruned model with the dense one on a text at the end, as"
        " 'flexhinm eval' does",
    )
    _add_decoders(parser)
    flags.add_pack_values(parser)
    hosts.add(parser)
    flags.add_written(parser)
    parser.set_defaults(run=run)


def _add_what(parser: argparse.ArgumentParser) -> None:
    """Adds what stays of which weights, and who decides."""
    add = parser.add_argument
    add(
        "--method",
        metavar="NAME",
        help="see below (default: alps, and staged_alps where a pattern of columns and"
        " groups prunes more than half)",
    )
    add(
        "--pattern",
        default="2:4",
        metavar="PATTERN",
        help="which weights may stay, see below (default: 2:4)",
    )
    add(
        "--sparsity",
        type=flags.fraction,
        metavar="S",
        help="fraction of weights removed, between 0 and 1; not needed where the "
        "pattern fixes it (2:4)",
    )
    add(
        "--rule",
        action="append",
        default=[],
        metavar="REGEX=WHAT",
        help="what the weights get whose name matches: another pattern, a sparsity (the"
        " other weights make up for it), dense (or skip), or prune; repeatable, the"
        " first match wins, for patterns and for sparsities apart ('flexhinm inspect'"
        " lists the names)",
    )
    add(
        "--allocate",
        type=flags.mode,
        default="uniform",
        metavar="MODE",
        help="uniform: the same sparsity for every weight (default); global: more where"
        " less is lost; owl: less in blocks with many outliers, with options such as"
        " owl:multiple=5,spread=0.08. The total over all pruned weights is --sparsity",
    )


def _add_order(parser: argparse.ArgumentParser) -> None:
    """Adds in which order weights are pruned, and inputs are sorted."""
    add = parser.add_argument
    add(
        "--sequential",
        action="store_true",
        help="prune in order of execution, every weight on what the pruned ones before"
        " it give; decoders always are, for encoders it needs a method that moves"
        " weights to pay (sparsegpt, alps, wrappers)",
    )
    add(
        "--target",
        choices=TARGETS,
        help="with --sequential: fit to the weight's own output (seq, the default), to"
        " that of the dense model (asym), or also repair the residual stream (resid,"
        " best from about 500 sentences on); nothing to methods that move no weights",
    )
    add(
        "--statistics",
        choices=STATISTICS,
        help="with --sequential: judge a weight by the inputs that the pruned ones"
        " before it give (sequential), by those that the dense weights of its block"
        " give (block), or by those of the dense model (dense); default: block for"
        " wanda, else sequential",
    )
    add(
        "--reconstruct",
        metavar="WINDOW",
        help="with --sequential: train what is left of a window to give the outputs of"
        " the dense model, before the next is pruned: block, part (attention or MLP of"
        " a block), a number of blocks (not for decoders), or a regular expression",
    )
    add(
        "--reconstruct-steps",
        type=flags.positive,
        metavar="N",
        help=f"steps per window (default: {Reconstruct.steps})",
    )
    add(
        "--reconstruct-rate",
        type=float,
        metavar="R",
        help=f"learning rate (default: {Reconstruct.rate:g})",
    )
    add(
        "--reconstruct-target",
        choices=("asym", "seq"),
        help="the outputs of the dense model (asym, the default), or of the window's"
        " dense weights for the inputs that the pruned ones give (seq)",
    )
    add(
        "--resume",
        type=Path,
        metavar="DIR",
        help="encoders with --sequential: keep finished weights in DIR, and continue"
        " after those that are there",
    )
    add(
        "--share-orders",
        action="store_true",
        help="search one input order for all weights that read the same input, such as"
        " query, key and value; for N:M patterns",
    )
    add(
        "--on-mismatch",
        choices=("error", "skip"),
        help="weights whose sizes the pattern does not divide: refuse them (error), or"
        " leave them dense with a reason in the report (skip); default error",
    )


def _add_decoders(parser: argparse.ArgumentParser) -> None:
    """Adds the options that are for decoders."""
    group = flags.add_decoders(parser)
    group.add_argument(
        "--first-last",
        metavar="WHAT",
        help="what the first and the last block get, before all rules: dense, a"
        " sparsity or a pattern",
    )


EXAMPLES = """\
examples:
  flexhinm prune Qwen/Qwen2.5-0.5B --out pruned
  flexhinm prune all-MiniLM-L6-v2 --pattern flexhinm:v=32 --sparsity 0.75 \\
      --calibration sentences.txt --out pruned
  flexhinm prune all-MiniLM-L6-v2 --method alps --pattern 2:4 --sequential \\
      --target resid --calibration sentences.txt --resume half-way --out pruned
  flexhinm prune all-MiniLM-L6-v2 --method magnitude --pattern 2:4 \\
      --rule 'layer\\.0\\.=skip' --rule 'output=1:4' --out pruned
  flexhinm prune Llama-2-7b --method sparsegpt --memory 8GiB --out pruned \\
      --calibration hf:Salesforce/wikitext:wikitext-2-raw-v1:train:text
  flexhinm prune Llama-2-7b --method sparsegpt --out /shared/pruned \\
      --calibration text.txt --coordinator host0:4567 --processes 4 --process 0
  flexhinm prune Llama-2-7b --pattern flexhinm:v=32 --sparsity 0.7 --allocate owl \\
      --first-last dense --rule 'o_proj=0.5' --calibration text.txt --out pruned
"""


def _epilog() -> str:
    """What the registries hold, each with the first line of its docstring."""
    lines = ["patterns (2:4 is short for nm:n=2,m=4):"]
    for name, pattern in patterns.PATTERNS.items():
        options = ",".join(f"{letter}=" for letter in pattern.letters)
        lines += _entry(f"{name}:{options}" if options else name, pattern)
    lines += ["", "methods (a wrapper takes another one: refit(ria); alps:damp=0.02):"]
    known = {k: m for k, m in methods.METHODS.items() if m.needs != "gradients"}
    learned = {k: m for k, m in known.items() if choices.only_learned(m)}
    for name, method in known.items():
        if name not in learned:
            options = ", ".join(f"{field}=" for field in methods.options(method))
            lines += _entry(name, method, f"Options: {options}." if options else "")
    lines += [
        "",
        "methods that learn from a loss, with 'flexhinm learn' or from Python:",
    ]
    for name, method in learned.items():
        lines += _entry(name, method)
    return "\n".join([*lines, "", EXAMPLES])


def _entry(name: str, described: type, more: str = "") -> list[str]:
    first = (described.__doc__ or "").partition("\n")[0]
    wrapped = textwrap.TextWrapper(
        84, initial_indent=" " * 6, subsequent_indent=" " * 6
    )
    return [f"  {name}", *wrapped.wrap(first), *wrapped.wrap(more)]


def run(args: argparse.Namespace, console: Console) -> None:
    """Runs the command."""
    kind = kind_of(args.model)
    decoder = kind.reads is Reads.TEXT
    args.sequential = args.sequential or decoder
    asked = choices.check(args, kind)
    hosts.join(args)
    if not hosts.first():
        console = Console(quiet=True)
    if decoder or len(asked.examples):
        directory.note_builtin(args, console)
    with atomic.locked(args.out) if hosts.first() else contextlib.nullcontext():
        command = prune_decoder if decoder else prune_encoder
        command.run(args, asked, console)
