"""What becomes of the hidden states of a sentence, as sentence-transformers says it.

A directory of sentence-transformers lists its parts in `modules.json`: the encoder, a
pooling with a configuration of its own, and often a normalisation.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from jax import Array

from flexhinm_jax.io import shards
from flexhinm_jax.io.huggingface import CONFIG, MODULES

__all__ = ["MEAN", "MODES", "Pooling", "read"]


def _mean(hidden: Array, real: Array) -> Array:
    total = jnp.sum(hidden * real, axis=1)
    return total / jnp.maximum(jnp.sum(real, axis=1), 1.0)


def _first(hidden: Array, real: Array) -> Array:
    return hidden[:, 0] * real[:, 0]


def _max(hidden: Array, real: Array) -> Array:
    largest = jnp.max(jnp.where(real > 0, hidden, -jnp.inf), axis=1)
    return jnp.where(jnp.any(real > 0, axis=1), largest, jnp.float32(0))


MODES: dict[str, Callable[[Array, Array], Array]] = {
    "mean": _mean,
    "cls": _first,
    "max": _max,
}
"""Name -> (f32[batch, length, hidden], 1 on real tokens f32[batch, length, 1]) ->
f32[batch, hidden]."""

FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Field of a pooling's configuration -> mode; some of these are not supported."""


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How one embedding is made of the hidden states of a sentence.

    Attributes:
      mode: a key of `MODES`: the mean of the tokens, the first token, or the largest
        value of every channel.
      unit: whether the embedding is scaled to unit length.
    """

    mode: str = "mean"
    unit: bool = True

    def __post_init__(self):
        """Validates the mode."""
        if self.mode not in MODES:
            raise ValueError(
                f"pooling {self.mode!r} is not supported; supported are"
                f" {', '.join(MODES)}"
            )


MEAN = Pooling()
"""What an encoder gets whose directory says nothing."""


def read(directory: Path) -> Pooling:
    """The pooling that a directory asks for.

    Args:
      directory: of the model; without `modules.json` the mean of unit length.

    Raises:
      ValueError: a module or a mode that is not supported, or a damaged file.
      FileNotFoundError: the configuration of the pooling is missing.
    """
    path = directory / MODULES
    if not path.is_file():
        return MEAN
    try:
        parts = [dict(part) for part in json.loads(path.read_bytes())]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no list of modules: {error}") from error
    mode, unit = MEAN.mode, False
    for part in parts:
        kind = str(part.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            mode = _mode(directory / str(part.get("path", "")) / CONFIG)
        elif kind == "Normalize":
            unit = True
        elif kind != "Transformer":
            raise ValueError(
                f"{path}: a module {kind!r} is not supported; supported are"
                " Transformer, Pooling and Normalize"
            )
    return Pooling(mode, unit)


def _mode(path: Path) -> str:
    """The mode of a pooling's configuration."""
    given = shards.read_json(path)
    chosen = [mode for flag, mode in FLAGS.items() if given.get(flag)]
    if "pooling_mode" in given:
        chosen = [str(given["pooling_mode"])]
    if len(chosen) != 1 or chosen[0] not in MODES:
        raise ValueError(
            f"{path}: pooling {' and '.join(chosen) or 'of no kind'} is not supported;"
            f" supported is one of {', '.join(MODES)}"
        )
    return chosen[0]
