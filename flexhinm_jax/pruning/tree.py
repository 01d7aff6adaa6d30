"""From one matrix to a model: solve, decide, densify and pack over a parameter tree.

A method sees one matrix. Here every prunable leaf is read as a stack of matrices, equal
shapes are stacked together and vmapped under one jit, and the results go back into the
tree. Results never depend on the grouping: the key of a leaf is derived from its path.

Everything is keyed by leaf path: `states` and `plans` are dicts path -> pytree whose
arrays have the leading stack axes of the leaf.
"""

import contextlib
import functools
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax import arguments, kernels
from flexhinm_jax.methods import Method
from flexhinm_jax.methods.base import check_method
from flexhinm_jax.paths import is_packed, leaf_paths
from flexhinm_jax.tracing import meshes
from flexhinm_jax.tracing.views import leaf as to_leaf
from flexhinm_jax.tracing.views import matrix
from flexhinm_jax.types import BlockDiagonal, Plan, State, Stats, Use, Uses

#: Weights solved in one vmapped call; more are split, so that memory stays bounded.
STACK_LIMIT = 1 << 24

Progress = Callable[[int, int], None]


def leaves_for(params: Any, uses: Uses) -> dict[str, Any]:
    """Path -> leaf, after checking that every prunable leaf is there.

    Raises:
      ValueError: params or uses of another kind, a leaf that is missing, packed or of
        another shape; the message names it.
    """
    arguments.found(uses)
    leaves = jax.tree.leaves(params, is_leaf=is_packed)
    found = dict(zip(leaf_paths(params), leaves, strict=True))
    for path, leaf in found.items():
        if is_packed(leaf):
            raise ValueError(
                f"{path}: is packed; pass the dense parameters, such as result.params"
            )
    for path, use in uses.leaves.items():
        if path not in found:
            raise ValueError(
                f"{path}: in uses but not in params; pass the uses that discover() "
                "returned for these params"
            )
        shape = tuple(np.shape(found[path]))
        if shape != use.layout.shape:
            raise ValueError(
                f"{path}: shape {shape}, but uses were discovered "
                f"for {use.layout.shape}; run discover() again"
            )
    return found


def method_for(method: Method, use: Use) -> Method:
    """The method with the pattern that a rule asks for, if there is one."""
    return method if use.pattern is None else method.with_pattern(use.pattern)


def target_for(method: Method, use: Use, sparsity: Any) -> Any:
    """The sparsity of one leaf: its own, the common, or none if a rule decides it."""
    if isinstance(sparsity, Mapping):
        if use.path not in sparsity:
            given = ", ".join(map(repr, list(sparsity)[:3])) or "nothing"
            raise ValueError(
                f"{use.path}: no sparsity given; the mapping needs every prunable leaf "
                f"by its path, and has {given} ({len(sparsity)} in all)"
            )
        return sparsity[use.path]
    low, high = method.pattern.sparsity_range()
    return None if use.pattern is not None and low == high else sparsity


@functools.partial(jax.jit, static_argnames="method")
def _solve(method, keys, w, stats, sparsity, prev):
    def one(key, w, stats, sparsity, prev):
        return method.solve(key, w, stats, sparsity=sparsity, prev=prev)

    return jax.vmap(one)(keys, w, stats, sparsity, prev)


@functools.partial(jax.jit, static_argnames="method")
def _decide(method, keys, w, states):
    return jax.vmap(lambda k, w, s: method.decide(s, w, key=k))(keys, w, states)


def _signature(tree: Any) -> Any:
    """Structure, shapes and dtypes: what two leaves must share to be stacked."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((x.shape, str(x.dtype)) for x in leaves)


def _flat(tree: Any, stack: int) -> Any:
    """Leading `stack` axes of every array flattened into one."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[stack:]), tree)


def _over_stacks(
    run: Callable[..., Any],
    uses: Uses,
    inputs: Mapping[str, tuple[Method, tuple[Any, ...]]],
    progress: Progress | None,
) -> dict[str, Any]:
    """Runs `run(method, *inputs)` once per group of equal signature.

    Args:
      run: takes a method and pytrees with one leading batch axis.
      uses: where the stack axes come from.
      inputs: path -> (method, pytrees with the leaf's stack axes leading).
      progress: called with (finished, total) leaves.

    Returns:
      path -> result with the leaf's stack axes leading.
    """
    groups: dict[Any, list[str]] = defaultdict(list)
    flat = {}
    for path, (method, args) in inputs.items():
        use = uses.leaves[path]
        flat[path] = _flat(args, len(use.layout.stack))
        one = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), flat[path]
        )
        groups[method, _signature(one)].append(path)
    results, done = {}, 0
    for (method, _), paths in groups.items():
        size = max(
            1, STACK_LIMIT // int(np.prod(uses.leaves[paths[0]].layout.matrix_shape))
        )
        for part in _chunks(paths, {p: flat[p] for p in paths}, size):
            stacked = jax.tree.map(lambda *xs: jnp.concatenate(xs), *part.values())
            out, start = run(method, *stacked), 0
            for path, args in part.items():
                use = uses.leaves[path]
                count = jax.tree.leaves(args)[0].shape[0]
                piece = jax.tree.map(lambda x: x[start : start + count], out)  # noqa: B023
                shape = use.layout.stack_shape
                results[path] = jax.tree.map(
                    lambda x: x.reshape(*shape, *x.shape[1:]),  # noqa: B023
                    piece,
                )
                start += count
            done += len(part)
            if progress is not None:
                progress(done, len(inputs))
    return {path: results[path] for path in inputs}


