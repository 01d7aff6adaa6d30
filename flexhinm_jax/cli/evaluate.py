"""`flexhinm eval`: perplexity of decoders, likeness of encoders, side by side."""

import argparse
import dataclasses
import functools
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexhinm_jax import kernels
from flexhinm_jax.cli import directory, flags
from flexhinm_jax.cli.console import Console, bytes_text, table
from flexhinm_jax.io.sources import is_dataset, read_sentences, read_text, short
from flexhinm_jax.models import evaluation, images
from flexhinm_jax.models.evaluation import LENGTH
from flexhinm_jax.models.load import Kind, Model, Reads, kind_of, load


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = flags.command(
        commands,
        "eval",
        help="perplexity of a text, or similarity of embeddings, dense beside pruned",
        description="""\
            Decoders (llama, qwen3, gemma3, ...): perplexity and bits per byte of a
            text file, for one directory or two beside each other. Every token but the
            first is scored once. --kl compares the predictions of two as well.
            Encoders (bert, roberta, mpnet, ...): cosine similarity of the embeddings
            that two directories give to the lines of the file.
            Classifiers (vit, deit, resnet): cosine similarity of the logits that two
            directories give to images, and how often both say the same class.
            """,
        epilog="""\
            examples:
              flexhinm eval Qwen2.5-0.5B pruned --text wiki.txt
              flexhinm eval Llama-2-7b --text wiki.txt --length 4096 --stride 512
              flexhinm eval Qwen2.5-0.5B pruned --text wiki.txt --kl
              flexhinm eval Qwen2.5-0.5B pruned --text wiki.txt --packed
              flexhinm eval all-MiniLM-L6-v2 pruned --text sentences.txt
              flexhinm eval resnet-50 pruned --images photos
            """,
    )
    flags.add_model(parser)
    add = parser.add_argument
    add("other", nargs="?", metavar="OTHER", help="pruned, for example")
    add(
        "--text",
        "--images",
        type=Path,
        required=True,
        metavar="PATH",
        help="UTF-8 text; classifiers: a folder of images, or an .npy file of pixels",
    )
    add(
        "--length",
        type=flags.positive,
        metavar="N",
        help=f"decoders: tokens of a window (default: {LENGTH}, or what the model"
        " reads); encoders: cut lines to N tokens (default: 128)",
    )
    add(
        "--stride",
        type=flags.positive,
        metavar="N",
        help="decoders: tokens from one window to the next, at most --length (default:"
        " --length, windows that do not overlap)",
    )
    add(
        "--limit",
        type=flags.positive,
        metavar="N",
        help="use the first N tokens (encoders: lines or images) only",
    )
    add(
        "--batch-size",
        type=flags.positive,
        metavar="N",
        help="windows, lines or images in one step (default: 1 window, 32 others)",
    )
    add(
        "--kl",
        action="store_true",
        help="decoders: also the mean KL divergence of OTHER's predictions from the"
        " first's and how often both hold the same token most likely; holds both"
        " models in memory",
    )
    flags.add_packed(
        parser,
        "run the last directory on its packed weights, beside the one before it, or"
        " beside itself with zeros in place; shows bytes and tokens per second",
    )
    flags.add_shown(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console) -> None:
    """Runs the command."""
    paths = [args.model] + ([args.other] if args.other else [])
    document, *lines = measure(args, paths, console)
    console.result(document, *lines)


def measure(args: argparse.Namespace, paths: list[Path], console: Console) -> list[Any]:
    """The document, then the table and lines, about one directory or two.

    Args:
      args: text, length, stride, limit, batch_size and packed of the command line.
      paths: directories.
      console: for the progress.
    """
    kinds = {kind_of(path).reads for path in paths}
    if args.packed and len(paths) == 1:
        paths = paths * 2
    if len(kinds) > 1:
        what = " and ".join(f"one reads {kind.value}" for kind in kinds)
        raise ValueError(f"{paths[0]} and {paths[1]}: {what}; give two of a kind")
    if kinds == {Reads.TEXT}:
        return _perplexities(args, paths, console)
    return _likeness(args, paths, console)


