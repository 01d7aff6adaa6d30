"""`flexhinm prune`: a model directory in, a pruned one with a packed file out.

An encoder is read whole and pruned in memory. A decoder is pruned block by block, in
bounded memory, by `streaming`.
"""

import argparse
import dataclasses
import math
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flexhinm_jax import __version__, checks, methods, patterns
from flexhinm_jax.cli import directory, evaluate, flags, recipe
from flexhinm_jax.cli.console import Console, bytes_text, report_table
from flexhinm_jax.cli.directory import PACKED, REPORT
from flexhinm_jax.cli.recipe import RECIPE
from flexhinm_jax.io import atomic
from flexhinm_jax.models import decoder
from flexhinm_jax.pruning import apply, prune, report, solve
from flexhinm_jax.pruning.allocate import budgets
from flexhinm_jax.pruning.share_orders import share_orders
from flexhinm_jax.pruning.statistics import calibrate, unseen
from flexhinm_jax.sequential.request import TARGETS
from flexhinm_jax.sequential.sequential import Layer, prune_sequential
from flexhinm_jax.streaming import streaming, work
from flexhinm_jax.streaming.blocks import Blocks, open_blocks
from flexhinm_jax.streaming.memory import Budget
from flexhinm_jax.tracing.discover import discover
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import Plan, Stats, Uses

BATCH_SENTENCES = 32
BATCH_SAMPLES = 4
SAMPLES = 128
LENGTH = 512

ONLY_ENCODERS = {
    "resume": "a decoder goes on by itself from OUT.partial beside --out",
    "limit": "give --samples",
    "max_length": "give --length",
    "share_orders": "it is not for --sequential",
    "on_mismatch": "leave such weights dense with --rule 'REGEX=skip'",
}
ONLY_DECODERS = ("memory", "length", "samples", "dtype", "pack", "first_last")


@dataclasses.dataclass(frozen=True)
class Choices:
    """What to do, checked before anything is computed.

    Attributes:
      method: with its pattern.
      sparsity: fraction of weights removed, or None.
      rules: regular expression on leaf paths -> pattern or "skip".
      exceptions: regular expression on leaf paths -> sparsity.
      text: calibration sentences of an encoder; empty for a method that needs none.
    """

    method: methods.Method
    sparsity: float | None
    rules: dict[str, Any]
    exceptions: dict[str, float]
    text: list[str]


class Pruned(NamedTuple):
    """A pruned encoder.

    Attributes:
      result: of the library.
      notes: path -> what a person should know about a weight.
      errors: path -> relative error of the outputs, where that is known.
    """

    result: prune.Pruned
    notes: dict[str, str]
    errors: dict[str, float]


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
        f" {BATCH_SENTENCES}, or {BATCH_SAMPLES})",
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
    flags.add_written(parser)
    parser.set_defaults(run=run)


