"""A model directory as a pure function with its parameters, and text as its batches.

Encoders of the BERT family only; `load` says so for any other `model_type`.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flexhinm_jax.io import huggingface
from flexhinm_jax.models import batches, encoder

TOKENIZER = "tokenizer.json"
KNOWN = ("bert",)


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


def load(directory: Path) -> Source:
    """Reads a model directory.

    Raises:
      FileNotFoundError: the directory or a part of it is missing.
      ValueError: it holds another kind of model, or is damaged.
      ImportError: the `hf` extra is not installed.
    """
    given = huggingface.read_config(directory)
    if given.get("model_type") not in KNOWN:
        raise ValueError(
            f"{directory}: model_type={given.get('model_type')!r} is not supported on"
            f" the command line; supported: {', '.join(KNOWN)}. The library prunes any"
            " pure function: see flexhinm_jax.prune"
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
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file; give calibration text, one sentence a line"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"{path} has no text; give one sentence a line")
    return found[:limit]


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
    if largest >= source.config.vocab_size:
        raise ValueError(
            f"{TOKENIZER} gives token {largest}, but the model has"
            f" vocab_size={source.config.vocab_size}; they belong to different models"
        )
    ids = [tokens for tokens in ids if tokens]
    pad = source.checkpoint.config.get("pad_token_id") or 0
    return list(batches.batches(ids, batch_size, max_length, pad))


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
