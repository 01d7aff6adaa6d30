"""`flexhinm prune`: a model directory in, a pruned one with a packed file out."""

import argparse
import dataclasses
import textwrap
from pathlib import Path
from typing import Any

import jax

from flexhinm_jax import __version__, checks, methods, patterns
from flexhinm_jax.cli import allocation, options, output, source, stream
from flexhinm_jax.cli.console import Console, bytes_text
from flexhinm_jax.io import atomic
from flexhinm_jax.pruning import apply, facts, prune, solve
from flexhinm_jax.pruning.allocate import budgets
from flexhinm_jax.pruning.share_orders import share_orders
from flexhinm_jax.pruning.statistics import calibrate
from flexhinm_jax.sequential.sequential import TARGETS, Layer, prune_sequential
from flexhinm_jax.tracing.discover import discover

BATCH = 32


@dataclasses.dataclass(frozen=True)
class Job:
    """What to do, checked before anything is computed.

    Attributes:
      method: with its pattern.
      sparsity: fraction of weights removed, or None.
      rules: regular expression on leaf paths -> pattern or "skip".
      exceptions: regular expression on leaf paths -> sparsity.
      text: calibration sentences; empty for a method that needs none.
    """

    method: methods.Method
    sparsity: float | None
    rules: dict[str, Any]
    exceptions: dict[str, float]
    text: list[str]


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "prune",
        help="prune a Hugging Face model directory",
        description=textwrap.dedent(f"""\
            Prunes the model in MODEL_DIR and writes DIR: the same files with zeros in
            place, {output.PACKED} with the weights as the sparse kernels read them, and
            {output.REPORT}. DIR appears complete or not at all.

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
    allocation.add_arguments(parser)
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
        "--share-orders",
        action="store_true",
        help="search one input order for all weights that read the same input, such as"
        " query, key and value; for N:M patterns",
    )
    add("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    add(
        "--limit",
        type=options.positive,
        metavar="N",
        help="use the first N sentences only (default: all)",
    )
    add(
        "--batch-size",
        type=options.positive,
        metavar="N",
        help="calibration sentences (or samples of a decoder) in one step (default:"
        f" {BATCH}, or {stream.BATCH})",
    )
    add(
        "--max-length",
        type=options.positive,
        metavar="N",
        help="cut sentences to N tokens (default: 128, or what the model reads)",
    )
    stream.add_arguments(parser)
    options.add_writing(parser)
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
  flexhinm prune Llama-2-7b --pattern flexhinm:v=32 --sparsity 0.7 --allocate owl \\
      --first-last dense --rule 'o_proj=0.5' --sequential --calibration text.txt \\
      --out pruned
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
    with atomic.locked(args.out):
        if decoder:
            plain = (job.method, job.sparsity, job.rules, job.exceptions)
            stream.run(args, console, *plain)
        else:
            _run_encoder(args, job, console)


def _run_encoder(args: argparse.Namespace, job: Job, console: Console) -> None:
    with console.step("reading the model"):
        model = source.load(args.model)
    result, notes = _prune(args, job, model, console)
    document = {
        "model": str(args.model),
        "out": str(args.out),
        "method": repr(job.method),
        "sparsity": job.sparsity,
        "rules": {regex: str(value) for regex, value in job.rules.items()},
        "allocate": str(args.allocate),
        "exceptions": job.exceptions,
        "seed": args.seed,
        "target": (args.target or "seq") if args.sequential else None,
        "sentences": len(job.text),
        "version": __version__,
        "notes": notes,
        **result.report.to_dict(),
    }
    with console.step(f"writing {args.out}"):
        output.write(args, result, model, document)
    console.result(document, *output.summary(args.out, result.report, notes))


def _check(args: argparse.Namespace, decoder: bool) -> Job:
    """Everything that can be refused before the model is read."""
    pattern = patterns.parse(args.pattern)
    method = methods.parse(args.method, pattern)
    checks.sparsity(args.sparsity, *pattern.sparsity_range(), pattern, "--sparsity")
    rules, exceptions = allocation.split(args.rule)
    options.check_out(args)
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
    if decoder:
        stream.check(args)
        return Job(method, args.sparsity, rules, exceptions, [])
    for option in stream.OPTIONS:
        if getattr(args, option):
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is for decoders; leave it out")
    if args.share_orders and args.sequential:
        raise ValueError("--share-orders is not for --sequential; drop one of them")
    if not args.sequential and (args.target or args.resume):
        option = "--target" if args.target else "--resume"
        raise ValueError(f"{option} is for --sequential; add that")
    plain = args.allocate in ("uniform", "global")
    if method.needs == "nothing" and not args.sequential and plain:
        return Job(method, args.sparsity, rules, exceptions, [])
    if args.calibration is None:
        asker = "--sequential" if args.sequential else f"--method {args.method}"
        asker = asker if plain else "--allocate owl"
        raise ValueError(
            f"{asker} needs --calibration TEXT, a file with one sentence a line"
        )
    text = source.read_text(args.calibration, args.limit)
    return Job(method, args.sparsity, rules, exceptions, text)


def _prune(
    args: argparse.Namespace, job: Job, model: source.Source, console: Console
) -> tuple[prune.Pruned, dict[str, str]]:
    """The result, and what a person should know about single weights."""
    uses = discover(model.apply_fn, model.params, *model.sample(), rules=job.rules)
    source.check_found(args.model, uses)
    steps: list[Any] = []
    if job.text:
        size = args.batch_size or BATCH
        found = source.tokenize(model, job.text, size, args.max_length)
        steps = [(batch.tokens, batch.mask) for batch in found]
    stats = None
    if steps and (not args.sequential or args.allocate != "uniform"):
        stats = calibrate(
            model.apply_fn,
            model.params,
            uses,
            console.track(steps, "calibrating", len(steps)),
            gram=job.method.needs == "gram" and not args.sequential,
            token_mask=source.real,
        )
    sparsity: Any = job.sparsity
    if args.allocate != "uniform" or job.exceptions:
        sparsity = budgets(
            job.method,
            model.params,
            uses,
            stats,
            sparsity,
            mode=args.allocate,
            exceptions=job.exceptions,
        )
    if args.sequential:
        return _in_order(args, job, model, steps, sparsity, console)
    with console.step(f"solving {len(uses.leaves)} weights"):
        key, method = jax.random.key(args.seed), job.method
        if args.share_orders:
            key, order_key = jax.random.split(key)
            method, stats = share_orders(method, order_key, model.params, uses, stats)
        states = solve.solve(method, key, model.params, uses, stats, sparsity)
        plans = apply.decide(method, states, model.params, uses)
    with console.step("packing"):
        result = prune.applied(plans, model.params, uses)
    return result, facts.notes(job.method, states, uses)


def _in_order(
    args: argparse.Namespace,
    job: Job,
    model: source.Source,
    steps: list[Any],
    sparsity: Any,
    console: Console,
) -> tuple[prune.Pruned, dict[str, str]]:
    """The same for --sequential."""
    notes: dict[str, str] = {}

    def progress(layer: Layer) -> None:
        console.progress(_line(layer))
        if layer.note:
            notes[layer.path] = layer.note

    with console.step("pruning the weights in order"):
        result = prune_sequential(
            model.apply_fn,
            model.params,
            steps,
            job.method,
            sparsity=sparsity,
            key=jax.random.key(args.seed),
            target=args.target or "seq",
            rules=job.rules,
            token_mask=source.real,
            progress=progress,
            resume=args.resume,
        )
    return result, notes


def _line(layer: Layer) -> str:
    """One line about a finished matrix."""
    at = "".join(f"[{':' if i is None else i}]" for i in layer.at)
    return (
        f"{layer.done}/{layer.total} {layer.path}{at}: error {layer.error:.4f},"
        f" {layer.seconds:.1f} s, {bytes_text(layer.held)} held"
    )
