"""`flexhinm tune`: a pruned model trained to predict what the dense one predicts."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from flexhinm_jax import atomic, kernels
from flexhinm_jax.cli import directory, flags, prune_decoder
from flexhinm_jax.cli.choices import examples
from flexhinm_jax.cli.console import Console
from flexhinm_jax.io import huggingface, model_card, packed, records, shards
from flexhinm_jax.jax_versions import on_device
from flexhinm_jax.models.load import PACKED, PACKED_BLOCKS, Model, Reads, kind_of, load
from flexhinm_jax.tracing import views
from flexhinm_jax.training.tune import Tuned, tune
from flexhinm_jax.types import PackedWeight

RATE = 3e-4
BATCH_SENTENCES = 16
EVERY = 10
"""Steps between two lines of progress, and two checkpoints are ten times as far."""


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = flags.command(
        commands,
        "tune",
        help="train what pruning left, masks fixed, towards the dense model's outputs",
        description="""\
            Trains the weights that PRUNED has kept, its biases and norms, until it
            predicts what the dense MODEL predicts on the calibration text, and writes
            DIR like PRUNED: the same zeros, packed files with the new values. Tables
            of words and weights that were not pruned stay. The whole model, its
            gradients and two moments are in memory, beside the dense model.
            """,
        epilog="""\
            examples:
              flexhinm prune SmolLM2-135M --method sparsegpt --pattern 2:4 --out pruned
              flexhinm tune SmolLM2-135M pruned --calibration text.txt --out tuned
              flexhinm eval SmolLM2-135M tuned --text wiki.txt --kl
            """,
    )
    flags.add_model(parser)
    add = parser.add_argument
    add("other", metavar="PRUNED", help="directory of the pruned model")
    flags.add_calibration(parser, "; an eighth of it judges")
    add("--steps", type=flags.positive, default=200, metavar="N", help="default: 200")
    add(
        "--rate",
        type=float,
        default=RATE,
        metavar="R",
        help=f"highest learning rate of Adam (default: {RATE:g})",
    )
    add(
        "--resume",
        type=Path,
        metavar="DIR",
        help="keep checkpoints in DIR, and continue after the newest one there",
    )
    flags.add_sentences(
        parser,
        f"sentences (default: {BATCH_SENTENCES}) or samples of a decoder (default: 1)"
        " of a step",
    )
    flags.add_samples(parser.add_argument_group("decoders").add_argument)
    flags.add_written(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console) -> None:
    """Runs the command."""
    kind = kind_of(args.model)
    flags.check_rate("rate", args.rate)
    directory.check_out(args)
    huggingface.check_copy(args.other, args.out)
    flags.check_kind(args, kind.reads, but=("resume",))
    directory.note_builtin(args, console)
    with atomic.locked(args.out), atomic.locked(args.resume or args.out):
        with console.step("reading both models"):
            dense, pruned = load(args.model), load(args.other)
            _check_pair(args, dense, pruned)
            weights = _packed(pruned)
            # Not after hours of training.
            _changed(pruned, weights, pruned.params)
            report = _report(pruned)
            shards.check_space(args.out, shards.read_index(args.other).size)
        result = _tuned(args, dense, pruned, console)
        document = _document(args, report, result)
        with console.step(f"writing {args.out}"):
            _write(args, pruned, result.params, weights, document)
    console.result(
        document["tuned"],
        f"loss on held-back data: {result.before:.4f} before, {result.after:.4f} after",
        *([result.note] if result.note else []),
        f"wrote {args.out}; 'flexhinm eval {args.base} {args.out}' compares",
    )


def _check_pair(args: argparse.Namespace, dense: Model, pruned: Model) -> None:
    """Refuses two models of which one cannot come from the other."""
    sizes = [{k: x.shape for k, x in m.params.items()} for m in (dense, pruned)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{args.other} is not a pruned form of {args.model}: their weights have"
            " other names or shapes; give the directory that 'flexhinm prune' made of"
            f" {args.model}"
        )


def _tuned(
    args: argparse.Namespace, dense: Model, pruned: Model, console: Console
) -> Tuned:
    """Both models' batches, and the training."""
    if dense.is_decoder:
        batches = prune_decoder.batches(args, args.batch_size or 1)
    else:
        size = args.batch_size or BATCH_SENTENCES
        text = examples(args, dense.kind)
        batches = dense.steps(text, size, args.max_length)
    batches = [tuple(map(on_device, batch)) for batch in batches]
    saved = {} if args.resume is None else {"resume": "auto", "save_every": 10 * EVERY}

    def progress(row: Mapping[str, Any]) -> None:
        if "loss" in row:
            console.progress(
                f"step {row['step']} of {args.steps}: loss {row['loss']:.4f}"
            )
        tell(row["step"], args.steps)

    name = f"training for {args.steps} steps (the first compiles)"
    with console.step(name, long=True) as tell:
        return tune(
            dense.apply,
            pruned.params,
            dense.params,
            batches,
            key=jax.random.key(args.seed),
            steps=args.steps,
            rate=args.rate,
            kind="cosine" if dense.kind.reads is Reads.SENTENCES else "kl",
            rules=dense.rules,
            token_mask=dense.token_mask,
            every=EVERY,
            progress=progress,
            checkpoints=args.resume,
            **saved,  # pyright: ignore[reportArgumentType]
        )


