"""From one matrix to a model: solves the matrices of a parameter tree, many at a time.

In go a method, the leaves with their uses and statistics; out come `states`, a dict
path -> State whose arrays have the leading stack axes of the leaf. A method sees one
matrix. Here every prunable leaf is read as a stack of matrices, equal shapes are
stacked together and vmapped under one jit, and the results go back to their leaves:

    q [64, 64], k [64, 64], up [8, 64, 256]   ->   tasks, one per leaf    (`prepared`)
    [2, 64, 64], [8, 256, 64]                 ->   one call per stack     (`in_stacks`)
    {"q": State, "k": State, "up": State}     ->   arrays [...], [8, ...]

Results never depend on the grouping: the key of a leaf is derived from its path. What
is solved during one pass over a model (`sequential`) is stacked here too.

Two things happen around a method, and `settled` sees to them in its plan: weights of
extreme size are scaled, matrices that no input reached keep their largest weights. What
`settled` needs is in the states of the leaves that it concerns. A trace has no values
to see which these are: there it is in the state of every leaf (`around_as_saved`).
"""

import dataclasses
import functools
import itertools
import logging
import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax import arguments, checks
from flexhinm_jax.methods import Magnitude, Method
from flexhinm_jax.methods.base import check_method
from flexhinm_jax.paths import over_stack
from flexhinm_jax.pruning.statistics import informed, unseen, unseen_note
from flexhinm_jax.tracing import meshes
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import Plan, State, Stats, Use, Uses

logger = logging.getLogger("flexhinm_jax")

#: Weights in one vmapped call; more are split, so that memory stays bounded.
MAX_STACK_WEIGHTS = 1 << 24

#: The same on a CPU for a program that other models are to use: a larger stack is not
#: faster there (384 x 384, FlexHiNM with Gyro: .10 CPU seconds per matrix alone and in
#: a stack of 8), and a program for one matrix serves every model that has its shape.
MAX_STACK_WEIGHTS_ON_CPU = 1 << 15

#: Weights below 2^40 and above 2^-40 are solved as they are.
MAX_EXPONENT = 40

#: Entry of a state: what was done around the method, for `decide` to settle.
AROUND = "around"

Progress = Callable[[int, int], None]
OnMismatch = Literal["error", "skip"]


class Task(NamedTuple):
    """The matrices of one leaf, or of some positions of its stack.

    Attributes:
      method: what runs on them, with their own pattern.
      like: shape and dtype of the weight, [*stack, o, i].
      weight: gives it, when its turn comes: a model is never copied as a whole.
      others: trees of arrays with the same leading stack axes.
    """

    method: Method
    like: Any
    weight: Callable[[], Any]
    others: tuple[Any, ...]


def method_for(method: Method, use: Use) -> Method:
    """The method with the pattern that a rule asks for, if there is one."""
    return method if use.pattern is None else method.with_pattern(use.pattern)


def target_for(method: Method, use: Use, sparsity: Any) -> Any:
    """The sparsity of one leaf: its own, the common, or none if a rule decides it."""
    if isinstance(sparsity, Mapping):
        if use.path not in sparsity:
            known = ", ".join(map(repr, list(sparsity)[:3])) or "nothing"
            raise ValueError(
                f"{use.path}: no sparsity given; the mapping needs every prunable leaf "
                f"by its path, and has {known} ({len(sparsity)} in all)"
            )
        return sparsity[use.path]
    low, high = method.pattern.sparsity_range()
    return None if use.pattern is not None and low == high else sparsity