def _chunks(
    paths: list[str], flat: dict[str, Any], size: int
) -> Iterable[dict[str, Any]]:
    """Whole leaves, as many as fit into `size` matrices, at least one."""
    part: dict[str, Any] = {}
    filled = 0
    for path in paths:
        count = jax.tree.leaves(flat[path])[0].shape[0]
        if part and filled + count > size:
            yield part
            part, filled = {}, 0
        part[path], filled = flat[path], filled + count
    yield part


def keys_for(key: Array, use: Use) -> Array:
    """One key per matrix of a leaf, from the path alone."""
    mine = jax.random.fold_in(key, zlib.crc32(use.path.encode()) & 0x7FFFFFFF)
    shape = use.layout.stack_shape
    return jax.random.split(mine, int(np.prod(shape))).reshape(shape)


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

    Raises:
      ValueError: a leaf that the pattern refuses, missing or bad statistics, NaN
        weights, a target out of range; the message names the leaf.
    """
    check_method(method)
    arguments.key(key)
    leaves = leaves_for(params, uses)
    arguments.concrete(params)
    check_targets(sparsity, uses)
    stats = {} if stats is None else stats
    arguments.by_path(stats, Stats, "stats", "calibrate()")
    if prev is not None:
        arguments.by_path(prev, State, "prev", "solve()")
    inputs = {}
    for path, use in uses.leaves.items():
        mine, given = method_for(method, use), stats.get(path)
        target = target_for(mine, use, sparsity)
        w = matrix(leaves[path], use.layout)
        one: Any = jax.ShapeDtypeStruct(w.shape[-2:], w.dtype)
        mine.check(one, given, target, path)
        meshes.check_finite(w, path)
        if target is not None:
            target = _spread(target, use)
        if prev is not None and path not in prev:
            raise ValueError(
                f"{path}: in uses but not in prev; pass the states of all leaves"
            )
        before = None if prev is None else prev[path]
        if mine.needs == "nothing":
            given = None
        inputs[path] = mine, (keys_for(key, use), w, given, target, before)
    return _over_stacks(_solve, uses, inputs, progress)


@meshes.under_automatic_axes
def decide(
    method: Method,
    states: Mapping[str, State],
    params: Any,
    uses: Uses,
    key: Array | None = None,
) -> dict[str, Plan]:
    """The plan of every solved leaf.

    Args:
      method: the method that solved.
      states: from `solve`, perhaps with `learned` moved by an optimiser.
      params: the parameter tree now.
      uses: from `discover`.
      key: None for hard, deterministic plans; a key for sampled relaxations.

    Returns:
      path -> Plan, arrays with the leading stack axes of the leaf.
    """
    check_method(method)
    leaves = leaves_for(params, uses)
    arguments.by_path(states, State, "states", "solve()", uses.leaves)
    if key is not None:
        arguments.key(key)
    inputs = {}
    for path, state in states.items():
        use = uses.leaves[path]
        w = matrix(leaves[path], use.layout)
        keys = None if key is None else keys_for(key, use)
        inputs[path] = method_for(method, use), (keys, w, state)
    with states_of(method):
        return _over_stacks(_decide, uses, inputs, None)


@contextlib.contextmanager
def states_of(method: Method) -> Iterator[None]:
    """Turns the failure of a method on states of another one into a ValueError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{type(method).__name__} cannot read these states "
            f"({type(error).__name__}: {error}); pass those that solve() returned for "
            "this method"
        ) from error


def check_targets(sparsity: Any, uses: Uses) -> None:
    """Raises ValueError for a mapping that names a leaf which does not exist."""
    if not isinstance(sparsity, Mapping):
        return
    leaves = uses.leaves
    for path in sparsity:
        if path not in leaves and path not in uses.skipped:
            near = arguments.nearest(path, leaves)
            raise ValueError(f"sparsity[{path!r}]: there is no such leaf; {near}")


