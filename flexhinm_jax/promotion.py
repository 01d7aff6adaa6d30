"""How arrays of different ranks and dtypes combine in the code of this package.

`jax_numpy_rank_promotion="raise"` and `jax_numpy_dtype_promotion="strict"` are for the
code of those who set them. Ours broadcasts a row over a matrix on purpose; so it runs
under the rules that JAX has where nothing is set. Results are the same.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax


@contextlib.contextmanager
def usual() -> Iterator[None]:
    """Inside, and in a function that this decorates, JAX's own rules hold.

    Nothing is entered where they hold already: a context is part of what compiled
    programs are found by.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> with jax.numpy_rank_promotion("raise"), usual():
      ...     (jnp.ones((2, 3)) + jnp.ones(3)).shape
      (2, 3)
    """
    config: Any = jax.config
    with contextlib.ExitStack() as stack:
        if config.jax_numpy_rank_promotion != "allow":
            stack.enter_context(jax.numpy_rank_promotion("allow"))
        if config.jax_numpy_dtype_promotion != "standard":
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
        yield
