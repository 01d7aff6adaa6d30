"""`flexhinm eval`: perplexity of decoders, similarity of encoders, side by side.

Perplexity is over windows of `length` tokens that begin every `stride` tokens. Every
token of the text but the first is scored once, in the first window that holds it: with
`stride` = `length` windows do not overlap, which is what papers on pruning report; a
smaller stride gives every token behind the first window at least length - stride + 1
tokens to look back at. The mean is over tokens, not over windows.
"""

import argparse
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax.cli import directory, flags
from flexhinm_jax.cli.console import Console, table
from flexhinm_jax.models import decoder, encoder

LENGTH = 2048
"""Tokens of a window where the model reads so many."""


_embed = jax.jit(encoder.embed, static_argnames="config")


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = flags.command(
        commands,
        "eval",
        help="perplexity of a text, or similarity of embeddings, dense beside pruned",
        description="""\
            Decoders (llama, qwen3, gemma3, ...): perplexity and bits per byte of a
            text file, for one directory or two beside each other. Every token but the
            first is scored once.
            Encoders (bert): cosine similarity of the embeddings that two directories
            give to the lines of the file.
            """,
        epilog="""\
            examples:
              flexhinm eval Qwen2.5-0.5B pruned --text wiki.txt
              flexhinm eval Llama-2-7b --text wiki.txt --length 4096 --stride 512
              flexhinm eval all-MiniLM-L6-v2 pruned --text sentences.txt
            """,
    )
    flags.add_model(parser)
    add = parser.add_argument
    add("other", nargs="?", metavar="OTHER", help="pruned, for example")
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
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
        help="use the first N tokens (encoders: lines) only",
    )
    add(
        "--batch-size",
        type=flags.positive,
        metavar="N",
        help="windows or lines in one step (default: 1 window, 32 lines)",
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
      args: text, length, stride, limit and batch_size of the command line.
      paths: directories.
      console: for the progress.
    """
    kinds = [directory.is_decoder(path) for path in paths]
    if all(kinds):
        return _perplexities(args, paths, console)
    if any(kinds):
        raise ValueError(
            f"{paths[0]} and {paths[1]} are a decoder and another model; give two of a"
            " kind"
        )
    return _similarity(args, paths, console)


def windows(
    tokens: np.ndarray, length: int, stride: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts a text so that every token but the first is scored once.

    Args:
      tokens: i32[count], count >= 2.
      length: inputs of a window.
      stride: tokens from one window to the next, at most `length`.

    Returns:
      Inputs i32[windows, length], targets i32[windows, length] (the next tokens), and
      bool[windows, length], True where a target is scored.

    Example:
      >>> inputs, targets, scored = windows(np.arange(7, dtype=np.int32), 4, 2)
      >>> [targets[k][scored[k]].tolist() for k in range(2)]
      [[1, 2, 3, 4], [5, 6]]
      >>> inputs.tolist()
      [[0, 1, 2, 3], [2, 3, 4, 5]]
    """
    count = len(tokens) - 1
    starts = np.arange(0, max(count - length, 0) + stride, stride)
    at = starts[:, None] + np.arange(length)
    before = np.where(starts > 0, starts - stride + length, 0)
    scored = (at >= before[:, None]) & (at < count)
    at = np.minimum(at, count - 1)
    return tokens[at], tokens[at + 1], scored


def _perplexities(
    args: argparse.Namespace, paths: list[Path], console: Console
) -> list[Any]:
    text = directory.read_text(args.text)
    rows = []
    for path in paths:
        with console.step(f"reading {path}"):
            model = directory.read_decoder(path)
        rows.append(_perplexity(model, text, args, console))
    shown = table(
        ("model", ">zeros", ">perplexity", ">bits per byte", ">tokens"),
        [
            (
                row["model"],
                f"{row['zeros']:.1%}",
                f"{row['perplexity']:.4f}",
                f"{row['bits_per_byte']:.4f}",
                f"{row['tokens']:,}",
            )
            for row in rows
        ],
    )
    note = f"windows of {rows[0]['length']} tokens, one every {rows[0]['stride']}"
    document = {"text": str(args.text), "kind": "decoder", "models": rows}
    return [document, shown, note]


def _perplexity(
    model: directory.Decoder, text: str, args: argparse.Namespace, console: Console
) -> dict[str, Any]:
    tokens, offsets = model.encode(text)
    tokens, offsets = tokens[: args.limit], offsets[: args.limit]
    if len(tokens) < 2:
        raise ValueError(
            f"{args.text} has {len(tokens)} tokens; at least 2 are needed, the first of"
            " which is only read"
        )
    longest = model.config.max_position_embeddings or LENGTH
    length = args.length or min(LENGTH, longest)
    if length > longest:
        raise ValueError(
            f"--length {length} is more than {model.directory} reads:"
            f" max_position_embeddings={longest}"
        )
    if args.stride and args.stride > length:
        raise ValueError(
            f"--stride {args.stride} is more than windows of {length} tokens: those"
            " between two windows would not be scored"
        )
    length = min(length, len(tokens) - 1)
    stride = min(args.stride or length, length)
    parts = windows(tokens, length, stride)
    size = args.batch_size or 1
    nats = 0.0
    steps = range(0, len(parts[0]), size)
    for start in console.track(steps, str(model.directory), total=len(steps)):
        # The last batch is filled up with windows that score nothing.
        batch = [part[start : start + size] for part in parts]
        missing = ((0, size - len(batch[0])), (0, 0))
        batch = [np.pad(part, missing) for part in batch]
        nats += float(_nats(model.params, *batch, config=model.config))
    if not math.isfinite(nats):
        model.check_finite()
        raise ValueError(f"{model.directory} gives logits that are not finite")
    count = len(tokens) - 1
    read = len(text[offsets[1][0] : offsets[-1][1]].encode())
    return {
        "model": str(model.directory),
        "zeros": model.zeros,
        "perplexity": math.exp(nats / count),
        "bits_per_byte": nats / math.log(2) / max(read, 1),
        "nats": nats,
        "tokens": count,
        "bytes": read,
        "length": length,
        "stride": stride,
    }


@functools.partial(jax.jit, static_argnames="config")
def _nats(
    params: Any, inputs: Array, targets: Array, scored: Array, config: Any
) -> Array:
    """Nats of all scored targets together; compiled once for dense and pruned."""
    logits = decoder.apply(params, inputs, config).astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(jnp.where(scored, nats, jnp.float32(0)))


def _similarity(
    args: argparse.Namespace, paths: list[Path], console: Console
) -> list[Any]:
    if len(paths) < 2:
        raise ValueError(
            f"{paths[0]} is no decoder: give OTHER too, to compare the embeddings of"
            " two encoders"
        )
    models = []
    for path in paths:
        with console.step(f"reading {path}"):
            models.append(directory.read_encoder(path))
    if args.stride:
        raise ValueError("--stride has no use for encoders")
    text = directory.read_sentences(args.text, args.limit)
    first, second = (_embeddings(model, text, args) for model in models)
    if first.shape != second.shape:
        raise ValueError(
            f"embeddings of {first.shape[1]} and {second.shape[1]} channels cannot be"
            " compared; give two directories of one model"
        )
    cosines = np.sum(first * second, -1)
    found = {
        "mean_cosine": float(cosines.mean()),
        "quantile_5": float(np.quantile(cosines, 0.05)),
        "lowest": float(cosines.min()),
    }
    figures = (f"{value:.4f}" for value in found.values())
    shown = table(
        ("model", "other", ">mean cosine", ">5 % quantile", ">lowest", ">lines"),
        [(*map(str, paths), *figures, f"{len(text):,}")],
    )
    document = {
        "text": str(args.text),
        "kind": "encoder",
        "models": [*map(str, paths)],
        "lines": len(text),
    }
    return [document | found, shown]


def _embeddings(
    model: directory.Encoder, text: list[str], args: argparse.Namespace
) -> np.ndarray:
    """Unit rows, f64[lines, hidden]."""
    found: dict[int, np.ndarray] = {}
    for batch in model.tokenize(text, args.batch_size or 32, args.length):
        rows = _embed(model.params, batch.tokens, batch.mask, config=model.config)
        rows = np.asarray(rows, np.float64)
        found |= dict(zip(batch.rows.tolist(), rows, strict=False))
    stacked = np.stack([found[row] for row in sorted(found)])
    return stacked / np.linalg.norm(stacked, axis=-1, keepdims=True)