def fitting(method: Method, uses: Uses, on_mismatch: OnMismatch) -> Uses:
    """The uses of the leaves whose sizes the pattern divides.

    Args:
      method: what is to prune them.
      uses: from `discover`.
      on_mismatch: "skip" moves other leaves to the skipped ones with the reason;
        "error" refuses the first of them, before anything is calibrated.

    Raises:
      ValueError: a leaf is refused; or another word.
    """
    if on_mismatch not in ("error", "skip"):
        raise ValueError(
            f"on_mismatch={on_mismatch!r}: choose 'error' or 'skip', what to do with a "
            "leaf whose sizes the pattern does not divide"
        )
    reasons = {}
    for path, use in uses.leaves.items():
        shape, pattern = use.layout.matrix_shape, method_for(method, use).pattern
        try:
            pattern.check_shape(shape, path)
        except ValueError as error:
            if on_mismatch == "error":
                raise
            reason = str(error).removeprefix(f"{path}: ").partition(";")[0]
            reasons[path] = f"does not fit {pattern}: {reason}"
            logger.warning("%s: skipped, it %s", path, reasons[path])
    return uses.without(reasons) if reasons else uses


def keys_for(key: Array, use: Use) -> Array:
    """One key per matrix of a leaf, from the path alone."""
    own = jax.random.fold_in(key, zlib.crc32(use.path.encode()) & 0x7FFFFFFF)
    shape = use.layout.stack_shape
    keys = jax.random.split(own, math.prod(shape))
    return keys.reshape(*shape, *own.shape)  # a raw key has an axis of its own


def check_targets(sparsity: Any, uses: Uses) -> None:
    """Raises ValueError for a mapping that names a leaf which does not exist."""
    if not isinstance(sparsity, Mapping):
        return
    leaves = uses.leaves
    for path in sparsity:
        if path not in leaves and path not in uses.skipped:
            near = arguments.nearest(path, leaves)
            raise ValueError(f"sparsity[{path!r}]: there is no such leaf; {near}")


@meshes.under_automatic_axes
def solve(
    method: Method,
    key: Array,
    params: Any,
    uses: Uses,
    stats: Mapping[str, Stats] | None = None,
    sparsity: float | Mapping[str, float] | None = None,
    prev: Mapping[str, State] | None = None,
    progress: Progress | None = None,
) -> dict[str, State]:
    """Solves every prunable leaf.

    Args:
      method: a configuration; a rule's pattern replaces its pattern for that leaf.
      key: PRNG key, consumed; a leaf uses key and path, nothing else.
      params: the parameter tree.
      uses: from `discover`.
      stats: from `calibrate`; not needed by a method that needs nothing.
      sparsity: fraction of weights removed, one for all or one per path; None for a
        pattern that has only one.
      prev: earlier states: the kept set of every leaf only shrinks.
      progress: called with (finished, total) leaves.

    Returns:
      path -> State, arrays with the leading stack axes of the leaf.

    A matrix that no calibration input reached is pruned by its weights alone, as if
    all its inputs had been alike; a warning names it. Weights of extreme size are
    multiplied by a power of two while they are solved.

    Raises:
      ValueError: a leaf that the pattern refuses, missing or bad statistics, NaN
        weights, a target out of range; the message names the leaf.
    """
    check_method(method)
    arguments.key(key)
    arguments.concrete(params, traceable=True)
    if stats is not None:
        arguments.by_path(stats, Stats, "stats", "calibrate()")
    if prev is not None:
        arguments.by_path(prev, State, "prev", "solve()")
    leaves = Leaves.of(params).dense(uses)
    return solve_leaves(method, key, leaves, uses, stats, sparsity, prev, progress)


def solve_leaves(
    method: Method,
    key: Array,
    leaves: Leaves,
    uses: Uses,
    stats: Mapping[str, Stats] | None,
    sparsity: float | Mapping[str, float] | None,
    prev: Mapping[str, State] | None = None,
    progress: Progress | None = None,
) -> dict[str, State]:
    """`solve` of arguments that are what they should be, under automatic axes."""
    check_targets(sparsity, uses)
    stats = {} if stats is None else stats
    tasks, around = {}, {}
    for path, use in uses.leaves.items():
        if prev is not None and path not in prev:
            raise ValueError(
                f"{path}: in uses but not in prev; pass the states of all leaves"
            )
        before = None if prev is None else prev[path]
        tasks[path], around[path] = prepared(
            method, key, leaves, use, stats.get(path), sparsity, before
        )
    states: dict[str, State] = {}
    for part in in_stacks(_solve, tasks, of_any_model=True):
        states |= part
        if progress is not None:
            progress(len(states), len(tasks))
    return {path: with_around(states[path], around[path]) for path in tasks}


