"""Equations that change a weight element by element and keep its zeros.

A packed weight takes part in them value by value: casts, roundings, factors and the end
of its derivative apply to the kept values alone.
"""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from flexhinm_jax.tracing.stops import Where


class Reach(enum.Enum):
    """What a change does to a product of factors."""

    EVERY_FACTOR = enum.auto()
    ONE_FACTOR = enum.auto()
    PRODUCT_ONLY = enum.auto()  # known for the multiplied out product alone


class Change(NamedTuple):
    """What an equation does to every element of a weight.

    Attributes:
      apply: the change, for an array of any shape.
      reach: how it passes through a product of factors.
      scaled_at: position of the equation that scales by a value of the program.
    """

    apply: Callable[[Array], Array]
    reach: Reach = Reach.EVERY_FACTOR
    scaled_at: Where | None = None


def change(eqn: Any, where: Where, position: int, operands: list) -> Change | None:
    """What an equation does to the weight at a position of its operands.

    Args:
      eqn: the equation.
      where: its position.
      position: which operand the weight is.
      operands: all of them; only scalars are read.

    Returns:
      The change, or None for an equation that is not one.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "convert_element_type":
        dtype = params["new_dtype"]
        if not jnp.issubdtype(dtype, np.floating):
            return None
        return Change(lambda x: x.astype(dtype))
    if name == "stop_gradient":
        return Change(lax.stop_gradient)
    if name == "reduce_precision":
        return Change(lambda x: lax.reduce_precision(x, **params), Reach.PRODUCT_ONLY)
    if name == "neg":
        return Change(lax.neg, Reach.ONE_FACTOR)
    if name == "mul" or (name == "div" and position == 0):
        scalar = operands[1 - position]
        if np.shape(scalar):
            return None
        f = lax.mul if name == "mul" else lax.div
        return Change(
            lambda x: f(x, jnp.asarray(scalar, x.dtype)), Reach.ONE_FACTOR, where
        )
    return None
