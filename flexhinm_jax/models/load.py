"""A Hugging Face directory as a model: a pure function, its parameters, its tokenizer.

One door for encoders, decoders and image classifiers, dense directories and packed
ones, so that programs and the command line read models in one way. What is read is
checked: an architecture that is not known, a tensor too many or of another shape is
named.
"""

import dataclasses
import enum
import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexhinm_jax import arguments
from flexhinm_jax.io import huggingface, shards, tensors
from flexhinm_jax.io import packed as packed_files
from flexhinm_jax.io.sources import short
from flexhinm_jax.jax_versions import on_device
from flexhinm_jax.models import (
    batches,
    decoder,
    decoder_config,
    encoder,
    encoder_config,
    fields,
    resnet,
    vit,
)
from flexhinm_jax.models.pooling import Pooling
from flexhinm_jax.models.pooling import read as read_pooling
from flexhinm_jax.tracing.sparsify import sparsify
from flexhinm_jax.types import PackedWeight

__all__ = [
    "Kind",
    "Model",
    "Reads",
    "is_decoder",
    "kind_of",
    "kinds",
    "load",
    "load_config",
    "load_tokenizer",
    "token_ids",
]

PACKED = "packed.safetensors"
"""The whole packed model, as an encoder is written."""

PACKED_BLOCKS = "packed"
"""Folder with one packed file per block, as a decoder is written."""

SAMPLE_TOKENS = 8

MARGIN = 64
"""Tokens at the end of a piece of text that the text behind it may change."""

CHARACTERS = 6
"""Of a token, about: what is read first of a long text."""

TOKENIZER = "tokenizer.json"
GENERATION = "generation_config.json"


Examples = Sequence[str] | np.ndarray
"""Sentences, or pixels [images, channels, height, width]."""


class Reads(enum.Enum):
    """What a model is made for."""

    TEXT = "a text, which it continues"
    SENTENCES = "sentences, which it embeds"
    IMAGES = "images, which it classifies"