def _spread(target: Any, use: Use) -> Array:
    """The target of every matrix of a leaf."""
    target, shape = jnp.asarray(target, jnp.float32), use.layout.stack_shape
    if target.shape not in ((), shape):
        raise ValueError(
            f"{use.path}: sparsity of shape {target.shape}; give one number, {{leaf "
            f"path: number}}, or one per matrix of its stack, shape {shape}"
        )
    return jnp.broadcast_to(target, shape)


def check_plans(plans: Any, uses: Uses) -> None:
    """Raises ValueError unless every plan belongs to a prunable leaf of its shape."""
    arguments.found(uses)
    leaves = uses.leaves
    arguments.by_path(plans, Plan, "plans", "decide()", leaves)
    for path, plan in plans.items():
        layout = leaves[path].layout
        shape = (*layout.stack_shape, *layout.matrix_shape)
        if plan.weight.shape != shape:
            raise ValueError(
                f"{path}: its plan is for a weight {list(plan.weight.shape)}, the leaf "
                f"is {list(shape)} as [*stack, out, in]; pass the plans of these params"
            )


def dense_weight(plan: Plan) -> Array:
    """The product left @ weight @ right of a plan, [*stack, o, i], weight's dtype."""
    weight = plan.weight
    if plan.left is None and plan.right is None:
        return weight

    def one(x: Array, left: BlockDiagonal | None, right: BlockDiagonal | None) -> Array:
        # x @ right = (right^T @ x^T)^T
        x = kernels.block_product(x, None if right is None else right.T, axis=1)
        return kernels.block_product(x, left, axis=0)

    for _ in range(weight.ndim - 2):
        one = jax.vmap(one)
    product = one(weight.astype(jnp.float32), plan.left, plan.right)
    return product.astype(weight.dtype)


def _replace(
    params: Any,
    plans: Mapping[str, Plan],
    uses: Uses,
    weight: Callable[[Plan, Use], Any],
) -> Any:
    """The tree with `weight(plan, use)` on planned leaves and refitted biases."""
    check_plans(plans, uses)
    leaves = leaves_for(params, uses)
    new = dict(leaves)
    for path, plan in plans.items():
        use = uses.leaves[path]
        new[path] = weight(plan, use)
        if plan.bias is None:
            continue
        if use.bias is None:
            raise ValueError(
                f"{path}: the plan has a refitted bias, but no bias parameter is added "
                "to this product; solve without bias refit"
            )
        old = leaves[use.bias]
        shift = plan.bias.reshape(old.shape).astype(jnp.float32)
        new[use.bias] = (old.astype(jnp.float32) + shift).astype(old.dtype)
    return jax.tree.unflatten(jax.tree.structure(params), [new[p] for p in leaves])


@meshes.under_automatic_axes
def densify(plans: Mapping[str, Plan], params: Any, uses: Uses) -> Any:
    """The same tree with zeros in place: works in every JAX program.

    Args:
      plans: from `decide`.
      params: the parameter tree.
      uses: from `discover`.

    Returns:
      A tree of the same structure, shapes and dtypes, in original channel order.
    """

    def weight(plan: Plan, use: Use) -> Array:
        return to_leaf(dense_weight(plan), use.layout)

    return _replace(params, plans, uses, weight)


@meshes.under_automatic_axes
def pack(plans: Mapping[str, Plan], params: Any, uses: Uses) -> Any:
    """The same tree with `PackedWeight` leaves, for `sparsify`.

    A plan without regions (unstructured) stays dense; `report` says so.

    Args:
      plans: concrete plans from `decide`.
      params: the parameter tree.
      uses: from `discover`.

    Returns:
      A tree with the same paths.
    """

    def weight(plan: Plan, use: Use) -> Any:
        if plan.support.regions is None:
            return to_leaf(dense_weight(plan), use.layout)
        return kernels.pack(plan, use.layout)

    return _replace(params, plans, uses, weight)


@meshes.under_automatic_axes
def keep_tree(plans: Mapping[str, Plan], params: Any, uses: Uses) -> Any:
    """The supports as a tree like `params`: bool leaves, None where nothing is pruned.

    Args:
      plans: from `decide`.
      params: the parameter tree.
      uses: from `discover`.

    Returns:
      A tree in which a pruned leaf has its keep mask in the leaf's own shape.

    Raises:
      ValueError: a plan with block-diagonal factors, whose product has no zeros.
    """
    check_plans(plans, uses)
    for path, plan in plans.items():
        if plan.left is not None or plan.right is not None:
            raise ValueError(
                f"{path}: its plan has block-diagonal factors, so only the core has "
                "zeros to keep, not the matrix; train the tree of pack() instead"
            )
    masks = [
        to_leaf(plans[p].support.keep, uses.leaves[p].layout) if p in plans else None
        for p in leaves_for(params, uses)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), masks)
