"""Random bits as `jax.random` makes them, in a program that compiles faster.

On a CPU every call of JAX's generator is a loop of ten kernels, and compiling a kernel
takes tens of milliseconds whatever it does. Here the twenty rounds of Threefry-2x32
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") are written out: one
kernel, .06 CPU seconds of compilation instead of .3. The values are those of
`jax.random`, bit for bit; for another generator `jax.random` is called.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
BLOCKS = 5  # of four rounds, after each of which the key is added
PARITY = 0x1BD11BDA
MAX_COUNT = 1 << 32  # above it the counter would need its second word


def bits(key: Array, shape: tuple[int, ...]) -> Array:
    """`jax.random.bits(key, shape, jnp.uint32)`.

    Args:
      key: one key, typed or raw, consumed. It should come out of a loop or into the
        program: XLA computes a key that was split beside this call once per use.
      shape: of the result.

    Returns:
      u32[shape]
    """
    count = math.prod(shape)
    if not _is_threefry(key) or count >= MAX_COUNT:
        return jax.random.bits(key, shape, jnp.uint32)
    data = jax.random.key_data(key)
    keys = data[0], data[1], data[0] ^ data[1] ^ jnp.uint32(PARITY)
    x = jnp.full((count,), keys[0], jnp.uint32)
    y = jnp.arange(count, dtype=jnp.uint32) + keys[1]
    for block in range(BLOCKS):
        for turn in ROTATIONS[block % 2]:
            x = x + y
            y = x ^ ((y << jnp.uint32(turn)) | (y >> jnp.uint32(32 - turn)))
        x = x + keys[(block + 1) % 3]
        y = y + keys[(block + 2) % 3] + jnp.uint32(block + 1)
    return (x ^ y).reshape(shape)


def _is_threefry(key: Array) -> bool:
    """Whether JAX would draw from this key with Threefry, counting in row-major."""
    known = str(jax.random.key_impl(key)) == "threefry2x32"
    return known and jax.config.jax_threefry_partitionable  # pyright: ignore[reportAttributeAccessIssue]
