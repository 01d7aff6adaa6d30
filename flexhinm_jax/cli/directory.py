"""A model directory as the commands need it: read, fed with text, written again.

An encoder of the BERT family and a decoder are both read whole here; `flexhinm prune`
opens a decoder block by block instead (`streaming.blocks`).
"""

import argparse
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexhinm_jax.cli.console import Console, bytes_text
from flexhinm_jax.io import atomic, huggingface, packed, records
from flexhinm_jax.models import batches, decoder, decoder_config, encoder
from flexhinm_jax.models.decoder import DecoderConfig
from flexhinm_jax.models.load import TOKENIZER, load_tokenizer
from flexhinm_jax.pruning import prune
from flexhinm_jax.pruning.report import Report
from flexhinm_jax.types import Uses

GENERATION = "generation_config.json"
PACKED = "packed.safetensors"
REPORT = "report.json"
BUILTIN = "builtin"
DATASET_ROWS = 512
HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
ENCODERS = ("bert",)
DECODERS = tuple(decoder_config.FAMILIES)


def is_decoder(directory: Path) -> bool:
    """Whether a directory holds a decoder, otherwise an encoder.

    Raises:
      FileNotFoundError: the directory or its config is missing.
      ValueError: another kind of model.
    """
    kind = huggingface.read_config(directory).get("model_type")
    if kind not in ENCODERS + DECODERS:
        raise ValueError(
            f"{directory}: model_type={kind!r} is not supported on the command line;"
            f" supported: {', '.join(ENCODERS + DECODERS)}. The library prunes any pure"
            " function: see flexhinm_jax.prune"
        )
    return kind in DECODERS


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder directory that was read.

    Attributes:
      checkpoint: its files in memory.
      config: sizes.
      apply_fn: `apply_fn(params, tokens, mask)`, the hidden states.
    """

    checkpoint: huggingface.Checkpoint
    config: encoder.EncoderConfig
    apply_fn: Callable[..., Any]

    @property
    def params(self) -> dict[str, np.ndarray]:
        """Key of the checkpoint -> array."""
        return self.checkpoint.params

    def sample(self) -> tuple[np.ndarray, np.ndarray]:
        """A batch of the right form, for tracing; its values mean nothing."""
        length = min(8, self.config.max_position_embeddings)
        tokens = np.zeros((1, length), np.int32)
        return tokens, np.ones((1, length), np.int32)

    def tokenize(
        self, text: list[str], batch_size: int, max_length: int | None = None
    ) -> list[batches.Batch]:
        """Batches of sentences, tokenized as the directory says.

        Args:
          text: sentences.
          batch_size: sentences of a batch.
          max_length: longest sentence in tokens, special tokens included, the rest is
            cut; None takes 128 or what the model allows.

        Raises:
          FileNotFoundError: the directory has no tokenizer.json.
          ValueError: the model cannot read so many tokens, or the tokenizer is damaged
            or belongs to another model.
          ImportError: the `hf` extra is not installed.
        """
        longest = self.config.max_position_embeddings
        if max_length is None:
            max_length = min(128, longest)
        if max_length > longest:
            raise ValueError(
                f"--max-length {max_length} is more than this model reads:"
                f" max_position_embeddings={longest}"
            )
        tokenizer = load_tokenizer(self.checkpoint.directory / TOKENIZER)
        tokenizer.enable_truncation(max_length)
        ids = [encoded.ids for encoded in tokenizer.encode_batch(text)]
        largest = max((max(tokens, default=0) for tokens in ids), default=0)
        _check_known(largest, self.config.vocab_size)
        ids = [tokens for tokens in ids if tokens]
        pad = self.checkpoint.config.get("pad_token_id") or 0
        return list(batches.batches(ids, batch_size, max_length, pad))


def read_encoder(directory: Path) -> Encoder:
    """Reads the directory of an encoder.

    Raises:
      FileNotFoundError: the directory or a part of it is missing.
      ValueError: it holds another kind of model, or is damaged.
      ImportError: the `hf` extra is not installed.
    """
    given = huggingface.read_config(directory)
    if is_decoder(directory):
        raise ValueError(
            f"{directory}: model_type={given['model_type']!r} is a decoder; this needs"
            f" an encoder: {', '.join(ENCODERS)}"
        )
    try:
        config = encoder.EncoderConfig.from_dict(given)
    except ValueError as error:
        raise ValueError(f"{directory / huggingface.CONFIG}: {error}") from error
    return Encoder(
        checkpoint=huggingface.read(directory),
        config=config,
        apply_fn=functools.partial(encoder.encode, config=config),
    )


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder directory that was read whole.

    Attributes:
      directory: where.
      config: sizes.
      params: key of the checkpoint -> array on the device.
      tokenizer: of the `tokenizers` package; neither cuts nor pads.
      ends: ids that end a text.
      zeros: share of zeros in the matrices of the layers.
    """

    directory: Path
    config: DecoderConfig
    params: dict[str, jax.Array]
    tokenizer: Any
    ends: tuple[int, ...]
    zeros: float

    def encode(self, text: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Tokens of a text, and where in it each begins and ends, in characters.

        Raises:
          ValueError: the tokenizer belongs to another model.
        """
        encoded = self.tokenizer.encode(text)
        _check_known(max(encoded.ids, default=0), self.config.vocab_size)
        return np.array(encoded.ids, np.int32), encoded.offsets

    def check_finite(self) -> None:
        """Raises ValueError that names tensors with NaN or infinity, if any."""
        bad = [k for k, x in self.params.items() if not bool(jnp.all(jnp.isfinite(x)))]
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise ValueError(
                f"{self.directory}: NaN or infinity in {', '.join(bad[:3])}{more}"
            )


def read_decoder(directory: Path) -> Decoder:
    """Reads a decoder directory.

    Raises:
      FileNotFoundError: the directory or a part of it is missing.
      ValueError: another architecture or a setting not supported, tensors that are
        missing, unknown or of another shape, or a damaged file.
      ImportError: the `hf` extra is not installed.
    """
    given = huggingface.read_config(directory)
    try:
        config = DecoderConfig.from_dict(given)
    except ValueError as error:
        raise ValueError(f"{directory / huggingface.CONFIG}: {error}") from error
    # The tokenizer first: a missing one should not cost the time to read the weights.
    tokenizer = load_tokenizer(directory / TOKENIZER)
    stored = huggingface.read(directory).params
    try:
        decoder.check({name: leaf.shape for name, leaf in stored.items()}, config)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    params = {name: stored[name] for name in decoder.shapes(config)}
    at = decoder.block_prefix(0).split("0")[0]
    pruned = [x for k, x in params.items() if k.startswith(at) and x.ndim == 2]
    nonzero = sum(np.count_nonzero(x) for x in pruned)
    return Decoder(
        directory=directory,
        config=config,
        params={name: jnp.asarray(leaf) for name, leaf in params.items()},
        tokenizer=tokenizer,
        ends=_ends(directory, given),
        zeros=1 - nonzero / sum(x.size for x in pruned),
    )


def _ends(directory: Path, given: Mapping[str, Any]) -> tuple[int, ...]:
    path = directory / GENERATION
    ends = given.get("eos_token_id")
    if path.is_file():
        ends = records.read(path).get("eos_token_id", ends)
    if ends is None:
        return ()
    ends = tuple(ends) if isinstance(ends, list) else (ends,)
    if not all(type(x) is int for x in ends):
        raise ValueError(f"eos_token_id={ends!r} of {directory} must be integers")
    return ends


def find(name: str | Path, cache: Path | None = None, offline: bool = False) -> Path:
    """The directory of a model: a folder, or one of the Hugging Face Hub.

    Args:
      name: a folder, or OWNER/NAME[@REVISION].
      cache: where downloads are kept; None for the place of huggingface_hub.
      offline: takes what is in the cache and fetches nothing.

    Raises:
      ValueError: it is not there, or cannot be fetched.
      ImportError: the `hf` extra is not installed.
    """
    path = Path(name)
    remote = HUB_NAME.fullmatch(str(name))
    if path.exists() or remote is None:
        return path
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{name} is no folder here; fetching it from the Hub needs"
            " huggingface_hub: pip install 'flexhinm_jax[hf]'"
        ) from error
    others = [s for s in huggingface.WEIGHT_SUFFIXES if s != ".safetensors"]
    try:
        found = huggingface_hub.snapshot_download(
            remote["repo"],
            revision=remote["revision"],
            cache_dir=cache,
            local_files_only=offline,
            ignore_patterns=[f"*{suffix}" for suffix in others],
        )
    # The package and its transport raise many kinds, some of them no OSError.
    except Exception as error:
        why = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name} is no folder here, and not to be had from the Hugging Face Hub:"
            f" {type(error).__name__}: {why}"
        ) from error
    return Path(found)


def read_text(source: str | Path, limit: int | None = None) -> str:
    """Reads a text, line ends as they are.

    Args:
      source: a file, "builtin", or hf:DATASET[:CONFIG]:SPLIT:COLUMN.
      limit: rows of a dataset; None takes `DATASET_ROWS`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not UTF-8, or the dataset cannot be read.
      ImportError: the `datasets` extra is not installed.
    """
    if str(source) == BUILTIN:
        return Path(__file__).with_name("builtin.txt").read_text(encoding="utf-8")
    if str(source).startswith("hf:"):
        return "\n".join(_rows(str(source), limit or DATASET_ROWS))
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a UTF-8 text")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _rows(source: str, limit: int) -> list[str]:
    """The first rows with text of a column of a dataset."""
    parts = source.split(":")[1:]
    if len(parts) not in (3, 4) or not all(parts):
        raise ValueError(
            f"--calibration {source}: write hf:DATASET[:CONFIG]:SPLIT:COLUMN, such as"
            " hf:Salesforce/wikitext:wikitext-2-raw-v1:train:text"
        )
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "reading a dataset needs datasets: pip install 'flexhinm_jax[datasets]'"
        ) from error
    name, *config, split, column = parts
    rows: list[str] = []
    try:
        for row in datasets.load_dataset(name, *config, split=split, streaming=True):
            if len(rows) == limit:
                break
            if text := str(row[column]).strip():
                rows.append(text)
    # The package and its transport raise many kinds.
    except Exception as error:
        why = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"--calibration {source}: {type(error).__name__}: {why}"
        ) from error
    return rows


def read_sentences(source: str | Path, limit: int | None = None) -> list[str]:
    """Reads a text of one sentence a line; blank lines are skipped.

    Args:
      source: see `read_text`.
      limit: takes the first so many sentences; None takes all.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not UTF-8 or has no text.
    """
    lines = [line.strip() for line in read_text(source, limit).splitlines()]
    sentences = [line for line in lines if line]
    if not sentences:
        raise ValueError(f"{source} has no text; give one sentence a line")
    return sentences[:limit]


def note_builtin(args: argparse.Namespace, console: Console) -> None:
    """Says that nobody chose the text to calibrate on."""
    if args.calibration == BUILTIN:
        console.note(
            "calibrating on the bundled text, which is short; give --calibration a text"
            " like those that the model will read"
        )


def samples(
    directory: Path,
    text: str,
    length: int,
    count: int | None,
    most: int,
    vocab_size: int,
) -> np.ndarray:
    """Text as pieces of equal length, tokenized as the model directory says.

    The whole text is one sequence, cut every `length` tokens; what is left is dropped.

    Args:
      directory: model directory.
      text: anything.
      length: tokens of a piece.
      count: pieces; None for all, at most `most`.
      most: see `count`.
      vocab_size: tokens that the model knows.

    Returns:
      i32[pieces, length].

    Raises:
      FileNotFoundError: the directory has no tokenizer.json.
      ValueError: the text is too short, or the tokenizer is damaged or belongs to
        another model.
      ImportError: the `hf` extra is not installed.
    """
    ids = np.asarray(load_tokenizer(directory / TOKENIZER).encode(text).ids, np.int64)
    wanted = count or 1
    if len(ids) < wanted * length:
        raise ValueError(
            f"the calibration text has {len(ids)} tokens, {wanted} samples of {length}"
            f" need {wanted * length}; give more text, fewer --samples or a shorter"
            " --length"
        )
    pieces = min(count or most, len(ids) // length)
    ids = ids[: pieces * length]
    _check_known(int(ids.max()), vocab_size)
    return ids.astype(np.int32).reshape(pieces, length)


def _check_known(largest: int, vocab_size: int) -> None:
    if largest >= vocab_size:
        raise ValueError(
            f"{TOKENIZER} gives token {largest}, but the model has"
            f" vocab_size={vocab_size}; they belong to different models"
        )


def real(tokens: Any, mask: Any) -> Any:
    """Which tokens of a batch count: the token mask of calibration."""
    del tokens
    return mask != 0


def check_uses(model: Path, uses: Uses) -> None:
    """Refuses a model in which the rules leave nothing to prune."""
    if not uses.leaves:
        raise ValueError(
            f"{model}: no weight is left to prune; 'flexhinm inspect' lists them"
            " all, and --rule may skip too many"
        )


def check_out(args: argparse.Namespace) -> None:
    """Refuses an --out that must not be written, and a model that cannot be copied."""
    huggingface.check_copy(args.model, args.out)
    atomic.check_directory(args.out, overwrite=args.force)


def write(
    args: argparse.Namespace,
    result: prune.Pruned,
    model: Encoder,
    texts: Mapping[str, str],
) -> None:
    """Writes the directory: the model with zeros in place, packed file, other texts."""
    with atomic.directory(args.out, overwrite=args.force) as folder:
        huggingface.write(
            folder, result.params, source=model.checkpoint, overwrite=True
        )
        packed.write_packed(folder / PACKED, result.packed, overwrite=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")


def report_text(document: dict[str, Any]) -> str:
    """Contents of the report file."""
    return json.dumps(document, indent=2) + "\n"


def ending(out: Path, report: Report, packed_file: str | None = None) -> list[str]:
    """The last lines that a person reads."""
    kept = f"{len(report.skipped)} leaves not pruned (flexhinm inspect says why)"
    covered = report.coverage_lines
    if packed_file is None:
        return [*covered, kept, f"wrote {out} with {REPORT}"]
    dense, small = report.tree_dense_bytes, report.tree_packed_bytes
    return [
        *covered,
        f"whole model: {bytes_text(dense)} dense, {bytes_text(small)} packed; {kept}",
        f"wrote {out} with {packed_file} and {REPORT}",
    ]
