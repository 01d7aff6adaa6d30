"""Rotary positions (arXiv:2104.09864) and the ways to stretch them over longer texts.

A pair of channels turns by its frequency with every position. A scaling changes the
frequencies of a trained model so that it reads further than it was trained:

- linear: all frequencies divided by one factor (arXiv:2306.15595);
- dynamic: a larger base, the longer the text, from the trained length on;
- llama3: low frequencies divided, high ones kept, a ramp between (arXiv:2407.21783);
- yarn: the same by number of turns, and sharper attention (arXiv:2309.00071).

The formulas are those of Hugging Face's checkpoints, so `from_dict` reads their
`config.json`. Frequencies are rounded once, from float64 to float32.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax.models import fields

__all__ = ["Dynamic", "Linear", "Llama3", "Scaling", "Yarn", "from_dict", "rotate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Every frequency divided by `factor`.

    Attributes:
      factor: how much longer texts may be, >= 1.
    """

    factor: float

    def __post_init__(self):
        """Validates the factor."""
        _check_numbers(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dynamic:
    """A base that grows with the length of the text; nothing changes up to `trained`.

    Attributes:
      factor: growth, >= 1.
      trained: positions the model was trained on (`max_position_embeddings`).
    """

    factor: float
    trained: int

    def __post_init__(self):
        """Validates the numbers."""
        _check_numbers(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
    """Low frequencies divided by `factor`, high ones kept, a ramp between.

    Attributes:
      factor: what wavelengths above trained / low_freq_factor are stretched by, >= 1.
      low_freq_factor: turns within `trained` positions below which a pair is stretched.
      high_freq_factor: turns above which it is kept; above `low_freq_factor`.
      trained: `original_max_position_embeddings`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    trained: int

    def __post_init__(self):
        """Validates the numbers."""
        _check_numbers(self)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be below"
                f" high_freq_factor={self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """Pairs that turn seldom divided by `factor`, the others kept, a ramp between.

    Attributes:
      factor: what slow pairs are stretched by, >= 1.
      trained: `original_max_position_embeddings`.
      attention_factor: scales rotated queries and keys; None for the paper's
        0.1 ln(factor) + 1.
      beta_fast: turns within `trained` positions above which a pair is kept.
      beta_slow: turns below which it is stretched.
      truncate: whether the ends of the ramp are rounded to whole pairs.
    """

    factor: float
    trained: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        """Validates the numbers."""
        _check_numbers(self)
        if self.beta_slow > self.beta_fast:
            raise ValueError(
                f"beta_slow={self.beta_slow} must not be above"
                f" beta_fast={self.beta_fast}"
            )


Scaling = Linear | Dynamic | Llama3 | Yarn

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
"""Supported values of `rope_type`."""


def frequencies(
    theta: float, size: int, scaling: Scaling | None, length: int
) -> tuple[np.ndarray, float]:
    """Radians per position of every pair of channels.

    Args:
      theta: base of the wavelengths.
      size: channels of a head, even.
      scaling: how the frequencies are stretched; None for not at all.
      length: positions of the text; only `Dynamic` depends on it.

    Returns:
      f32[size / 2], descending, and the factor of rotated queries and keys.
    """
    steps = np.arange(0, size, 2, dtype=np.float64) / size
    if isinstance(scaling, Dynamic):
        over = scaling.factor * max(length, scaling.trained) / scaling.trained
        # A head of one pair has no second frequency to stretch: its power is infinite.
        if size > 2:
            theta = theta * (over - scaling.factor + 1) ** (size / (size - 2))
    plain = theta**-steps
    scale = 1.0
    if isinstance(scaling, Linear):
        plain = plain / scaling.factor
    elif isinstance(scaling, Llama3):
        turns = scaling.trained * plain / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        plain = plain * (kept + (1 - kept) / scaling.factor)
    elif isinstance(scaling, Yarn):
        kept = 1 - _ramp(scaling, theta, size)
        plain = plain * (kept + (1 - kept) / scaling.factor)
        scale = scaling.attention_factor
        scale = _sharpening(scaling.factor) if scale is None else scale
    return plain.astype(np.float32), float(scale)


def turns(
    positions: Array, theta: float, size: int, scaling: Scaling | None, length: int
) -> tuple[Array, Array]:
    """Cosine and sine of every angle.

    Args:
      positions: i32[..., t].
      theta: see `frequencies`, as are the others.
      size: channels of a head.
      scaling: how frequencies are stretched.
      length: positions of the text, >= the largest position + 1.

    Returns:
      Two f32[..., t, 1, size / 2]: they broadcast over heads.
    """
    steps, scale = frequencies(theta, size, scaling, length)
    angles = positions.astype(jnp.float32)[..., None, None] * jnp.asarray(steps)
    return jnp.cos(angles) * jnp.float32(scale), jnp.sin(angles) * jnp.float32(scale)


def rotate(x: Array, turns: tuple[Array, Array]) -> Array:
    """Turns channel c of [..., t, heads, size] together with channel c + size / 2."""
    cos, sin = turns
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.astype(x.dtype)


def from_dict(
    config: Mapping[str, Any], limit: int
) -> tuple[float, Scaling | None, float | None]:
    """Base and scaling of a Hugging Face `config.json`, in its old or new form.

    Old: `rope_theta` beside `rope_scaling`, and `rope_local_base_freq` for layers with
    a window; new: both in `rope_parameters`, perhaps once per kind of layer.

    Args:
      config: contents of the file.
      limit: `max_position_embeddings` of the model.

    Returns:
      Base, scaling, and the base of layers with a window where that is another.

    Raises:
      ValueError: an unknown kind, a missing number, or a setting not supported.
    """
    where = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    entry = config.get(where) or {}
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}={entry!r} must be an object or null")
    entry = {name: value for name, value in entry.items() if value is not None}
    local = config.get("rope_local_base_freq")
    if any(isinstance(value, Mapping) for value in entry.values()):
        inner = entry.get("sliding_attention", {})
        if set(entry) != {"full_attention", "sliding_attention"} or not isinstance(
            inner, Mapping
        ):
            raise ValueError(
                f"{where} differs between layers ({', '.join(entry)}); supported is one"
                " for all, or full_attention and sliding_attention"
            )
        if inner.get("rope_type", "default") != "default":
            raise ValueError(
                f"{where}: rope_type={inner['rope_type']!r} in sliding_attention is not"
                " supported; supported there is default"
            )
        local = inner.get("rope_theta", local)
        entry = {k: v for k, v in entry["full_attention"].items() if v is not None}
    theta = entry.pop("rope_theta", config.get("rope_theta"))
    theta = 10_000.0 if theta is None else theta
    if local is not None:
        fields.checked("rope_theta of layers with a window", local, float)
    kind = entry.get("rope_type", entry.get("type", "default"))
    part = entry.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise ValueError(
            f"partial_rotary_factor={part!r} is not supported; supported is 1"
        )
    try:
        fields.chosen("rope_type", kind, KINDS)
        return theta, _scaling(kind, entry, config, limit), local
    except KeyError as error:
        raise ValueError(f"{where}: {error.args[0]} is missing for {kind}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _scaling(
    kind: str, entry: Mapping[str, Any], config: Mapping[str, Any], limit: int
) -> Scaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(factor=entry["factor"])
    if kind == "dynamic":
        return Dynamic(factor=entry["factor"], trained=limit)
    inner = entry.get("original_max_position_embeddings")
    # The readers of these files let the outer value win.
    trained = config.get("original_max_position_embeddings") or inner or limit
    if kind == "llama3":
        return Llama3(
            factor=entry["factor"],
            low_freq_factor=entry["low_freq_factor"],
            high_freq_factor=entry["high_freq_factor"],
            trained=trained,
        )
    fields.checked("original_max_position_embeddings", trained, int)
    factor = entry["factor"] if "factor" in entry else limit / trained
    fields.checked("factor", factor, float)
    attention = entry.get("attention_factor")
    one, all_dims = entry.get("mscale"), entry.get("mscale_all_dim")
    if attention is None and one and all_dims:
        fields.checked("mscale", one, float)
        fields.checked("mscale_all_dim", all_dims, float)
        attention = _sharpening(factor, one) / _sharpening(factor, all_dims)
    return Yarn(
        factor=factor,
        trained=trained,
        attention_factor=attention,
        beta_fast=entry.get("beta_fast") or 32.0,
        beta_slow=entry.get("beta_slow") or 1.0,
        truncate=entry.get("truncate", True),
    )


def _ramp(scaling: Yarn, theta: float, size: int) -> np.ndarray:
    """0 for pairs that are kept, 1 for those that are stretched."""

    def pair(count: float) -> float:
        """The pair (as a real number) that turns so often within `trained`."""
        positions = scaling.trained / (count * 2 * math.pi)
        return size * math.log(positions) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low if high != low else 0.001
    return np.clip((np.arange(size // 2) - low) / width, 0, 1)


def _sharpening(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def _check_numbers(config: Any) -> None:
    fields.check(config)
    if config.factor < 1:
        raise ValueError(f"factor must be a number >= 1, got {config.factor!r}")