def prepared(
    method: Method,
    key: Array,
    leaves: Leaves,
    use: Use,
    stats: Stats | None,
    sparsity: float | Mapping[str, float] | None,
    before: State | None = None,
) -> tuple[Task, dict[str, Any]]:
    """One leaf as every solver gets it: of ordinary size, on inputs that were seen.

    Args:
      method: as in `solve`.
      key: of the call; the task has one of its own per matrix.
      leaves: dense leaves.
      use: the first use of the leaf.
      stats: statistics of its inputs, or None.
      sparsity: as in `solve`.
      before: an earlier state of the leaf, or None.

    Returns:
      The task, with (keys, statistics, targets, earlier state) beside the weight, and
      what `with_around` puts beside its state.

    Raises:
      ValueError: as in `solve`.
    """
    path, own, known = use.path, method_for(method, use), stats
    target = target_for(own, use, sparsity)
    like, weight = leaves.like(use), functools.partial(leaves.matrix, use)
    one: Any = jax.ShapeDtypeStruct(like.shape[-2:], like.dtype)
    if own.needs == "nothing":
        known = None
    blind = None
    if known is not None:
        blind = unseen(known)
        known = informed(known, blind, weight)
        if not checks.is_concrete(blind):
            pass  # any may be
        elif blind.any():
            logger.warning("%s: %s", path, unseen_note(blind))
        else:
            blind = None
    own.check(one, known, target, path)
    around: dict[str, Any] = {}
    scale = scale_of(weight(), path)
    if scale is not None:
        around["scale"] = jnp.asarray(scale)
    if target is not None:
        target = _spread(target, use)
    known = scaled_targets(known, scale)
    before = None if before is None else split(before)[0]
    others = keys_for(key, use), known, target, before
    task = Task(own, like, scaled(weight, scale), others)
    if blind is not None:
        around |= by_magnitude(task, blind)
    return task, around


def _spread(target: Any, use: Use) -> Array:
    """The target of every matrix of a leaf."""
    target, shape = jnp.asarray(target, jnp.float32), use.layout.stack_shape
    if target.shape not in ((), shape):
        raise ValueError(
            f"{use.path}: sparsity of shape {target.shape}; give one number, {{leaf "
            f"path: number}}, or one per matrix of its stack, shape {shape}"
        )
    return jnp.broadcast_to(target, shape)


def scale_of(w: Array, path: str) -> Any:
    """Powers of two that bring weights of extreme size near 1, exactly.

    Squares of weights overflow at 1e19 and vanish at 1e-19, and every method squares
    them. None, for weights of ordinary size, leaves programs and bits as they are; in
    a trace their scale is 1.

    Args:
      w: [*stack, o, i].
      path: leaf path for the message.

    Returns:
      f32[*stack, 1, 1], or None where no matrix needs it.

    Raises:
      ValueError: weights with NaN or infinity, outside of a trace.
    """
    top = _largest(w)
    if not checks.is_concrete(top):
        return _powers(top.astype(jnp.float32), jnp)[..., None, None]
    largest = np.asarray(meshes.whole(top), np.float64)
    if not np.isfinite(largest).all():
        meshes.check_finite(w, path)
    scale = _powers(largest, np)
    return None if (scale == 1).all() else scale[..., None, None].astype(np.float32)


def _powers(largest: Any, xp: Any) -> Any:
    """The scale of matrices by their largest weights; `xp` is numpy or its twin."""
    exponent = xp.frexp(largest)[1]
    extreme = (xp.abs(exponent) > MAX_EXPONENT) & (largest > 0)
    # 2^120 and its inverse are both normal numbers of float32.
    return xp.ldexp(
        xp.ones_like(largest), xp.where(extreme, -xp.clip(exponent, -120, 120), 0)
    )


@jax.jit
def _largest(w: Array) -> Array:
    return jnp.max(jnp.abs(w), axis=(-2, -1))


