"""What commands read alike of their command line, and the types of their options."""

import argparse
import math
import re
import textwrap
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from flexhinm_jax import patterns
from flexhinm_jax.kernels.quantised import DTYPES
from flexhinm_jax.models.load import PACKED_BLOCKS, Reads
from flexhinm_jax.pruning.allocate import MODES, Mode
from flexhinm_jax.pruning.owl import OWL

ACTIONS = ("skip", "prune")
"""What a rule may ask for besides a pattern; "prune" takes that of --pattern."""

DENSE = "dense"
"""Another word for "skip"."""

ONLY_ENCODERS = {
    "resume": "a decoder goes on by itself from OUT.partial beside --out",
    "limit": "give --samples",
    "max_length": "give --length",
    "share_orders": "it is not for --sequential",
}
NOT_FOR_IMAGES = ("max_length",)
ONLY_DECODERS = ("memory", "length", "samples", "dtype", "pack", "first_last")
ONLY_DECODERS += ("coordinator",)

LENGTH, SAMPLES, BATCH_SAMPLES = 512, 128, 4
"""Of a decoder where nothing is said: tokens of a sample, the most samples, a batch."""

NUMBER = re.compile(r"[01]|[01]?\.\d+")

UNITS = {"": 1, "B": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
UNITS |= {f"{u}IB": UNITS[u] for u in "KMGT"}
UNITS |= {f"{u}B": 1000**k for k, u in enumerate("KMGT", 1)}

WORDS = {
    "allocate": "--allocate",
    "batch": "a smaller --batch-size",
    "block": "block={!r}",
    "continue": "the same --resume",
    "describe": "'flexhinm inspect MODEL'",
    "exceptions": "--rule REGEX=SPARSITY",
    "length": "a shorter --length",
    "memory": "--memory {}",
    "no sparsity": "leave --sparsity out",
    "older": "remove the damaged one to continue from {}",
    "overwrite": "--force",
    "owl blocks": "choose --allocate global or uniform",
    "restart": "another --resume",
    "samples": "fewer --samples",
    "share orders": "--share-orders",
    "steps": "fewer --tokens",
    "skip": "--rule 'REGEX=skip'",
    "some sparsity": "--sparsity",
    "sparsity": "--sparsity {}",
    "target": "--target seq, or --dtype checkpoint",
    "temperature": "--temperature {}",
    "top k": "--top-k {}",
    "window": "--reconstruct {}",
}
"""The words of `arguments.WORDS` on the command line."""


def command(
    commands: Any, name: str, *, help: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """Adds a command; its texts are laid out as they are shown."""
    return commands.add_parser(
        name,
        help=help,
        description=textwrap.dedent(description),
        epilog=textwrap.dedent(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the model that a command reads, and how it is fetched."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="model directory, or OWNER/NAME[@REVISION] of the Hugging Face Hub",
    )
    add = parser.add_argument_group("the Hugging Face Hub").add_argument
    add(
        "--hub-cache",
        type=Path,
        metavar="DIR",
        help="where downloads are kept (default: where huggingface_hub keeps them)",
    )
    add(
        "--offline",
        action="store_true",
        help="use what is in the cache, fetch nothing (as HF_HUB_OFFLINE=1)",
    )


def add_calibration(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Adds the text to calibrate on."""
    parser.add_argument(
        "--calibration",
        default="builtin",
        metavar="TEXT",
        help="UTF-8 text file, one sentence a line; hf:DATASET[:CONFIG]:SPLIT:COLUMN"
        f" of the Hub; or builtin, a short neutral text (default){more}. For a model of"
        " images: a folder of images, or an .npy file of pixels",
    )


def add_packed(parser: argparse.ArgumentParser, help: str) -> None:
    """Adds the switch for weights as the sparse kernels read them."""
    parser.add_argument("--packed", action="store_true", help=help)


def add_pack_values(parser: argparse.ArgumentParser) -> None:
    """Adds what packed values are stored in."""
    parser.add_argument(
        "--pack-values",
        choices=DTYPES,
        help="store the packed values in eight bits, with one scale per row (default:"
        " the dtype of the checkpoint); a decoder needs --pack",
    )


def add_shown(parser: argparse.ArgumentParser) -> None:
    """Adds what is printed."""
    add = parser.add_argument
    add("-q", "--quiet", action="store_true", help="show errors only")
    add("--json", action="store_true", help="print one JSON document, no table")


def add_rows(parser: argparse.ArgumentParser) -> None:
    """Adds how long the table is."""
    parser.add_argument(
        "--rows",
        choices=("grouped", "all"),
        default="grouped",
        help="one row for equal weights of all layers (default), or one for each",
    )


def add_out(parser: argparse.ArgumentParser) -> None:
    """Adds where a model directory goes."""
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", required=True, help="directory to write")
    add("--force", action="store_true", help="replace DIR if it is a model directory")


def add_written(parser: argparse.ArgumentParser) -> None:
    """Adds where a pruned model directory goes, and what decides about it."""
    add_out(parser)
    add_seed(parser)
    add_shown(parser)
    add_rows(parser)


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Adds the random seed."""
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="random seed (default: 0)"
    )


def add_sentences(parser: argparse.ArgumentParser, batch: str) -> None:
    """Adds how text is cut into batches of sentences."""
    add = parser.add_argument
    add(
        "--limit",
        type=positive,
        metavar="N",
        help="use the first N sentences or images only (default: all)",
    )
    add("--batch-size", type=positive, metavar="N", help=batch)
    add(
        "--max-length",
        type=positive,
        metavar="N",
        help="cut sentences to N tokens (default: 128, or what the model reads)",
    )


def add_samples(add: Callable[..., Any]) -> None:
    """Adds how a text is cut into samples, by the `add_argument` of a group."""
    add(
        "--length",
        type=positive,
        metavar="N",
        help=f"tokens of a sample (default: {LENGTH}, or what the model reads)",
    )
    add(
        "--samples",
        type=positive,
        metavar="N",
        help=f"samples to calibrate on (default: all of TEXT, at most {SAMPLES})",
    )


def add_decoders(parser: argparse.ArgumentParser) -> Any:
    """Adds what streaming a decoder needs; returns the group of these options."""
    group = parser.add_argument_group("decoders")
    add = group.add_argument
    add(
        "--memory",
        type=size,
        metavar="SIZE",
        help="most memory to take besides that of the interpreter, such as 8GiB; hidden"
        " states that do not fit go to disk",
    )
    add_samples(add)
    add(
        "--dtype",
        choices=("checkpoint", "float32"),
        help="what to compute in (default: the dtype of the checkpoint)",
    )
    add(
        "--pack",
        action="store_true",
        help="also write the weights as the sparse kernels read them, one file per"
        f" block in {PACKED_BLOCKS}/",
    )
    return group


def check_rate(name: str, rate: float) -> None:
    """Raises ValueError for a learning rate that is not above 0 and finite."""
    if not 0 < rate < math.inf:
        raise ValueError(f"--{name} {rate}: need a positive number")


def check_kind(
    args: argparse.Namespace, reads: Reads, but: Collection[str] = ()
) -> None:
    """Raises ValueError for an option that is for another kind of model.

    Args:
      args: the options.
      reads: what the model is made for.
      but: options that this command takes for every kind.
    """
    is_decoder = reads is Reads.TEXT
    for option in NOT_FOR_IMAGES if reads is Reads.IMAGES else ():
        if getattr(args, option, None):
            raise ValueError(f"--{option.replace('_', '-')} is for text; leave it out")
    for option, why in ONLY_ENCODERS.items() if is_decoder else ():
        if option not in but and getattr(args, option, None):
            raise ValueError(f"--{option.replace('_', '-')} is for encoders; {why}")
    if is_decoder and getattr(args, "pack_values", None) and not args.pack:
        raise ValueError("--pack-values says what --pack writes; add --pack")
    for option in () if is_decoder else ONLY_DECODERS:
        if getattr(args, option, None):
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is for decoders; leave it out")


def rules(texts: Sequence[str]) -> tuple[dict[str, Any], dict[str, float]]:
    """Every --rule, the first wins: ({regex: pattern or action}, {regex: sparsity})."""
    others: dict[str, Any] = {}
    numbers: dict[str, float] = {}
    for text in texts:
        regex, _, value = text.rpartition("=")
        if regex and NUMBER.fullmatch(value):
            numbers.setdefault(_regex(regex, text), float(value))
        else:
            others.setdefault(*_rule(text))
    return others, numbers


def _rule(text: str) -> tuple[str, Any]:
    """(regex, pattern or action) of one --rule; the regex may hold "=" too."""
    first: ValueError | None = None
    cut = text.find("=")
    while cut > 0:
        regex, value = text[:cut], text[cut + 1 :]
        value = "skip" if value == DENSE else value
        try:
            action = value if value in ACTIONS else patterns.parse(value)
        except ValueError as error:
            first = first or error
            cut = text.find("=", cut + 1)
            continue
        return _regex(regex, text), action
    if first is None:
        raise ValueError(f"--rule {text!r} is not REGEX=PATTERN or REGEX=skip")
    raise ValueError(f"--rule {text!r}: {first}, {', '.join(ACTIONS)}")


def _regex(regex: str, text: str) -> str:
    try:
        re.compile(regex)
    except re.error as error:
        raise ValueError(
            f"--rule {text!r}: {regex!r} is no regular expression: {error}"
        ) from error
    return regex


def mode(text: str) -> Mode:
    """The type of --allocate: a mode, or owl with options."""
    name, _, rest = text.partition(":")
    if name not in MODES or (rest and name != "owl"):
        raise argparse.ArgumentTypeError(f"{text!r}: choose {', '.join(MODES)}")
    if not rest:
        return text  # type: ignore[return-value]
    values: dict[str, Any] = {}
    for option in rest.split(","):
        key, _, value = option.partition("=")
        try:
            if key not in ("multiple", "spread"):
                raise ValueError("owl takes multiple= and spread=")
            values[key] = float(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{option!r}: {error}") from error
    try:
        return OWL(**values)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def written(value: Any) -> str:
    """The text of an option that is read as this value."""
    if isinstance(value, OWL):
        return f"owl:multiple={value.multiple!r},spread={value.spread!r}"
    return str(value)


def positive(text: str) -> int:
    """The type of an option that counts from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def seed(text: str) -> int:
    """The type of --seed; of larger ones a PRNG key would see 32 bits."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to {2**32 - 1}")
    return value


def fraction(text: str) -> float:
    """The type of an option that is a share of the weights."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number; give the fraction that is removed, such as 0.5"
            " for 50 %"
        ) from None


def size(text: str) -> int:
    """Bytes of a text such as 8GiB, 800MB or 1000000."""
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = None if parts is None else UNITS.get(parts[2].upper())
    if parts is None or unit is None or float(parts[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 8GiB or 800MB")
    return int(float(parts[1]) * unit)
