"""`flexhinm learn`: masks of a model directory, by distilling its own outputs."""

import argparse
import dataclasses
import math
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexhinm_jax import __version__, checks, methods, patterns
from flexhinm_jax.cli import options, output, source
from flexhinm_jax.cli.console import Console
from flexhinm_jax.io import atomic
from flexhinm_jax.methods import LearnedMethod, RefineMask
from flexhinm_jax.pruning import apply, prune, solve
from flexhinm_jax.pruning.statistics import calibrate
from flexhinm_jax.tracing.discover import discover
from flexhinm_jax.training import objectives
from flexhinm_jax.training.adopt import adopt
from flexhinm_jax.training.fit import fit
from flexhinm_jax.training.relative import relative
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

LOOKS = 20  # validations of the hard masks in a run
HELD = 0.125  # share of the batches that validate


@dataclasses.dataclass(frozen=True)
class Job:
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
    parser = commands.add_parser(
        "learn",
        help="learn the masks of a Hugging Face model directory",
        description=textwrap.dedent(f"""\
            Learns which weights of the model in MODEL_DIR stay and leaves the weights
            as they are: the outputs on the calibration text are to be those of the
            dense model. Writes DIR as 'flexhinm prune' does: zeros in place,
            {output.PACKED} and {output.REPORT}.
            """),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL_DIR", help="model directory (bert family)")
    add("--out", type=Path, metavar="DIR", required=True, help="directory to write")
    add(
        "--method",
        default="maskllm",
        choices=list(RATES),
        help="default: maskllm",
    )
    add(
        "--pattern",
        required=True,
        metavar="PATTERN",
        help="which weights may stay: 2:4, tiles:tile=64 (patch), flexhinm:v=32 ...",
    )
    add("--sparsity", type=float, metavar="S", help="see 'flexhinm prune --help'")
    add(
        "--calibration",
        type=Path,
        metavar="TEXT",
        required=True,
        help="UTF-8 text, one sentence a line; an eighth of it validates the masks",
    )
    add("--steps", type=options.positive, default=300, metavar="N", help="default: 300")
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
        help="as in 'flexhinm prune'",
    )
    add("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    add("--limit", type=options.positive, metavar="N", help="first N sentences only")
    add(
        "--batch-size",
        type=options.positive,
        default=16,
        metavar="N",
        help="sentences of a step (default: 16)",
    )
    add(
        "--max-length",
        type=options.positive,
        metavar="N",
        help="cut sentences to N tokens (default: 128, or what the model reads)",
    )
    options.add_writing(parser)
    parser.set_defaults(run=run)


EXAMPLES = """\
examples:
  flexhinm learn all-MiniLM-L6-v2 --pattern 2:4 --calibration sentences.txt --out masked
  flexhinm learn all-MiniLM-L6-v2 --method patch --pattern tiles:tile=128 \\
      --sparsity 0.35 --calibration sentences.txt --resume half-way --out masked
"""


def run(args: argparse.Namespace, console: Console) -> None:
    """Runs the command."""
    job = _check(args)
    with atomic.locked(args.out), atomic.locked(args.resume or args.out):
        _run(args, job, console)


def _run(args: argparse.Namespace, job: Job, console: Console) -> None:
    with console.step("reading the model"):
        model = source.load(args.model)
    result, history = _learn(args, job, model, console)
    first, best = history[0]["value"], min(entry["value"] for entry in history)
    document = {
        "model": str(args.model),
        "out": str(args.out),
        "method": repr(job.method),
        "start": None if job.start is None else repr(job.start),
        "sparsity": args.sparsity,
        "rules": {regex: str(value) for regex, value in job.rules.items()},
        "seed": args.seed,
        "steps": args.steps,
        "rate": job.rate,
        "sentences": len(job.text),
        "version": __version__,
        "validation": {"first": first, "best": best},
        "history": [{k: v for k, v in e.items() if v == v} for e in history],
        **result.report.to_dict(),
    }
    with console.step(f"writing {args.out}"):
        output.write(args, result, model, document)
    told = f"loss on held-back text: {first:.4f} of the first masks, {best:.4f} now"
    console.result(document, *output.summary(args.out, result.report, {}), told)


def _check(args: argparse.Namespace) -> Job:
    """Everything that can be refused before the model is read."""
    pattern = patterns.parse(args.pattern)
    method: Any = methods.parse(args.method, pattern)
    method = dataclasses.replace(method, **SETTINGS.get(args.method, {}))
    checks.sparsity(args.sparsity, *pattern.sparsity_range(), pattern, "--sparsity")
    rate = RATES[args.method] if args.rate is None else args.rate
    if not 0 < rate < math.inf:
        raise ValueError(f"--rate {rate}: need a positive number")
    options.check_out(args)
    start = _start(args.start, method)
    text = source.read_text(args.calibration, args.limit)
    return Job(method, start, rate, options.rules(args.rule), text)


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
    args: argparse.Namespace, job: Job, model: source.Source, console: Console
) -> tuple[prune.Pruned, list[dict[str, float]]]:
    """The result, and the validations on the way."""
    params: Any = jax.tree.map(jnp.asarray, model.params)
    uses = discover(model.apply_fn, params, *model.sample(), rules=job.rules)
    source.check_found(args.model, uses)
    given = source.tokenize(model, job.text, args.batch_size, args.max_length)
    steps = [(jnp.asarray(b.tokens), jnp.asarray(b.mask)) for b in given]
    stats = calibrate(
        model.apply_fn,
        params,
        uses,
        console.track(steps, "calibrating", len(steps)),
        token_mask=source.real,
    )
    key, fit_key, mix_key = jax.random.split(jax.random.key(args.seed), 3)
    with console.step(f"solving {len(uses.leaves)} weights"):
        states = _states(job, key, params, uses, stats, args.sparsity)
    order = np.asarray(jax.random.permutation(mix_key, len(steps)))
    steps = [steps[k] for k in order]
    held = math.ceil(HELD * len(steps)) if len(steps) > 1 else 0
    # every dense output is computed once
    learned_from = objectives.taught(model.apply_fn, params, steps)
    loss_fn = objectives.distillation(model.apply_fn, token_mask=source.real)
    value = jax.jit(loss_fn)

    def evaluate(now: Any) -> float:
        parts = learned_from[:held] or learned_from
        return float(np.mean([value(now, *batch) for batch in parts]))

    def progress(entry: dict[str, float]) -> None:
        console.progress(
            f"step {entry['step']:.0f} of {args.steps}: loss {entry['loss']:.4f}, held"
            f" back {entry['value']:.4f}"
        )

    rate = optax.cosine_decay_schedule(job.rate, args.steps, 0.1)
    tx = optax.adam(rate, b2=0.95)
    if args.method == "maskpro":
        tx = optax.sgd(job.rate)
    elif args.method in ("maskllm", "patch"):
        tx = optax.chain(relative(0.95), optax.sgd(rate))
    states, history = fit(
        job.method,
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
        config={"rate": job.rate, "method": args.method},
    )
    with console.step("packing"):
        plans = apply.decide(job.method, states, params, uses)
        result = prune.applied(plans, params, uses)
    return result, history


def _states(
    job: Job,
    key: Any,
    params: Any,
    uses: Uses,
    stats: dict[str, Stats],
    sparsity: float | None,
) -> dict[str, State]:
    """Where learning begins."""
    if job.start is None or not job.method.adopts_plans:
        return solve.solve(job.method, key, params, uses, stats, sparsity)
    found = solve.solve(job.start, key, params, uses, stats, sparsity)
    plans = apply.decide(job.start, found, params, uses)
    # The weights and biases of these plans are not used: nothing but masks moves.
    return adopt(job.method, plans, params, uses)[0]