def scaled(weight: Callable[[], Any], scale: Any) -> Callable[[], Any]:
    """What gives the weight, times its scale."""
    if scale is None:
        return weight

    def times() -> Array:
        w = weight()
        return w * jnp.asarray(scale, w.dtype)

    return times


def scaled_targets(stats: Stats | None, scale: Any) -> Stats | None:
    """Statistics whose targets are those of the scaled weight."""
    if stats is None or scale is None or stats.cross is None:
        return stats
    mean = None if stats.target_mean is None else stats.target_mean * scale[..., 0]
    return dataclasses.replace(stats, cross=stats.cross * scale, target_mean=mean)


def by_magnitude(task: Task, blind: Any) -> dict[str, Any]:
    """The support that the largest weights make, for matrices that no input reached.

    Args:
      task: of `solve`.
      blind: bool[*stack], which matrices these are.

    Returns:
      What `split` gives beside a state; empty where an order of the inputs was given.
    """
    keys, stats, target, before = task.others
    if stats.order is not None:
        return {}
    if before is not None:
        known = {k: x for k, x in before.fixed.items() if k == "support"}
        before = State(learned=(), fixed=known) if known else None
    method = Magnitude(task.method.pattern)
    plain = task._replace(method=method, others=(keys, None, target, before))
    state = next(in_stacks(_solve, {"": plain}))[""]
    return {"blind": jnp.asarray(blind), **state.fixed}


def settled(plan: Plan, around: Mapping[str, Any], weight: Callable[[], Array]) -> Plan:
    """The plan of the weight itself, from that of what was solved.

    Undoes the scale, and gives matrices that no input reached their largest weights.

    Args:
      plan: from `Method.decide`.
      around: from `split`.
      weight: gives the weight, [*stack, o, i].
    """
    if "scale" in around:
        scale = around["scale"]
        bias = plan.bias
        plan = dataclasses.replace(
            plan,
            weight=(plan.weight / scale).astype(plan.weight.dtype),
            bias=None if bias is None else (bias / scale[..., 0]).astype(bias.dtype),
        )
    factors = plan.left is not None or plan.right is not None
    if "blind" not in around or factors:
        return plan
    w, blind, support = weight(), around["blind"], around["support"]
    own = Plan(
        weight=jnp.where(support.keep, w, jnp.zeros((), w.dtype)),
        support=support,
        retained=around["retained"],
        bias=None if plan.bias is None else jnp.zeros_like(plan.bias),
    )

    def pick(new: Array, old: Array) -> Array:
        at = blind.reshape(blind.shape + (1,) * (old.ndim - blind.ndim))
        return jnp.where(at, new, old)

    return jax.tree.map(pick, own, plan)


def with_around(state: State, around: dict[str, Any]) -> State:
    """The state, with what `settled` needs to know."""
    if not around or jax.tree.leaves(state.learned):
        around = {name: x for name, x in around.items() if name == "scale"}
    if not around:
        return state
    return dataclasses.replace(state, fixed=state.fixed | {AROUND: around})


def split(state: State) -> tuple[State, dict[str, Any]]:
    """(state as the method made it, what `settled` needs to know)."""
    if not isinstance(state.fixed, dict) or AROUND not in state.fixed:
        return state, {}
    fixed = dict(state.fixed)
    around = fixed.pop(AROUND)
    return dataclasses.replace(state, fixed=fixed), around


def around_as_saved(state: State, saved: Collection[str]) -> State:
    """A state that was solved in a trace, in the form of one with values.

    Args:
      state: shapes, or values; with what `settled` may need to know.
      saved: names of what the other one has of that, the keys that `split` returns.

    Returns:
      The state without the rest.
    """
    own, around = split(state)
    around = {k: x for k, x in around.items() if k in saved}
    return with_around(own, around)


@functools.partial(jax.jit, static_argnames="method")
def _solve(method, w, keys, stats, sparsity, prev):
    one = functools.partial(solve_matrix, method)
    return over_stack(one, w.ndim - 2)(w, keys, stats, sparsity, prev)


