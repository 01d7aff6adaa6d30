"""Cases that the conformance suite and the property tests share."""

import functools

import jax
import jax.numpy as jnp

import flexhinm_jax as fh
from flexhinm_jax.types import Stats

SHAPE = (16, 32)

PATTERNS = {
    "unstructured": fh.Unstructured(),
    "2:4": fh.NM(2, 4),
    "flexhinm": fh.FlexHiNM(8, permute=None),
}
"""No regions, one region, three regions: what every method is tested with first."""

MORE_PATTERNS = {
    "unstructured-row": fh.Unstructured(scope="row"),
    "1:4": fh.NM(1, 4),
    "5:8": fh.NM(5, 8),
    "transposable": fh.Transposable(2, 4),
    "transposable-4:8": fh.Transposable(4, 8),
    "vector": fh.Vector(8),
    "hinm": fh.HiNM(8, permute=None),
    "hinm-1:4": fh.HiNM(4, n=1, m=4, permute=None),
    "flexhinm-one-tile": fh.FlexHiNM(16, n=2, m=8, permute=None),
    "flexhinm-gyro": fh.FlexHiNM(8),
    "hinm-gyro": fh.HiNM(8),
    "dense+nm": fh.FlexHiNM(permute=None, regions="dense+nm", boundary="matrix"),
    "tiles": fh.Tiles((4, 8)),
    "tiles-1:4": fh.Tiles(8, inner=fh.NM(1, 4)),
}
"""Other patterns, parameters and searched orders: the slow part of the suite."""


@functools.cache
def weight(seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@functools.cache
def stats(seed: int = 0, inputs: int = SHAPE[1], outputs: int = SHAPE[0]) -> Stats:
    """Statistics of correlated inputs with skewed channel scales."""
    keys = jax.random.split(jax.random.key(100 + seed), 3)
    x = jax.random.normal(keys[0], (256, inputs))
    x = x + 0.3 * x @ jax.random.normal(keys[1], (inputs, inputs)) / inputs**0.5
    x = x * jnp.exp(0.5 * jax.random.normal(keys[2], (inputs,))) + 0.1
    gram = x.T @ x
    return Stats(
        sq_norm=jnp.diag(gram),
        mean=x.mean(0),
        count=jnp.float32(256),
        gram=gram,
        sq_grad=jnp.square(jax.random.normal(jax.random.key(200), (outputs, inputs))),
    )


def targets(pattern, low: float = 0.55, high: float = 0.8) -> tuple[float, float]:
    """Two sparsities inside the range of a pattern; equal when it has only one."""
    first, last = pattern.sparsity_range()
    low = min(low, (first + last) / 2)
    return max(first, low), max(first, min(high, last))
