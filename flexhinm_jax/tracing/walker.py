"""One interpreter of jaxprs that keeps track of the parameters.

A parameter travels through the program as a `Tracked` leaf. Layout primitives rewrite
its view; a contraction with an input becomes a `Product`, and a `Visitor` decides what
to do with it. Everything else needs the dense value and ends the tracking. Control flow
is rebuilt around the walk of its bodies and threads the state of the visitor, so a
transform is one visitor and knows nothing about loops.

Equations that touch no parameter are run exactly as they are written: their derivative
rules, shardings and effects survive.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal

from flexhinm_jax import jax_versions
from flexhinm_jax.tracing import control_flow, experts, joined, scales, views
from flexhinm_jax.tracing.contractions import (
    LOOKUP,
    Followed,
    Kind,
    Part,
    Product,
    Stop,
    Tracked,
    match_dot,
    plain,
)
from flexhinm_jax.tracing.convolutions import match_conv
from flexhinm_jax.tracing.joined import Joined
from flexhinm_jax.tracing.masks import Masks, has_program
from flexhinm_jax.tracing.views import Where


class Visitor:
    """What a transform does where a weight meets the program; the defaults do nothing.

    `where` is the position of an equation: indices into nested jaxprs. It depends on
    the shapes and on the version of jax, so it never leaves one trace.

    Attributes:
      rules: how the walk goes through control flow; see `control_flow`.
      masks: the token masks of the values, which the walk then follows, or None.
      counts: whether it counts tokens, so that those of a loop that ended must go.
    """

    rules: Mapping[str, Callable] = control_flow.RULES
    masks: Masks | None = None
    counts: bool = False

    def product(self, where: Where, product: Product, state: Any) -> tuple[Any, Any]:
        """Handles a contraction of a weight with an input.

        Returns:
          (result, state); a result of None runs the product dense.
        """
        del where, product
        return None, state

    def stop(self, where: Where, weight: Tracked, reason: Stop) -> None:
        """Learns that a leaf is needed dense, and why."""
        del where, weight, reason

    def bound(self, where: Where, eqn: Any, operands: list, results: list) -> None:
        """Learns that an equation without sub-programs has run."""
        del where, eqn, operands, results

    def read(self, values: Sequence[Any]) -> None:
        """Learns that an equation with programs that are walked reads these values.

        A program that is inlined reads nothing itself; its equations do.
        """
        del values

    def enter(self, state: Any, axes: tuple[str, ...]) -> Any:
        """The state with which each device of a shard_map over `axes` starts."""
        del axes
        return state

    def leave(self, state: Any, local: Any, axes: tuple[str, ...]) -> Any:
        """The state after a shard_map: `state` joined by what each device added.

        Runs inside the shard_map and must not differ between the devices.
        """
        del local, axes
        return state


def walk(
    jaxpr: Any, operands: Sequence[Any], visitor: Visitor, state: Any, where: Where = ()
) -> tuple[list[Any], Any]:
    """Runs a jaxpr on arrays and tracked leaves: (outputs, state)."""
    body, consts = jax_versions.opened(jaxpr)
    inputs = [*body.constvars, *body.invars]
    env = dict(zip(inputs, [*consts, *operands], strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else env[v]

    for k, eqn in enumerate(body.eqns):
        values, here = [read(v) for v in eqn.invars], (*where, k)
        if any(isinstance(v, Followed) for v in values) or entered(
            eqn, values, visitor
        ):
            outs, state = visit(eqn, values, visitor, state, here)
        else:
            outs = jax_versions.bind(eqn, values)
            ran(here, eqn, values, outs, visitor)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in body.outvars], state


def entered(eqn: Any, values: list, visitor: Visitor) -> bool:
    """Whether token masks are to be followed into the program of an equation."""
    masks = visitor.masks
    if masks is None or not has_program(eqn):
        return False
    return any(masks.of(v) is not None for v in values)


def ran(where: Where, eqn: Any, operands: list, results: list, visitor: Any) -> None:
    """Tells a visitor that an equation without programs to walk has run."""
    if visitor.masks is not None:
        visitor.masks.follow(eqn, operands, results)
    visitor.bound(where, eqn, operands, results)


INLINED = frozenset("jit pjit closed_call core_call".split())
REMATERIALISED = frozenset("remat2 remat checkpoint".split())
KEPT = frozenset(
    "custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr custom_lin".split()
)


def visit(
    eqn: Any, operands: list, visitor: Visitor, state: Any, where: Where
) -> tuple[list[Any], Any]:
    """Runs one equation that the walk has something to do with: (outputs, state)."""
    name, params = eqn.primitive.name, eqn.params

    def sub(jaxpr: Any, operands: Sequence[Any], state: Any, *step: Any) -> Any:
        outs, state = walk(jaxpr, operands, visitor, state, where + step)
        if name not in INLINED:
            visitor.read(outs)
        return outs, state

    rule = visitor.rules.get(name)
    if name in INLINED:
        return sub(jax_versions.called_jaxpr(params), operands, state)
    if rule is not None and not params.get("branches_platforms"):
        if name not in REMATERIALISED:
            visitor.read(operands)
        return rule(eqn, operands, visitor, state, where, sub)
    if name in MATCHERS:
        return multiply(eqn, operands, visitor, state, where)
    if name in KEPT and entered(eqn, operands, visitor):
        for leaf in (leaf for v in operands for leaf in tracked(v)):
            visitor.stop(where, leaf, Stop("inside a function with its own rule"))
        return sub(jax_versions.called_jaxpr(params), plain(operands), state)
    if name in KEPT:
        kind = "custom_jvp" if "jvp" in name else "custom_vjp"
        function = jax_versions.function_name(params)
        reason = Stop(
            f"inside a {kind} function '{function}': its derivative rule is kept"
        )
    else:
        outs = (
            joined.join(eqn, operands)
            or (name == "gather" and experts.looked_up(eqn, operands[0], operands[1:]))
            or relayout(eqn, operands)
            or changed(eqn, operands, visitor, where)
        )
        if outs:
            return list(outs), state
        reason = Stop(f"stopped at '{name}'", Kind.PRIMITIVE)
        reason = LOOKUP if name == "gather" else reason
    return stopped(eqn, operands, visitor, state, where, reason)


def stopped(
    eqn: Any, operands: list, visitor: Visitor, state: Any, where: Where, reason: Stop
) -> tuple[list[Any], Any]:
    """Runs an equation on dense values: (outputs, state)."""
    for v in operands:
        for leaf in tracked(v):
            visitor.stop(where, leaf, LOOKUP if leaf.lookup else reason)
    outs = jax_versions.bind(eqn, plain(operands))
    ran(where, eqn, operands, outs, visitor)
    return outs, state


def tracked(value: Any) -> tuple[Tracked, ...]:
    """The leaves of a value of the walk."""
    return value.tracked if isinstance(value, Followed) else ()


def multiply(
    eqn: Any, operands: list, visitor: Visitor, state: Any, where: Where
) -> tuple[list[Any], Any]:
    """Runs a contraction with a followed operand: (outputs, state)."""
    followed = [k for k, v in enumerate(operands) if isinstance(v, Followed)]
    if len(followed) > 1:
        operands = settled(operands, visitor, where)
        followed = [k for k in followed if isinstance(operands[k], Followed)]
    if len(followed) == 1 and isinstance(operands[followed[0]], Joined):
        role = joined.role(eqn, followed[0], operands[followed[0]].axis)
        if role is None:
            reason = Stop("put beside other leaves, then contracted", Kind.PRODUCT)
            return stopped(eqn, operands, visitor, state, where, reason)
        return multiply_parts(eqn, operands, visitor, state, where, role)
    product = match(eqn, operands)
    if isinstance(product, Stop):
        return stopped(eqn, operands, visitor, state, where, product)
    y, state = visitor.product(where, product, state)
    if y is None:
        outs = jax_versions.bind(eqn, plain(operands))
    else:
        outs = [y.astype(product.result.dtype)]
    ran(where, eqn, operands, outs, visitor)
    return outs, state


def settled(operands: list, visitor: Visitor, where: Where) -> list:
    """Operands in which rows of a table, contracted with another leaf, are dense."""
    out = list(operands)
    for k, v in enumerate(operands):
        if isinstance(v, Tracked) and v.lookup is not None:
            visitor.stop(where, v, LOOKUP)
            out[k] = v.dense()
    return out


def match(eqn: Any, operands: list) -> Product | Stop:
    """Reads a contraction with a Tracked operand as a product.

    Returns:
      The product, or the reason why the leaf is not the matrix of one.
    """
    if sum(isinstance(v, Followed) for v in operands) > 1:
        kind = Kind.AUXILIARY if is_vector(eqn, operands) else Kind.PRODUCT
        return Stop("contracted with another parameter", kind)
    weight = next(v for v in operands if isinstance(v, Tracked))
    matcher = MATCHERS[eqn.primitive.name]
    if weight.lookup is not None:
        matcher = experts.match_routed if matcher is match_dot else no_lookup
    product = matcher(eqn, operands)
    return product if isinstance(product, Stop) else product.obstacle or product


def is_vector(eqn: Any, operands: list) -> bool:
    """Whether an operand of a product of two leaves is one vector or a row of one."""
    if eqn.primitive.name != "dot_general":
        return False
    if not all(isinstance(v, Tracked) for v in operands):
        return False
    contracted = eqn.params["dimension_numbers"][0]
    for v, axes in zip(operands, contracted, strict=True):
        sizes = views.sizes(v.view.dims)
        if math.prod(sizes) == math.prod(sizes[d] for d in axes):
            return True
    return False


def no_lookup(eqn: Any, operands: list) -> Stop:
    """Matrices that a lookup has read are followed into a dot_general alone."""
    del eqn, operands
    return LOOKUP


#: Primitive -> what reads it as a product.
MATCHERS: dict[str, Callable[[Any, list], Product | Stop]] = {
    "dot_general": match_dot,
    "conv_general_dilated": match_conv,
    "ragged_dot_general": experts.match_ragged,
}


def multiply_parts(
    eqn: Any,
    operands: list,
    visitor: Visitor,
    state: Any,
    where: Where,
    role: joined.Role,
) -> tuple[list[Any], Any]:
    """Runs a contraction of joined leaves, leaf by leaf: (outputs, state)."""
    pieces, results = joined.pieces(eqn, operands, role, match), []
    for k, piece in enumerate(pieces):
        y, at = None, (*where, Part(k))
        if isinstance(piece.product, Stop):
            visitor.stop(at, piece.part, piece.product)
        else:
            y, state = visitor.product(at, piece.product, state)
        results.append(y)
    if all(y is None for y in results):
        outs = jax_versions.bind(eqn, plain(operands))
    else:
        pairs = zip(results, pieces, strict=True)
        dtype = eqn.outvars[0].aval.dtype
        parts = [piece.run() if y is None else y.astype(dtype) for y, piece in pairs]
        outs = [joined.combined(parts, role)]
    ran(where, eqn, operands, outs, visitor)
    return outs, state


def relayout(eqn: Any, operands: list) -> Sequence[Followed] | None:
    """The outputs of a layout primitive on followed leaves, None for any other."""
    weight, rest = operands[0], operands[1:]
    if any(isinstance(v, Followed) for v in rest):
        return None
    shapes = [v.aval.shape for v in eqn.outvars]
    static = [literal(v) for v in rest]
    if isinstance(weight, Joined):
        return joined.relayout(eqn, weight, static)
    if not isinstance(weight, Tracked):
        return None
    name = eqn.primitive.name
    moved = views.relayout(weight.view, name, eqn.params, shapes, static)
    if moved is None:
        return None

    def dense(k: int) -> Any:
        return jax_versions.bind(eqn, [weight.dense(), *rest])[k]

    return [
        dataclasses.replace(weight, view=view, dense=lambda k=k: dense(k))
        for k, view in enumerate(moved)
    ]


def changed(
    eqn: Any, operands: list, visitor: Visitor, where: Where
) -> Sequence[Followed] | None:
    """The output of an equation that keeps the zeros of a leaf, None for any other."""
    followed = [k for k, v in enumerate(operands) if isinstance(v, Followed)]
    matrices = [k for k in followed if eqn.invars[k].aval.shape] or followed
    if eqn.primitive.name == "mul" and len(matrices) == 2:
        return scaled(eqn, operands, visitor, where)
    if len(matrices) != 1:
        return None
    (k,) = matrices
    weight, others = operands[k], list(operands)
    others[k] = None
    others = plain(others)
    step = views.change(eqn, where, k, others)
    if step is None:
        return None
    reason = Stop(f"stopped at '{eqn.primitive.name}'", Kind.PRIMITIVE)
    for leaf in (leaf for n in followed if n != k for leaf in operands[n].tracked):
        visitor.stop(where, leaf, reason)

    def dense() -> Any:
        values = [weight.dense() if n == k else v for n, v in enumerate(others)]
        return jax_versions.bind(eqn, values)[0]

    if isinstance(weight, Joined):
        return [joined.changed(weight, step, dense)]
    view = weight.view._replace(changes=(*weight.view.changes, step))
    return [dataclasses.replace(weight, view=view, dense=dense)]


def scaled(
    eqn: Any, operands: list, visitor: Visitor, where: Where
) -> Sequence[Followed] | None:
    """A leaf of eight bits times the leaf of its scale, None for any other product."""
    for weight, scale in (operands, operands[::-1]):
        if not (isinstance(weight, Tracked) and isinstance(scale, Tracked)):
            return None
        step = scales.multiplied(weight, scale)
        if step is None:
            continue
        visitor.stop(where, scale, Stop(f"the scale of {weight.path!r}"))
        view = weight.view._replace(changes=(*weight.view.changes, step))

        def dense() -> Any:
            return jax_versions.bind(eqn, plain(operands))[0]

        return [dataclasses.replace(weight, view=view, dense=dense)]
    return None


def literal(x: Any) -> Any:
    """An integer written into the program as an int, anything else as it is."""
    if isinstance(x, np.ndarray | np.generic) and x.ndim == 0:
        return int(x) if np.issubdtype(x.dtype, np.integer) else x
    return int(x) if isinstance(x, int) else x
