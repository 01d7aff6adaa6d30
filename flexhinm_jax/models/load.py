"""A Hugging Face directory as a model: a pure function, its parameters, its tokenizer.

One door for encoders and decoders, dense directories and packed ones, so that programs
and the command line read models in one way. What is read is checked: an architecture
that is not known, a tensor too many or of another shape is named.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexhinm_jax.io import huggingface, shards, tensors
from flexhinm_jax.io import packed as packed_files
from flexhinm_jax.models import batches, decoder, decoder_config, encoder
from flexhinm_jax.tracing.sparsify import sparsify
from flexhinm_jax.types import PackedWeight

__all__ = [
    "ENCODERS",
    "Model",
    "is_decoder",
    "load",
    "load_tokenizer",
    "token_ids",
]

ENCODERS = ("bert",)
"""Supported values of `model_type`, besides those of decoders."""

PACKED = "packed.safetensors"
"""The whole packed model, as an encoder is written."""

PACKED_BLOCKS = "packed"
"""Folder with one packed file per block, as a decoder is written."""

TOKENIZER = "tokenizer.json"
GENERATION = "generation_config.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model directory that was read.

    Attributes:
      directory: where.
      config: sizes; a `DecoderConfig` or an `EncoderConfig`.
      apply: pure function. A decoder: `apply(params, tokens)`, i32[batch, length] ->
        logits [batch, length, vocabulary]. An encoder: `apply(params, tokens, mask)`,
        mask 1 for real tokens -> hidden states [batch, length, width].
      params: key of the checkpoint -> array; packed weights where `packed`.
      tokenizer: of the `tokenizers` package, neither cutting nor padding; None where
        the directory has none.
      ends: ids that end a text.
      pad: id behind the end of a text.
      packed: whether `params` has packed weights, which `apply` multiplies as they are.
    """

    directory: Path
    config: Any  # one of two, which callers know
    apply: Callable[..., jax.Array]
    params: dict[str, Any]
    tokenizer: Any
    ends: tuple[int, ...]
    pad: int = 0
    packed: bool = False

    @property
    def is_decoder(self) -> bool:
        """Whether it continues texts; else it reads them."""
        return isinstance(self.config, decoder.DecoderConfig)

    @property
    def rules(self) -> dict[str, Any]:
        """Rules for `fh.prune` that any pruning of this model should have."""
        return dict(decoder.rules(self.config)) if self.is_decoder else {}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in jax.tree.leaves(self.params))

    @functools.cached_property
    def zeros(self) -> float:
        """Share of zeros in the matrices of the layers."""
        blocks = "model.layers." if self.is_decoder else "encoder.layer."
        layers = [x for name, x in self.params.items() if name.startswith(blocks)]
        matrices = [x for x in layers if len(_shape(x)) == 2]
        nonzero = sum(
            np.count_nonzero(values)
            for x in matrices
            for values in (
                (x.dense_values, x.nm_values) if isinstance(x, PackedWeight) else (x,)
            )
            if values is not None
        )
        return 1 - nonzero / sum(math.prod(_shape(x)) for x in matrices)

    def sample(self) -> tuple[np.ndarray, ...]:
        """A batch of the right form, for tracing; its values mean nothing."""
        length = min(8, self.config.max_position_embeddings or 8)
        tokens = np.zeros((1, length), np.int32)
        return (tokens,) if self.is_decoder else (tokens, np.ones_like(tokens))

    def encode(self, text: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Tokens of a text, and where in it each begins and ends, in characters.

        Raises:
          ValueError: the tokenizer belongs to another model.
        """
        return token_ids(self.tokenizer, text, self.config.vocab_size)

    def tokenize(
        self, text: Sequence[str], batch_size: int, max_length: int | None = None
    ) -> list[batches.Batch]:
        """Batches of sentences, tokenized as the directory says.

        Args:
          text: sentences.
          batch_size: sentences of a batch.
          max_length: longest sentence in tokens, special tokens included, the rest is
            cut; None takes 128 or what the model allows.

        Raises:
          ValueError: the model cannot read so many tokens, or the tokenizer belongs to
            another model.
        """
        longest: int | None = self.config.max_position_embeddings
        cut = max_length or min(128, longest or 128)
        if longest is not None and cut > longest:
            raise ValueError(
                f"sentences of {cut} tokens are more than this model reads:"
                f" max_position_embeddings={longest}; cut them shorter"
            )
        self.tokenizer.enable_truncation(cut)
        try:
            ids = [encoded.ids for encoded in self.tokenizer.encode_batch(list(text))]
        finally:
            self.tokenizer.no_truncation()
        largest = max((max(tokens, default=0) for tokens in ids), default=0)
        _check_known(largest, self.config.vocab_size)
        kept = [tokens for tokens in ids if tokens]
        return list(batches.batches(kept, batch_size, cut, self.pad))

    def check_finite(self) -> None:
        """Raises ValueError that names leaves with NaN or infinity, if any."""
        bad = [
            name
            for name, leaf in self.params.items()
            if not all(
                bool(jnp.all(jnp.isfinite(x)))
                for x in jax.tree.leaves(leaf)
                if jnp.issubdtype(x.dtype, jnp.floating)
            )
        ]
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise ValueError(
                f"{self.directory}: NaN or infinity in {', '.join(bad[:3])}{more}"
            )

    def __repr__(self) -> str:
        """Kind, size and place."""
        form = "packed" if self.packed else "dense"
        return (
            f"Model({self.directory.name!r}, {type(self.config).__name__}, {form},"
            f" {len(self.params)} arrays, {self.nbytes / 1e6:.1f} MB)"
        )


def load(
    directory: str | os.PathLike,
    *,
    packed: bool = False,
    tokenizer: bool = True,
) -> Model:
    """Reads a model directory.

    Args:
      directory: Hugging Face directory of a family in `ENCODERS` or of
        `decoder_config.FAMILIES`.
      packed: read what `flexhinm prune` packed instead of the weights with zeros in
        place: `packed.safetensors`, or for a decoder the folder `packed`, which
        --pack writes.
      tokenizer: read `tokenizer.json`; without it a directory may lack one.

    Returns:
      The model; floating arrays on the default device, in the stored dtype.

    Raises:
      FileNotFoundError: the directory or a part of it is missing.
      ValueError: another architecture or a setting not supported, tensors that are
        missing, unknown or of another shape, or a damaged file.
      ImportError: the `hf` extra is not installed.

    Example:
      >>> model = load("SmolLM2-135M")  # doctest: +SKIP
      >>> ids = model.tokenizer.encode("Once upon a time").ids  # doctest: +SKIP
      >>> model.apply(model.params, jnp.array([ids])).shape  # doctest: +SKIP
      (1, 4, 49152)
    """
    directory = Path(directory)
    given = huggingface.read_config(directory)
    config = read_config(directory, given)
    # The tokenizer first: a missing one should not cost the time to read the weights.
    read = load_tokenizer(directory / TOKENIZER) if tokenizer else None
    params = _packed(directory) if packed else huggingface.read(directory).params
    if isinstance(config, decoder.DecoderConfig):
        shapes = {name: tuple(_shape(leaf)) for name, leaf in params.items()}
        try:
            decoder.check(shapes, config)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error
        apply = functools.partial(decoder.apply, config=config)
    else:
        apply = functools.partial(encoder.encode, config=config)
    return Model(
        directory=directory,
        config=config,
        apply=sparsify(apply) if packed else apply,
        params={name: _placed(leaf) for name, leaf in params.items()},
        tokenizer=read,
        ends=_ends(directory, given),
        pad=given.get("pad_token_id") or 0,
        packed=packed,
    )


def is_decoder(directory: str | os.PathLike) -> bool:
    """Whether a directory holds a decoder, otherwise an encoder.

    Raises:
      FileNotFoundError: the directory or its config is missing.
      ValueError: another architecture.
    """
    kind = _kind(Path(directory), huggingface.read_config(directory))
    return kind in decoder_config.FAMILIES


def read_config(
    directory: Path, given: Mapping[str, Any]
) -> decoder.DecoderConfig | encoder.EncoderConfig:
    """The sizes that a `config.json` gives.

    Args:
      directory: of the model, for messages.
      given: contents of the file.

    Raises:
      ValueError: another architecture, or a setting not supported.
    """
    kind = _kind(directory, given)
    decodes = kind in decoder_config.FAMILIES
    config = decoder.DecoderConfig if decodes else encoder.EncoderConfig
    try:
        return config.from_dict(given)
    except ValueError as error:
        raise ValueError(f"{directory / huggingface.CONFIG}: {error}") from error


def load_tokenizer(path: Path) -> Any:
    """Reads a `tokenizer.json`; it neither cuts nor pads.

    Raises:
      FileNotFoundError: it is missing.
      ValueError: it is damaged.
      ImportError: the `hf` extra is not installed.
    """
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
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_ids(
    tokenizer: Any, text: str, vocab_size: int
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Tokens of a text, and where in it each begins and ends.

    Args:
      tokenizer: from `load_tokenizer`.
      text: anything.
      vocab_size: tokens that the model knows.

    Returns:
      i32[count], and (first, one behind the last) character of every token.

    Raises:
      ValueError: the tokenizer gives a token that the model does not know.
    """
    encoded = tokenizer.encode(text)
    _check_known(max(encoded.ids, default=0), vocab_size)
    return np.array(encoded.ids, np.int32), encoded.offsets


def _check_known(largest: int, vocab_size: int) -> None:
    if largest >= vocab_size:
        raise ValueError(
            f"{TOKENIZER} gives token {largest}, but the model has"
            f" vocab_size={vocab_size}; they belong to different models"
        )


def _kind(directory: Path, given: Mapping[str, Any]) -> str:
    """The `model_type`, one that is supported."""
    kind = given.get("model_type")
    known = (*ENCODERS, *decoder_config.FAMILIES)
    if kind not in known:
        raise ValueError(
            f"{directory}: model_type={kind!r} is not supported; supported are"
            f" {', '.join(known)}. The library prunes any pure function:"
            " see flexhinm_jax.prune"
        )
    return kind


def _packed(directory: Path) -> dict[str, Any]:
    """The parameters in packed form; what no packed file holds as it is stored."""
    if (directory / PACKED).is_file():
        return packed_files.read_packed(directory / PACKED)
    files = sorted((directory / PACKED_BLOCKS).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{directory} holds no packed weights: neither {PACKED} nor a folder"
            f" {PACKED_BLOCKS} with blocks; `flexhinm prune` writes them, of a decoder"
            " with --pack"
        )
    params: dict[str, Any] = {}
    for path in files:
        params |= packed_files.read_packed(path)
    index = shards.read_index(directory)
    for file in index.headers:
        rest = [key for key in index.keys_of(file) if key not in params]
        params |= tensors.read(directory / file, rest)
    return params


def _shape(leaf: Any) -> tuple[int, ...]:
    """Shape of the dense form of a leaf; of a packed one its matrix."""
    return leaf.layout.shape if getattr(leaf, "layout", None) else leaf.shape


def _placed(leaf: Any) -> Any:
    """Floating arrays on the device; 64-bit integers stay on the host as they are."""
    floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.tree.map(jnp.asarray, leaf) if floating else leaf


def _ends(directory: Path, given: Mapping[str, Any]) -> tuple[int, ...]:
    path = directory / GENERATION
    ends = given.get("eos_token_id")
    if path.is_file():
        ends = shards.read_json(path).get("eos_token_id", ends)
    if ends is None:
        return ()
    ends = tuple(ends) if isinstance(ends, list) else (ends,)
    if not all(type(x) is int for x in ends):
        raise ValueError(
            f"eos_token_id={json.dumps(ends)} of {directory} must be integers"
        )
    return ends
