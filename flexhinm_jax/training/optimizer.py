"""An optax wrapper under which pruned weights stay exactly zero.

Masking weights or gradients once is not enough: momentum and weight decay move pruned
weights again on the next steps. The wrapper replaces the update of a pruned weight by
`-p`, so that `optax.apply_updates` gives an exact zero in every dtype and with every
inner optimiser, and nobody can forget a step after the update.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from flexhinm_jax import arguments
from flexhinm_jax.paths import leaf_paths
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import Uses


class KeepSparseState(NamedTuple):
    """State of `keep_sparse`.

    Attributes:
      keep: the supports, bool leaves or None. Replacing it (a later pruning stage)
        does not retrace a jitted step as long as the same leaves are pruned.
      inner: state of the inner optimiser.
    """

    keep: Any
    inner: Any


def keep_sparse(
    tx: optax.GradientTransformation, keep: Any
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimiser so that pruned weights stay exactly zero.

    Use it outermost: a transformation applied after it could move the zeros again.
    Gradients of pruned weights are zeroed before the inner optimiser, so they enter
    neither its moments nor a gradient norm. Weights that were not zero become zero with
    the first update.

    Args:
      tx: any optax optimiser.
      keep: tree like the parameters, bool leaves of the leaf's shape, None for leaves
        that are not pruned; from `keep_tree` or `keep_from_zeros`.

    Returns:
      An optimiser whose `update` needs `params`.

    Raises:
      ValueError: at init, when `keep` has another structure or another shape; at
        update, without `params`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = keep_sparse(optax.sgd(0.5), {"w": jnp.array([True, False])})
      >>> params = {"w": jnp.array([1.0, 0.0])}
      >>> grads = {"w": jnp.array([1.0, 1.0])}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"].tolist()
      [0.5, 0.0]
    """
    arguments.optimiser(tx, "tx")
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> KeepSparseState:
        _check(keep, params)
        return KeepSparseState(keep, inner.init(params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, KeepSparseState]:
        if params is None:
            raise ValueError(
                "keep_sparse needs the parameters: tx.update(grads, state, params)"
            )
        _check_like(updates, params, state.keep)
        zeroed = _where(state.keep, updates, jax.tree.map(jnp.zeros_like, updates))
        moved, after = inner.update(zeroed, state.inner, params, **extra)
        back = jax.tree.map(jnp.negative, params)
        return _where(state.keep, moved, back), KeepSparseState(state.keep, after)

    return optax.GradientTransformationExtraArgs(init, update)


def keep_from_zeros(params: Any, uses: Uses) -> Any:
    """The supports of a checkpoint that already has zeros.

    Args:
      params: parameters with zeros in place, such as those that `densify` returns.
      uses: from `discover`: only prunable leaves are looked at, so a bias that happens
        to be zero stays trainable.

    Returns:
      A tree like `params`: bool where a prunable leaf has a zero, None elsewhere.
    """
    leaves, prunable = Leaves.of(params).dense(uses), uses.leaves

    def mask(path: str, leaf: Any) -> Array | None:
        if path not in prunable or not bool(jnp.any(leaf == 0)):
            return None
        return jnp.asarray(leaf != 0)

    return leaves.tree({path: mask(path, leaf) for path, leaf in leaves.items()})


def _is_none(x: Any) -> bool:
    return x is None


def _where(keep: Any, kept: Any, pruned: Any) -> Any:
    """Leaves of `kept` where there is no support, otherwise chosen entry by entry."""

    def choose(k: Array | None, a: Any, b: Any) -> Any:
        return a if k is None else jnp.where(k, a, b)

    return jax.tree.map(choose, keep, kept, pruned, is_leaf=_is_none)


def _check(keep: Any, params: Any) -> None:
    masks, structure = jax.tree.flatten(keep, is_leaf=_is_none)
    leaves, wanted = jax.tree.flatten(params)
    if structure != wanted:
        raise ValueError(
            "keep has another tree structure than the parameters; build it with "
            f"keep_tree or keep_from_zeros for these parameters\nkeep: {structure}\n"
            f"parameters: {wanted}"
        )
    for path, mask, leaf in zip(leaf_paths(params), masks, leaves, strict=True):
        if mask is None:
            continue
        shape, dtype = np.shape(mask), getattr(mask, "dtype", type(mask).__name__)
        if shape != leaf.shape or str(dtype) != "bool":
            raise ValueError(
                f"{path}: keep is {dtype}{list(shape)}, expected "
                f"bool{list(leaf.shape)}, True where a weight stays; build it with "
                "keep_tree or keep_from_zeros"
            )


def _check_like(updates: Any, params: Any, keep: Any) -> None:
    wanted = jax.tree.structure(params)
    for name, found in (
        ("gradients", jax.tree.structure(updates)),
        ("state", jax.tree.structure(keep, is_leaf=_is_none)),
    ):
        if found != wanted:
            raise ValueError(
                f"keep_sparse: the {name} have another tree structure than the "
                f"parameters\n{name}: {found}\nparameters: {wanted}"
            )
