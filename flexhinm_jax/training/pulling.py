"""Optimisers that pull the weights that are to be pruned towards zero, bit by bit.

`prox_sparse` is ProxSparse (arXiv:2502.00258) for training loops of one's own: it pulls
the two smallest weights of every group of four towards zero after each update, and the
mask it ends with goes onto the original weights. `methods.ProxSparse` under `fit` does
the same to a copy of the weights and keeps the best mask on the way. `scale_by_adam_s`
is the optimiser of CAST (arXiv:2509.25996): an L1 decay inside Adam.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

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


class AdamSState(NamedTuple):
    """State of `scale_by_adam_s`.

    Attributes:
      count: i32[], updates done.
      mu: mean of the gradients, without the decay.
      nu: mean of the squares of what moved the weights, decay included.
      keep: path -> bool[*stack, o, i], the masks now.
    """

    count: Array
    mu: Any
    nu: Any
    keep: dict[str, Array]


def scale_by_adam_s(
    uses: Uses,
    *,
    steps: int,
    decay: float,
    nm: tuple[int, int] = (2, 4),
    refresh: int = 10,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Adam whose gradient turns into an L1 decay where a weight is to be pruned.

    AdamS of CAST (arXiv:2509.25996): weights stay dense while they are trained, those
    outside the present mask are driven to zero more and more firmly, and the mask of
    the largest weights follows. With a = step / steps, for these the gradient and its
    mean g become (1 - a) g + a decay sign(w) before one is divided by the root mean
    square of the other, so that the kept ones see Adam. CAST as described squares the
    mean, which would change the steps of the kept ones too.

    Near the end a weight outside the mask moves by about the learning rate per step
    whatever `decay` is, so the sum of a * rate over the steps has to exceed the weights
    that are to vanish; let the rate end at 0.

    Chain it with `optax.scale_by_learning_rate`; at the end prune by magnitude.

    Args:
      uses: from `discover`; its leaves decay, groups run along their inputs.
      steps: updates until the gradient of a masked weight is the decay alone.
      decay: strength of the decay, in units of the gradient; > 0. Parameters in
        float32: a small one is below the resolution of bfloat16.
      nm: (n, m), the n largest of every m stay.
      refresh: updates between two choices of the masks.
      b1: of the mean of gradients.
      b2: of the mean of squares.
      eps: added to the root.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      ValueError: numbers out of range; at init, inputs that m does not divide; at
        update, without `params`.
    """
    n, m = nm
    arguments.found(uses)
    for name, number in (("steps", steps), ("refresh", refresh)):
        arguments.count(number, name, 1)
    if not 0 < n < m or not decay > 0 or not 0 <= min(b1, b2) <= max(b1, b2) < 1:
        raise ValueError(
            f"nm={nm}, decay={decay}, b1={b1}, b2={b2}: need 0 < n < m, a decay > 0 "
            "and means in [0, 1)"
        )

    def chosen(params: Any) -> dict[str, Array]:
        return {
            path: masks.n_of_m(jnp.abs(w), n=n, m=m)
            for path, w, _ in _prunable(params, uses)
        }

    def init(params: Any) -> AdamSState:
        for path, _, use in _prunable(params, uses):
            checks.divisible(use.layout.matrix_shape[1], m, "in", "m", path)
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return AdamSState(jnp.zeros((), jnp.int32), mu, nu, chosen(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdamSState]:
        if params is None:
            raise ValueError(
                "scale_by_adam_s needs the parameters: tx.update(grads, state, params)"
            )
        keep = lax.cond(
            state.count % refresh == 0, lambda: chosen(params), lambda: state.keep
        )
        a = jnp.minimum(state.count / steps, 1.0)

        def mixed(slopes: Any) -> Any:
            """Gradients, or their means, with the decay where it acts."""
            leaves, pulled = Leaves.of(slopes), {}
            for path, w, use in _prunable(params, uses):
                slope = leaves.matrix(use)
                pull = ((1 - a) * slope + a * decay * jnp.sign(w)).astype(slope.dtype)
                pulled[path] = to_leaf(jnp.where(keep[path], slope, pull), use.layout)
            return leaves.tree(pulled)

        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(mixed(updates), state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        mean = optax.tree.bias_correction(mixed(mu), b1, count)
        square = optax.tree.bias_correction(nu, b2, count)
        scaled = jax.tree.map(lambda x, v: x / (jnp.sqrt(v) + eps), mean, square)
        return scaled, AdamSState(jnp.asarray(count, jnp.int32), mu, nu, keep)

    return optax.GradientTransformation(init, update)


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
