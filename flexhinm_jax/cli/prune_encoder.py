"""`flexhinm prune` of an encoder of text or images: the whole model in memory."""

import argparse
import dataclasses
from typing import Any, NamedTuple

import jax

from flexhinm_jax.cli import directory, progress
from flexhinm_jax.cli.choices import Choices
from flexhinm_jax.cli.choices import document as document_of
from flexhinm_jax.cli.console import Console, report_table
from flexhinm_jax.cli.evaluate import evaluated
from flexhinm_jax.models.load import PACKED, Model, load
from flexhinm_jax.pruning import apply, prune, report, solve
from flexhinm_jax.pruning.allocate import budgets
from flexhinm_jax.pruning.apply import output_errors
from flexhinm_jax.pruning.share_orders import share_orders
from flexhinm_jax.pruning.statistics import calibrate, unseen_counts
from flexhinm_jax.sequential.cuts import Layer
from flexhinm_jax.sequential.sequential import prune_sequential
from flexhinm_jax.sequential.trained import Trained
from flexhinm_jax.tracing.discover import discover

BATCH_EXAMPLES = 32


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


def run(args: argparse.Namespace, choices: Choices, console: Console) -> None:
    """Reads the model whole, prunes it and writes it."""
    with console.step("reading the model"):
        model = load(args.model, tokenizer=len(choices.examples) > 0)
    choices = dataclasses.replace(choices, rules=directory.rules(model, choices.rules))
    result, notes, errors = _pruned(args, choices, model, console)
    if args.pack_values:
        result = prune.with_values(result, args.pack_values)
    result = directory.compared(result, model)
    document = document_of(args, choices) | {
        "images" if model.reads_images else "sentences": len(choices.examples),
        "commands": [args.written],
        "notes": notes,
        "errors": errors,
        **result.report.to_dict(),
    }
    with console.step(f"writing {args.out}"):
        directory.write(args, result, model, directory.texts(args, document))
    document, more = evaluated(args, document, console)
    console.result(
        document,
        report_table(result.report, errors, every=args.rows == "all"),
        "",
        *(f"{path}: {text}" for path, text in notes.items()),
        *directory.ending(args.out, result.report, PACKED),
        *more,
    )


def _pruned(
    args: argparse.Namespace,
    choices: Choices,
    model: Model,
    console: Console,
) -> Pruned:
    """Calibrates and prunes."""
    method = choices.method
    uses = discover(model.apply, model.params, *model.sample(), rules=choices.rules)
    uses = solve.fitting(method, uses, args.on_mismatch or "error")
    directory.check_uses(args.model, uses)
    steps: list[Any] = []
    if len(choices.examples):
        size = args.batch_size or BATCH_EXAMPLES
        steps = model.steps(choices.examples, size, args.max_length)
    stats = None
    if steps and (not args.sequential or args.allocate != "uniform"):
        stats = calibrate(
            model.apply,
            model.params,
            uses,
            console.track(steps, "calibrating", len(steps)),
            gram=method.needs == "gram" and not args.sequential,
            token_mask=model.token_mask,
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
        blind = unseen_counts(stats)
        result = prune.applied(plans, model.params, uses, blind)
    notes = report.notes(choices.method, states, uses)
    return Pruned(result, notes, output_errors(plans, model.params, uses, stats))


def _in_order(
    args: argparse.Namespace,
    choices: Choices,
    model: Model,
    steps: list[Any],
    sparsity: Any,
    console: Console,
) -> Pruned:
    """The same for --sequential."""
    notes: dict[str, str] = {}
    errors: dict[str, float] = {}

    def tell_layer(layer: Layer | Trained) -> None:
        if isinstance(layer, Trained):
            console.note(progress.window_text(layer))
            return
        console.progress(progress.layer_text(layer))
        tell(layer.done, layer.total)
        errors[layer.path] = layer.error
        if layer.note:
            notes[layer.path] = layer.note

    name = "pruning the weights in order (the first of a shape compiles)"
    with console.step(name, long=True) as tell:
        result = prune_sequential(
            model.apply,
            model.params,
            steps,
            choices.method,
            sparsity=sparsity,
            key=jax.random.key(args.seed),
            target=args.target or "seq",
            statistics=choices.statistics,
            reconstruct=choices.reconstruct,
            rules=choices.rules,
            on_mismatch=args.on_mismatch or "error",
            token_mask=model.token_mask,
            progress=tell_layer,
            resume=args.resume,
        )
    return Pruned(result, notes, errors)
