"""`flexhinm learn`: masks of a model directory, by distilling its own outputs."""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexhinm_jax import __version__, checks, methods, patterns
from flexhinm_jax.cli import directory, flags
from flexhinm_jax.cli.console import Console, report_table
from flexhinm_jax.cli.directory import REPORT
from flexhinm_jax.io import atomic
from flexhinm_jax.io.sources import read_sentences
from flexhinm_jax.methods import LearnedMethod, RefineMask
from flexhinm_jax.models.load import PACKED, Model, load
from flexhinm_jax.pruning import apply, prune, solve
from flexhinm_jax.pruning.statistics import calibrate
from flexhinm_jax.tracing.discover import discover
from flexhinm_jax.training import objectives
from flexhinm_jax.training.fit import fit
from flexhinm_jax.training.optimizers import relative
from flexhinm_jax.training.warm_start import adopt
from flexhinm_jax.types import State, Stats, Uses

#: Learning rates, of the optimiser that `_tx` gives the method.
RATES = {
    "maskllm": 2e-4,
    "maskpro": 50.0,
    "patch": 2e-4,
    "permllm": 5e-2,
    "proxsparse": 1e-4,
}

#: In place of the published schedules, which are for thousands of steps: with few steps
#: from good masks the noise of sampling costs more than it finds.
SHORT = {
    "relaxation": "decided",
    "scale": (100.0, 100.0),
    "temperature": (1.0, 1.0),
    "reward": 0.0,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "maskllm": SHORT,
    "patch": SHORT,
    "permllm": {"steps": 0},  # the loss is that of the model
}

BATCH_SENTENCES = 16
LOOKS = 20  # validations of the hard masks in a run
HELD = 0.125  # share of the batches that validate


@dataclasses.dataclass(frozen=True)
class Choices:
    """What to do, checked before anything is computed.

    Attributes:
      method: with its pattern.
      start: the method whose plans come first, or None for the own start.
      rate: of the optimiser.
      rules: regular expression on leaf paths -> pattern or "skip".
      text: calibration sentences.
    """

    method: LearnedMethod
    start: methods.Method | None
    rate: float
    rules: dict[str, Any]
    text: list[str]


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = flags.command(
        commands,
        "learn",
        help="learn the masks of a Hugging Face model directory",
        description=f"""\
            Learns which weights of the model in MODEL stay and leaves the weights
            as they are: the outputs on the calibration text are to be those of the
            dense model. Writes DIR as 'flexhinm prune' does: zeros in place,
            {PACKED} and {REPORT}. For encoders of the BERT family.
            """,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    flags.add_model(parser)
    add(
        "--method",
        default="maskllm",
        choices=list(RATES),
        help="default: maskllm",
    )
    add(
        "--pattern",
        default="2:4",
        metavar="PATTERN",
        help="which weights may stay: 2:4 (default), tiles:tile=64 (patch) ...",
    )
    add("--sparsity", type=float, metavar="S", help="see 'flexhinm prune --help'")
    flags.add_calibration(parser, "; an eighth of it validates the masks")
    add("--steps", type=flags.positive, default=300, metavar="N", help="default: 300")
    add("--rate", type=float, metavar="R", help="learning rate; default by method")
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
        help="keep checkpoints in DIR, and go on behind the newest one there",
    )
    add(
        "--rule",
        action="append",
        default=[],
        metavar="REGEX=PATTERN",
        help="as in 'flexhinm prune', but no sparsities",
    )
    flags.add_sentences(parser, f"sentences of a step (default: {BATCH_SENTENCES})")
    flags.add_written(parser)
    parser.set_defaults(run=run)


EXAMPLES = """\
examples:
  flexhinm learn all-MiniLM-L6-v2 --pattern 2:4 --calibration sentences.txt --out masked
  flexhinm learn all-MiniLM-L6-v2 --method patch --pattern tiles:tile=128 \\
      --sparsity 0.35 --calibration sentences.txt --resume half-way --out masked
"""


def run(args: argparse.Namespace, console: Console) -> None:
    """Runs the command."""
    choices = _check(args)
    directory.note_builtin(args, console)
    with atomic.locked(args.out), atomic.locked(args.resume or args.out):
        _run(args, choices, console)


def _run(args: argparse.Namespace, choices: Choices, console: Console) -> None:
    with console.step("reading the model"):
        model = load(args.model)
    result, history = _learn(args, choices, model, console)
    first, best = history[0]["value"], min(entry["value"] for entry in history)
    document = {
        "model": str(args.model),
        "out": str(args.out),
        "method": repr(choices.method),
        "start": None if choices.start is None else repr(choices.start),
        "sparsity": args.sparsity,
        "rules": {regex: str(value) for regex, value in choices.rules.items()},
        "calibration": str(args.calibration),
        "seed": args.seed,
        "steps": args.steps,
        "rate": choices.rate,
        "sentences": len(choices.text),
        "version": __version__,
        "validation": {"first": first, "best": best},
        "history": [{k: v for k, v in e.items() if v == v} for e in history],
        **result.report.to_dict(),
    }
    with console.step(f"writing {args.out}"):
        directory.write(args, result, model, directory.texts(args, document))
    console.result(
        document,
        report_table(result.report, every=args.rows == "all"),
        "",
        *directory.ending(args.out, result.report, PACKED),
        f"loss on held-back text: {first:.4f} of the first masks, {best:.4f} now",
    )