def check_text(path: Path, kind: Kind) -> None:
    """Refuses a text that cannot be read, before anything is computed.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is empty or not UTF-8.
    """
    if kind.reads is Reads.IMAGES:
        if not path.exists():
            raise FileNotFoundError(
                f"--eval {path} does not exist; give a folder of images or an .npy file"
            )
    elif not is_dataset(path):
        read_sentences(path)


def evaluated(
    args: argparse.Namespace, document: dict[str, Any], console: Console
) -> tuple[dict[str, Any], list[Any]]:
    """The document of a pruned model and further lines, with what --eval asks for.

    Raises:
      ValueError: the comparison failed; says that the model is written.
    """
    if args.eval is None:
        both = shlex.join([args.base, str(args.out)])
        return document, [f"compare them: flexhinm eval {both} --text FILE"]
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    asked = parser.parse_args(["eval", f"--text={args.eval}", "--", str(args.model)])
    try:
        figures, *lines = measure(asked, [args.model, args.out], console)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{args.out} is written, but not compared with {args.base}: {error}"
        ) from error
    directory.write_figures(args, document, figures)
    return document | {"evaluation": figures}, ["", *lines]


def read(path: Path, packed: bool, console: Console) -> tuple[Model, int]:
    """A model as it runs fastest, and its bytes as they are stored."""
    with console.step(f"reading {short(path)}"):
        model = load(path, packed=packed)
        size = model.nbytes
        if packed:
            model = dataclasses.replace(model, params=kernels.prepare(model.params))
    return model, size


def names(paths: Sequence[Path], packed: bool) -> list[str]:
    """What people call the directories; with `packed` the last one runs packed."""
    shown = [short(path) for path in paths]
    if len(set(shown)) < len(set(paths)):
        shown = [str(path) for path in paths]
    return [*shown[:-1], f"{shown[-1]} packed"] if packed else shown


def _perplexities(
    args: argparse.Namespace, paths: list[Path], console: Console
) -> list[Any]:
    text = read_text(args.text)
    if not text.strip():
        raise ValueError(f"{args.text} has no text; give a text to measure on")
    options = {
        "length": args.length,
        "stride": args.stride,
        "limit": args.limit,
        "batch": args.batch_size or 1,
    }
    if args.kl:
        return _divergence(args, paths, text, options, console)
    rows = []
    for k, name in enumerate(names(paths, args.packed)):
        model, size = read(paths[k], args.packed and k == len(paths) - 1, console)
        track = functools.partial(_track, console, name)
        score = evaluation.perplexity(
            model, text, timed=args.packed, track=track, **options
        )
        rows.append(_row(name, model, size, score))
    return [_document(args, rows), _table(rows, args.packed), _note(rows)]


def _divergence(
    args: argparse.Namespace,
    paths: list[Path],
    text: str,
    options: dict[str, Any],
    console: Console,
) -> list[Any]:
    if len(paths) < 2:
        raise ValueError("--kl compares two models: give OTHER too")
    how = (False, args.packed)
    both = [read(path, each, console) for path, each in zip(paths, how, strict=True)]
    shown = names(paths, args.packed)
    track = functools.partial(_track, console, " and ".join(shown))
    (dense, _), (other, _) = both
    result = evaluation.divergence(
        dense, other, text, timed=args.packed, track=track, **options
    )
    scores = result.first, result.second
    rows = [
        _row(name, model, size, score)
        for name, (model, size), score in zip(shown, both, scores, strict=True)
    ]
    document = _document(args, rows) | {"kl": result.kl, "same_top": result.same_top}
    line = (
        f"KL {result.kl:.4f} nats a token; the same token is most likely in"
        f" {result.same_top:.1%}"
    )
    return [document, _table(rows, args.packed), line, _note(rows)]


def _row(
    name: str, model: Model, size: int, score: evaluation.Perplexity
) -> dict[str, Any]:
    row = {
        "model": str(model.directory),
        "packed": model.packed,
        "zeros": model.zeros,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        **dataclasses.asdict(score),
        "stored_bytes": size,
        "shown": name,
    }
    if score.seconds is not None:
        row["tokens_per_second"] = score.computed / score.seconds
    return row


