"""`flexhinm import`: a GGUF file as a Hugging Face model directory."""

import argparse
from pathlib import Path
from typing import Any

from flexhinm_jax.cli import flags
from flexhinm_jax.cli.console import Console, bytes_text
from flexhinm_jax.io import gguf, shards


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = flags.command(
        commands,
        "import",
        help="turn a GGUF file into a model directory",
        description=f"""\
            Writes the model of a GGUF file ({", ".join(gguf.ARCHITECTURES)}) as a
            Hugging Face directory: config.json, model.safetensors, tokenizer.json.
            Quantised weights are dequantised. Needs: pip install 'flexhinm_jax[gguf]'
            """,
        epilog="""\
            examples:
              flexhinm import SmolLM2-135M-Instruct.Q4_1.gguf --out SmolLM2-135M
              flexhinm import model.gguf --out model --dtype bfloat16
            """,
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE.gguf", help="the file, in one piece")
    add(
        "--dtype",
        choices=list(gguf.DTYPES),
        default="float32",
        help="of the weights written (default: float32)",
    )
    flags.add_out(parser)
    flags.add_shown(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console) -> None:
    """Runs the command."""
    shown = -1

    def tell(done: int, total: int) -> None:
        nonlocal shown
        if done * 10 // total > shown:
            shown = done * 10 // total
            console.progress(f"{bytes_text(done)} of {bytes_text(total)}")

    out = gguf.convert(
        args.file,
        args.out,
        dtype=args.dtype,
        overwrite=args.force,
        progress=tell,
    )
    size = shards.read_index(out).size
    document = {"file": str(args.file), "out": str(out), "bytes": size}
    console.result(document, f"{out}: {bytes_text(size)} of {args.dtype} weights")
