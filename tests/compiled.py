"""Functions of a module, each call of them one compiled program.

Run operation by operation, a function is a hundred programs, each of which costs more
to trace, lower and look up than it computes. Tests of its values compile it whole.
"""

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from flexhinm_jax.sequential import cuts


class Compiled:
    """The attributes of a module; its functions compile."""

    def __init__(self, module: Any, plain: tuple[str, ...] = ()) -> None:
        """Takes the module and the names of functions that stay as they are."""
        self.module, self.plain = module, plain

    def __getattr__(self, name: str) -> Any:
        """The attribute, compiled when it is a function."""
        value = getattr(self.module, name)
        is_plain = name in self.plain or not isinstance(value, types.FunctionType)
        return value if is_plain else compiled(value)


def compiled(function: Callable) -> Callable:
    """Arrays and unnamed floats are arguments of the program, the rest is in it."""
    arrays = jax.Array | np.ndarray | np.generic

    @functools.wraps(function)
    def run(*args, **kwargs):
        unnamed, named = jax.tree.leaves(args), jax.tree.leaves(kwargs)
        leaves, tree = [*unnamed, *named], jax.tree.structure((args, kwargs))
        varies = [isinstance(x, arrays | float) for x in unnamed]
        varies += [isinstance(x, arrays) for x in named]
        rest = tuple(None if v else x for v, x in zip(varies, leaves, strict=True))
        given = [x for v, x in zip(varies, leaves, strict=True) if v]
        return program(function, tree, tuple(varies), rest)(given)

    return run


@functools.cache
def program(function: Callable, tree: Any, varies: tuple, rest: tuple) -> Callable:
    """The jitted function of the leaves that vary."""

    def of_arrays(arrays):
        left = iter(arrays)
        leaves = [next(left) if v else x for v, x in zip(varies, rest, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, leaves)
        return function(*args, **kwargs)

    return jax.jit(of_arrays)


@functools.partial(jax.jit, static_argnums=0)
def solve(method, key, w, stats, sparsity=None, prev=None):
    """`method.solve` as one program."""
    return method.solve(key, w, stats, sparsity=sparsity, prev=prev)


@functools.partial(jax.jit, static_argnums=0)
def decide(method, state, w, key=None):
    """`method.decide` as one program."""
    return method.decide(state, w, key=key)


@pytest.fixture(scope="module", autouse=True)
def walks_share_programs() -> Iterator[cuts.Programs]:
    """Equal programs of walks are compiled once for a file that names this."""
    made = cuts.Programs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "Programs", lambda: made)
        yield made
