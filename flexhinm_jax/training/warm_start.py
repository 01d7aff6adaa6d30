"""Gates that start from the plans of any other method."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax import checks, promotion
from flexhinm_jax.methods.base import check_method
from flexhinm_jax.methods.gated import Gated
from flexhinm_jax.paths import over_stack
from flexhinm_jax.pruning import apply, solve
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import Plan, State, Use, Uses


@promotion.usual()
def adopt(
    method: Gated, plans: Mapping[str, Plan], params: Any, uses: Uses
) -> tuple[dict[str, State], Any]:
    """States and parameters for training gates from given plans.

    Weights that a plan keeps take its values, refitted biases are added, and the other
    weights stay as they are in `params`: a gate that opens later finds a weight there.

    Args:
      method: gates with the pattern of the plans.
      plans: path -> plan, from `decide` or from `prune_sequential(...).plans`.
      params: the dense parameters.
      uses: from `discover`.

    Returns:
      states, params for `init_training`.

    Raises:
      ValueError: a plan with block-diagonal factors, or one that has not n of m in
        every group that the gates of the method are for.
    """
    check_method(method)
    if not method.adopts_plans:
        raise ValueError(
            f"adopt: {type(method).__name__} has no gates; give HardConcrete, "
            "GumbelPatterns or MaskLLM"
        )
    apply.check_plans(plans, uses)
    leaves = Leaves.of(params).dense(uses)
    states, filled = {}, {}
    for path, plan in plans.items():
        use = uses.leaves[path]
        if plan.left is not None or plan.right is not None:
            raise ValueError(
                f"{path}: the plan has block-diagonal factors, which gates do not "
                "train; adopt plans without them"
            )
        own: Any = solve.method_for(method, use)
        _check_groups(path, own, plan, use)
        begin = over_stack(own.begin, len(use.layout.stack))
        states[path] = begin(plan.support)
        w: Array = leaves.matrix(use)
        weight = jnp.where(plan.support.keep, plan.weight.astype(w.dtype), w)
        filled[path] = dataclasses.replace(plan, weight=weight)
    return states, apply.densify(filled, params, uses)


def _check_groups(path: str, method: Gated, plan: Plan, use: Use) -> None:
    """Raises ValueError unless the plan keeps n of m where the method will choose."""
    pattern, regions = method.pattern, plan.support.regions
    if pattern.form is None:
        return
    form = None if regions is None else (regions.n, regions.m)
    if form != pattern.form:
        has = "no groups" if form is None else f"groups of {form[0]}:{form[1]}"
        raise ValueError(
            f"{path}: the plan has {has}, {type(method).__name__} learns {pattern}; "
            "adopt plans of the same n:m"
        )
    if not checks.is_concrete(plan.support.keep):
        return
    for at in np.ndindex(*use.layout.stack_shape):
        one: Any = jax.tree.map(lambda x: x[at], plan.support)  # noqa: B023
        checks.regions(one.regions, one.keep, path)
