"""A model directory as a pure function with its parameters, and text as its batches.

`load` reads encoders of the BERT family; decoders stay on disk and are opened by
`models.blocks`.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flexhinm_jax.io import huggingface
from flexhinm_jax.models import batches, decoder_config, encoder
from flexhinm_jax.types import Uses

TOKENIZER = "tokenizer.json"
ENCODERS = ("bert",)
DECODERS = tuple(decoder_config.FAMILIES)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model directory that was read.

    Attributes:
      checkpoint: its files in memory.
      config: sizes of the encoder.
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


def load(directory: Path) -> Source:
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
    return Source(
        checkpoint=huggingface.read(directory),
        config=config,
        apply_fn=functools.partial(encoder.encode, config=config),
    )


def read_text(path: Path, limit: int | None = None) -> list[str]:
    """Reads calibration text: UTF-8, one sentence a line, blank lines skipped.

    Args:
      path: the file.
      limit: takes the first so many sentences; None takes all.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not UTF-8 or has no text.
    """
    lines = read_whole(path).splitlines()
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"{path} has no text; give one sentence a line")
    return found[:limit]


def read_whole(path: Path) -> str:
    """Reads a text file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file; give calibration text, one sentence a line"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


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
    tokenizer = _tokenizer(directory / TOKENIZER)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = np.asarray(tokenizer.encode(text).ids, np.int64)
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


def tokenize(
    source: Source, text: list[str], batch_size: int, max_length: int | None
) -> list[batches.Batch]:
    """Batches of the text, tokenized as the model directory says.

    Args:
      source: model directory.
      text: sentences.
      batch_size: sentences of a batch.
      max_length: longest sentence in tokens, special tokens included, the rest is cut;
        None takes 128 or what the model allows.

    Raises:
      FileNotFoundError: the directory has no tokenizer.json.
      ValueError: the model cannot read so many tokens, or the tokenizer is damaged or
        belongs to another model.
      ImportError: the `hf` extra is not installed.
    """
    longest = source.config.max_position_embeddings
    if max_length is None:
        max_length = min(128, longest)
    if max_length > longest:
        raise ValueError(
            f"--max-length {max_length} is more than this model reads:"
            f" max_position_embeddings={longest}"
        )
    tokenizer = _tokenizer(source.checkpoint.directory / TOKENIZER)
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    ids = [encoded.ids for encoded in tokenizer.encode_batch(text)]
    largest = max((max(tokens, default=0) for tokens in ids), default=0)
    _check_known(largest, source.config.vocab_size)
    ids = [tokens for tokens in ids if tokens]
    pad = source.checkpoint.config.get("pad_token_id") or 0
    return list(batches.batches(ids, batch_size, max_length, pad))


def _check_known(largest: int, vocab_size: int) -> None:
    if largest >= vocab_size:
        raise ValueError(
            f"{TOKENIZER} gives token {largest}, but the model has"
            f" vocab_size={vocab_size}; they belong to different models"
        )


def _tokenizer(path: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "reading text needs the tokenizers package: pip install 'flexhinm_jax[hf]'"
        ) from error
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; save the model's fast tokenizer there"
            " (tokenizer.save_pretrained of transformers writes it)"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def real(tokens: Any, mask: Any) -> Any:
    """Which tokens of a batch count: the token mask of calibration."""
    del tokens
    return mask != 0


def check_found(model: Path, uses: Uses) -> None:
    """Refuses a model in which the rules leave nothing to prune."""
    if not uses.leaves:
        raise ValueError(
            f"{model}: no weight is left to prune; 'flexhinm inspect' lists them"
            " all, and --rule may skip too many"
        )
