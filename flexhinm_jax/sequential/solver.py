"""Solves the matrices of one cut: stacked where they are equal, kept on disk when done.

Statistics arrive per (path, at); plans, errors and facts leave on the host.
"""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp

from flexhinm_jax.methods import Method
from flexhinm_jax.pruning import tree
from flexhinm_jax.pruning.statistics import blank
from flexhinm_jax.sequential.job import Job, select
from flexhinm_jax.tracing import meshes
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


def solve(
    job: Job, stats: Mapping[tuple, Stats], run: Callable[..., Any]
) -> dict[tuple, Solved]:
    """Solves matrices whose statistics, but for the targets, are the same.

    Args:
      job: what to do.
      stats: (path, at) -> statistics.
      run: `solve_stack`, or the same compiled before.
    """
    out: dict[tuple, Solved] = {}
    for names in groups(job, stats):
        weights = {name: job.weight(*name) for name in names}
        for name in names:
            meshes.check_finite(weights[name], name[0])
        given = {name: stats[name] for name in names}
        found = solve_equal(job, given, weights, run)
        for name, result in found.items():
            out[name] = meshes.host(result)
            if job.finished is not None:
                job.finished.save(f"{name[0]} {name[1]}", out[name])
    return {name: out[name] for name in stats}


def groups(job: Job, stats: Mapping[tuple, Stats]) -> list[list[tuple]]:
    """What is solved together: equal shapes and methods, up to a number of weights."""
    found: dict[Any, list[tuple]] = defaultdict(list)
    for name in stats:
        w = job.like(*name)
        like = w.shape, str(w.dtype), jax.tree.structure(stats[name])
        choice = job.methods[name[0]], job.targets[name[0]] is None
        size = max(1, tree.STACK_LIMIT // math.prod(w.shape))
        found[like, choice, size].append(name)
    return [
        names[k : k + key[-1]]
        for key, names in found.items()
        for k in range(0, len(names), key[-1])
    ]


def restore(job: Job, names: Sequence[tuple]) -> dict[tuple, Solved] | None:
    """The plans of these matrices from disk; None unless all are there."""
    if job.finished is None:
        return None
    found = {}
    for path, at in names:
        w = job.like(path, at)
        stats = blank(w.shape[-1], w.shape[:-2])
        like = jax.eval_shape(
            lambda w, stats, path=path, at=at: solve_equal(
                job, {(path, at): stats}, {(path, at): w}, solve_stack
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
    job: Job,
    stats: Mapping[tuple, Stats],
    weights: Mapping[tuple, Array],
    run: Callable[..., Any],
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
    plans, errors, facts = run(
        job.methods[names[0][0]],
        stacked(keys),
        stacked([weights[name] for name in names]),
        shared,
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
      stats: [*axes of the stack, ...], shared by the members.
      cross: f32[members, stack, o, i] or None.
      target_mean: f32[members, stack, o] or None.
      sparsity: f32[members, stack] or None.
    """
    # Here it costs no copy of the Gram matrices.
    axes = stats.mean.ndim - 1
    stats = jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), stats)

    def one(key, w, stats, cross, mean, sparsity):
        mine = dataclasses.replace(stats, cross=cross, target_mean=mean)
        state = method.solve(key, w, mine, sparsity=sparsity)
        plan = method.decide(state, w)
        before = w.astype(jnp.float32)
        lost = tree.dense_weight(plan).astype(jnp.float32) - before
        total = jnp.maximum(squared(before, stats.gram), 1e-30)
        return plan, squared(lost, stats.gram) / total, method.diagnostics(state)

    over = jax.vmap(one)
    return jax.vmap(over, in_axes=(0, 0, None, 0, 0, 0))(
        keys, w, stats, cross, target_mean, sparsity
    )


class Ahead:
    """`solve_stack`, compiled before it runs, so that its memory is known."""

    def __init__(self):
        """Starts with nothing compiled."""
        self.known: dict[Any, Any] = {}

    def compiled(self, method: Method, *args: Any) -> Any:
        """The program for arrays, concrete or abstract, of these shapes."""
        leaves, structure = jax.tree.flatten(args)
        key = method, structure, tuple((x.shape, str(x.dtype)) for x in leaves)
        if key not in self.known:
            like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
            given = jax.tree.unflatten(structure, like)
            self.known[key] = solve_stack.lower(method, *given).compile()
        return self.known[key]

    def __call__(self, method: Method, *args: Any) -> Any:
        """What `solve_stack` returns."""
        return self.compiled(method, *args)(*args)

    def bytes_for(
        self, job: Job, names: Sequence[tuple], stats: Mapping[tuple, Stats]
    ) -> int:
        """Bytes that solving these matrices together takes, results included."""
        found = []

        def measure(method: Method, *args: Any) -> Any:
            memory = self.compiled(method, *args).memory_analysis()
            # Without the statistics, which are counted where they are made.
            found.append(
                memory.temp_size_in_bytes
                + memory.output_size_in_bytes
                + sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(args[1]))
            )
            return solve_stack(method, *args)

        given = {name: stats[name] for name in names}
        weights = {name: job.like(*name) for name in names}
        jax.eval_shape(lambda s, w: solve_equal(job, s, w, measure), given, weights)
        return found[0]


def squared(w: Array, gram: Array) -> Array:
    """|| X W^T ||^2 from the Gram matrix of X."""
    product = jnp.dot(w, gram, precision=lax.Precision.HIGHEST)
    return jnp.sum(product * w, dtype=jnp.float32)
