"""Solves the matrices of one cut: stacked where they are equal, kept on disk when done.

Statistics arrive per (path, at); plans, errors and facts leave on the host.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from flexhinm_jax import checks
from flexhinm_jax.methods import Method
from flexhinm_jax.methods.reconstruction import Reconstruction
from flexhinm_jax.transforms import tree
from flexhinm_jax.transforms.job import Job, select
from flexhinm_jax.types import Plan, Stats


class Solved(NamedTuple):
    """The result for one (path, at).

    Attributes:
      plan: with the remaining stack axes.
      error: f32[], || X (W' - W) ||^2 / || X W ||^2, the mean over the stack.
      facts: name -> array[*rest of the stack], how the solving went.
    """

    plan: Plan
    error: Array
    facts: dict[str, Array]


def solve(job: Job, stats: Mapping[tuple, Stats]) -> dict[tuple, Solved]:
    """Solves matrices whose statistics, but for the targets, are the same."""
    groups: dict[Any, list[tuple]] = defaultdict(list)
    weights = {name: job.weight(*name) for name in stats}
    for name, w in weights.items():
        like = w.shape, str(w.dtype), jax.tree.structure(stats[name])
        choice = job.methods[name[0]], job.targets[name[0]] is None
        groups[like, choice].append(name)
    out: dict[tuple, Solved] = {}
    for names in groups.values():
        for name in names:
            checks.finite(weights[name], "weight", name[0])
        given = {name: stats[name] for name in names}
        found = solve_equal(job, given, {name: weights[name] for name in names})
        for name, result in found.items():
            out[name] = jax.tree.map(np.asarray, result)
            if job.finished is not None:
                job.finished.save(f"{name[0]} {name[1]}", out[name])
    return {name: out[name] for name in stats}


def restore(job: Job, names: Sequence[tuple]) -> dict[tuple, Solved] | None:
    """The plans of these matrices from disk; None unless all are there."""
    if job.finished is None:
        return None
    found = {}
    for path, at in names:
        use = job.uses.leaves[path]
        stack = tuple(
            f.size for f, i in zip(use.layout.stack, at, strict=True) if i is None
        )
        o, i = use.layout.matrix_shape
        made: Any = jax.ShapeDtypeStruct
        f32 = jnp.float32
        stats = Stats(
            sq_norm=made((*stack, i), f32),
            mean=made((*stack, i), f32),
            count=made(stack, f32),
            gram=made((*stack, i, i), f32),
        )
        w = made((*stack, o, i), job.leaves[path].dtype)
        like = jax.eval_shape(
            lambda w, stats, path=path, at=at: solve_equal(
                job, {(path, at): stats}, {(path, at): w}
            )[path, at],
            w,
            stats,
        )
        known = job.finished.load(f"{path} {at}", like)
        if known is None:
            return None
        found[path, at] = known
    return found


def solve_equal(
    job: Job, stats: Mapping[tuple, Stats], weights: Mapping[tuple, Array]
) -> dict[tuple, Solved]:
    """`solve` for matrices of one shape and method."""
    names = list(weights)
    stack = weights[names[0]].shape[:-2]
    rest = len(stack)

    def flat(x: Array) -> Array:
        return x.reshape(-1, *x.shape[rest:])

    def stacked(values: Sequence[Any]) -> Any:
        return None if values[0] is None else jnp.stack([flat(v) for v in values])

    keys, targets = [], []
    for path, at in names:
        keys.append(tree.keys_for(job.key, job.uses.leaves[path])[select(at)])
        goal = job.targets[path]
        full = None if goal is None else jnp.full(stack, goal, jnp.float32)
        targets.append(full)
    first = stats[names[0]]
    shared = dataclasses.replace(first, cross=None, target_mean=None)
    plans, errors, facts = solve_stack(
        job.methods[names[0][0]],
        stacked(keys),
        stacked([weights[name] for name in names]),
        jax.tree.map(flat, shared),
        stacked([stats[name].cross for name in names]),
        stacked([stats[name].target_mean for name in names]),
        stacked(targets),
    )
    out = {}
    for n, (path, at) in enumerate(names):
        plan, mine = jax.tree.map(
            lambda x: x[n].reshape(*stack, *x.shape[2:]),  # noqa: B023
            (plans, facts),
        )
        out[path, at] = Solved(plan, jnp.mean(errors[n]), mine)
    return out


@functools.partial(jax.jit, static_argnames="method")
def solve_stack(
    method: Method,
    keys: Array,
    w: Array,
    stats: Stats,
    cross: Array | None,
    target_mean: Array | None,
    sparsity: Array | None,
) -> tuple[Plan, Array, dict[str, Array]]:
    """Plans, relative output errors and facts of [members, stack] matrices.

    Args:
      method: static.
      keys: [members, stack].
      w: [members, stack, o, i].
      stats: [stack, ...], shared by the members.
      cross: f32[members, stack, o, i] or None.
      target_mean: f32[members, stack, o] or None.
      sparsity: f32[members, stack] or None.
    """

    def one(key, w, stats, cross, mean, sparsity):
        mine = dataclasses.replace(stats, cross=cross, target_mean=mean)
        state = method.solve(key, w, mine, sparsity=sparsity)
        plan = method.decide(state, w)
        before = w.astype(jnp.float32)
        lost = tree.dense_weight(plan).astype(jnp.float32) - before
        total = jnp.maximum(squared(before, stats.gram), 1e-30)
        facts = method.facts(state) if isinstance(method, Reconstruction) else {}
        return plan, squared(lost, stats.gram) / total, facts

    over = jax.vmap(one)
    return jax.vmap(over, in_axes=(0, 0, None, 0, 0, 0))(
        keys, w, stats, cross, target_mean, sparsity
    )


def squared(w: Array, gram: Array) -> Array:
    """|| X W^T ||^2 from the Gram matrix of X."""
    product = jnp.dot(w, gram, precision=lax.Precision.HIGHEST)
    return jnp.sum(product * w, dtype=jnp.float32)
