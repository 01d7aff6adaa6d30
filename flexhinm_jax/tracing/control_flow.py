"""How the walk goes through control flow: one rule per primitive.

Every rule rebuilds its construct with the public function of jax around the walk of the
bodies, and threads the state of the visitor through it. A rule gets the equation, its
operands, the visitor, its state, the position, and `sub(jaxpr, operands, state,
*step)`, which walks a body; it returns (outputs, state).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec

from flexhinm_jax import jax_versions
from flexhinm_jax.tracing import masks, views
from flexhinm_jax.tracing.contractions import Body, Followed, Stop, Tracked, plain

Result = tuple[list[Any], Any]
CHANGED = Stop("carried through a loop that changes it")
PARTLY_SCANNED = Stop("scanned over a part of an axis")


def visit_remat(
    eqn: Any, operands: list, visitor: Any, state: Any, where: tuple, sub: Callable
) -> Result:
    """A rematerialised body stays one."""
    del where
    p = eqn.params

    def body(state: Any) -> Any:
        outs, state = sub(p["jaxpr"], operands, state)
        return plain(outs), state, keeps_of(visitor, outs)

    options = {"prevent_cse": p["prevent_cse"], "policy": p["policy"]}
    outs, state, keeps = jax.checkpoint(body, **options)(state)
    attach(visitor, outs, keeps)
    return outs, state


def keeps_of(visitor: Any, values: Sequence[Any]) -> list[Any]:
    """The token masks that travel with values; None for each without masks."""
    masks = visitor.masks
    return [None if masks is None else masks.of(v) for v in values]


def attach(visitor: Any, values: Sequence[Any], keeps: Sequence[Any]) -> None:
    """Gives values the token masks that came with them."""
    if visitor.masks is not None:
        for value, keep in zip(values, keeps, strict=True):
            visitor.masks.put(value, keep)


def visit_cond(
    eqn: Any, operands: list, visitor: Any, state: Any, where: tuple, sub: Callable
) -> Result:
    """Branches share the state: one that is not taken adds nothing."""
    del where
    like: list[Any] | None = None

    def branch(k: int, jaxpr: Any) -> Callable:
        def body(state: Any) -> Any:
            outs, state = sub(jaxpr, operands[1:], state, Body("branch", k))
            keeps = keeps_of(visitor, outs)
            if like is not None:
                pairs = zip(keeps, like, strict=True)
                keeps = [masks.shaped(keep, form) for keep, form in pairs]
            return plain(outs), state, keeps

        return body

    # lax.switch wants masks of one form from all branches, so they are run abstractly
    # first, which decides the form.
    branches = [branch(k, jaxpr) for k, jaxpr in enumerate(eqn.params["branches"])]
    if visitor.masks is not None:
        forms = [jax.eval_shape(body, state)[2] for body in branches]
        like = [masks.join(*keeps) for keeps in zip(*forms, strict=True)]
    outs, state, keeps = lax.switch(plain(operands[:1])[0], branches, state)
    attach(visitor, outs, keeps)
    return outs, state


class Carry:
    """The carry of a loop; a leaf handed on untouched is a constant of the loop."""

    def __init__(self, body: Any, init: list, offset: int):
        """Splits `init`, whose first value is input `offset` of `body`."""
        jaxpr = jax_versions.opened(body)[0]
        self.init = init
        self.fixed = [
            isinstance(v, Followed) and jaxpr.outvars[k] is jaxpr.invars[offset + k]
            for k, v in enumerate(init)
        ]

    @property
    def changed(self) -> list[Tracked]:
        """Leaves that the body replaces."""
        pairs = zip(self.init, self.fixed, strict=True)
        lost = [v for v, fixed in pairs if isinstance(v, Followed) and not fixed]
        return [leaf for v in lost for leaf in v.tracked]

    def moving(self, values: Sequence[Any]) -> list[Any]:
        """The dense values that change from step to step."""
        kept = zip(values, self.fixed, strict=True)
        return plain([v for v, fixed in kept if not fixed])

    def join(self, moving: Sequence[Any]) -> list[Any]:
        """The whole carry from its moving part."""
        it, pairs = iter(moving), zip(self.init, self.fixed, strict=True)
        return [v if fixed else next(it) for v, fixed in pairs]


def visit_while(
    eqn: Any, operands: list, visitor: Any, state: Any, where: tuple, sub: Callable
) -> Result:
    """The state is part of the carry, and so is the condition if it has products.

    Under `jax.vmap` every element may have a condition of its own. The loop then runs
    until the last one ends, as in jax: those that ended keep their values, and their
    tokens do not count.
    """
    p = eqn.params
    batched = bool(jax_versions.opened(p["cond_jaxpr"])[0].outvars[0].aval.shape)
    first, last = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    carry = Carry(p["body_jaxpr"], operands[last:], p["body_nconsts"])
    for v in carry.changed:
        visitor.stop(where, v, CHANGED)

    def test(moving: list, state: Any) -> Any:
        values = [*operands[:first], *carry.join(moving)]
        outs, state = sub(p["cond_jaxpr"], values, state, Body("condition"))
        return plain(outs)[0], state

    like: list[Any] | None = None

    def turn(moving: list, state: Any, keeps: list, on: Any = None) -> Any:
        before = carry.join(moving)
        attach(visitor, before, keeps if on is None else elements(on, before, keeps))
        values = [*operands[first:last], *before]
        outs, state = sub(p["body_jaxpr"], values, state, Body("turn"))
        after = keeps_of(visitor, outs)
        if on is not None:
            outs, after = kept_ends(on, before, outs, keeps, after)
        if like is not None:
            after = [masks.shaped(k, form) for k, form in zip(after, like, strict=True)]
        return carry.moving(outs), state, after

    def tested_turn(loop: Any) -> Any:
        moving, state, keeps = turn(*loop[1:])
        on, state = test(moving, state)
        return on, moving, state, keeps

    def turn_of_elements(loop: Any) -> Any:
        on, moving, state, keeps = loop
        with counting(visitor, on):
            moving, state, after = turn(moving, state, keeps, on)
            values = carry.join(moving)
            attach(visitor, values, elements(on, values, after))
            more, state = test(moving, state)
        return on & more, moving, state, keeps if like is None else after

    moving, fixed = carry.moving(operands[last:]), carry.join(operands[last:])
    keeps = keeps_of(visitor, operands[last:])
    tested = batched or any(
        isinstance(v, Followed) for v in [*operands[:first], *fixed]
    )
    on, state = test(moving, state) if tested else (None, state)
    if visitor.masks is not None:
        ends = on if batched else None

        def after(keeps: list) -> list:
            return jax.eval_shape(turn, moving, state, keeps, ends)[2]

        like, keeps = settled(after, keeps)
    if tested:
        start = on, moving, state, keeps
        body = turn_of_elements if batched else tested_turn
        going = (lambda loop: loop[0].any()) if batched else (lambda loop: loop[0])
        end = lax.while_loop(going, body, start)[1:]
    else:
        start = moving, state, keeps
        end = lax.while_loop(
            lambda loop: test(*loop[:2])[0], lambda loop: turn(*loop), start
        )
    moving, state, keeps = end
    outs = carry.join(moving)
    attach(visitor, outs, keeps)
    return outs, state


@contextlib.contextmanager
def counting(visitor: Any, on: Any) -> Iterator[None]:
    """A visitor that counts tokens counts those of the elements that are `on`."""
    before = visitor.masks
    if before is None and visitor.counts:
        visitor.masks = masks.Masks(on, ())
    try:
        yield
    finally:
        visitor.masks = before


def of_elements(on: Any, value: Any) -> Any:
    """Booleans of elements along the first axes, for the values of all."""
    return on.reshape(on.shape + (1,) * (value.ndim - on.ndim))


def elements(on: Any, values: Sequence[Any], keeps: list) -> list:
    """Token masks of a carry that leave out the elements that are not `on`."""
    return [
        keep
        if isinstance(v, Followed) or isinstance(keep, masks.Lost)
        else masks.both(keep, of_elements(on, v))
        for v, keep in zip(values, keeps, strict=True)
    ]


def kept_ends(
    on: Any, before: list, after: list, keeps: list, later: list
) -> tuple[list, list]:
    """A carry after a turn, in which elements that are not `on` stay as they were.

    Args:
      on: booleans of the elements.
      before: the carry before the turn.
      after: the same behind it.
      keeps: token masks before the turn.
      later: the same behind it.

    Returns:
      (the carry, its masks).
    """
    outs, chosen = list(after), list(later)
    for k, (old, new) in enumerate(zip(before, plain(after), strict=True)):
        if isinstance(old, Followed) and isinstance(after[k], Followed):
            continue
        here = of_elements(on, new)
        outs[k] = jnp.where(here, new, plain([old])[0])
        pair = [later[k], keeps[k]]
        if isinstance(masks.join(*pair), jax.ShapeDtypeStruct):
            whole = [jnp.ones((), bool) if keep is None else keep for keep in pair]
            chosen[k] = jnp.where(here, *whole)
    return outs, chosen


def settled(after: Callable[[list], list], keeps: list) -> tuple[list, list]:
    """Token masks of a carry in a form that a turn of the loop keeps.

    Args:
      after: masks before a turn -> those after it, abstract.
      keeps: masks at the start.

    Returns:
      (their form, the masks at the start in it).
    """
    while True:  # ends: forms only grow, up to the shape of the value or to lost
        form = [masks.join(k) for k in keeps]
        pairs = zip(keeps, after(keeps), strict=True)
        grown = [masks.join(before, later) for before, later in pairs]
        keeps = [masks.shaped(k, g) for k, g in zip(keeps, grown, strict=True)]
        if grown == form:
            return form, keeps


def visit_scan(
    eqn: Any, operands: list, visitor: Any, state: Any, where: tuple, sub: Callable
) -> Result:
    """Stacked leaves stay scanned, dense or packed, so that gradients stay stacked."""
    p = eqn.params
    consts, init, xs = jax_versions.scan_operands(p, operands)
    carry = Carry(p["jaxpr"], init, len(consts))
    for v in carry.changed:
        visitor.stop(where, v, CHANGED)
    for x in xs:
        if isinstance(x, Followed) and not scannable(x):
            for leaf in x.tracked:
                visitor.stop(where, leaf, PARTLY_SCANNED)

    steady, moving_keeps = row_keeps(keeps_of(visitor, xs), p["length"])
    like: list[Any] | None = None

    def step(loop: Any, scanned: Any) -> Any:
        k, slices, here = scanned
        moving, state, keeps = loop
        rows = [row(x, part, k) for x, part in zip(xs, slices, strict=True)]
        values = carry.join(moving)
        attach(
            visitor,
            rows,
            [s if m is None else m for s, m in zip(steady, here, strict=True)],
        )
        attach(visitor, values, of_step(values, keeps, here))
        values = [*consts, *values, *rows]
        outs, state = sub(p["jaxpr"], values, state, Body("step"))
        kept = keeps_of(visitor, outs)
        ends = kept[: len(init)]
        if like is not None:
            ends = [masks.shaped(k, form) for k, form in zip(ends, like, strict=True)]
        loop = carry.moving(outs[: len(init)]), state, ends
        return loop, (plain(outs[len(init) :]), kept[len(init) :])

    parts = [scanned_arrays(x) for x in xs]
    counter = jnp.arange(p["length"], dtype=jnp.int32)
    options = {k: p[k] for k in ("length", "reverse", "unroll")}
    moving, keeps = carry.moving(init), keeps_of(visitor, init)
    scanned = counter, parts, moving_keeps
    if visitor.masks is not None and p["length"]:
        first = jax.eval_shape(lambda s: jax.tree.map(lambda x: x[0], s), scanned)

        def after(keeps: list) -> list:
            ends = jax.eval_shape(step, (moving, state, keeps), first)[0][2]
            own = of_step(carry.join(moving), keeps, first[2])
            # A state without a mask of its own belongs to the token of the step.
            return [
                None if k is None and s is not None else e
                for k, s, e in zip(keeps, own, ends, strict=True)
            ]

        like, keeps = settled(after, keeps)
    if not p["length"]:  # the carry comes out as it went in
        keeps, like = [None] * len(init), [None] * len(init)
    start = moving, state, keeps
    (moved, state, keeps), (ys, of_ys) = lax.scan(step, start, scanned, **options)
    outs = [*carry.join(moved), *ys]
    keeps = keeps if p["length"] else keeps_of(visitor, init)
    attach(visitor, outs, [*keeps, *of_ys])
    return outs, state


def row_keeps(keeps: list, length: int) -> tuple[list, list]:
    """Token masks of scanned values: (those of every row, those that are scanned)."""
    steady, moving = [], []
    for keep in keeps:
        if keep is None or isinstance(keep, masks.Lost):
            moving.append(None)
            steady.append(keep)
        elif keep.shape[0] == length:
            moving.append(keep)
            steady.append(None)
        else:
            moving.append(None)
            steady.append(keep[0])
    return steady, moving


def of_step(values: Sequence[Any], keeps: list, here: Sequence[Any]) -> list:
    """Masks of a carry; without one of its own, that of the token of the step."""
    out = []
    for value, keep in zip(values, keeps, strict=True):
        fitting = [
            k
            for k in here
            if k is not None
            and keep is None
            and not isinstance(value, Followed)
            and k.ndim == np.ndim(value)
            and all(n in (1, m) for n, m in zip(k.shape, value.shape, strict=True))
        ]
        out.append(masks.both(*fitting) if fitting else keep)
    return out


def scannable(x: Followed) -> bool:
    """Whether the first axis of a leaf is one whole factor, or a unit axis."""
    if not isinstance(x, Tracked):
        return False
    dim = x.view.dims[0]
    if len(dim) != 1:
        return not dim
    return dim[0].whole and not dim[0].flipped and dim[0].axis != views.REPEAT


def is_stacked(x: Tracked) -> bool:
    """Whether the first axis of a packed leaf is a stack axis of its arrays."""
    dim = x.view.dims[0]
    return scannable(x) and bool(dim) and dim[0].factor in x.left


def scanned_arrays(x: Any) -> Any:
    """What lax.scan slices for a scanned operand; None for a packed unit stack."""
    if not isinstance(x, Tracked):
        return plain([x])[0]
    if x.packed is not None and scannable(x) and not x.view.dims[0]:
        return None
    if x.packed is not None and is_stacked(x):
        k = x.left.index(x.view.dims[0][0].factor)
        return jax.tree.map(lambda a: jnp.moveaxis(a, k, 0), x.packed)
    return x.dense()


def row(x: Any, part: Any, k: Any) -> Any:
    """A scanned operand inside step `k`; `part` is its slice of `scanned_arrays`."""
    if not isinstance(x, Tracked) or not scannable(x):
        return part
    dim, view = x.view.dims[0], x.view._replace(dims=x.view.dims[1:])
    if dim:
        view = view._replace(index=(*view.index, (dim[0], k)))
    if x.packed is None:
        return dataclasses.replace(x, view=view, dense=lambda: part)

    def dense() -> Any:
        return lax.dynamic_index_in_dim(x.dense(), k, 0, keepdims=False)

    if not dim:
        return dataclasses.replace(x, view=view, dense=dense)
    if not is_stacked(x):
        return part
    left = tuple(f for f in x.left if f != dim[0].factor)
    return dataclasses.replace(x, view=view, dense=dense, packed=part, left=left)


def visit_barrier(
    eqn: Any, operands: list, visitor: Any, state: Any, where: tuple, sub: Callable
) -> Result:
    """An optimization barrier holds back the values that are not tracked."""
    del visitor, where, sub
    others = [v for v in operands if not isinstance(v, Followed)]
    held = iter(lax.optimization_barrier(others) if others else ())
    return [v if isinstance(v, Followed) else next(held) for v in operands], state


def visit_shard_map(
    eqn: Any, operands: list, visitor: Any, state: Any, where: tuple, sub: Callable
) -> Result:
    """Replicated leaves are followed into the body; every device has its own state."""
    p, names = eqn.params, jax_versions.manual_axes(eqn.params)
    values = list(operands)
    for k, (v, spec) in enumerate(zip(operands, p["in_specs"], strict=True)):
        if not isinstance(v, Followed):
            continue
        split_over = [axis for axis in spec if axis is not None]
        simple = isinstance(v, Tracked) and v.lookup is None
        if split_over or not p["check_vma"] or not simple:
            over = "with check_vma=False" if not p["check_vma"] else ""
            over = f"over mesh axes {split_over}" if split_over else over
            for leaf in v.tracked:
                visitor.stop(where, leaf, Stop(f"inside a shard_map {over}".strip()))
            values[k] = v.dense()
    if not any(isinstance(v, Tracked) for v in values):
        outs = jax_versions.bind(eqn, values)
        visitor.bound(where, eqn, operands, outs)
        attach(visitor, outs, [masks.Lost() for _ in outs])
        return outs, state
    everywhere = PartitionSpec()
    arrays = [ports(v) if isinstance(v, Tracked) else v for v in values]
    specs = [
        jax.tree.map(lambda _: everywhere, a) if isinstance(v, Tracked) else spec
        for a, v, spec in zip(arrays, values, p["in_specs"], strict=True)
    ]
    state_specs = jax.tree.map(lambda _: everywhere, state)

    def body(arrays: list, state: Any) -> Any:
        inside = [
            landed(v, a) if isinstance(v, Tracked) else a
            for v, a in zip(values, arrays, strict=True)
        ]
        outs, local = sub(p["jaxpr"], inside, visitor.enter(state, names))
        return tuple(plain(outs)), visitor.leave(state, local, names)

    out_specs = (tuple(p["out_specs"]), state_specs)
    with eqn.ctx.manager:
        mapped = jax_versions.shard_map(body, p, (specs, state_specs), out_specs)
        outs, state = mapped(arrays, state)
    attach(visitor, outs, [masks.Lost() for _ in outs])
    return list(outs), state


def ports(x: Tracked) -> tuple[Any, Any, list[Any]]:
    """The arrays of a tracked leaf: dense value, packed leaf, traced positions."""
    traced = [at for _, at in x.view.index if not isinstance(at, int)]
    return x.dense(), x.packed, traced


def landed(x: Tracked, arrays: tuple[Any, Any, list[Any]]) -> Tracked:
    """The leaf rebuilt on the other side from its `ports`."""
    dense, packed, traced = arrays
    it = iter(traced)
    index = tuple(
        (a, at if isinstance(at, int) else next(it)) for a, at in x.view.index
    )
    view = x.view._replace(index=index)
    return dataclasses.replace(x, view=view, dense=lambda: dense, packed=packed)


RULES: dict[str, Callable] = {
    **dict.fromkeys(("remat2", "remat", "checkpoint"), visit_remat),
    "cond": visit_cond,
    "while": visit_while,
    "scan": visit_scan,
    "optimization_barrier": visit_barrier,
    "shard_map": visit_shard_map,
}
