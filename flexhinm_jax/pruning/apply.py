"""What becomes of solved weights: plans, and the tree in every form.

`plans` are dicts path -> Plan whose arrays have the leading stack axes of the leaf.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from flexhinm_jax import arguments, checks, kernels
from flexhinm_jax.methods import Method
from flexhinm_jax.methods.base import check_method
from flexhinm_jax.ops import gram
from flexhinm_jax.paths import over_stack
from flexhinm_jax.pruning.solve import (
    Task,
    in_stacks,
    keys_for,
    method_for,
    scaled,
    settled,
    split,
)
from flexhinm_jax.tracing import meshes
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.tracing.views import leaf as to_leaf
from flexhinm_jax.tracing.views import matrix
from flexhinm_jax.types import BlockDiagonal, Plan, State, Stats, Use, Uses

logger = logging.getLogger("flexhinm_jax")


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

    Raises:
      ValueError: states of another method; outside of a trace, a plan with NaN or
        infinity, by leaf and method; a leaf of eight bits with block-diagonal factors,
        or with states that are being learned.
    """
    check_method(method)
    arguments.by_path(states, State, "states", "solve()", uses.leaves)
    if key is not None:
        arguments.key(key)
    return decide_leaves(method, states, Leaves.of(params).dense(uses), uses, key)


def decide_leaves(
    method: Method,
    states: Mapping[str, State],
    leaves: Leaves,
    uses: Uses,
    key: Array | None = None,
) -> dict[str, Plan]:
    """`decide` of arguments that are what they should be, under automatic axes."""
    tasks, around = {}, {}
    for path, state in states.items():
        use = uses.leaves[path]
        if path in leaves.on_grid and not checks.are_concrete(state.learned):
            raise ValueError(
                f"{path}: is stored in eight bits, whose steps have no derivative, so "
                "nothing can be learned through it; learn on the dequantised weights, "
                f"or exclude the leaf with {arguments.say('skip')}"
            )
        keys = None if key is None else keys_for(key, use)
        state, around[path] = split(state)
        load = functools.partial(leaves.matrix, use)
        weight = scaled(load, around[path].get("scale"))
        own = method_for(method, use)
        tasks[path] = Task(own, leaves.like(use), weight, (keys, state))
    plans: dict[str, Plan] = {}
    with states_of(method):
        concrete = checks.are_concrete((states, leaves))
        for part in in_stacks(_decide, tasks, of_any_model=concrete):
            plans |= part
    plans = {
        path: settled(
            plans[path],
            around[path],
            functools.partial(leaves.matrix, uses.leaves[path]),
        )
        for path in tasks
    }
    check_finite(plans, {path: task.method for path, task in tasks.items()})
    return rounded(plans, leaves, uses)


def rounded(plans: dict[str, Plan], leaves: Leaves, uses: Uses) -> dict[str, Plan]:
    """The plans with the weights of leaves of eight bits on their grids.

    Raises:
      ValueError: a plan with block-diagonal factors for such a leaf.
    """
    moved: list[str] = []
    out = dict(plans)
    for path, plan in plans.items():
        if path not in leaves.on_grid:
            continue
        if plan.left is not None or plan.right is not None:
            raise ValueError(
                f"{path}: is stored in eight bits, and its plan has block-diagonal "
                "factors, whose product has no grid; choose a method without factors"
            )
        use = uses.leaves[path]
        steps = leaves.stored(plan.weight, use)
        weight = leaves.replaced({path: steps}).matrix(use)
        if checks.is_concrete(weight) and bool((weight != plan.weight).any()):
            moved.append(path)
        out[path] = dataclasses.replace(plan, weight=weight)
    if moved:
        logger.warning(
            "%s (%d leaves in eight bits): the method moved weights, which were "
            "rounded to the steps of their scales",
            moved[0],
            len(moved),
        )
    return out


@functools.partial(jax.jit, static_argnames="method")
def _decide(method, w, keys, states):
    one = lambda w, k, s: method.decide(s, w, key=k)  # noqa: E731
    return over_stack(one, w.ndim - 2)(w, keys, states)


