"""Entry point of the `flexhinm` command.

A user's mistake ends in one line on stderr and exit status 2, never in a traceback.
Each command is a module with `add_parser(commands)` and `run(args, console)`.
"""

import argparse
import errno
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

import flexhinm_jax
from flexhinm_jax import arguments
from flexhinm_jax.cli import (
    evaluate,
    flags,
    generate,
    importer,
    inspect,
    learn,
    prune,
    recipe,
    reorder,
    rotate,
    tune,
    unfinished,
)
from flexhinm_jax.cli.console import Console
from flexhinm_jax.io import fingerprint, sources
from flexhinm_jax.training.run import NotFinite

COMMANDS = (inspect, prune, learn, evaluate, generate, importer, reorder, rotate, tune)

EPILOG = """\
examples:
  flexhinm prune Qwen/Qwen2.5-0.5B --out pruned
  flexhinm inspect all-MiniLM-L6-v2
  flexhinm prune all-MiniLM-L6-v2 --pattern flexhinm:v=32 --sparsity 0.75 \\
      --calibration sentences.txt --out pruned

'flexhinm COMMAND --help' explains a command.
"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exits with status 2."""
        self.exit(2, f"flexhinm: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses an unknown option at the command that it was given to."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            known = [name for action in self._actions for name in action.option_strings]
            near = arguments.similar(rest[0].partition("=")[0], known)
            self.error(f"unrecognized arguments: {' '.join(rest)}{near}")
        return found, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: arguments without the program name; None for those of the process.

    Returns:
      The exit status: 0, or 2 after a mistake of the user.
    """
    if argv is None:
        argv = sys.argv[1:]
        keep_compiled()
        silence_log()
    argv = list(argv)
    args = parser().parse_args(argv)
    console = Console(quiet=getattr(args, "quiet", False), json=args.json)
    try:
        with arguments.speaking(flags.WORDS):
            if getattr(args, "recipe", None) is not None:
                args = recipe.merged(parser(), argv, args.recipe)
            args.written = shlex.join(["flexhinm", *argv])
            args.base = str(getattr(args, "model", ""))
            for name in ("model", "other"):
                if getattr(args, name, None) is not None:
                    path = sources.find(
                        getattr(args, name), args.hub_cache, args.offline
                    )
                    setattr(args, name, path)
            args.run(args, console)
        sys.stdout.flush()
    except BrokenPipeError:  # `flexhinm inspect DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, NotFinite) as error:
        told = _one_line(error, getattr(args, "out", None))
        print(f"flexhinm: error: {told}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        out = getattr(args, "out", None)
        left = "" if out is None or out.exists() else f"; {out} was not written"
        print(f"flexhinm: interrupted{left}", file=sys.stderr)
        return 130
    return 0


def keep_compiled() -> None:
    """Keeps compiled programs on disk for later runs, unless JAX is told where."""
    known = jax.config.jax_compilation_cache_dir  # pyright: ignore
    if known is None:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = os.path.join(os.path.expanduser(base), "flexhinm", "xla")
        jax.config.update("jax_compilation_cache_dir", folder)
        # By default only what took a second is kept; a model has many small programs.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def silence_log() -> None:
    """Takes the library's warnings out of the log: they are part of the results.

    They came out twice, whenever another package had configured the root logger.
    """
    log = logging.getLogger("flexhinm_jax")
    log.addHandler(logging.NullHandler())
    log.propagate = False


def parser() -> Parser:
    """The parser of the whole command line."""
    top = Parser(
        prog="flexhinm",
        description="Prune models to patterns that kernels can use.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument(
        "--version", action="version", version=f"flexhinm {flexhinm_jax.__version__}"
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command in COMMANDS:
        command.add_parser(commands)
    return top


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of errors that come while writing, often without the name of the file."""


def _one_line(error: Exception, out: Path | None) -> str:
    if isinstance(error, OSError) and error.errno in FULL and out is not None:
        return f"{out} could not be written: {os.strerror(error.errno)}"
    if isinstance(error, fingerprint.Differs):
        return unfinished.differing_text(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
