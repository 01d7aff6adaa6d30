"""No kernel is trusted before it was right on the GPU at hand.

The kernels rest on instructions that only a GPU can check. So the first product of a
process that would use one runs it on small integers, whose products and sums are exact,
and compares every bit with the host. A kernel that fails is refused with that reason,
and the product runs in plain XLA. Costs one or two small compilations per process.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexhinm_jax.gpu import support
from flexhinm_jax.types import PackedWeight


class Case(NamedTuple):
    """One product to check.

    Attributes:
      tiles: row tiles.
      rows: rows of a tile.
      dense: dense columns of a tile.
      groups: 2:4 groups of a tile; 32 of them are one step of the pipeline.
      tokens: rows of x.
      dtype: of values and activations.
      cut: how to cut it, an argument of the product; None lets the kernel choose.
    """

    tiles: int
    rows: int
    dense: int
    groups: int
    tokens: int
    dtype: str = "bfloat16"
    cut: Any = None


def failure(
    name: str, prepare: Callable, run: Callable, cases: tuple[Case, ...]
) -> str | None:
    """Why a kernel must not run on the GPU at hand, or None if it was right.

    Args:
      name: of its layout.
      prepare: makes its layout.
      run: its product.
      cases: products to check.

    Returns:
      None also where there is no GPU: nothing is going to run then.
    """
    device = first_gpu()
    if device is None or support.interpreting():
        return None
    return _failure(name, prepare, run, cases, device)


def first_gpu() -> Any:
    """The first CUDA device, or None."""
    try:
        return jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return None


@functools.cache
def _failure(
    name: str, prepare: Callable, run: Callable, cases: tuple, device: Any
) -> str | None:
    rng = np.random.default_rng(0)
    try:
        # Products are traced when this runs, but its own arrays are not.
        with jax.ensure_compile_time_eval(), jax.default_device(device):
            right = all(_right(name, prepare, run, rng, case) for case in cases)
    except Exception as error:  # whatever it is, the kernel cannot be used
        text = str(error).partition("\n")[0][:200]
        return f"its check on this GPU failed: {type(error).__name__}: {text}"
    return None if right else "it gave a wrong result in its check on this GPU"


def _right(name: str, prepare: Callable, run: Callable, rng: Any, case: Case) -> bool:
    packed, w = example(rng, *case[:4], dtype=case.dtype)
    x = rng.integers(-2, 3, (case.tokens, w.shape[1])).astype(np.float32)
    ready = jax.jit(prepare)(packed)
    packed = dataclasses.replace(packed, layouts={name: ready})
    forced = {} if case.cut is None else {"cut": case.cut}
    product = jax.jit(
        lambda x, packed: run(x, packed, jnp.dtype(jnp.float32), **forced)
    )
    y = product(jnp.asarray(x, case.dtype), packed)
    return np.array_equal(np.asarray(y), x @ w.T)


def example(
    rng: np.random.Generator,
    t: int,
    v: int,
    dense: int,
    groups: int,
    dtype: str = "bfloat16",
) -> tuple[PackedWeight, np.ndarray]:
    """A packed weight of small integers, and the same matrix dense.

    Args:
      rng: host generator.
      t: tiles.
      v: rows of a tile.
      dense: dense columns of a tile.
      groups: 2:4 groups of a tile.
      dtype: of the values.
    """
    inputs = dense + 4 * groups + 4
    first = rng.integers(0, 3, (t, v, groups))
    second = first + 1 + rng.integers(0, 3 - first)
    nibbles = np.zeros((t, v, -(-groups // 8) * 8), np.uint32)
    nibbles[..., :groups] = first | second << 2
    shift = 4 * np.arange(8, dtype=np.uint32)
    words = (nibbles.reshape(t, v, -1, 8) << shift).sum(-1, dtype=np.uint32)
    columns = np.stack([rng.permutation(inputs)[:-4] for _ in range(t)])
    order = rng.permutation(t * v)
    values = rng.integers(-2, 3, (t, v, dense + 2 * groups)).astype(np.float32)
    w = np.zeros((t * v, inputs), np.float32)
    kept = np.stack([first, second], -1) + 4 * np.arange(groups)[:, None]
    for tile in range(t):
        rows = order[tile * v : tile * v + v][:, None]
        w[rows, columns[tile, :dense]] = values[tile, :, :dense]
        four = columns[tile, dense:][kept[tile].reshape(v, -1)]
        w[rows, four] = values[tile, :, dense:]
    i32 = lambda a: jnp.asarray(a, jnp.int32)  # noqa: E731
    packed = PackedWeight(
        dense_index=i32(columns[:, :dense]),
        dense_values=jnp.asarray(values[..., :dense], dtype),
        nm_index=i32(columns[:, dense:]),
        nm_values=jnp.asarray(values[..., dense:], dtype),
        nm_positions=jnp.asarray(words),
        out_order=i32(order),
        left=None,
        right=None,
        shape=(t * v, inputs),
        n=2,
        m=4,
    )
    return packed, w
