"""A decoder directory as the commands `eval` and `generate` need it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexhinm_jax.cli import source
from flexhinm_jax.io import huggingface, records
from flexhinm_jax.models import decoder
from flexhinm_jax.models.decoder import DecoderConfig

GENERATION = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Language:
    """A decoder directory that was read.

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


def load(directory: Path) -> Language:
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
    tokenizer = source._tokenizer(directory / source.TOKENIZER)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    stored = huggingface.read(directory).params
    try:
        decoder.check({name: leaf.shape for name, leaf in stored.items()}, config)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    params = {name: stored[name] for name in decoder.shapes(config)}
    at = decoder.block_prefix(0).split("0")[0]
    pruned = [x for k, x in params.items() if k.startswith(at) and x.ndim == 2]
    nonzero = sum(np.count_nonzero(x) for x in pruned)
    return Language(
        directory=directory,
        config=config,
        params={name: jnp.asarray(leaf) for name, leaf in params.items()},
        tokenizer=tokenizer,
        ends=_ends(directory, given),
        zeros=1 - nonzero / sum(x.size for x in pruned),
    )


def encode(model: Language, text: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Tokens of a text, and where in it each begins and ends, in characters.

    Raises:
      ValueError: the tokenizer belongs to another model.
    """
    encoded = model.tokenizer.encode(text)
    source._check_known(max(encoded.ids, default=0), model.config.vocab_size)
    return np.array(encoded.ids, np.int32), encoded.offsets


def check_finite(model: Language) -> None:
    """Raises ValueError that names tensors with NaN or infinity, if there are any."""
    bad = [k for k, x in model.params.items() if not bool(jnp.all(jnp.isfinite(x)))]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(
            f"{model.directory}: NaN or infinity in {', '.join(bad[:3])}{more}"
        )


def _ends(directory: Path, given: Mapping[str, Any]) -> tuple[int, ...]:
    path = directory / GENERATION
    found = given.get("eos_token_id")
    if path.is_file():
        found = records.read(path).get("eos_token_id", found)
    if found is None:
        return ()
    found = tuple(found) if isinstance(found, list) else (found,)
    if not all(type(x) is int for x in found):
        raise ValueError(f"eos_token_id={found!r} of {directory} must be integers")
    return found
