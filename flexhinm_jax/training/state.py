"""The state of a training and what happens between two steps.

`init_training` begins, `harden` ends a stage with exact zeros, `next_stage` solves
again for a higher sparsity. `step` does what lies between; `stages` drives it all.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import PartitionSpec as P

from flexhinm_jax import arguments, promotion
from flexhinm_jax.methods import Method
from flexhinm_jax.methods.base import check_method
from flexhinm_jax.methods.learned import LearnedMethod
from flexhinm_jax.pruning import apply, solve
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.training import model_gates, sharding
from flexhinm_jax.training.optimizers import apart, keep_sparse, owned, zeroed
from flexhinm_jax.types import Regions, State, Stats, Uses, brief

#: Optimiser of gates and logits unless another is given: ten times a usual rate of the
#: weights, because they start far from a decision.
MASK_TX = optax.adam(1e-2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Training:
    """Everything that a training step reads and writes.

    Attributes:
      params: the parameter tree; under a learned method the weights before gates.
      states: path -> State, from `solve`.
      opt_state: state of the optimiser of the weights, a `KeepSparseState`; () when
        the method keeps the weights as they are.
      learned_opt: state of the optimiser of `State.learned`; () for other methods.
      key: PRNG key, split in every step.
      step: i32[], steps done, skipped ones included.
      skipped: i32[], steps without an update because loss or gradient was not finite.
      progress: f32[] in [0, 1], the finished fraction of the stage: set it between
        steps to anneal temperatures and ramps.
      gap: f32[], moving average of how much higher the loss of a sample is than that
        of the first choice; only a `ScoreFunction` has one.
    """

    params: Any
    states: dict[str, State]
    opt_state: Any
    learned_opt: Any
    key: Array
    step: Array
    skipped: Array
    progress: Array
    gap: Array

    __repr__ = brief

    def at(self, progress: float) -> "Training":
        """The same training at another fraction of its stage."""
        if isinstance(progress, jax.Array):
            now = jnp.array(progress, jnp.float32)  # a copy: steps use theirs up
        else:  # put explicitly, which `jax.transfer_guard("disallow")` lets through
            now = jax.device_put(np.float32(progress))
        mesh = sharding.mesh_of(self.progress)
        if mesh is not None:
            now = sharding.put(now, P(), mesh)
        return dataclasses.replace(self, progress=now)

    @classmethod
    def under(
        cls, keep: Any, params: Any, tx: optax.GradientTransformation, *, key: Array
    ) -> "Training":
        """The training of weights under fixed supports, for `make_step(None, ...)`.

        Args:
          keep: tree like the parameters, bool leaves or None, see `keep_sparse`; all
            None trains a dense model.
          params: the parameters; copied, with zeros where `keep` is False.
          tx: optimiser of the weights, not yet wrapped.
          key: PRNG key.
        """
        _check_trainable(params)
        opt = keep_sparse(tx, keep).init(params)
        sparse = _as_params(zeroed(keep, params), params)
        return _begun(owned(sparse), {}, opt, (), key, sharding.mesh_of(params))

    def without_frozen(self) -> "Training":
        """What a checkpoint needs: not the parameters that no step moves."""
        return self if self.opt_state != () else dataclasses.replace(self, params=())

    def with_frozen(self, start: "Training") -> "Training":
        """The inverse of `without_frozen`, with the parameters of the start."""
        moves = self.opt_state != ()
        return self if moves else dataclasses.replace(self, params=start.params)


@promotion.usual()
def init_training(
    method: Method,
    params: Any,
    uses: Uses,
    states: Mapping[str, State],
    tx: optax.GradientTransformation | None,
    *,
    key: Array,
    mask_tx: optax.GradientTransformation = MASK_TX,
) -> Training:
    """The training before its first step.

    Args:
      method: the method that solved.
      params: the parameter tree; copied, because steps reuse its memory.
      uses: from `discover`.
      states: from `solve`.
      tx: optimiser of the weights, not yet wrapped; None if the method freezes them.
      key: PRNG key, consumed.
      mask_tx: optimiser of what the method learns.

    Returns:
      The training. For a method without anything to learn, pruned weights are zero.

    Raises:
      ValueError: `tx` is missing, states do not belong to `uses`, or a leaf that a
        step would train has no gradient (integers, keys).
    """
    mesh = sharding.mesh_of(params)
    check_method(method)
    arguments.key(key)
    leaves = Leaves.of(params).dense(uses)
    arguments.by_path(states, State, "states", "solve()", uses.leaves)
    if tx is not None:
        arguments.optimiser(tx, "tx")
    if isinstance(method, LearnedMethod):
        arguments.optimiser(mask_tx, "mask_tx")
    if tx is None and not frozen(method):
        raise ValueError(
            f"tx=None: {type(method).__name__} trains the weights; give an optax "
            "optimiser"
        )
    if not frozen(method):
        _check_trainable(params)
    like, opt, learned_opt = params, (), ()
    if isinstance(method, LearnedMethod):
        keep = _keep_all(leaves, uses)
    else:
        params, keep = _pruned(method, states, params, uses)
    params, keep = owned(_as_params(params, like)), owned(_as_params(keep, like))
    states = {path: owned(state) for path, state in states.items()}
    states = _as_weights(states, like, uses)
    if isinstance(method, LearnedMethod):
        learned_opt = mask_tx.init(learned_trees(states))
    if tx is not None and not frozen(method):
        opt = keep_sparse(tx, keep).init(params)
    return _begun(params, states, opt, learned_opt, key, mesh)


def _begun(
    params: Any,
    states: dict[str, State],
    opt_state: Any,
    learned_opt: Any,
    key: Array,
    mesh: Any,
) -> Training:
    """A training at its step 0."""
    training = Training(
        params=params,
        states=states,
        opt_state=opt_state,
        learned_opt=learned_opt,
        key=owned(key),
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        progress=jnp.zeros((), jnp.float32),
        gap=jnp.zeros((), jnp.float32),
    )
    return _on_mesh(apart(training), mesh)


@promotion.usual()
def harden(method: Method, training: Training, uses: Uses) -> Training:
    """Makes every choice: exact zeros in the parameters, and they stay zero.

    Args:
      method: the method.
      training: the training; not donated.
      uses: from `discover`.

    Returns:
      The training with hard states. For a method that learns nothing it is the given
      one, otherwise parameters and states are in memory of their own. What hardening
      does not change, the states of the optimisers, belongs to both: go on with one
      of them.
    """
    check_method(method)
    check_training(training)
    if not isinstance(method, LearnedMethod):
        return training
    like = training.params
    whole, before = sharding.gather(like), sharding.gather(training.states)
    with apply.states_of(method):
        states = model_gates.harden(method, before, whole, uses)
    params, keep = _pruned(method, states, whole, uses)
    opt = training.opt_state
    if not frozen(method):
        opt = opt.under(_as_params(keep, like))
    return dataclasses.replace(
        training,
        states=apart(_as_weights(states, like, uses), training.states),
        params=apart(_as_params(params, like), like),
        opt_state=opt,
    )


@promotion.usual()
def next_stage(
    method: Method,
    training: Training,
    uses: Uses,
    *,
    key: Array,
    stats: Mapping[str, Stats] | None = None,
    sparsity: float | Mapping[str, float] | None = None,
    mask_tx: optax.GradientTransformation = MASK_TX,
) -> Training:
    """Solves again for a higher sparsity; the kept set only shrinks.

    Args:
      method: the method.
      training: hardened by `harden`; gates that are open harden now.
      uses: from `discover`.
      key: PRNG key, consumed.
      stats: statistics of the inputs, taken with the parameters as they are now.
      sparsity: the new target.
      mask_tx: optimiser of what the method learns; begins anew.

    Returns:
      The training at the start of the stage. The optimiser of the weights goes on. It
      shares memory with the given one: go on with this one.
    """
    check_training(training)
    like = training.params
    whole, before = sharding.gather(like), sharding.gather(training.states)
    solved = solve.solve(method, key, whole, uses, stats, sparsity, before)
    states = {path: owned(state) for path, state in solved.items()}
    states = _as_weights(states, like, uses)
    training = dataclasses.replace(training, states=states).at(0.0)
    if isinstance(method, LearnedMethod):
        learned_opt = apart(mask_tx.init(learned_trees(states)), states)
        learned_opt = _on_mesh(learned_opt, sharding.mesh_of(like))
        return dataclasses.replace(training, learned_opt=learned_opt)
    params, keep = _pruned(method, solved, whole, uses)
    return dataclasses.replace(
        training,
        params=_as_params(params, like),
        opt_state=training.opt_state.under(_as_params(keep, like)),
    )


def check_training(training: Any) -> None:
    """Raises ValueError unless the argument is a training."""
    if not isinstance(training, Training):
        raise ValueError(
            f"training is {arguments.shown(training)}: need what init_training(...) "
            "or the step returned"
        )


def _check_trainable(params: Any) -> None:
    """Raises ValueError for a leaf that has no gradient."""
    for path, leaf in Leaves.of(params).items():
        if not jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact):
            raise ValueError(
                f"{path}: {arguments.shown(leaf)} has no gradient, and a step trains "
                "every leaf of params; keep such leaves out of params and close "
                "loss_fn over them, as over what nnx.split(model, nnx.Param, ...) "
                "returns beside the parameters"
            )


def frozen(method: Method | None) -> bool:
    """Whether the weights stay as they are."""
    return isinstance(method, LearnedMethod) and method.frozen_weights


def learned_trees(states: Mapping[str, State]) -> dict[str, Any]:
    """Path -> `State.learned`: what the second optimiser moves."""
    return {path: state.learned for path, state in states.items()}


def _keep_all(leaves: Leaves, uses: Uses) -> Any:
    """Supports that keep everything, on the leaves that will be pruned."""
    masks = {
        path: jnp.ones(leaf.shape, bool) if path in uses.leaves else None
        for path, leaf in leaves.items()
    }
    return leaves.tree(masks)


def _pruned(
    method: Method, states: Mapping[str, State], params: Any, uses: Uses
) -> tuple[Any, Any]:
    """Parameters with exact zeros and their supports, under hard plans."""
    leaves = Leaves.of(sharding.gather(params))
    plans = apply.decide(method, states, leaves, uses)
    for path, plan in plans.items():
        if plan.left is not None or plan.right is not None:
            raise ValueError(
                f"{path}: {type(method).__name__} multiplies the weight by block-"
                "diagonal factors; its product has no zeros to keep while training"
            )
    keep = apply.keep_tree(plans, leaves, uses)
    return apply.densify(plans, leaves, uses), keep


def _as_params(x: Any, like: Any) -> Any:
    """A tree like the parameters, each leaf where its parameter lives."""
    mesh = sharding.mesh_of(like)
    if mesh is None:
        return x

    def move(leaf: Any, where: Any) -> Any:
        if leaf is None:
            return None
        spec = where.sharding.spec if sharding.mesh_of(where) is not None else P()
        return sharding.put(leaf, spec, mesh)

    return jax.tree.map(move, x, like, is_leaf=lambda leaf: leaf is None)


def _as_weights(states: dict[str, State], params: Any, uses: Uses) -> dict[str, State]:
    """States whose matrices and learned arrays live where their weights do.

    The rest lives everywhere.
    """
    mesh = sharding.mesh_of(params)
    if mesh is None:
        return states
    leaves = Leaves.of(params)
    placed = {}
    for path, state in states.items():
        use = uses.leaves[path]
        shape = (*use.layout.stack_shape, *use.layout.matrix_shape)
        spec = sharding.matrix_spec(use, leaves[path].sharding)
        specs = jax.tree.map(lambda x: spec if x.shape == shape else P(), state)  # noqa: B023
        regions = _regions(state)
        tiles = None if regions is None else regions.in_order.shape[-2]

        def where(x: Array, tiles=tiles, use=use, spec=spec) -> P:
            own = sharding.learned_spec(x.shape, tiles, use, spec)
            return sharding.divided(own, x.shape, mesh)

        learned = jax.tree.map(where, state.learned)
        specs = dataclasses.replace(specs, learned=learned)
        placed[path] = sharding.put(state, specs, mesh)
    return placed


def _regions(state: State) -> Regions | None:
    """The regions of a state, if it has any."""
    is_regions = lambda x: isinstance(x, Regions)  # noqa: E731
    parts = jax.tree.leaves(state.fixed, is_leaf=is_regions)
    return next((x for x in parts if is_regions(x)), None)


def _on_mesh(x: Any, mesh: Any) -> Any:
    """A tree whose leaves outside the mesh are copied to all of its devices."""
    if mesh is None:
        return x

    def move(leaf: Any) -> Any:
        return leaf if sharding.mesh_of(leaf) else sharding.put(leaf, P(), mesh)

    return jax.tree.map(move, x)
