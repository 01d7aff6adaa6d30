"""Several processes that do one run together, on one machine or on many.

Every process is started with the same command but for its number. Process 0 writes and
speaks; the others speak of their errors only.
"""

import argparse
import atexit
import contextlib
import os
import sys
from collections.abc import Iterator

import jax

from flexhinm_jax.sequential.share import Lost, Share

AUTO = "auto"

FAILED = 2
"""The exit status of a mistake of the user, as `main` has it."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds who works together."""
    option = parser.add_argument_group(
        "several processes",
        "each takes a share of a decoder's samples; the files are those of one\n"
        "process. All need MODEL, TEXT and the folder of DIR on a file system that they"
        "\nshare.",
    ).add_argument
    option(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 waits for the others, a free port; or auto where SLURM,"
        " Open MPI or a TPU says it, and the numbers too",
    )
    option("--processes", type=int, metavar="N", help="how many there are")
    option("--process", type=int, metavar="I", help="which one this is, from 0")


def join(args: argparse.Namespace) -> None:
    """Waits for the other processes, if there are any.

    Raises:
      ValueError: options that do not fit together.
      Lost: the others did not come.
    """
    numbers = args.processes, args.process
    if args.coordinator is None:
        if numbers != (None, None):
            raise ValueError("--processes and --process need --coordinator HOST:PORT")
        return
    if args.coordinator != AUTO:
        if None in numbers:
            raise ValueError(
                f"--coordinator {args.coordinator} needs --processes N and --process I,"
                " with I from 0 to N - 1; or give --coordinator auto"
            )
        if not 0 <= args.process < args.processes:
            raise ValueError(
                f"--process {args.process} of --processes {args.processes}: they count"
                " from 0"
            )
    # It would catch the signal that is to end the process.
    jax.config.update("jax_enable_preemption_service", False)
    address = None if args.coordinator == AUTO else args.coordinator
    try:
        jax.distributed.initialize(address, *numbers)
    except ValueError as error:
        raise ValueError(
            f"--coordinator {args.coordinator}: the environment does not say who works"
            f" together ({error}); give HOST:PORT, --processes and --process"
        ) from error
    except RuntimeError as error:
        raise Lost(
            f"--coordinator {args.coordinator}: not all processes met there"
            f" ({str(error).splitlines()[0]})"
        ) from error
    # A process that fails would wait at its end for the others, and they for it.
    atexit.register(os._exit, FAILED)
    with _no_output():
        Share.here(jax.process_count())  # connects them while they are all here


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Sends what libraries print to stderr: stdout is for results."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def first() -> bool:
    """Whether this process writes and speaks."""
    return jax.process_index() == 0


def part() -> None:
    """Lets every process go its own way, after the work is done."""
    jax.distributed.shutdown()
    atexit.unregister(os._exit)
