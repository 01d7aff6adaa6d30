"""Which values of a program are the same value, and which depend on the batch.

The operands of two products are compared by identity and, through cheap primitives, by
how they were computed: two layers that both cast x to bfloat16 read the same input.
Serves arrays and tracers of a walk as well as the variables of a jaxpr.

A product with an operand that no batch can change is an auxiliary one where its weight
has others: power iteration, a penalty, a table of positions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal

from flexhinm_jax import jax_versions
from flexhinm_jax.tracing import views
from flexhinm_jax.tracing.contractions import Body
from flexhinm_jax.tracing.views import Where

#: Primitives whose result is their operand, up to rounding.
ALIASES = views.IDENTITY | frozenset(
    "convert_element_type reduce_precision stop_gradient".split()
)

#: Primitives that are numbered by what they compute instead of by their result.
CHEAP = ALIASES | frozenset(
    "reshape transpose squeeze broadcast_in_dim slice "
    "lt add select_n concatenate".split()  # what makes a position of an index
)


class Numbering:
    """Numbers values, so that the same number means the same value."""

    def __init__(self):
        """Starts without any value."""
        self.numbers: dict[Any, int] = {}
        # The first value of every number; keeps it alive, so that ids stay unique.
        self.first: list[Any] = []
        self.alive: list[Any] = []

    def of(self, value: Any) -> int:
        """The number of a value; scalars of the program are known by content."""
        value = value.val if isinstance(value, Literal) else value
        if isinstance(value, np.generic | np.ndarray) and np.ndim(value) == 0:
            return self.of_key(("scalar", str(value.dtype), value.item()))
        return self._number(id(value), value)

    def of_key(self, key: tuple) -> int:
        """The number of a hashable description."""
        return self._number(key, key)

    def same(self, value: Any) -> Any:
        """The first value that is the same as `value`."""
        return self.first[self.of(value)]

    def computed(self, eqn: Any, operands: list, results: list) -> None:
        """Gives the results of equal cheap equations equal numbers."""
        if eqn.primitive.name not in CHEAP:
            return
        params = str(sorted(eqn.params.items(), key=str))
        key = eqn.primitive.name, params, *map(self.of, operands)
        for k, value in enumerate(results):
            self.alive.append(value)
            self.numbers[id(value)] = self._number((*key, k), value)

    def _number(self, key: Any, value: Any) -> int:
        if key not in self.numbers:
            self.numbers[key] = len(self.first)
            self.first.append(value)
        return self.numbers[key]


Dependence = dict[Where, list[bool]]


def dependence(jaxpr: Any, parameters: int) -> Dependence:
    """Follows the batch through a program.

    Args:
      jaxpr: a closed jaxpr.
      parameters: how many of its inputs, from the first, are parameters.

    Returns:
      position of an equation -> per operand, whether it depends on the batch.
    """
    count = len(jax_versions.opened(jaxpr)[0].invars)
    at: Dependence = {}
    _body(jaxpr, [k >= parameters for k in range(count)], (), at)
    return at


def _body(jaxpr: Any, inputs: Sequence[bool], where: Where, at: Dependence) -> list:
    """Per output of a jaxpr, whether it depends on the batch."""
    body, consts = jax_versions.opened(jaxpr)
    env = dict.fromkeys(body.constvars, False)
    env |= dict(zip(body.invars, inputs, strict=True))
    del consts

    def read(v: Any) -> bool:
        return False if isinstance(v, Literal) else env[v]

    for k, eqn in enumerate(body.eqns):
        here, depends = (*where, k), [read(v) for v in eqn.invars]
        at[here] = depends
        rule = RULES.get(eqn.primitive.name, _any)
        env.update(zip(eqn.outvars, rule(eqn, depends, here, at), strict=True))
    return [read(v) for v in body.outvars]


def _any(eqn: Any, depends: list[bool], where: Where, at: Dependence) -> list[bool]:
    del where, at
    return [any(depends)] * len(eqn.outvars)


def _call(eqn: Any, depends: list[bool], where: Where, at: Dependence) -> list[bool]:
    return _body(jax_versions.called_jaxpr(eqn.params), depends, where, at)


def _cond(eqn: Any, depends: list[bool], where: Where, at: Dependence) -> list[bool]:
    # A branch that the batch chooses makes results of the batch, whatever it computes.
    outs = [depends[0]] * len(eqn.outvars)
    for k, branch in enumerate(eqn.params["branches"]):
        more = _body(branch, depends[1:], (*where, Body("branch", k)), at)
        outs = [a or b for a, b in zip(outs, more, strict=True)]
    return outs


def _while(eqn: Any, depends: list[bool], where: Where, at: Dependence) -> list[bool]:
    p = eqn.params
    first, last = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    carry = depends[last:]
    while True:  # ends: a value that depends on the batch never stops to
        test = _body(
            p["cond_jaxpr"], depends[:first] + carry, (*where, Body("condition")), at
        )
        turn = (*where, Body("turn"))
        moved = _body(p["body_jaxpr"], depends[first:last] + carry, turn, at)
        grown = [a or b or test[0] for a, b in zip(carry, moved, strict=True)]
        if grown == carry:
            return carry
        carry = grown


def _scan(eqn: Any, depends: list[bool], where: Where, at: Dependence) -> list[bool]:
    consts, carry, xs = jax_versions.scan_operands(eqn.params, depends)
    while True:  # ends, as in `_while`
        inside = (*where, Body("step"))
        outs = _body(eqn.params["jaxpr"], [*consts, *carry, *xs], inside, at)
        moved = outs[: len(carry)]
        grown = [a or b for a, b in zip(carry, moved, strict=True)]
        if grown == carry:
            return outs
        carry = grown


RULES = {
    **dict.fromkeys("jit pjit closed_call core_call".split(), _call),
    **dict.fromkeys("remat2 remat checkpoint shard_map".split(), _call),
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