def _no_rules(config: Any) -> dict[str, str]:
    """Nothing is left alone."""
    del config
    return {}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the families of one module have in common.

    Attributes:
      config: sizes; its `from_dict` reads a `config.json`.
      apply: (parameters, *inputs, config=sizes) -> outputs.
      reads: what the inputs are.
      layers: regular expression on the keys of the repeated layers.
      rules: sizes -> rules for `fh.prune` that any pruning of the model should have.
    """

    config: type
    apply: Callable[..., jax.Array]
    reads: Reads
    layers: str
    rules: Callable[[Any], dict[str, str]] = _no_rules


DECODER = Kind(
    decoder.DecoderConfig,
    decoder.apply,
    Reads.TEXT,
    r"^model\.layers\.",
    decoder.model_rules,
)
ENCODER = Kind(
    encoder.EncoderConfig,
    encoder.encode,
    Reads.SENTENCES,
    r"\b(encoder|transformer)\.layer\.",
)
VIT = Kind(vit.ViTConfig, vit.classify, Reads.IMAGES, r"\.encoder\.layer\.", vit.rules)
RESNET = Kind(
    resnet.ResNetConfig,
    resnet.classify,
    Reads.IMAGES,
    r"\.encoder\.stages\.",
    resnet.rules,
)


def kinds() -> dict[str, Kind]:
    """Supported values of `model_type`, and what they are."""
    return {
        **dict.fromkeys(encoder_config.FAMILIES, ENCODER),
        **dict.fromkeys(vit.FAMILIES, VIT),
        **dict.fromkeys(resnet.FAMILIES, RESNET),
        **dict.fromkeys(decoder_config.FAMILIES, DECODER),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model directory that was read.

    Attributes:
      directory: where.
      kind: what it reads, and how its families are read.
      config: sizes; of the type `kind.config`.
      apply: pure function. A decoder: `apply(params, tokens)`, i32[batch, length] ->
        logits [batch, length, vocabulary]. An encoder: `apply(params, tokens, mask)`,
        mask 1 for real tokens -> hidden states [batch, length, width]. A classifier:
        `apply(params, pixels)`, f32[batch, channels, height, width] -> logits
        [batch, classes].
      params: key of the checkpoint -> array; packed weights where `packed`.
      tokenizer: of the `tokenizers` package, neither cutting nor padding; None where
        the directory has none.
      ends: ids that end a text.
      pad: id behind the end of a text.
      packed: whether `params` has packed weights, which `apply` multiplies as they are.
    """

    directory: Path
    kind: Kind
    config: Any  # of the type kind.config, which callers know
    apply: Callable[..., jax.Array]
    params: dict[str, Any]
    tokenizer: Any
    ends: tuple[int, ...]
    pad: int = 0
    packed: bool = False

    @property
    def is_decoder(self) -> bool:
        """Whether it continues texts; else it reads them."""
        return self.kind.reads is Reads.TEXT

    @property
    def reads_images(self) -> bool:
        """Whether it classifies images; else it reads text."""
        return self.kind.reads is Reads.IMAGES

    @property
    def rules(self) -> dict[str, Any]:
        """Rules for `fh.prune` that any pruning of this model should have."""
        return dict(self.kind.rules(self.config))

    @functools.cached_property
    def pooling(self) -> Pooling:
        """How an encoder's hidden states become one embedding.

        Raises:
          ValueError: the directory asks for something that is not supported.
        """
        return read_pooling(self.directory)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in jax.tree.leaves(self.params))

    @functools.cached_property
    def zeros(self) -> float:
        """Share of zeros in the matrices of the layers."""
        inside = re.compile(self.kind.layers)
        layers = [x for name, x in self.params.items() if inside.search(name)]
        matrices = [x for x in layers if len(_shape(x)) > 1]
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
        if self.reads_images:
            return (np.zeros((1, *self.config.image_shape), np.float32),)
        if self.is_decoder:
            longest = self.config.max_position_embeddings or SAMPLE_TOKENS
            return (np.zeros((1, min(SAMPLE_TOKENS, longest)), np.int32),)
        tokens = np.zeros((1, min(SAMPLE_TOKENS, self.config.longest)), np.int32)
        return tokens, np.ones_like(tokens)

    def steps(
        self, examples: Examples, batch_size: int, max_length: int | None = None
    ) -> list[tuple[np.ndarray, ...]]:
        """What `apply` takes besides the parameters, batch by batch.

        Args:
          examples: sentences for an encoder, pixels [images, channels, height, width]
            for a classifier.
          batch_size: examples of a batch; the last batch of images may have fewer.
          max_length: see `tokenize`.

        Raises:
          ValueError: see `tokenize`.
        """
        if not self.reads_images:
            rows = self.tokenize(list(examples), batch_size, max_length)
            return [(batch.tokens, batch.mask) for batch in rows]
        starts = range(0, len(examples), batch_size)
        return [(np.asarray(examples[k : k + batch_size]),) for k in starts]

    @property
    def token_mask(self) -> Callable[..., jax.Array] | None:
        """(inputs of `apply`) -> which tokens count; None where all do."""
        return real_tokens if self.kind.reads is Reads.SENTENCES else None

    def encode(
        self, text: str, count: int | None = None
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Tokens of a text, and where in it each begins and ends, in characters.

        Args:
          text: anything.
          count: the first so many of them; None for all.

        Raises:
          ValueError: the tokenizer belongs to another model.
        """
        return token_ids(self.tokenizer, text, self.config.vocab_size, count)

    def tokenize(
        self,
        text: Sequence[str],
        batch_size: int,
        max_length: int | None = None,
        *,
        buckets: Sequence[int] = batches.BUCKETS,
    ) -> list[batches.Batch]:
        """Batches of sentences, tokenized as the directory says.

        Args:
          text: sentences.
          batch_size: sentences of a batch.
          max_length: longest sentence in tokens, special tokens included, the rest is
            cut; None takes 128 or what the model allows.
          buckets: lengths that sentences are padded to, see `models.batches`.

        Raises:
          ValueError: the model cannot read so many tokens, or the tokenizer belongs to
            another model.
        """
        longest: int = self.config.longest
        cut = max_length or min(128, longest)
        if cut > longest:
            allowed = self.config.max_position_embeddings
            raise ValueError(
                f"sentences of {cut} tokens are more than the {longest} that this model"
                f" reads: max_position_embeddings={allowed}; cut them shorter"
            )
        self.tokenizer.enable_truncation(cut)
        try:
            ids = [encoded.ids for encoded in self.tokenizer.encode_batch(list(text))]
        finally:
            self.tokenizer.no_truncation()
        largest = max((max(tokens, default=0) for tokens in ids), default=0)
        _check_known(largest, self.config.vocab_size)
        kept = [tokens for tokens in ids if tokens]
        return list(batches.batches(kept, batch_size, cut, self.pad, buckets=buckets))

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
            raise ValueError(
                f"{self.directory}: NaN or infinity in {arguments.some(bad, 3)}"
            )

    def __repr__(self) -> str:
        """Kind, size and place."""
        form = "packed" if self.packed else "dense"
        return (
            f"Model({short(self.directory)!r}, {type(self.config).__name__}, {form},"
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
      directory: Hugging Face directory of a family in `kinds()`.
      packed: read what `flexhinm prune` packed instead of the weights with zeros in
        place: `packed.safetensors`, or for a decoder the folder `packed`, which
        --pack writes.
      tokenizer: read `tokenizer.json`; without it a directory may lack one. One of a
        classifier of images has none.

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
    kind, config = _kind(directory, given), read_config(directory, given)
    tokenizer = tokenizer and kind.reads is not Reads.IMAGES
    # The tokenizer first: a missing one should not cost the time to read the weights.
    read = load_tokenizer(directory / TOKENIZER) if tokenizer else None
    params = _packed(directory) if packed else huggingface.read(directory).params
    if kind.reads is Reads.TEXT:
        stored = {k: (tuple(_shape(leaf)), leaf.dtype) for k, leaf in params.items()}
        decoder.check_directory(directory, stored, config)
    apply = functools.partial(kind.apply, config=config)
    return Model(
        directory=directory,
        kind=kind,
        config=config,
        apply=sparsify(apply) if packed else apply,
        params={name: _placed(leaf) for name, leaf in params.items()},
        tokenizer=read,
        ends=_ends(directory, given),
        pad=fields.integer(
            f"pad_token_id of {directory}", given.get("pad_token_id") or 0
        ),
        packed=packed,
    )


def is_decoder(directory: str | os.PathLike) -> bool:
    """Whether a directory holds a decoder, otherwise an encoder.

    Raises:
      FileNotFoundError: the directory or its config is missing.
      ValueError: another architecture.
    """
    return kind_of(directory).reads is Reads.TEXT


def kind_of(directory: str | os.PathLike) -> Kind:
    """What the model of a directory is.

    Raises:
      FileNotFoundError: the directory or its config is missing.
      ValueError: another architecture.
    """
    return _kind(Path(directory), huggingface.read_config(directory))


def load_config(directory: str | os.PathLike) -> Any:
    """The sizes of the model of a directory, of the type `kind_of(directory).config`.

    Raises:
      FileNotFoundError: the directory or its config is missing.
      ValueError: another architecture, or a setting not supported.
    """
    return read_config(Path(directory), huggingface.read_config(directory))


def read_config(directory: Path, given: Mapping[str, Any]) -> Any:
    """The sizes that a `config.json` gives.

    Args:
      directory: of the model, for messages.
      given: contents of the file.

    Raises:
      ValueError: another architecture, or a setting not supported.
    """
    config: Any = _kind(directory, given).config
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
    with arguments.extra("hf", "reading text needs the tokenizers package"):
        import tokenizers
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
    tokenizer: Any, text: str, vocab_size: int, count: int | None = None
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Tokens of a text, and where in it each begins and ends.

    Args:
      tokenizer: from `load_tokenizer`.
      text: anything; of a long one no more is cut into tokens than `count` needs.
      vocab_size: tokens that the model knows.
      count: the first so many tokens, or as many as there are; None for all.

    Returns:
      i32[count], and (first, one behind the last) character of every token.

    Raises:
      ValueError: the tokenizer gives a token that the model does not know, or the text
        is none, such as arguments of a command that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not UTF-8: {error}") from error
    size = len(text) if count is None else CHARACTERS * (count + MARGIN)
    encoded = tokenizer.encode(text[:size])
    while size < len(text) and len(encoded.ids) < (count or 0) + MARGIN:
        size *= 2
        encoded = tokenizer.encode(text[:size])
    ids = encoded.ids[:count]
    _check_known(max(ids, default=0), vocab_size)
    return np.array(ids, np.int32), encoded.offsets[:count]


def _check_known(largest: int, vocab_size: int) -> None:
    if largest >= vocab_size:
        raise ValueError(
            f"{TOKENIZER} gives token {largest}, but the model has"
            f" vocab_size={vocab_size}; they belong to different models"
        )


def real_tokens(tokens: Any, mask: Any) -> Any:
    """Which tokens of a batch of sentences count."""
    del tokens
    return mask != 0


def _kind(directory: Path, given: Mapping[str, Any]) -> Kind:
    """What the `model_type` is, one that is supported."""
    name, known = given.get("model_type"), kinds()
    if name not in list(known):
        raise ValueError(
            f"{directory}: model_type={name!r} is not supported; supported are"
            f" {', '.join(known)}. The library prunes any pure function:"
            " see flexhinm_jax.prune"
        )
    return known[name]


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
    return jax.tree.map(on_device, leaf) if floating else leaf


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
