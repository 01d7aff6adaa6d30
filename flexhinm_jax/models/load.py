"""A Hugging Face directory as a model: a pure function, its parameters, its tokenizer.

One door for encoders and decoders, dense directories and packed ones, so that programs
and the command line read models in one way. What is read is checked: an architecture
that is not known, a tensor too many or of another shape is named.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flexhinm_jax.io import huggingface, packed, shards
from flexhinm_jax.models import decoder, decoder_config, encoder
from flexhinm_jax.tracing.sparsify import sparsify

__all__ = ["DECODERS", "ENCODERS", "Model", "load", "load_tokenizer"]

ENCODERS = ("bert",)
DECODERS = tuple(decoder_config.FAMILIES)
"""Supported values of `model_type`."""

PACKED = "packed.safetensors"
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
      packed: whether `params` has packed weights, which `apply` multiplies as they are.
    """

    directory: Path
    config: decoder.DecoderConfig | encoder.EncoderConfig
    apply: Callable[..., jax.Array]
    params: dict[str, Any]
    tokenizer: Any
    ends: tuple[int, ...]
    packed: bool = False

    @property
    def is_decoder(self) -> bool:
        """Whether it continues texts; else it reads them."""
        return isinstance(self.config, decoder.DecoderConfig)

    @property
    def rules(self) -> dict[str, str]:
        """Rules for `fh.prune` that any pruning of this model should have."""
        if not isinstance(self.config, decoder.DecoderConfig):
            return {}
        return decoder.rules(self.config)

    def __repr__(self) -> str:
        """Kind, size and place."""
        leaves = jax.tree.leaves(self.params)
        size = sum(x.nbytes for x in leaves)
        form = "packed" if self.packed else "dense"
        return (
            f"Model({self.directory.name!r}, {type(self.config).__name__}, {form},"
            f" {len(self.params)} arrays, {size / 1e6:.1f} MB)"
        )


def load(
    directory: str | os.PathLike,
    *,
    packed_weights: bool = False,
    tokenizer: bool = True,
) -> Model:
    """Reads a model directory.

    Args:
      directory: Hugging Face directory of a family in `ENCODERS` or `DECODERS`.
      packed_weights: read `packed.safetensors`, which `flexhinm prune` wrote, instead
        of the weights with zeros in place.
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
    if packed_weights:
        if not (directory / PACKED).is_file():
            raise FileNotFoundError(
                f"{directory / PACKED} is missing; `flexhinm prune` writes it, a dense"
                " directory has none"
            )
        params = packed.read_packed(directory / PACKED)
    else:
        params = huggingface.read(directory).params
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
        apply=sparsify(apply) if packed_weights else apply,
        params={name: _placed(leaf) for name, leaf in params.items()},
        tokenizer=read,
        ends=_ends(directory, given),
        packed=packed_weights,
    )


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
    kind = given.get("model_type")
    if kind not in ENCODERS + DECODERS:
        raise ValueError(
            f"{directory}: model_type={kind!r} is not supported; supported are"
            f" {', '.join(ENCODERS + DECODERS)}. The library prunes any pure function:"
            " see flexhinm_jax.prune"
        )
    known = decoder.DecoderConfig if kind in DECODERS else encoder.EncoderConfig
    try:
        return known.from_dict(given)
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