def _check(args: argparse.Namespace) -> Choices:
    """Everything that can be refused before the model is read."""
    pattern = patterns.parse(args.pattern)
    method: Any = methods.parse(args.method, pattern)
    method = dataclasses.replace(method, **SETTINGS.get(args.method, {}))
    checks.sparsity(args.sparsity, *pattern.sparsity_range(), pattern, "--sparsity")
    rate = RATES[args.method] if args.rate is None else args.rate
    if not 0 < rate < math.inf:
        raise ValueError(f"--rate {rate}: need a positive number")
    directory.check_out(args)
    start = _start(args.start, method)
    text = read_sentences(args.calibration, args.limit)
    rules, numbers = flags.rules(args.rule)
    if numbers:
        raise ValueError(
            f"--rule {next(iter(numbers))}=...: 'flexhinm learn' takes one sparsity for"
            " all weights; give a pattern or skip"
        )
    return Choices(method, start, rate, rules, text)


def _start(name: str | None, method: LearnedMethod) -> methods.Method | None:
    """The method whose plans come first."""
    if not method.adopts_plans:
        if name not in (None, "own"):
            raise ValueError(
                f"--start {name}: {type(method).__name__} begins with a start of its"
                " own; leave the option out"
            )
        return None
    if name == "own":
        return None
    if name is None and not RefineMask.fits(method.pattern):
        return None
    found = methods.parse(name or "refine_mask", method.pattern).for_fixed_weights()
    if isinstance(found, LearnedMethod) or found.needs == "gradients":
        raise ValueError(f"--start {name}: need a method that 'flexhinm prune' runs")
    return found


def _learn(
    args: argparse.Namespace,
    choices: Choices,
    model: Model,
    console: Console,
) -> tuple[prune.Pruned, list[dict[str, float]]]:
    """The result, and the validations on the way."""
    params: Any = model.params
    uses = discover(model.apply, params, *model.sample(), rules=choices.rules)
    directory.check_uses(args.model, uses)
    size = args.batch_size or BATCH_SENTENCES
    batches = model.tokenize(choices.text, size, args.max_length)
    steps = [(jnp.asarray(b.tokens), jnp.asarray(b.mask)) for b in batches]
    stats = calibrate(
        model.apply,
        params,
        uses,
        console.track(steps, "calibrating", len(steps)),
        token_mask=directory.real,
    )
    key, fit_key, mix_key = jax.random.split(jax.random.key(args.seed), 3)
    with console.step(f"solving {len(uses.leaves)} weights", long=True):
        states = _states(choices, key, params, uses, stats, args.sparsity)
    order = np.asarray(jax.random.permutation(mix_key, len(steps)))
    steps = [steps[k] for k in order]
    held = math.ceil(HELD * len(steps)) if len(steps) > 1 else 0
    # every dense output is computed once
    with console.step(f"the dense model reads {len(steps)} batches", long=True):
        learned_from = objectives.taught(model.apply, params, steps)
    loss_fn = objectives.distillation(model.apply, token_mask=directory.real)
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

    rate = optax.cosine_decay_schedule(choices.rate, args.steps, 0.1)
    tx = optax.adam(rate, b2=0.95)
    if args.method == "maskpro":
        tx = optax.sgd(choices.rate)
    elif args.method in ("maskllm", "patch"):
        tx = optax.chain(relative(0.95), optax.sgd(rate))
    name = f"learning for {args.steps} steps (the first compiles)"
    with console.step(name, long=True) as tell:
        states, history = fit(
            choices.method,
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
            config={"rate": choices.rate, "method": args.method},
        )
    with console.step("packing"):
        plans = apply.decide(choices.method, states, params, uses)
        result = prune.applied(plans, params, uses)
    return result, history


def _states(
    choices: Choices,
    key: Any,
    params: Any,
    uses: Uses,
    stats: dict[str, Stats],
    sparsity: float | None,
) -> dict[str, State]:
    """Where learning begins."""
    if choices.start is None or not choices.method.adopts_plans:
        return solve.solve(choices.method, key, params, uses, stats, sparsity)
    found = solve.solve(choices.start, key, params, uses, stats, sparsity)
    plans = apply.decide(choices.start, found, params, uses)
    # The weights and biases of these plans are not used: nothing but masks moves.
    gated: Any = choices.method  # the one kind that adopts plans
    return adopt(gated, plans, params, uses)[0]
