"""`flexhinm learn`: masks of a model directory, by distilling its own outputs.

An encoder is learned as a whole here, a decoder too where that is asked for; else it is
learned block by block, in `learn_decoder`.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexhinm_jax import atomic, checks, patterns
from flexhinm_jax.cli import directory, flags, learn_decoder, prune_decoder
from flexhinm_jax.cli.choices import examples
from flexhinm_jax.cli.console import Console, report_table
from flexhinm_jax.cli.directory import REPORT
from flexhinm_jax.cli.learn_decoder import Choices
from flexhinm_jax.jax_versions import on_device
from flexhinm_jax.methods import LearnedMethod
from flexhinm_jax.models.load import PACKED, Examples, Kind, Model, Reads, kind_of, load
from flexhinm_jax.pruning import apply, prune
from flexhinm_jax.pruning.statistics import calibrate
from flexhinm_jax.tracing.discover import discover
from flexhinm_jax.training import few_steps, objectives
from flexhinm_jax.training.fit import fit

BATCH_SENTENCES = 16
LOOKS = 20  # validations of the hard masks in a run
HELD = 0.125  # share of the batches that validate

OF_BLOCKS = ("target", "weights_rate", "memory", "dtype")
"""Options of decoders that are learned block by block."""


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = flags.command(
        commands,
        "learn",
        help="learn the masks of a Hugging Face model directory",
        description=f"""\
            Learns which weights of the model in MODEL stay and leaves the weights
            as they are (but for --weights-rate): the outputs on the calibration text
            are to be those of the dense model. Writes DIR as 'flexhinm prune' does:
            zeros in place, {PACKED} and {REPORT}.

            A decoder is learned block by block, in the memory of one block: the
            block is to give what the dense block gives on the hidden states of the
            text. A run that is stopped or killed goes on by itself when the same
            command is given again. With --window model all of it is in memory, and is
            to predict what the dense model predicts; --resume keeps checkpoints.
            """,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    flags.add_model(parser)
    add(
        "--method",
        default="maskllm",
        choices=list(few_steps.RATES),
        help="default: maskllm",
    )
    add(
        "--pattern",
        default="2:4",
        metavar="PATTERN",
        help="which weights may stay: 2:4 (default), tiles:tile=64 (patch) ...",
    )
    add("--sparsity", type=flags.fraction, metavar="S", help="as in 'flexhinm prune'")
    flags.add_calibration(parser, "; an eighth of it validates the masks")
    add(
        "--steps",
        type=flags.positive,
        default=300,
        metavar="N",
        help="of the whole model, or of every block of a decoder (default: 300)",
    )
    add("--rate", type=float, metavar="R", help="learning rate; default by method")
    add(
        "--noise",
        action="store_true",
        help="sample gates, as published, with Adam; for hard_concrete, maskllm and"
        " patch (default: choices without noise, which need fewer steps)",
    )
    add(
        "--start",
        metavar="NAME",
        help="method whose masks come first, for maskllm and maskpro; own: that of"
        " their scores (default: refine_mask where the pattern allows it)",
    )
    add(
        "--resume",
        type=Path,
        metavar="DIR",
        help="keep checkpoints in DIR, and continue after the newest one there; for"
        " what is learned whole",
    )
    add(
        "--rule",
        action="append",
        default=[],
        metavar="REGEX=PATTERN",
        help="as in 'flexhinm prune', but no sparsities",
    )
    flags.add_sentences(
        parser,
        f"sentences (or samples of a decoder) of a step (default: {BATCH_SENTENCES}, or"
        f" {flags.BATCH_SAMPLES}; 1 with --window model)",
    )
    _add_decoders(parser)
    flags.add_pack_values(parser)
    flags.add_written(parser)
    parser.set_defaults(run=run)


def _add_decoders(parser: argparse.ArgumentParser) -> None:
    """Adds the options that are for decoders."""
    add = flags.add_decoders(parser).add_argument
    add(
        "--window",
        choices=("block", "part", "model"),
        help="whose outputs are compared with the dense ones: those of a block (the"
        " default), those of its attention as well (part), or the predictions of the"
        " whole model, which it then holds in memory (model)",
    )
    add(
        "--weights-rate",
        type=float,
        metavar="R",
        help="train the weights that stay too, norms and biases with them, at this"
        " rate; for hard_concrete (default: weights stay as they are)",
    )
    add(
        "--target",
        choices=("seq", "asym"),
        help="what a block is to give: what the dense block gives on the same input"
        " (seq, the default), or what the dense model gives there (asym)",
    )


EXAMPLES = """\
examples:
  flexhinm learn all-MiniLM-L6-v2 --pattern 2:4 --calibration sentences.txt --out masked
  flexhinm learn all-MiniLM-L6-v2 --method patch --pattern tiles:tile=128 \\
      --sparsity 0.35 --calibration sentences.txt --resume half-way --out masked
  flexhinm learn Qwen2.5-0.5B --calibration text.txt --memory 8GiB --out masked
  flexhinm learn Qwen2.5-0.5B --window model --calibration text.txt --out masked