def _report(pruned: Model) -> dict[str, Any]:
    """The report of the pruned directory; empty where it has none."""
    path = pruned.directory / directory.REPORT
    return records.read(path) if path.is_file() else {}


def _document(
    args: argparse.Namespace, report: Mapping[str, Any], result: Tuned
) -> dict[str, Any]:
    """The report of the pruned directory, with what was done to it."""
    tuned = {
        "model": str(args.model),
        "pruned": str(args.other),
        "out": str(args.out),
        "calibration": str(args.calibration),
        "steps": args.steps,
        "rate": args.rate,
        "seed": args.seed,
        "before": result.before,
        "after": result.after,
        "note": result.note,
    }
    return {**report, "steps": args.steps, "tuned": tuned}


def _packed(pruned: Model) -> dict[str, dict[str, Any]]:
    """Packed file of a directory -> its leaves."""
    files = [pruned.directory / PACKED, *pruned.directory.glob(f"{PACKED_BLOCKS}/*")]
    return {
        str(file.relative_to(pruned.directory)): packed.read_packed(file)
        for file in sorted(files)
        if file.is_file() and file.suffix == ".safetensors"
    }


def _changed(
    pruned: Model,
    weights: Mapping[str, Mapping[str, Any]],
    params: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """The leaves of packed files with the values of other parameters.

    Raises:
      ValueError: packed weights that do not hold the weights themselves.
    """

    def changed(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, PackedWeight):
            return params[path]
        matrix = params[path]
        if leaf.layout is not None:
            matrix = views.matrix(matrix, leaf.layout)
        try:
            return kernels.with_weight(leaf, matrix)
        except ValueError as error:
            raise ValueError(f"{pruned.directory}, {path}: {error}") from error

    return {
        name: {path: changed(path, leaf) for path, leaf in leaves.items()}
        for name, leaves in weights.items()
    }


def _write(
    args: argparse.Namespace,
    pruned: Model,
    params: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, Any]],
    document: dict[str, Any],
) -> None:
    """Writes the directory like that of the pruned model."""
    with atomic.directory(args.out, overwrite=args.force) as folder:
        source = pruned.directory
        huggingface.write(folder, params, source=source, overwrite=True)
        for name, leaves in _changed(pruned, weights, params).items():
            (folder / name).parent.mkdir(exist_ok=True)
            packed.write_packed(folder / name, leaves, overwrite=True)
        model_card.write(folder, directory.texts(args, document))