def solve_matrix(
    method: Method,
    w: Array,
    key: Array,
    stats: Stats | None,
    sparsity: Array | None,
    prev: State | None = None,
) -> State:
    """The state of one matrix `[o, i]`; see `Method.solve`."""
    return method.solve(key, w, stats, sparsity=sparsity, prev=prev)


def in_stacks(
    run: Callable[..., Any], tasks: Mapping[Any, Task], *, of_any_model: bool = False
) -> Iterator[dict[Any, Any]]:
    """Runs `run(method, weight, *others)` once per stack of equal matrices.

    Tasks with one method and equal shapes per matrix share a stack, up to a number of
    weights; one task is never split.

    Args:
      run: takes a method and trees of arrays with the same leading axes: those of the
        task, or one of several tasks.
      tasks: name -> task.
      of_any_model: compile programs that serve other models too. Stacks are filled up
        to a round number of tasks by repeating the last one, and on a CPU only small
        matrices are stacked.

    Yields:
      name -> result with the leading stack axes of the task, stack by stack.
    """
    limit, rounded = MAX_STACK_WEIGHTS, lambda count: count
    if of_any_model:
        rounded = round_count
        if jax.default_backend() == "cpu":
            limit = min(limit, MAX_STACK_WEIGHTS_ON_CPU)
    groups: dict[Hashable, dict[Any, Task]] = defaultdict(dict)
    for name, task in tasks.items():
        groups[_signature(task)][name] = task
    for group in groups.values():
        for part in _parts(group, limit, rounded):
            arrays = [(task.weight(), *task.others) for task in part.values()]
            method = next(iter(part.values())).method
            if len(arrays) == 1:  # of one task nothing is copied
                yield dict.fromkeys(part, run(method, *arrays[0]))
                continue
            stacks = [task.like.shape[:-2] for task in part.values()]
            arrays += arrays[-1:] * (rounded(len(arrays)) - len(arrays))
            axes = tuple(x[0].ndim - 2 for x in arrays)
            joined = _join(arrays, axes)
            del arrays
            results = _part(run(method, *joined), tuple(stacks))
            yield dict(zip(part, results, strict=True))


def _signature(task: Task) -> Hashable:
    """Method, structure, shapes and dtypes per matrix: equal ones can be stacked."""
    leaves, structure = jax.tree.flatten((task.like, *task.others))
    axes = len(task.like.shape) - 2
    return task.method, structure, tuple((x.shape[axes:], str(x.dtype)) for x in leaves)


def round_count(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: at most a third is repeated."""
    power = 1 << (count - 1).bit_length()
    return power if 4 * count > 3 * power or power < 4 else 3 * power // 4


@functools.partial(jax.jit, static_argnames="axes")
def _join(arrays: list[Any], axes: tuple[int, ...]) -> Any:
    """The arrays of tasks with one leading axis in place of so many of each."""

    def join(*xs: Array) -> Array:
        parts = zip(xs, axes, strict=True)
        return jnp.concatenate([x.reshape(-1, *x.shape[n:]) for x, n in parts])

    return jax.tree.map(join, *arrays)


@functools.partial(jax.jit, static_argnames="stacks")
def _part(results: Any, stacks: tuple[tuple[int, ...], ...]) -> list[Any]:
    """The results of every task, with its stack axes: one program for all slices."""
    ends = list(itertools.accumulate(map(math.prod, stacks)))

    def own(stack: tuple[int, ...], end: int) -> Any:
        start = end - math.prod(stack)
        return jax.tree.map(
            lambda x: x[start:end].reshape(*stack, *x.shape[1:]), results
        )

    return [own(stack, end) for stack, end in zip(stacks, ends, strict=True)]


def _parts(
    group: dict[Any, Task], limit: int, rounded: Callable[[int], int]
) -> Iterator[dict[Any, Task]]:
    """Whole tasks, as many as fit into `limit` weights, at least one."""
    part: dict[Any, Task] = {}
    filled = 0
    for name, task in group.items():
        size = math.prod(task.like.shape)
        more = rounded(len(part) + 1) - len(part)
        if part and filled + more * size > limit:
            yield part
            part, filled = {}, 0
        part[name], filled = task, filled + size
    yield part