"""


def run(args: argparse.Namespace, console: Console) -> None:
    """Runs the command."""
    kind = kind_of(args.model)
    choices = check(args, kind)
    decoder = kind.reads is Reads.TEXT
    given = [] if decoder else examples(args, kind)
    directory.note_builtin(args, console)
    with atomic.locked(args.out), atomic.locked(args.resume or args.out):
        if _is_whole(args, kind):
            _run(args, choices, given, console)
        else:
            learn_decoder.run(args, choices, console)


def _is_whole(args: argparse.Namespace, kind: Kind) -> bool:
    """Whether the model is learned as a whole, not block by block."""
    return kind.reads is not Reads.TEXT or args.window == "model"


def _run(
    args: argparse.Namespace, choices: Choices, text: Examples, console: Console
) -> None:
    with console.step("reading the model"):
        model = load(args.model)
    if model.is_decoder:
        batches = prune_decoder.batches(args, args.batch_size or 1)
        samples, length = sum(len(x) for (x,) in batches), batches[0][0].shape[1]
        told = {"window": "model", "samples": samples, "length": length}
    else:
        size = args.batch_size or BATCH_SENTENCES
        batches = model.steps(text, size, args.max_length)
        told = {"images" if model.reads_images else "sentences": len(text)}
    result, history = _learn(args, choices, batches, model, console)
    result = directory.compared(result, model)
    first, best = history[0]["value"], min(entry["value"] for entry in history)
    document = learn_decoder.document(args, choices) | {
        **told,
        "validation": {"first": first, "best": best},
        "history": [{k: v for k, v in e.items() if v == v} for e in history],
        **result.report.to_dict(),
    }
    with console.step(f"writing {args.out}"):
        directory.write(args, result, model, directory.texts(args, document))
    form = directory.packed_name(args, decoder=model.is_decoder, whole=True)
    console.result(
        document,
        report_table(result.report, packed=bool(form), every=args.rows == "all"),
        "",
        *directory.ending(args.out, result.report, form),
        f"loss on held-back data: {first:.4f} of the first masks, {best:.4f} now",
    )


def check(args: argparse.Namespace, kind: Kind) -> Choices:
    """Everything that can be refused before the model is read."""
    decoder, whole = kind.reads is Reads.TEXT, _is_whole(args, kind)
    pattern = patterns.parse(args.pattern)
    method = few_steps.method(args.method, pattern, args.noise)
    checks.sparsity(
        args.sparsity, *pattern.sparsity_range(), pattern, f"--pattern {args.pattern}"
    )
    rate = few_steps.rate(args.method, args.noise) if args.rate is None else args.rate
    for name, value in (("rate", rate), ("weights-rate", args.weights_rate)):
        if value is not None:
            flags.check_rate(name, value)
    directory.check_out(args)
    flags.check_kind(args, kind.reads, but=("resume",) if whole else ())
    blocks = "masks that are learned block by block; leave it or --window model out"
    reason = blocks if decoder else "decoders; leave it out"
    for option in (*OF_BLOCKS, *(() if decoder else ("window",))) if whole else ():
        if getattr(args, option):
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is for {reason}")
    fitted = isinstance(method, LearnedMethod) and method.frozen_weights
    if whole and not fitted:
        only = "" if decoder else ", which is for decoders"
        raise ValueError(
            f"--method {args.method} learns block by block{only}; choose another method"
            + " or leave --window model out" * decoder
        )
    start = few_steps.start(args.start, method)
    rules, numbers = flags.rules(args.rule)
    if numbers:
        raise ValueError(
            f"--rule {next(iter(numbers))}=...: 'flexhinm learn' takes one sparsity for"
            " all weights; give a pattern or skip"
        )
    return Choices(method, start, rate, rules)


def _learn(
    args: argparse.Namespace,
    choices: Choices,
    batches: Sequence[tuple[Any, ...]],
    model: Model,
    console: Console,
) -> tuple[prune.Pruned, list[dict[str, float]]]:
    """The result, and the validations on the way."""
    params, rules = model.params, directory.rules(model, choices.rules)
    uses = discover(model.apply, params, *model.sample(), rules=rules)
    directory.check_uses(args.model, uses)
    steps = [tuple(map(on_device, batch)) for batch in batches]
    stats = calibrate(
        model.apply,
        params,
        uses,
        console.track(steps, "calibrating", len(steps)),
        token_mask=model.token_mask,
    )
    key, fit_key, mix_key = jax.random.split(jax.random.key(args.seed), 3)
    with console.step(f"solving {len(uses.leaves)} weights", long=True):
        states = few_steps.first_states(
            choices.method, choices.start, key, params, uses, stats, args.sparsity
        )
    order = np.asarray(jax.random.permutation(mix_key, len(steps)))
    steps = [steps[k] for k in order]
    held = math.ceil(HELD * len(steps)) if len(steps) > 1 else 0
    loss_fn = objectives.distillation(
        model.apply,
        kind="cosine" if model.kind.reads is Reads.SENTENCES else "kl",
        token_mask=model.token_mask,
    )
    if model.is_decoder:  # a prediction of every token would take too much memory
        loss_fn = objectives.beside(model.apply, loss_fn)
        learned_from = [(params, *batch) for batch in steps]
    else:
        with console.step(f"the dense model reads {len(steps)} batches", long=True):
            learned_from = objectives.taught(model.apply, params, steps)
    value = jax.jit(loss_fn)

    def evaluate(now: Any) -> float:
        parts = learned_from[:held] or learned_from
        return float(np.mean([value(now, *batch) for batch in parts]))

    def progress(entry: dict[str, float]) -> None:
        console.progress(
            f"step {entry['step']:.0f} of {args.steps}: loss {entry['loss']:.4f}, held"
            f" back {entry['value']:.4f}"
        )
        tell(entry["step"], args.steps)

    tx = few_steps.optimiser(args.method, choices.rate, args.steps, args.noise)
    name = f"learning for {args.steps} steps (the first compiles)"
    with console.step(name, long=True) as tell:
        states, history = fit(
            choices.method,  # pyright: ignore[reportArgumentType]
            states,
            loss_fn,
            params,
            uses,
            learned_from[held:],
            key=fit_key,
            tx=tx,
            steps=args.steps,
            evaluate=evaluate,
            every=max(1, args.steps // LOOKS),
            progress=progress,
            checkpoints=args.resume,
            resume="auto" if args.resume else False,
            config={"rate": choices.rate, "method": args.method, "noise": args.noise},
        )
    with console.step("packing"):
        plans = apply.decide(choices.method, states, params, uses)
        result = prune.applied(plans, params, uses)
        if args.pack_values:
            result = prune.with_values(result, args.pack_values)
    return result, history
