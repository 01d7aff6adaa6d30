"""Solves the matrices of one cut: stacked where they are equal, kept on disk when done.

Statistics arrive per (path, at); plans, errors and facts leave on the host.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array
from jax import numpy as jnp

from flexhinm_jax.methods import Method
from flexhinm_jax.ops import gram
from flexhinm_jax.pruning import statistics
from flexhinm_jax.pruning.apply import check_finite, dense_weight
from flexhinm_jax.pruning.solve import (
    Task,
    by_magnitude,
    in_stacks,
    keys_for,
    scale_of,
    scaled,
    scaled_targets,
    settled,
    solve_matrix,
)
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
      unseen: bool[*rest of the stack], whether no input reached a matrix.
    """

    plan: Plan
    error: Array
    facts: dict[str, Array]
    unseen: Any = False


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
    known, blind, around = {}, {}, {}
    for (path, at), own in stats.items():
        weight = functools.partial(job.weight, path, at)
        around[path, at] = extra = {}
        scale = scale_of(weight(), path)
        if scale is not None:
            extra["scale"] = jnp.asarray(scale)
        blind[path, at] = statistics.unseen(own)
        own = statistics.informed(own, blind[path, at], weight)
        known[path, at] = scaled_targets(own, scale)
        if blind[path, at].any():
            task = task_of(job, path, at, own, scaled(weight, scale))
            keys, _, _, target = task.others
            others = keys, own, target, None
            extra |= by_magnitude(task._replace(others=others), blind[path, at])

    def load(path: str, at: tuple) -> Array:
        scale = around[path, at].get("scale")
        return scaled(functools.partial(job.weight, path, at), scale)()

    for part in solved(job, known, load, run):
        for (path, at), result in part.items():
            plan = settled(
                result.plan,
                around[path, at],
                functools.partial(job.weight, path, at),
            )
            check_finite({path: plan}, job.methods)
            result = result._replace(plan=plan, unseen=blind[path, at])
            out[path, at] = meshes.host(result)
            if job.finished is not None:
                job.finished.save(f"{path} {at}", out[path, at])
    return {name: out[name] for name in stats}


def solved(
    job: Job,
    stats: Mapping[tuple, Stats],
    weight: Callable[[str, tuple], Any],
    run: Callable[..., Any],
) -> Iterator[dict[tuple, Solved]]:
    """`solve`, stack by stack, with the weights of (path, at) from anywhere."""
    first = next(iter(stats.values()))
    shared = dataclasses.replace(first, cross=None, target_mean=None)
    tasks = {
        (path, at): task_of(job, path, at, own, functools.partial(weight, path, at))
        for (path, at), own in stats.items()
    }
    for part in in_stacks(functools.partial(run, shared), tasks):
        yield {
            name: Solved(plan, jnp.mean(errors.reshape(-1)), facts)
            for name, (plan, errors, facts) in part.items()
        }


def task_of(
    job: Job, path: str, at: tuple, stats: Stats, weight: Callable[[], Any]
) -> Task:
    """What runs on the matrices of (path, at)."""
    like, goal = job.like(path, at), job.targets[path]
    keys = keys_for(job.key, job.uses.leaves[path])[select(at)]
    target = None if goal is None else jnp.full(like.shape[:-2], goal, jnp.float32)
    others = keys, stats.cross, stats.target_mean, target
    return Task(job.methods[path], like, weight, others)


def restore(job: Job, names: Sequence[tuple]) -> dict[tuple, Solved] | None:
    """The plans of these matrices from disk; None unless all are there."""
    if job.finished is None:
        return None
    known = {}
    for name in names:
        w = job.like(*name)
        stats = blank(w.shape[-1], w.shape[:-2])

        def one(w: Any, stats: Stats, name: Any = name) -> Solved:
            part = next(solved(job, {name: stats}, lambda *_: w, solve_stack))
            return part[name]._replace(unseen=jnp.zeros(w.shape[:-2], bool))

        like = jax.eval_shape(one, w, stats)
        result = job.finished.load(f"{name[0]} {name[1]}", like)
        if result is None:
            return None
        known[name] = result
    return known


@functools.partial(jax.jit, static_argnames="method")
def solve_stack(
    stats: Stats,
    method: Method,
    w: Array,
    keys: Array,
    cross: Array | None,
    target_mean: Array | None,
    sparsity: Array | None,
) -> tuple[Plan, Array, dict[str, Array]]:
    """Plans, relative output errors and facts of matrices that read the same input.

    Args:
      stats: [*stack, ...], of the stack of inputs that every member of a cut reads.
      method: static.
      w: [*lead, o, i]; the leading axes hold any number of members of that stack, one
        after the other, here and below.
      keys: [*lead].
      cross: f32[*lead, o, i] or None.
      target_mean: f32[*lead, o] or None.
      sparsity: f32[*lead] or None.
    """
    # Here it costs no copy of the Gram matrices.
    axes, lead = stats.mean.ndim - 1, w.shape[:-2]
    stats = jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), stats)
    stack = stats.mean.shape[0]

    def one(stats, w, key, cross, mean, sparsity):
        own = dataclasses.replace(stats, cross=cross, target_mean=mean)
        state = solve_matrix(method, w, key, own, sparsity)
        plan = method.decide(state, w)
        before = w.astype(jnp.float32)
        lost = dense_weight(plan).astype(jnp.float32) - before
        total = jnp.maximum(gram.energy(before, stats.gram), 1e-30)
        return plan, gram.energy(lost, stats.gram) / total, method.diagnostics(state)

    members = jax.tree.map(
        lambda x: x.reshape(-1, stack, *x.shape[len(lead) :]),
        (w, keys, cross, target_mean, sparsity),
    )
    over = jax.vmap(jax.vmap(one), in_axes=(None, 0, 0, 0, 0, 0))
    results = over(stats, *members)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[2:]), results)