def _add_what(parser: argparse.ArgumentParser) -> None:
    """Adds what stays of which weights, and who decides."""
    add = parser.add_argument
    add(
        "--method",
        metavar="NAME",
        help="see below (default: staged_alps for patterns of columns and groups, alps"
        " for others)",
    )
    add(
        "--pattern",
        default="2:4",
        metavar="PATTERN",
        help="which weights may stay, see below (default: 2:4)",
    )
    add(
        "--sparsity",
        type=float,
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
    add(
        "--on-mismatch",
        choices=("error", "skip"),
        help="weights whose sizes the pattern does not divide: refuse them (error), or"
        " leave them dense with a reason in the report (skip); default error",
    )


def _add_decoders(parser: argparse.ArgumentParser) -> None:
    """Adds the options that are for decoders."""
    add = parser.add_argument_group("decoders").add_argument
    add(
        "--memory",
        type=flags.size,
        metavar="SIZE",
        help="most memory to take besides that of the interpreter, such as 8GiB; hidden"
        " states that do not fit go to disk",
    )
    add(
        "--length",
        type=flags.positive,
        metavar="N",
        help=f"tokens of a sample (default: {LENGTH}, or what the model reads)",
    )
    add(
        "--samples",
        type=flags.positive,
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
  flexhinm prune Llama-2-7b --pattern flexhinm:v=32 --sparsity 0.7 --allocate owl \\
      --first-last dense --rule 'o_proj=0.5' --calibration text.txt --out pruned
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
    is_decoder = args.model.is_dir() and directory.is_decoder(args.model)
    args.sequential = args.sequential or is_decoder
    choices = _check(args, is_decoder)
    if is_decoder or choices.text:
        directory.note_builtin(args, console)
    with atomic.locked(args.out):
        prune_model = _prune_decoder if is_decoder else _prune_encoder
        prune_model(args, choices, console)


def _check(args: argparse.Namespace, is_decoder: bool) -> Choices:
    """Everything that can be refused before the model is read."""
    pattern = patterns.parse(args.pattern)
    args.method = args.method or best(pattern)
    method = methods.parse(args.method, pattern)
    low, high = pattern.sparsity_range()
    checks.sparsity(args.sparsity, low, high, pattern, "--sparsity")
    rules, exceptions = flags.rules(args.rule)
    directory.check_out(args)
    if method.needs == "gradients":
        raise ValueError(
            f"--method {args.method} needs gradients of a loss, which the command line"
            " has not; use it from Python, or choose another method"
        )
    if args.allocate != "uniform" and low == high:
        raise ValueError(
            f"--allocate {args.allocate}: --pattern {args.pattern} has only one"
            f" sparsity, {low:g}, so there is nothing to spread; choose one that can"
            " have several (flexhinm, hinm, vector), or leave --allocate out"
        )
    check = _check_decoder if is_decoder else _check_encoder
    text = check(args, method)
    return Choices(method, args.sparsity, rules, exceptions, text)


def best(pattern: patterns.Pattern) -> str:
    """The method that lost least in our measurements, of those that do not train."""
    low, high = pattern.sparsity_range()
    return "staged_alps" if pattern.form and low < high else "alps"


def _check_decoder(args: argparse.Namespace, method: methods.Method) -> list[str]:
    del method
    for option, why in ONLY_ENCODERS.items():
        if getattr(args, option):
            raise ValueError(f"--{option.replace('_', '-')} is for encoders; {why}")
    return []


def _check_encoder(args: argparse.Namespace, method: methods.Method) -> list[str]:
    """The calibration sentences that are needed."""
    for option in ONLY_DECODERS:
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
        return []
    return directory.read_sentences(args.calibration, args.limit)


def _document(args: argparse.Namespace, choices: Choices) -> dict[str, Any]:
    """What decides about the result, as the report says it."""
    return {
        "model": str(args.model),
        "out": str(args.out),
        "method": repr(choices.method),
        "sparsity": choices.sparsity,
        "rules": {regex: str(value) for regex, value in choices.rules.items()},
        "allocate": str(args.allocate),
        "exceptions": choices.exceptions,
        "seed": args.seed,
        "target": (args.target or "seq") if args.sequential else None,
        "version": __version__,
    }


def _texts(args: argparse.Namespace, document: dict[str, Any]) -> dict[str, str]:
    """What is written beside the model: the report, and how to get it again."""
    return {REPORT: directory.report_text(document), RECIPE: recipe.text(args)}


def _evaluated(
    args: argparse.Namespace, document: dict[str, Any], console: Console
) -> tuple[dict[str, Any], list[Any]]:
    """The document and lines for people, with what --eval asks for."""
    if args.eval is None:
        return document, []
    asked = argparse.Namespace(
        text=args.eval, length=None, stride=None, limit=None, batch_size=None
    )
    figures, *lines = evaluate.measure(asked, [args.model, args.out], console)
    return document | {"evaluation": figures}, ["", *lines]


def _prune_encoder(
    args: argparse.Namespace, choices: Choices, console: Console
) -> None:
    """Reads the model whole, prunes it and writes it."""
    with console.step("reading the model"):
        model = directory.read_encoder(args.model)
    result, notes, errors = _pruned(args, choices, model, console)
    document = _document(args, choices) | {
        "sentences": len(choices.text),
        "notes": notes,
        "errors": errors,
        **result.report.to_dict(),
    }
    with console.step(f"writing {args.out}"):
        directory.write(args, result, model, _texts(args, document))
    document, evaluated = _evaluated(args, document, console)
    console.result(
        document,
        report_table(result.report, errors, every=args.rows == "all"),
        "",
        *(f"{path}: {text}" for path, text in notes.items()),
        *directory.ending(args.out, result.report, PACKED),
        *evaluated,
    )


def _pruned(
    args: argparse.Namespace,
    choices: Choices,
    model: directory.Encoder,
    console: Console,
) -> Pruned:
    """Calibrates and prunes."""
    method = choices.method
    uses = discover(model.apply_fn, model.params, *model.sample(), rules=choices.rules)
    uses = solve.fitting(method, uses, args.on_mismatch or "error")
    directory.check_uses(args.model, uses)
    steps: list[Any] = []
    if choices.text:
        size = args.batch_size or BATCH_SENTENCES
        batches = model.tokenize(choices.text, size, args.max_length)
        steps = [(batch.tokens, batch.mask) for batch in batches]
    stats = None
    if steps and (not args.sequential or args.allocate != "uniform"):
        stats = calibrate(
            model.apply_fn,
            model.params,
            uses,
            console.track(steps, "calibrating", len(steps)),
            gram=method.needs == "gram" and not args.sequential,
            token_mask=directory.real,
        )
    sparsity: Any = choices.sparsity
    if args.allocate != "uniform" or choices.exceptions:
        sparsity = budgets(
            method,
            model.params,
            uses,
            stats,
            sparsity,
            mode=args.allocate,
            exceptions=choices.exceptions,
        )
    if args.sequential:
        return _in_order(args, choices, model, steps, sparsity, console)
    name = f"solving {len(uses.leaves)} weights (the first of a shape compiles)"
    with console.step(name, long=True) as tell:
        key = jax.random.key(args.seed)
        if args.share_orders:
            key, order_key = jax.random.split(key)
            method, stats = share_orders(method, order_key, model.params, uses, stats)
        states = solve.solve(
            method, key, model.params, uses, stats, sparsity, progress=tell
        )
        plans = apply.decide(method, states, model.params, uses)
    with console.step("packing"):
        blind = {path: int(unseen(one).sum()) for path, one in (stats or {}).items()}
        result = prune.applied(plans, model.params, uses, blind)
    notes = report.notes(choices.method, states, uses)
    return Pruned(result, notes, _errors(plans, model.params, uses, stats))


def _errors(
    plans: Mapping[str, Plan],
    params: Any,
    uses: Uses,
    stats: Mapping[str, Stats] | None,
) -> dict[str, float]:
    """Path -> || X (W' - W) ||^2 / || X W ||^2, where the Gram matrix is known."""
    errors, leaves = {}, Leaves.of(params)
    for path, use in uses.leaves.items():
        gram = None if stats is None or path not in stats else stats[path].gram
        if gram is not None:
            before = leaves.matrix(use).astype(jnp.float32)
            lost = apply.dense_weight(plans[path]).astype(jnp.float32) - before
            # A weight that saw no input has lost nothing of its outputs.
            total = max(float(_squared(before, gram)), 1e-30)
            errors[path] = float(_squared(lost, gram)) / total
    return errors


def _squared(w: Any, gram: Any) -> Any:
    """|| X W^T ||^2 from the Gram matrix of X, over a whole stack."""
    return jnp.sum(jnp.matmul(w, gram) * w, dtype=jnp.float32)


def _in_order(
    args: argparse.Namespace,
    choices: Choices,
    model: directory.Encoder,
    steps: list[Any],
    sparsity: Any,
    console: Console,
) -> Pruned:
    """The same for --sequential."""
    notes: dict[str, str] = {}
    errors: dict[str, float] = {}

    def progress(layer: Layer) -> None:
        console.progress(layer_text(layer))
        tell(layer.done, layer.total)
        errors[layer.path] = layer.error
        if layer.note:
            notes[layer.path] = layer.note

    name = "pruning the weights in order (the first of a shape compiles)"
    with console.step(name, long=True) as tell:
        result = prune_sequential(
            model.apply_fn,
            model.params,
            steps,
            choices.method,
            sparsity=sparsity,
            key=jax.random.key(args.seed),
            target=args.target or "seq",
            rules=choices.rules,
            on_mismatch=args.on_mismatch or "error",
            token_mask=directory.real,
            progress=progress,
            resume=args.resume,
        )
    return Pruned(result, notes, errors)


def _prune_decoder(
    args: argparse.Namespace, choices: Choices, console: Console
) -> None:
    """Prunes and writes block by block."""
    blocks = open_blocks(args.model)
    if args.first_last:
        choices = _with_first_last(choices, args.first_last, blocks)
    tokens = _samples(args, blocks)
    notes: dict[str, str] = {}

    def progress(done: streaming.Told) -> None:
        if isinstance(done, Budget):
            console.note(plan_text(done, tokens.shape))
        elif isinstance(done, Layer):
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
        return _document(args, choices) | {
            "budgets": dict(result.targets),
            "samples": tokens.shape[0],
            "length": tokens.shape[1],
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
            streaming.Request(
                method=choices.method,
                key=jax.random.key(args.seed),
                sparsity=choices.sparsity,
                rules=choices.rules,
                target=args.target or "seq",
            ),
            spread=streaming.Spread(args.allocate, choices.exceptions),
            limits=streaming.Limits(
                args.memory,
                args.batch_size or BATCH_SAMPLES,
                args.dtype or "checkpoint",
            ),
            output=streaming.Output(
                args.pack,
                args.force,
                lambda made: _texts(args, document(made)),
            ),
            progress=progress,
        )
    except BaseException:
        if partial.exists():
            console.note(f"{partial} is kept: the same command goes on from there")
        raise
    shown, evaluated = _evaluated(args, document(result), console)
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
        *directory.ending(args.out, result.report),
        *evaluated,
    )


def _with_first_last(choices: Choices, what: str, blocks: Blocks) -> Choices:
    """The choices with a rule for the first and the last block before all others."""
    first, last = map(decoder.block_prefix, (0, blocks.count - 1))
    regex = f"^({re.escape(first)}|{re.escape(last)})"
    rules, exceptions = flags.rules([f"{regex}={what}"])
    return dataclasses.replace(
        choices,
        rules=rules | choices.rules,
        exceptions=exceptions | choices.exceptions,
    )


def _samples(args: argparse.Namespace, blocks: Blocks) -> Any:
    """The calibration text as i32[samples, length]."""
    longest = blocks.config.max_position_embeddings or LENGTH
    length = args.length or min(LENGTH, longest)
    if length > longest:
        raise ValueError(
            f"--length {length} is more than this model reads:"
            f" max_position_embeddings={longest}"
        )
    return directory.samples(
        args.model,
        directory.read_text(args.calibration),
        length,
        args.samples,
        SAMPLES,
        blocks.config.vocab_size,
    )


def plan_text(plan: Budget, shape: tuple[int, ...]) -> str:
    """The plan of memory for people."""
    lines = [f"planned memory for {shape[0]} samples of {shape[1]} tokens:"]
    lines += [f"  {name:<28}{bytes_text(value):>10}" for name, value in plan.rows()]
    if plan.limit is not None:
        lines.append(f"  {'limit':<28}{bytes_text(plan.limit):>10}")
    return "\n".join(lines)


def budgets_text(made: streaming.Allocated, blocks: Blocks) -> str:
    """The sparsity of every block, in one paragraph."""
    shown = []
    for layer in range(blocks.count):
        keys = [key for key in blocks.keys(layer) if key in made.sparsity]
        sizes = [math.prod(blocks.index.shape(key)) for key in keys]
        pairs = zip(keys, sizes, strict=True)
        removed = sum(made.sparsity[key] * size for key, size in pairs)
        shown.append(f"{removed / sum(sizes):.3f}" if keys else "dense")
    return f"sparsity of the blocks: {' '.join(shown)}"


def layer_text(layer: Layer) -> str:
    """One line about a finished matrix."""
    at = "".join(f"[{':' if i is None else i}]" for i in layer.at)
    return (
        f"{layer.done}/{layer.total} {layer.path}{at}: error {layer.error:.4f},"
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
