"""Which values of a program depend on the batch, and not on the parameters alone.

A product with an operand that no batch can change is an auxiliary one where its weight
has others: power iteration, a penalty, a table of positions.
"""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal

from flexhinm_jax.tracing import jax_versions
from flexhinm_jax.tracing.stops import Body, Where

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
        here, given = (*where, k), [read(v) for v in eqn.invars]
        at[here] = given
        rule = RULES.get(eqn.primitive.name, _any)
        env.update(zip(eqn.outvars, rule(eqn, given, here, at), strict=True))
    return [read(v) for v in body.outvars]


def _any(eqn: Any, given: list[bool], where: Where, at: Dependence) -> list[bool]:
    del where, at
    return [any(given)] * len(eqn.outvars)


def _call(eqn: Any, given: list[bool], where: Where, at: Dependence) -> list[bool]:
    return _body(jax_versions.called_jaxpr(eqn.params), given, where, at)


def _cond(eqn: Any, given: list[bool], where: Where, at: Dependence) -> list[bool]:
    outs = [given[0]] * len(eqn.outvars)
    for k, branch in enumerate(eqn.params["branches"]):
        more = _body(branch, given[1:], (*where, Body("branch", k)), at)
        outs = [a or b for a, b in zip(outs, more, strict=True)]
    return outs


def _while(eqn: Any, given: list[bool], where: Where, at: Dependence) -> list[bool]:
    p = eqn.params
    first, last = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    carry = given[last:]
    while True:
        test = _body(
            p["cond_jaxpr"], given[:first] + carry, (*where, Body("condition")), at
        )
        turn = (*where, Body("turn"))
        moved = _body(p["body_jaxpr"], given[first:last] + carry, turn, at)
        grown = [a or b or test[0] for a, b in zip(carry, moved, strict=True)]
        if grown == carry:
            return carry
        carry = grown


def _scan(eqn: Any, given: list[bool], where: Where, at: Dependence) -> list[bool]:
    consts, carry, xs = jax_versions.scan_operands(eqn.params, given)
    while True:
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
