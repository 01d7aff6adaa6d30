"""Parameters of a model by key: those that a configuration asks for, random ones."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["check_float", "check_shape", "init", "select"]

FLOATS = ("float32", "bfloat16", "float16")
"""What models compute in."""


def select(
    params: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], prefix: str = ""
) -> dict[str, Array]:
    """The wanted parameters of a dict that may hold others, as JAX arrays.

    Args:
      params: key -> array.
      wanted: key -> shape.
      prefix: what the keys of `params` begin with besides those of `wanted`.

    Returns:
      Key of `wanted` -> array.

    Raises:
      ValueError: one is missing or has another shape.
    """
    chosen = {}
    for name, shape in wanted.items():
        if prefix + name not in params:
            raise ValueError(
                f"{prefix}{name} is missing from the parameters; they belong to "
                "another configuration"
            )
        chosen[name] = jnp.asarray(params[prefix + name])
        check_shape(prefix + name, chosen[name].shape, shape)
    return chosen


def check_shape(name: str, shape: Sequence[int], wanted: tuple[int, ...]) -> None:
    """Compares a parameter with its configuration.

    Args:
      name: its key.
      shape: what it has.
      wanted: what the configuration gives.

    Raises:
      ValueError: these differ.
    """
    if tuple(shape) != wanted:
        raise ValueError(
            f"{name} has shape {tuple(shape)}, the configuration gives {wanted}"
        )


def check_float(name: str, dtype: Any) -> None:
    """Refuses a parameter that models cannot compute with.

    Args:
      name: its key.
      dtype: what it has; anything whose text is its name.

    Raises:
      ValueError: it is none of `FLOATS`.
    """
    if str(dtype) not in FLOATS:
        raise ValueError(
            f"{name} has dtype {dtype}, supported are {', '.join(FLOATS)}; give the"
            " directory with float weights, or convert them to one of these"
        )


def init(
    key: Array,
    wanted: Mapping[str, tuple[int, ...]],
    scale: float | None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> dict[str, Array]:
    """Random parameters: normal weights, zero biases and means, unit norms.

    Args:
      key: PRNG key, consumed.
      wanted: key -> shape.
      scale: standard deviation of the weights; None for the square root of 2 over the
        inputs of one output (He et al. 2015, arXiv:1502.01852).
      dtype: dtype of all parameters.

    Returns:
      Key -> array.
    """
    keys = jax.random.split(key, len(wanted))
    params = {}
    for k, (name, shape) in zip(keys, wanted.items(), strict=True):
        if name.endswith(("bias", "running_mean")):
            params[name] = jnp.zeros(shape, dtype)
        elif len(shape) == 1:
            params[name] = jnp.ones(shape, dtype)
        else:
            deviation = math.sqrt(2 / math.prod(shape[1:])) if scale is None else scale
            draw = jax.random.normal(k, shape, jnp.float32) * deviation
            params[name] = draw.astype(dtype)
    return params
