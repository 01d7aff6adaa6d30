"""`flexhinm prune`: a model directory in, a pruned one with a packed file out."""

import argparse
import dataclasses
import json
import os
import re
import textwrap
from pathlib import Path
from typing import Any

import jax

from flexhinm_jax import __version__, checks, methods, patterns
from flexhinm_jax.cli import source, stream
from flexhinm_jax.cli.console import Console, bytes_text, table
from flexhinm_jax.io import atomic, huggingface, packed
from flexhinm_jax.transforms import facts, oneshot, tree
from flexhinm_jax.transforms.allocate import budgets
from flexhinm_jax.transforms.calibrate import calibrate
from flexhinm_jax.transforms.discover import discover
from flexhinm_jax.transforms.report import Report
from flexhinm_jax.transforms.sequential import TARGETS, Layer, prune_sequential
from flexhinm_jax.transforms.sharing import share_orders

BATCH = 32
PACKED = "packed.safetensors"
REPORT = "report.json"

ACTIONS = ("skip", "prune")
"""What a rule may ask for besides a pattern; "prune" takes that of --pattern."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What to do, checked before anything is computed.

    Attributes:
      method: with its pattern.
      sparsity: fraction of weights removed, or None.
      rules: regular expression on leaf paths -> pattern or "skip".
      text: calibration sentences; empty for a method that needs none.
    """

    method: methods.Method
    sparsity: float | None
    rules: dict[str, Any]
    text: list[str]


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "prune",
        help="prune a Hugging Face model directory",
        description=textwrap.dedent(f"""\
            Prunes the model in MODEL_DIR and writes DIR: the same files with zeros in
            place, {PACKED} with the weights as the sparse kernels read them, and
            {REPORT}. DIR appears complete or not at all.

            A decoder (llama, mistral, qwen2, qwen3) is pruned block by block, which
            takes the memory of one block: give --sequential, and --memory for a limit.
            A run that is stopped or killed goes on by itself when the same command is
            given again: its state is in DIR.partial, beside DIR.
            """),
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL_DIR", help="model directory")
    add("--out", type=Path, metavar="DIR", required=True, help="directory to write")
    add("--method", default="wanda", metavar="NAME", help="see below (default: wanda)")
    add(
        "--pattern",
        required=True,
        metavar="PATTERN",
        help="which weights may stay, see below",
    )
    add(
        "--sparsity",
        type=float,
        metavar="S",
        help="fraction of weights removed, between 0 and 1; not needed where the "
        "pattern fixes it (2:4)",
    )
    add(
        "--calibration",
        type=Path,
        metavar="TEXT",
        help="UTF-8 text, one sentence a line; needed by methods that look at the "
        "inputs of the weights",
    )
    add(
        "--rule",
        action="append",
        default=[],
        metavar="REGEX=PATTERN",
        help="another pattern, or skip, or prune, for the weights whose name matches; "
        "repeatable, the first match wins ('flexhinm inspect' lists the names)",
    )
    add(
        "--sequential",
        action="store_true",
        help="prune in order of execution, every weight on what the pruned ones before"
        " it give; for sparsegpt, alps and wrappers",
    )
    add(
        "--target",
        choices=TARGETS,
        help="with --sequential: fit to the weight's own output (seq, the default), to"
        " that of the dense model (asym), or also repair the residual stream (resid,"
        " best from about 500 sentences on)",
    )
    add(
        "--resume",
        type=Path,
        metavar="DIR",
        help="with --sequential: keep finished weights in DIR, and go on behind those"
        " that are there",
    )
    add(
        "--allocate",
        choices=("uniform", "global"),
        default="uniform",
        help="the same sparsity for every weight, or more where less is lost, with the"
        " same total (default: uniform)",
    )
    add(
        "--share-orders",
        action="store_true",
        help="search one input order for all weights that read the same input, such as"
        " query, key and value; for N:M patterns",
    )
    add("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    add(
        "--limit",
        type=_positive,
        metavar="N",
        help="use the first N sentences only (default: all)",
    )
    add(
        "--batch-size",
        type=_positive,
        metavar="N",
        help="calibration sentences (or samples of a decoder) in one step (default:"
        f" {BATCH}, or {stream.BATCH})",
    )
    add(
        "--max-length",
        type=_positive,
        metavar="N",
        help="cut sentences to N tokens (default: 128, or what the model reads)",
    )
    stream.add_arguments(parser)
    add("--force", action="store_true", help="replace DIR if it is a model directory")
    add("-q", "--quiet", action="store_true", help="show errors only")
    add("--json", action="store_true", help="print the report as one JSON document")
    parser.set_defaults(run=run)


