"""Block-diagonal matrices as stacks of their blocks: products and the choice of scale.

A factor on the outputs is `a[k, b, b]` with k * b = o, one on the inputs `[k, b, b]`
with k * b = i. Everything is float32 with full-precision products.
"""

import jax.numpy as jnp
from jax import Array, lax


def einsum(form: str, *arrays: Array) -> Array:
    """`jnp.einsum` that no accelerator rounds to a short mantissa."""
    return jnp.einsum(form, *arrays, precision=lax.Precision.HIGHEST)


def largest_block(side: int, most: int, unit: int = 1) -> int:
    """The largest divisor of `side` up to `most` that is a multiple of `unit`.

    Args:
      side: channels to cover with blocks.
      most: upper limit; `unit` when that is larger.
      unit: the blocks must be a multiple of it; divides `side`.

    Example:
      >>> largest_block(384, 32), largest_block(12, 32), largest_block(37, 32)
      (32, 12, 1)
    """
    sizes = range(unit, max(most, unit) + 1, unit)
    return max(size for size in sizes if side % size == 0)


def identity(side: int, block: int) -> Array:
    """f32[side / block, block, block]: the identity."""
    eye = jnp.eye(block, dtype=jnp.float32)
    return jnp.broadcast_to(eye, (side // block, block, block))


def cut(x: Array, a: int, b: int) -> Array:
    """[o, i] -> [o / a, i / b, a, b]."""
    o, i = x.shape
    return jnp.swapaxes(x.reshape(o // a, a, i // b, b), 1, 2)


def join(x: Array) -> Array:
    """The inverse of `cut`: [I, J, a, b] -> [I * a, J * b]."""
    k, j, a, b = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(k * a, j * b)


def left(blocks: Array, x: Array) -> Array:
    """Multiplies diag(blocks) @ x.

    Args:
      blocks: [k, b, b].
      x: [k * b, i].

    Returns:
      [k * b, i].
    """
    k, b, _ = blocks.shape
    return einsum("kab,kbi->kai", blocks, x.reshape(k, b, -1)).reshape(x.shape)


def right(x: Array, blocks: Array) -> Array:
    """Multiplies x @ diag(blocks).

    Args:
      x: [o, k * b].
      blocks: [k, b, b].

    Returns:
      [o, k * b].
    """
    k, b, _ = blocks.shape
    return einsum("okb,kbc->okc", x.reshape(-1, k, b), blocks).reshape(x.shape)


def transpose(blocks: Array) -> Array:
    """The blocks of the transposed matrix."""
    return jnp.swapaxes(blocks, 1, 2)


def balance(a: Array, s: Array, b: Array) -> tuple[Array, Array, Array]:
    """The same product diag(a) @ s @ diag(b) in the scale that survives bfloat16.

    (a diag(g)^-1, diag(g) s) and (s diag(h), diag(h)^-1 b) are the same product for any
    g and h. Taken are those that give the columns of a and the rows of b unit norm; a
    zero column or row stays.

    Args:
      a: f32[k, b, b], on the outputs.
      s: f32[o, i].
      b: f32[k, b, b], on the inputs.
    """
    g = jnp.sqrt(jnp.sum(jnp.square(a), axis=1, keepdims=True))
    h = jnp.sqrt(jnp.sum(jnp.square(b), axis=2, keepdims=True))
    g, h = jnp.where(g > 0, g, 1), jnp.where(h > 0, h, 1)
    return a / g, s * g.reshape(-1, 1) * h.reshape(1, -1), b / h
