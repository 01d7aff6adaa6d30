"""Optimisers of sparse weights.

`keep_sparse` wraps any optimiser so that pruned weights stay exactly zero. Masking
weights or gradients once is not enough: momentum and weight decay move pruned weights
again on the next steps. The wrapper replaces the update of a pruned weight by `-p`, so
that `optax.apply_updates` gives an exact zero in every dtype and with every inner
optimiser, and nobody can forget a step after the update.
"""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from flexhinm_jax import arguments
from flexhinm_jax.paths import leaf_paths
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import Uses


class KeepSparseState(NamedTuple):
    """State of `keep_sparse`.

    Attributes:
      keep: the supports, bool leaves or None; `under` replaces them.
      inner: state of the inner optimiser.
    """

    keep: Any
    inner: Any

    def under(self, keep: Any) -> "KeepSparseState":
        """The state under other supports, as of a later pruning stage.

        A jitted step is not traced again as long as the same leaves are pruned.

        Args:
          keep: tree like the parameters, bool leaves or None; copied.

        Returns:
          The state. Arrays of the inner state that belong to a pruned leaf, such as
          moments and averages of the weights, are zero where it is now pruned.
        """
        return KeepSparseState(owned(keep), _zeros_inside(self.inner, keep))


def keep_sparse(
    tx: optax.GradientTransformation, keep: Any
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimiser so that pruned weights stay exactly zero.

    Use it outermost: a transformation applied after it could move the zeros again.
    The inner optimiser sees neither pruned weights nor their gradients: they enter no
    moment, no gradient norm and no average of the weights (schedule-free, lookahead),
    also when the parameters that it starts from are dense. Weights that were not zero
    become zero with the first update.

    Args:
      tx: any optax optimiser.
      keep: tree like the parameters, bool leaves of the leaf's shape, None for leaves
        that are not pruned; from `keep_tree` or `keep_from_zeros`. Parameters may hold
        None in place of a leaf (`equinox.partition`), `keep` then does too. It stays
        the caller's: the state gets a copy, so a step may be donated its arguments.
        With `optax.LookaheadParams` it holds for the fast and for the slow ones.

    Returns:
      An optimiser whose `update` needs `params`.

    Raises:
      ValueError: at init, when `keep` has another structure or another shape; at
        update, without `params`; in both, inside of `optax.masked` and the like.

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
    known = _extra_arguments(tx)

    def init(params: Any) -> KeepSparseState:
        _check(keep, _fast(params))
        state = tx.init(zeroed(keep, params))
        return KeepSparseState(owned(keep), apart(state, params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, KeepSparseState]:
        if params is None:
            raise ValueError(
                "keep_sparse needs the parameters: tx.update(grads, state, params)"
            )
        _check_like(updates, _fast(params), state.keep)
        every = _for_all(state.keep, params)
        sparse, inside = zeroed(state.keep, params), zeroed(state.keep, updates)
        extra = {name: x for name, x in extra.items() if known is None or name in known}
        moved, after = tx.update(inside, state.inner, sparse, **extra)
        back = jax.tree.map(jnp.negative, params)
        return _where(every, moved, back), KeepSparseState(state.keep, after)

    return optax.GradientTransformationExtraArgs(init, update)


def zeroed(keep: Any, x: Any) -> Any:
    """Parameters, or a tree like them, with exact zeros where they are pruned.

    Args:
      keep: bool leaves or None, see `keep_sparse`.
      x: the tree; `optax.LookaheadParams` are two.
    """
    return _where(_for_all(keep, x), x, jax.tree.map(jnp.zeros_like, x))


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


def warmed_adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam for a few hundred steps with little data in each.

    Args:
      rate: the highest; it rises for a twentieth of the steps and falls to zero along a
        cosine.
      steps: of the run.

    Returns:
      A transformation whose memory of squared gradients (.99) is short, as the run is.
    """
    warm = max(1, round(0.05 * steps))
    first = rate / (warm + 1)
    schedule = optax.warmup_cosine_decay_schedule(first, rate, warm, steps + 1)
    return optax.adam(schedule, b2=0.99)


def owned(x: Any) -> Any:
    """A copy in memory of its own, without weak types: either would cost a retrace."""

    def copy(leaf: Any) -> Array:
        leaf = jnp.array(leaf, copy=True)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        return lax.convert_element_type(leaf, leaf.dtype)

    return jax.tree.map(copy, x)


def apart(x: Any, other: Any = ()) -> Any:
    """A tree that may be donated: no array of another one is in it, and none twice.

    Those that are get copied: an optimiser may start several moments from one zero.
    """
    seen = {id(leaf) for leaf in jax.tree.leaves(other)}

    def own(leaf: Any) -> Any:
        again = isinstance(leaf, jax.Array) and id(leaf) in seen
        seen.add(id(leaf))
        return owned(leaf) if again else leaf

    return jax.tree.map(own, x)


def _is_none(x: Any) -> bool:
    return x is None


def _extra_arguments(tx: Any) -> Any:
    """Names that `tx.update` takes; None for any: some that should take all do not."""
    parameters = inspect.signature(tx.update).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    return None if inspect.Parameter.VAR_KEYWORD in kinds else parameters


def _fast(params: Any) -> Any:
    """The parameters that gradients are taken at."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def _for_all(keep: Any, params: Any) -> Any:
    """The supports of fast and slow parameters, where there are both."""
    both = isinstance(params, optax.LookaheadParams)
    return optax.LookaheadParams(keep, keep) if both else keep


def _zeros_inside(inner: Any, keep: Any) -> Any:
    """The state of an optimiser with zeros where its arrays of a leaf are pruned.

    An array belongs to the leaf that its path ends with, if it has the leaf's shape.
    Of several it is the one with the longest path: "head/w" ends with "w" too.
    """
    leaves = jax.tree_util.tree_leaves_with_path(keep, is_leaf=_is_none)
    masks = dict(leaves)  # those that are not pruned too: they own their arrays

    def zero(path: Any, leaf: Any) -> Any:
        ends = (path[k:] for k in range(len(path) + 1))
        mask = next((masks[end] for end in ends if end in masks), None)
        if mask is None or np.shape(leaf) != mask.shape:
            return leaf
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return jnp.where(mask, leaf, jnp.zeros_like(leaf))

    return jax.tree_util.tree_map_with_path(zero, inner)


def _where(keep: Any, kept: Any, pruned: Any) -> Any:
    """Leaves of `kept` where there is no support, otherwise chosen entry by entry.

    A gradient may be None (a leaf that is frozen): then it is 0.
    """

    def choose(k: Array | None, a: Any, b: Any) -> Any:
        if k is None or b is None:
            return a
        return jnp.where(k, jnp.zeros_like(b) if a is None else a, b)

    return jax.tree.map(choose, keep, kept, pruned, is_leaf=_is_none)


def _check_whole(tree: Any) -> None:
    """Raises ValueError for a tree of which a transformation outside shows a part."""
    hidden = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    if any(map(hidden, jax.tree.leaves(tree, is_leaf=hidden))):
        raise ValueError(
            "keep_sparse got an optax.MaskedNode in place of a leaf: optax.masked or "
            "optax.multi_transform (optax.partition) is around it; use keep_sparse "
            "outermost, such as keep_sparse(optax.masked(tx, mask), keep)"
        )


def _check(keep: Any, params: Any) -> None:
    _check_whole(params)
    masks, structure = jax.tree.flatten(keep, is_leaf=_is_none)
    leaves, wanted = jax.tree.flatten(params, is_leaf=_is_none)
    if structure != wanted:
        raise ValueError(
            "keep has another tree structure than the parameters; build it with "
            f"keep_tree or keep_from_zeros for these parameters\nkeep: {structure}\n"
            f"parameters: {wanted}"
        )
    paths = iter(leaf_paths(params))
    for mask, leaf in zip(masks, leaves, strict=True):
        path = None if leaf is None else next(paths)
        if mask is None:
            continue
        shape, dtype = np.shape(mask), getattr(mask, "dtype", type(mask).__name__)
        if leaf is None or shape != leaf.shape or str(dtype) != "bool":
            expected = "None" if leaf is None else f"bool{list(leaf.shape)}"
            raise ValueError(
                f"{path or 'a None in the parameters'}: keep is {dtype}{list(shape)}, "
                f"expected {expected}, True where a weight stays; build it with "
                "keep_tree or keep_from_zeros"
            )


def _check_like(updates: Any, params: Any, keep: Any) -> None:
    _check_whole((updates, params))
    wanted = jax.tree.structure(params, is_leaf=_is_none)
    for name, tree in (("gradients", updates), ("state", keep)):
        structure = jax.tree.structure(tree, is_leaf=_is_none)
        if structure != wanted:
            raise ValueError(
                f"keep_sparse: the {name} have another tree structure than the "
                f"parameters\n{name}: {structure}\nparameters: {wanted}"
            )