EXAMPLES = """\
examples:
  flexhinm prune all-MiniLM-L6-v2 --pattern flexhinm:v=32 --sparsity 0.75 \\
      --calibration sentences.txt --out pruned
  flexhinm prune all-MiniLM-L6-v2 --method alps --pattern 2:4 --sequential \\
      --target resid --calibration sentences.txt --resume half-way --out pruned
  flexhinm prune all-MiniLM-L6-v2 --method magnitude --pattern 2:4 \\
      --rule 'layer\\.0\\.=skip' --rule 'output=1:4' --out pruned
  flexhinm prune Llama-2-7b --method sparsegpt --pattern 2:4 --sequential \\
      --memory 8GiB --calibration text.txt --samples 128 --length 512 --out pruned
"""


def _epilog() -> str:
    """What the registries hold, each with the first line of its docstring."""
    lines = ["patterns (2:4 is short for nm:n=2,m=4):"]
    for name, pattern in patterns.PATTERNS.items():
        options = ",".join(f"{letter}=" for letter in pattern.letters)
        lines += _entry(f"{name}:{options}" if options else name, pattern)
    lines += ["", "methods (a wrapper takes another one: refit(ria)):"]
    for name, method in methods.METHODS.items():
        if method.needs != "gradients":
            lines += _entry(name, method)
    return "\n".join([*lines, "", EXAMPLES])


def _entry(name: str, described: type) -> list[str]:
    first = (described.__doc__ or "").partition("\n")[0]
    indent = " " * 6
    return [
        f"  {name}",
        *textwrap.wrap(first, 84, initial_indent=indent, subsequent_indent=indent),
    ]


def run(args: argparse.Namespace, console: Console) -> None:
    """Runs the command."""
    decoder = args.model.is_dir() and source.is_decoder(args.model)
    job = _check(args, decoder)
    if decoder:
        stream.run(args, console, job.method, job.sparsity, job.rules)
        return
    with console.step("reading the model"):
        model = source.load(args.model)
    result, notes = _prune(args, job, model, console)
    document = {
        "model": str(args.model),
        "out": str(args.out),
        "method": repr(job.method),
        "sparsity": job.sparsity,
        "rules": {regex: str(value) for regex, value in job.rules.items()},
        "seed": args.seed,
        "target": (args.target or "seq") if args.sequential else None,
        "sentences": len(job.text),
        "version": __version__,
        "notes": notes,
        **result.report.to_dict(),
    }
    with console.step(f"writing {args.out}"):
        _write(args, result, model, document)
    console.result(document, *_summary(args.out, result.report, notes))


def _check(args: argparse.Namespace, decoder: bool) -> Job:
    """Everything that can be refused before the model is read."""
    pattern = patterns.parse(args.pattern)
    method = methods.parse(args.method, pattern)
    checks.sparsity(args.sparsity, *pattern.sparsity_range(), pattern, "--sparsity")
    rules = dict(map(_rule, args.rule))
    here, there = (os.path.realpath(p) for p in (args.model, args.out))
    if os.path.commonpath([here, there]) in (here, there):
        raise ValueError(
            f"--out {args.out} is {args.model}, or one lies inside the other; choose a"
            " directory beside it"
        )
    atomic.check_directory(args.out, overwrite=args.force)
    if method.needs == "gradients":
        raise ValueError(
            f"--method {args.method} needs gradients of a loss, which the command line"
            " has not; use it from Python, or choose another method"
        )
    low, high = pattern.sparsity_range()
    if args.allocate != "uniform" and low == high:
        raise ValueError(
            f"--allocate {args.allocate}: --pattern {args.pattern} has only one"
            f" sparsity, {low:g}, so there is nothing to spread; choose one that can"
            " have several (flexhinm, hinm, vector), or leave --allocate out"
        )
    if args.allocate != "uniform" and args.sequential:
        raise ValueError(
            f"--allocate {args.allocate} is not for --sequential; leave one of them out"
        )
    if decoder:
        stream.check(args)
        return Job(method, args.sparsity, rules, [])
    for option in ("memory", "length", "samples", "dtype", "pack"):
        if getattr(args, option):
            raise ValueError(f"--{option} is for decoders; leave it out")
    if args.share_orders and args.sequential:
        raise ValueError("--share-orders is not for --sequential; drop one of them")
    if not args.sequential and (args.target or args.resume):
        option = "--target" if args.target else "--resume"
        raise ValueError(f"{option} is for --sequential; add that")
    if method.needs == "nothing" and not args.sequential:
        return Job(method, args.sparsity, rules, [])
    if args.calibration is None:
        asker = "--sequential" if args.sequential else f"--method {args.method}"
        raise ValueError(
            f"{asker} needs --calibration TEXT, a file with one sentence a line"
        )
    text = source.read_text(args.calibration, args.limit)
    return Job(method, args.sparsity, rules, text)