def _document(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "text": str(args.text),
        "kind": "decoder",
        "models": [
            {k: v for k, v in row.items() if k != "shown" and v is not None}
            for row in rows
        ],
    }


def _note(rows: list[dict[str, Any]]) -> str:
    return f"windows of {rows[0]['length']} tokens, one every {rows[0]['stride']}"


def _track(console: Console, at: str, steps: range) -> Iterable[int]:
    return console.track(steps, at, total=len(steps))


def _table(rows: list[dict[str, Any]], timed: bool) -> Any:
    columns = ("model", ">zeros", ">perplexity", ">bits per byte", ">tokens")
    return table(
        (*columns, ">bytes", ">tokens per second"),
        [
            (
                row["shown"],
                f"{row['zeros']:.1%}",
                f"{row['perplexity']:.4f}",
                f"{row['bits_per_byte']:.4f}",
                f"{row['tokens']:,}",
                bytes_text(row["stored_bytes"]) if timed else "",
                f"{row['tokens_per_second']:,.1f}" if timed else "",
            )
            for row in rows
        ],
    )


def _likeness(
    args: argparse.Namespace, paths: list[Path], console: Console
) -> list[Any]:
    if len(paths) < 2:
        raise ValueError(
            f"{paths[0]} is no decoder: give OTHER too, to compare the outputs of two"
            " models"
        )
    for flag, value in (("--stride", args.stride), ("--kl", args.kl)):
        if value:
            raise ValueError(f"{flag} has no use for encoders")
    read_both = zip(paths, (False, args.packed), strict=True)
    models, sizes = zip(*(read(p, how, console) for p, how in read_both), strict=True)
    both = names(paths, args.packed)
    tracks = [functools.partial(_track, console, name) for name in both]
    document, (first, second) = _outputs(args, models, tracks)
    if first.shape != second.shape:
        raise ValueError(
            f"outputs of {first.shape[1]} and {second.shape[1]} channels cannot be"
            " compared; give two directories of one model"
        )
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    cosines = np.sum(first * second, -1) / lengths
    likeness = {
        "mean_cosine": float(cosines.mean()),
        "quantile_5": float(np.quantile(cosines, 0.05)),
        "lowest": float(cosines.min()),
    }
    shown = [f"{value:.4f}" for value in likeness.values()]
    columns = ["model", "other", ">mean cosine", ">5 % quantile", ">lowest"]
    if models[0].reads_images:
        same = float(np.mean(first.argmax(-1) == second.argmax(-1)))
        likeness["same_class"] = same
        shown.append(f"{same:.1%}")
        columns.append(">same class")
    rows = [(*both, *shown, f"{len(first):,}")]
    lines: list[Any] = [
        table((*columns, ">images" if models[0].reads_images else ">lines"), rows)
    ]
    document |= {"models": [*map(str, paths)], **likeness}
    if args.packed:
        document["stored_bytes"] = list(sizes)
        lines.append(f"{bytes_text(sizes[0])} dense, {bytes_text(sizes[1])} packed")
    return [document, *lines]


def _outputs(
    args: argparse.Namespace,
    models: Sequence[Model],
    tracks: Sequence[evaluation.Track],
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What was read, and what two encoders or classifiers say about it."""
    size, model = args.batch_size or 32, models[0]
    pairs = list(zip(models, tracks, strict=True))
    if not model.reads_images:
        text = read_sentences(args.text, args.limit)
        document = {"text": str(args.text), "kind": "encoder", "lines": len(text)}
        return document, [
            evaluation.embeddings(one, text, size, args.length, track)
            for one, track in pairs
        ]
    if args.length:
        raise ValueError("--length is for text; leave it out")
    channels = model.config.num_channels
    pixels = images.read(args.text, model.directory, channels, args.limit)
    document = {"images": str(args.text), "kind": "classifier", "count": len(pixels)}
    return document, [evaluation.logits(one, pixels, size, t) for one, t in pairs]
