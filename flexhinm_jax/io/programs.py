"""What a traced function computes, as a checksum that two processes can compare.

The text of a jaxpr holds addresses and leaves the values of its constants out, and how
it names what is called twice depends on what was traced before. Here equations are read
one by one: the same function gives the same checksum in every process, another one, or
other constants that it is closed over, another.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from flexhinm_jax import jax_versions
from flexhinm_jax.io import fingerprint

__all__ = ["digest", "digest_of"]

ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+")

#: Parameters of equations that say how something is called and where it was written.
NAMES = {"name", "debug", "debug_info", "name_and_src_info"}


def digest_of(f: Callable[..., Any], *args: Any) -> str:
    """The checksum of a function with arguments of these shapes; it is only traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from flexhinm_jax.io import programs
      >>> x = jnp.ones(3)
      >>> one, same = (programs.digest_of(lambda x: jnp.tanh(x), x) for _ in range(2))
      >>> one == same, one == programs.digest_of(lambda x: jnp.cos(3 * x), x)
      (True, False)
    """
    return digest(jax.make_jaxpr(f)(*args))


def digest(jaxpr: Any) -> str:
    """The checksum of a jaxpr: equations, shapes and dtypes, values of constants.

    Of functions inside of it that are called back, or that give derivatives, only the
    names count.
    """
    return _program(jaxpr, {})


def _program(jaxpr: Any, known: dict[int, tuple[Any, str]]) -> str:
    """`digest`, with those of the jaxprs met before, by identity; they stay alive."""
    if id(jaxpr) in known:
        return known[id(jaxpr)][1]
    opened, consts = jax_versions.opened(jaxpr)
    numbers: dict[Any, int] = {}

    def atom(x: Any) -> str:
        if hasattr(x, "val"):
            return f"{x.aval}={_value(x.val, known)}"
        return str(numbers[x])

    def defined(xs: Any) -> str:
        for x in xs:
            numbers[x] = len(numbers)
        return " ".join(str(x.aval) for x in xs)

    lines = [defined(opened.constvars), *(_value(x, known) for x in consts)]
    lines.append(defined(opened.invars))
    for eqn in opened.eqns:
        words = [eqn.primitive.name, *map(atom, eqn.invars), defined(eqn.outvars)]
        lines.append(" ".join([*words, _value(eqn.params, known)]))
    lines += map(atom, opened.outvars)
    text = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    known[id(jaxpr)] = jaxpr, text
    return text


def _value(x: Any, known: dict[int, tuple[Any, str]]) -> str:
    """A parameter of an equation, or a constant, as text."""
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        return fingerprint.digest(x)
    if hasattr(jax_versions.opened(x)[0], "eqns"):
        return _program(x, known)
    if isinstance(x, Mapping):
        named = {str(k): _value(y, known) for k, y in x.items() if k not in NAMES}
        return str(sorted(named.items()))
    if isinstance(x, list | tuple):
        return f"({', '.join(_value(y, known) for y in x)})"
    if isinstance(x, set | frozenset):
        return f"{{{', '.join(sorted(_value(y, known) for y in x))}}}"
    if callable(x):
        return getattr(x, "__name__", type(x).__name__)
    return ADDRESS.sub("", repr(x))
