"""Optax optimisers for sparse weights and for what chooses their masks.

`keep_sparse` wraps any optimiser so that pruned weights stay exactly zero. Masking
weights or gradients once is not enough: momentum and weight decay move pruned weights
again on the next steps. The wrapper replaces the update of a pruned weight by `-p`, so
that `optax.apply_updates` gives an exact zero in every dtype and with every inner
optimiser, and nobody can forget a step after the update.

`relative` and `tied` are for gates, logits and orders. `prox_sparse` is ProxSparse
(arXiv:2502.00258) for training loops of one's own: it pulls the two smallest weights of
every group of four towards zero after each update, and the mask it ends with goes onto
the original weights. `methods.ProxSparse` under `fit` does the same to a copy of the
weights and keeps the best mask on the way. `scale_by_adam_s` is the optimiser of CAST
(arXiv:2509.25996): an L1 decay inside Adam for the weights that are to be pruned.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from flexhinm_jax import arguments, checks
from flexhinm_jax.ops import masks, prox
from flexhinm_jax.paths import leaf_paths
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.tracing.views import leaf as to_leaf
from flexhinm_jax.types import State, Use, Uses


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
        _check(keep, _fast(params))
        state = inner.init(_zeroed(_for_all(keep, params), params))
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
        sparse, zeroed = _zeroed(every, params), _zeroed(state.keep, updates)
        moved, after = inner.update(zeroed, state.inner, sparse, **extra)
        back = jax.tree.map(jnp.negative, params)
        return _where(every, moved, back), KeepSparseState(state.keep, after)

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


def relative(decay: float = 0.95) -> optax.GradientTransformation:
    """The mean of the gradients, scaled to a root mean square of 1 in every array.

    Adam moves every logit at the same pace, also those whose gradient is noise, and
    they leave a good start together. Here a logit is as fast as its gradient is large
    beside the others of its array, so the few groups that matter change first. One
    number per logit instead of two.

    Args:
      decay: of the mean, in [0, 1).

    Returns:
      A transformation to chain with a learning rate.

    Raises:
      ValueError: a decay outside [0, 1).

    Example:
      >>> tx = optax.chain(relative(0.95), optax.sgd(2e-4))
      >>> params = {"logits": jnp.zeros(4)}
      >>> grads = {"logits": jnp.asarray([3.0, 0.0, 0.0, 0.0])}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> [round(float(u) * 1e4, 3) for u in updates["logits"]]
      [-4.0, -0.0, -0.0, -0.0]
    """
    if not isinstance(decay, int | float) or not 0 <= decay < 1:
        raise ValueError(f"decay={decay!r}: need a number in [0, 1)")

    def scale(updates: Any, _: Any) -> Any:
        def one(x: Any) -> Any:
            mean = jnp.mean(jnp.square(x), dtype=jnp.float32)
            return x * lax.rsqrt(jnp.maximum(mean, jnp.finfo(jnp.float32).tiny))

        return jax.tree.map(one, updates)

    return optax.chain(optax.ema(decay), optax.stateless(scale))


def tied(
    tx: optax.GradientTransformation, ties: Mapping[str, str]
) -> optax.GradientTransformation:
    """An optimiser of a dict path -> learned in which some leaves move together.

    The gradients of leaves that are tied are summed and all of them get the same
    update, so what began equal stays equal: one order for query, key and value.

    Args:
      tx: the optimiser.
      ties: path -> path of the leaf that leads it.

    Returns:
      The optimiser; its state belongs to the leaves that lead.
    """

    def leaders(grads: Any) -> Any:
        summed: dict[str, Any] = {}
        for path, grad in grads.items():
            lead = ties.get(path, path)
            known = summed.get(lead)
            summed[lead] = grad if known is None else jax.tree.map(jnp.add, known, grad)
        return summed

    def init(params: Any) -> Any:
        return tx.init({p: x for p, x in params.items() if ties.get(p, p) == p})

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        heads = params and {p: x for p, x in params.items() if ties.get(p, p) == p}
        moved: Any
        moved, state = tx.update(leaders(updates), state, heads)
        return {p: moved[ties.get(p, p)] for p in updates}, state

    return optax.GradientTransformation(init, update)


def check_ties(states: Mapping[str, State], ties: Mapping[str, str]) -> None:
    """Raises ValueError for a leader that is unknown, follows, or learns other shapes.

    Args:
      states: path -> state.
      ties: path -> path of the leaf that leads it.
    """
    for path, lead in ties.items():
        if path not in states or lead not in states or ties.get(lead, lead) != lead:
            raise ValueError(
                f"fit: ties[{path!r}]={lead!r}: both must be solved leaves, and the "
                "leader must not follow another"
            )
        shapes = [
            [x.shape for x in jax.tree.leaves(states[p].learned)] for p in (path, lead)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"fit: ties[{path!r}]={lead!r}: they learn arrays of shapes "
                f"{shapes[0]} and {shapes[1]}"
            )


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


def owned(x: Any) -> Any:
    """A copy in memory of its own, without weak types: either would cost a retrace."""

    def copy(leaf: Any) -> Array:
        leaf = jnp.array(leaf, copy=True)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        return lax.convert_element_type(leaf, leaf.dtype)

    return jax.tree.map(copy, x)


def apart(x: Any, other: Any) -> Any:
    """A tree that shares no array with another one: those that it does are copied."""
    shared = {id(leaf) for leaf in jax.tree.leaves(other)}
    return jax.tree.map(lambda leaf: owned(leaf) if id(leaf) in shared else leaf, x)


def _is_none(x: Any) -> bool:
    return x is None


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
    """
    masks = {path: mask for path, mask in jax.tree_util.tree_leaves_with_path(keep)}

    def zero(path: Any, leaf: Any) -> Any:
        ends = (path[k:] for k in range(len(path) + 1))
        mask = next((masks[end] for end in ends if end in masks), None)
        if mask is None or np.shape(leaf) != mask.shape:
            return leaf
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return jnp.where(mask, leaf, jnp.zeros_like(leaf))

    return jax.tree_util.tree_map_with_path(zero, inner)


def _zeroed(keep: Any, x: Any) -> Any:
    """A tree like the parameters with zeros where they are pruned."""
    return _where(keep, x, jax.tree.map(jnp.zeros_like, x))


def _where(keep: Any, kept: Any, pruned: Any) -> Any:
    """Leaves of `kept` where there is no support, otherwise chosen entry by entry.

    A gradient may be None (a leaf that is frozen): then it is 0.
    """

    def choose(k: Array | None, a: Any, b: Any) -> Any:
        if k is None or b is None:
            return a
        return jnp.where(k, jnp.zeros_like(b) if a is None else a, b)

    return jax.tree.map(choose, keep, kept, pruned, is_leaf=_is_none)


def _check(keep: Any, params: Any) -> None:
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
    wanted = jax.tree.structure(params, is_leaf=_is_none)
    for name, tree in (("gradients", updates), ("state", keep)):
        structure = jax.tree.structure(tree, is_leaf=_is_none)
        if structure != wanted:
            raise ValueError(
                f"keep_sparse: the {name} have another tree structure than the "
                f"parameters\n{name}: {structure}\nparameters: {wanted}"
            )


def _prunable(params: Any, uses: Uses) -> list[tuple[str, Array, Use]]:
    """(path, matrix [*stack, o, i], use) of every prunable leaf."""
    leaves = Leaves.of(params).dense(uses)
    return [(path, leaves.matrix(use), use) for path, use in uses.leaves.items()]