def _prune(
    args: argparse.Namespace, job: Job, model: source.Source, console: Console
) -> tuple[oneshot.Pruned, dict[str, str]]:
    """The result, and what a person should know about single weights."""
    uses = discover(model.apply_fn, model.params, *model.sample(), rules=job.rules)
    if not uses.leaves:
        raise ValueError(
            f"{args.model}: no weight is left to prune; 'flexhinm inspect' lists them"
            " all, and --rule may skip too many"
        )
    stats = None
    if job.text:
        size = args.batch_size or BATCH
        batches = source.tokenize(model, job.text, size, args.max_length)
        steps = ((batch.tokens, batch.mask) for batch in batches)
        if args.sequential:
            notes: dict[str, str] = {}

            def progress(layer: Layer) -> None:
                console.progress(_line(layer))
                if layer.note:
                    notes[layer.path] = layer.note

            with console.step(f"pruning {len(uses.leaves)} weights in order"):
                result = prune_sequential(
                    model.apply_fn,
                    model.params,
                    steps,
                    job.method,
                    sparsity=job.sparsity,
                    key=jax.random.key(args.seed),
                    target=args.target or "seq",
                    rules=job.rules,
                    token_mask=lambda tokens, mask: mask != 0,
                    progress=progress,
                    resume=args.resume,
                )
            return result, notes
        stats = calibrate(
            model.apply_fn,
            model.params,
            uses,
            console.track(steps, "calibrating", len(batches)),
            gram=job.method.needs == "gram",
            token_mask=lambda tokens, mask: mask != 0,
        )
    with console.step(f"solving {len(uses.leaves)} weights"):
        key = jax.random.key(args.seed)
        sparsity: Any = job.sparsity
        if args.allocate != "uniform":
            sparsity = budgets(
                job.method, model.params, uses, stats, sparsity, mode=args.allocate
            )
        method = job.method
        if args.share_orders:
            key, order_key = jax.random.split(key)
            method, stats = share_orders(method, order_key, model.params, uses, stats)
        states = tree.solve(method, key, model.params, uses, stats, sparsity)
        plans = tree.decide(method, states, model.params, uses)
    with console.step("packing"):
        result = oneshot.applied(plans, model.params, uses)
    return result, facts.notes(job.method, states, uses)


def _line(layer: Layer) -> str:
    """One line about a finished matrix."""
    at = "".join(f"[{':' if i is None else i}]" for i in layer.at)
    return (
        f"{layer.done}/{layer.total} {layer.path}{at}: error {layer.error:.4f},"
        f" {layer.seconds:.1f} s, {bytes_text(layer.held)} held"
    )


def _write(
    args: argparse.Namespace,
    result: oneshot.Pruned,
    model: source.Source,
    document: dict[str, Any],
) -> None:
    with atomic.directory(args.out, overwrite=args.force) as folder:
        huggingface.write(
            folder, result.params, source=model.checkpoint, overwrite=True
        )
        packed.write_packed(folder / PACKED, result.packed, overwrite=True)
        (folder / REPORT).write_text(json.dumps(document, indent=2) + "\n")


def _summary(out: Path, result: Report, notes: dict[str, str]) -> list[Any]:
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


def _rule(text: str) -> tuple[str, Any]:
    """(regex, pattern or action) of one --rule; the regex may hold "=" too."""
    first: ValueError | None = None
    cut = text.find("=")
    while cut > 0:
        regex, value = text[:cut], text[cut + 1 :]
        try:
            action = value if value in ACTIONS else patterns.parse(value)
        except ValueError as error:
            first = first or error
            cut = text.find("=", cut + 1)
            continue
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(
                f"--rule {text!r}: {regex!r} is no regular expression: {error}"
            ) from error
        return regex, action
    if first is None:
        raise ValueError(f"--rule {text!r} is not REGEX=PATTERN or REGEX=skip")
    raise ValueError(f"--rule {text!r}: {first}, {', '.join(ACTIONS)}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value
