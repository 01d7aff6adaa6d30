"""What every GPU kernel needs to know of Mosaic, imported only when it is asked for.

Mosaic GPU is private to jax and changes from release to release. Its names are used in
the modules of the kernels, never at import time of the package, so an older jax never
sees them.
"""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

SINCE = (0, 11, 2)
"""First release of jax whose Mosaic GPU the kernels were compiled with."""

SHARED_BYTES = 227 * 1024
"""Shared memory that a block may use on Hopper."""

HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
"""Dtypes of the sparse tensor-core form that is used here."""


def mosaic() -> Any:
    """`jax.experimental.pallas.mosaic_gpu`, imported on the first call."""
    return importlib.import_module("jax.experimental.pallas.mosaic_gpu")


def not_half(dtype: Any) -> str | None:
    """Why a dtype has no sparse tensor-core form, or None if it has one."""
    if jnp.dtype(dtype) in HALF:
        return None
    return f"{jnp.dtype(dtype).name} has no 2:4 tensor-core form (bfloat16, float16)"


@contextlib.contextmanager
def interpreted(detect_races: bool = True) -> Iterator[None]:
    """Kernels traced inside run in the Mosaic GPU interpreter, on any platform.

    What a kernel writes as inline PTX (the sparse product of two tiles, the gather and
    the scatter) is replaced there by its meaning in jax.numpy; pipelines, barriers,
    index arithmetic and the copies of the tensor memory engine are interpreted.

    Args:
      detect_races: raise where two threads touch shared memory without an order.
    """
    plgpu = mosaic()
    parameters = plgpu.InterpretGPUParams(detect_races=detect_races)
    with plgpu.force_gpu_interpret_mode(parameters):
        yield


def interpreting() -> bool:
    """Whether kernels traced now are going to be interpreted."""
    from jax._src import config

    state = getattr(config, "pallas_tpu_interpret_mode_context_manager", None)
    return state is not None and state.value is not None


def swizzled(columns: int, dtype: Any) -> tuple[Any, ...]:
    """Shared-memory transforms of a tile with `columns` contiguous elements.

    The widest swizzle that a row fits: 128, 64 or 32 bytes, in tiles of eight rows.
    """
    plgpu = mosaic()
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(min(columns * bits, 1024))
    return (
        plgpu.TilingTransform((8, 8 * swizzle // bits)),
        plgpu.SwizzleTransform(swizzle),
    )


def pad_rows(x: jax.Array, multiple: int) -> jax.Array:
    """Zero rows behind x [n, k] up to a multiple."""
    return jnp.pad(x, ((0, -x.shape[0] % multiple), (0, 0)))
