"""ProxSparse as an optax wrapper, for training loops of one's own.

ProxSparse (arXiv:2502.00258) pulls the two smallest weights of every group of four
towards zero after each update of the optimiser; the mask it ends with goes onto the
original weights. `methods.ProxSparse` under `fit` does the same to a copy of the
weights and keeps the best mask on the way.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from flexhinm_jax import arguments, checks
from flexhinm_jax.ops import masks, prox
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.tracing.views import leaf as to_leaf
from flexhinm_jax.types import Use, Uses


class ProxSparseState(NamedTuple):
    """State of `prox_sparse`.

    Attributes:
      rms: path -> f32[*stack], of the weights at the start.
      inner: state of the inner optimiser.
    """

    rms: dict[str, Array]
    inner: Any


def prox_sparse(
    tx: optax.GradientTransformation,
    uses: Uses,
    *,
    strength: float = 0.005,
    sweeps: int = 20,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimiser so that weights move towards 2:4.

    The update of a prunable leaf becomes prox(p + u) - p. Use it outermost.

    Args:
      tx: any optax optimiser.
      uses: from `discover`; its leaves are pulled, groups run along their inputs.
      strength: of the pull after every update, relative: times 1 / rms of the weight
        at the start. It is not multiplied by a learning rate.
      sweeps: of the proximal operator.

    Returns:
      An optimiser whose `update` needs `params`. At the end see `original_under_2_4`.

    Raises:
      ValueError: a negative strength; at init, inputs that 4 does not divide; at
        update, without `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flexhinm_jax as fh
      >>> w = jnp.array([[1.0, 0.75, 0.5, 0.25], [1.0, 2.0, 3.0, 4.0]])
      >>> params = {"w": w.T}
      >>> uses = fh.discover(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> tx = prox_sparse(optax.sgd(0.1), uses, strength=10.0)
      >>> still = jax.tree.map(jnp.zeros_like, params)
      >>> updates, _ = tx.update(still, tx.init(params), params)
      >>> moved = optax.apply_updates(params, updates)
      >>> original_under_2_4(moved, params, uses)["w"].T.tolist()
      [[1.0, 0.75, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0]]
    """
    arguments.optimiser(tx, "tx")
    arguments.found(uses)
    arguments.count(sweeps, "sweeps", 1)
    if not isinstance(strength, int | float) or not strength >= 0:
        raise ValueError(f"strength={strength!r}: need a number >= 0")
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> ProxSparseState:
        rms = {}
        for path, w, use in _prunable(params, uses):
            checks.divisible(use.layout.matrix_shape[1], 4, "in", "m", path)
            mean = jnp.mean(jnp.square(w.astype(jnp.float32)), axis=(-2, -1))
            rms[path] = jnp.sqrt(jnp.where(mean > 0, mean, 1))
        return ProxSparseState(rms, inner.init(params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, ProxSparseState]:
        if params is None:
            raise ValueError(
                "prox_sparse needs the parameters: tx.update(grads, state, params)"
            )
        moved, after = inner.update(updates, state.inner, params, **extra)
        new = {}
        pairs = zip(
            _prunable(params, uses),
            _prunable(optax.apply_updates(params, moved), uses),
            strict=True,
        )
        for (path, old, use), (_, reached, _) in pairs:
            lam = (strength / state.rms[path])[..., None, None]
            groups = reached.reshape(*reached.shape[:-1], -1, 4)
            pulled = prox.prox24(groups, lam, sweeps=sweeps).reshape(reached.shape)
            new[path] = to_leaf(pulled - old, use.layout)
        return Leaves.of(moved).tree(new), ProxSparseState(state.rms, after)

    return optax.GradientTransformationExtraArgs(init, update)


def original_under_2_4(moved: Any, original: Any, uses: Uses) -> Any:
    """The original weights under the 2:4 masks that moved weights have found.

    Args:
      moved: the parameters after training with `prox_sparse`.
      original: the parameters before.
      uses: from `discover`.

    Returns:
      A tree like `original`: the two largest of `moved` stay in every group of a
      prunable leaf; other leaves are the original ones.
    """
    leaves, masked = Leaves.of(original), {}
    for path, w, use in _prunable(moved, uses):
        keep = to_leaf(masks.n_of_m(jnp.abs(w), n=2, m=4), use.layout)
        masked[path] = jnp.where(keep, leaves[path], 0)
    return leaves.tree(masked)


def _prunable(params: Any, uses: Uses) -> list[tuple[str, Array, Use]]:
    """(path, matrix [*stack, o, i], use) of every prunable leaf."""
    leaves = Leaves.of(params).dense(uses)
    return [(path, leaves.matrix(use), use) for path, use in uses.leaves.items()]