def check_finite(plans: Mapping[str, Plan], methods: Mapping[str, Method]) -> None:
    """Raises ValueError for concrete plans whose weights are not finite."""
    parts = {
        path: jax.tree.leaves((p.weight, p.bias, p.left, p.right))
        for path, p in plans.items()
        if checks.is_concrete(p.weight)
    }
    finite = jax.device_get(
        {
            path: _all_finite(
                [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
            )
            for path, arrays in parts.items()
        }
    )
    for path, known in finite.items():
        if not known:
            raise ValueError(
                f"{path}: {type(methods[path]).__name__} gave NaN or infinite weights "
                "from finite ones: its problem is too badly conditioned; give more "
                "damping, more calibration tokens or another method, or exclude the "
                f"leaf with {arguments.say('skip')}"
            )


@jax.jit
def _all_finite(arrays: list[Array]) -> Array:
    return jnp.stack([jnp.isfinite(x).all() for x in arrays]).all()


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

    core = weight.astype(jnp.float32)
    product = over_stack(one, weight.ndim - 2)(core, plan.left, plan.right)
    return product.astype(weight.dtype)


def output_errors(
    plans: Mapping[str, Plan],
    params: Any,
    uses: Uses,
    stats: Mapping[str, Stats] | None,
) -> dict[str, float]:
    """Relative errors of the outputs, where the Gram matrix of the inputs is known.

    Args:
      plans: path -> plan, from `decide`.
      params: the dense parameters.
      uses: from `discover`.
      stats: from `calibrate`; None gives no errors.

    Returns:
      Path -> || X (W' - W) ||^2 / || X W ||^2.
    """
    errors, leaves = {}, Leaves.of(params)
    for path, use in uses.leaves.items():
        h = None if stats is None or path not in stats else stats[path].gram
        if h is not None:
            before = leaves.matrix(use).astype(jnp.float32)
            lost = dense_weight(plans[path]).astype(jnp.float32) - before
            # A weight that saw no input has lost nothing of its outputs.
            total = max(float(jnp.sum(gram.energy(before, h))), 1e-30)
            errors[path] = float(jnp.sum(gram.energy(lost, h))) / total
    return errors


def _replaced(
    leaves: Leaves,
    plans: Mapping[str, Plan],
    uses: Uses,
    weight: Callable[[Leaves, Plan, Use], Any],
) -> Leaves:
    """The leaves, planned ones as `weight(leaves, plan, use)`; refitted biases."""
    changed = {}
    for path, plan in plans.items():
        use = uses.leaves[path]
        changed[path] = weight(leaves, plan, use)
        if plan.bias is None:
            continue
        if path not in uses.biases:
            raise ValueError(
                f"{path}: the plan has a refitted bias, but no bias parameter is added "
                "to all products of this weight and read by nothing else; solve "
                "without bias refit"
            )
        name, factor = uses.biases[path]
        old = leaves[name]
        shift = plan.bias.reshape(old.shape).astype(jnp.float32) / factor
        changed[name] = (old.astype(jnp.float32) + shift).astype(old.dtype)
    return leaves.replaced(changed)


@meshes.under_automatic_axes
def densify(plans: Mapping[str, Plan], params: Any, uses: Uses) -> Any:
    """The same tree with zeros in place: works in every JAX program.

    Args:
      plans: from `decide`.
      params: the parameter tree.
      uses: from `discover`.

    Returns:
      A tree of the same structure, shapes and dtypes, in original channel order. It
      shares memory: leaves that are not pruned are those of `params`, and one stored
      as [out, in] is that of its plan. A step that is donated the tree takes these
      too; give it `jax.tree.map(jnp.copy, tree)`.
    """
    check_plans(plans, uses)
    return densify_leaves(plans, Leaves.of(params).dense(uses), uses).tree()


def densify_leaves(plans: Mapping[str, Plan], leaves: Leaves, uses: Uses) -> Leaves:
    """`densify` of arguments that are what they should be, under automatic axes."""

    def weight(leaves: Leaves, plan: Plan, use: Use) -> Array:
        return leaves.stored(dense_weight(plan), use)

    return _replaced(leaves, plans, uses, weight)


@meshes.under_automatic_axes
def pack(
    plans: Mapping[str, Plan],
    params: Any,
    uses: Uses,
    values: DTypeLike | None = None,
) -> Any:
    """The same tree with `PackedWeight` leaves, for `sparsify`.

    A plan without regions (unstructured) stays dense; `report` says so.

    Args:
      plans: concrete plans from `decide`.
      params: the parameter tree.
      uses: from `discover`.
      values: "int8", "float8_e4m3fn" or "float8_e5m2" stores the packed values in eight
        bits with one scale per row, which `report` shows in bytes and in error; None
        stores them as they are.

    Returns:
      A tree with the same paths.

    Raises:
      ValueError: plans that do not belong to the leaves, or `values` of another kind.
    """
    check_plans(plans, uses)
    return pack_leaves(plans, Leaves.of(params).dense(uses), uses, values).tree()


def pack_leaves(
    plans: Mapping[str, Plan],
    leaves: Leaves,
    uses: Uses,
    values: DTypeLike | None = None,
) -> Leaves:
    """`pack` of arguments that are what they should be, under automatic axes."""

    def weight(leaves: Leaves, plan: Plan, use: Use) -> Any:
        if plan.support.regions is None:
            return leaves.stored(dense_weight(plan), use)
        if use.path not in leaves.on_grid:
            return kernels.pack(plan, use.layout, values)
        steps = matrix(leaves.stored(plan.weight, use), use.layout)
        return kernels.pack(dataclasses.replace(plan, weight=steps), use.layout)

    return _replaced(leaves, plans, uses, weight)


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
    leaves = Leaves.of(params).dense(uses)
    masks = {
        path: to_leaf(plan.support.keep, uses.leaves[path].layout)
        for path, plan in plans.items()
    }
    return leaves.tree(dict.fromkeys(leaves) | masks)
