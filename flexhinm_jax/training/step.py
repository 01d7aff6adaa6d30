"""One training step for any method, as a pure jitted function.

There are three: weights under fixed supports, relaxed masks with or without weights,
and the score function. They differ in their objective.

A learned method sees its sampled weights, moves what it learns and the weights; an
ordinary method trains the weights that its plans keep. The step traces once: a stage
changes arrays, never shapes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from flexhinm_jax import arguments, jax_versions, promotion
from flexhinm_jax.methods import Method
from flexhinm_jax.methods.base import check_method
from flexhinm_jax.methods.learned import LearnedMethod, ScoreFunction
from flexhinm_jax.pruning.apply import states_of
from flexhinm_jax.training import model_gates
from flexhinm_jax.training.optimizers import keep_sparse
from flexhinm_jax.training.state import (
    MASK_TX,
    Training,
    check_training,
    frozen,
    learned_trees,
)
from flexhinm_jax.types import State, Uses

#: Weight of the past in the moving average of a score function's baseline.
MEMORY = 0.99

LOSS = "loss_fn(params, *batch)"

UPDATE = (
    "raised by the optimiser: it gets (gradients, state, params, value=loss); one that "
    "needs more, or its own kind of parameters, runs in a loop of your own around "
    "keep_sparse(tx, keep)"
)

Step = Callable[..., tuple[Training, dict[str, Array]]]


def make_step(
    method: Method | None,
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation | None,
    uses: Uses | None,
    *,
    mask_tx: optax.GradientTransformation = MASK_TX,
    axis_name: str | None = None,
    shardings: Any = None,
) -> Step:
    """A training step: `training, metrics = step(training, *batch)`.

    The loss sees weights in which everything pruned is exactly zero: those under
    sampled gates for a learned method, otherwise the parameters. When the loss or a
    gradient is not finite nothing but `step`, `skipped` and the key changes.

    Args:
      method: learned or not; None trains the weights under the supports that the
        training has, see `Training.under`.
      loss_fn: pure function of (params, *batch), returns the loss f[] or (loss, dict
        of further metrics f[]).
      tx: optimiser of the weights, as given to `init_training`.
      uses: from `discover`; None without a method.
      mask_tx: optimiser of what the method learns, as given to `init_training`.
      axis_name: mapped axis over which gradients and metrics are averaged; the step is
        then not jitted, and meant for `jax.pmap` or `jax.shard_map`.
      shardings: a tree like the training that says where each array stays, such as
        `jax.tree.map(lambda x: x.sharding, training)`; None lets the compiler choose.

    Returns:
      A jitted function that gives the memory of its first argument to the result. The
      metrics, f32[] each: "loss" (of `loss_fn`), "penalty/..." and "total" when there
      are penalties, "grad_norm", "finite" (1 or 0), "sparsity" if there are supports,
      and those of `loss_fn` and of the method (`LearnedMethod.metrics`), such as
      "expected_sparsity" and "temperature".

    Raises:
      ValueError: no method or loss function, `tx` is missing; in the first step, a loss
        that is no floating scalar or a training of another method.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flexhinm_jax as fh
      >>> apply_fn = lambda p, x: x @ p["w"]
      >>> loss_fn = lambda p, x, y: jnp.mean((apply_fn(p, x) - y) ** 2)
      >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> x, y = jnp.ones((2, 8)), jnp.zeros((2, 4))
      >>> uses = fh.discover(apply_fn, params, x)
      >>> method, tx = fh.HardConcrete(fh.NM(2, 4)), optax.adam(1e-3)
      >>> states = fh.solve(method, jax.random.key(1), params, uses)
      >>> training = fh.init_training(
      ...     method, params, uses, states, tx, key=jax.random.key(2))
      >>> step = fh.make_step(method, loss_fn, tx, uses)
      >>> for j in range(3):
      ...     training, metrics = step(training.at(j / 3), x, y)
      >>> training = fh.harden(method, training, uses)
      >>> int((training.params["w"] == 0).sum())
      16
    """
    if method is not None:
        check_method(method)
    arguments.function(loss_fn, "loss_fn", LOSS)
    if tx is not None:
        arguments.optimiser(tx, "tx")
    elif not frozen(method):
        name = "the step" if method is None else type(method).__name__
        raise ValueError(
            f"tx=None: {name} trains the weights; give the optax optimiser that "
            "init_training got"
        )
    wrapped = None if tx is None else keep_sparse(tx, None)
    learner = method if isinstance(method, LearnedMethod) else None
    parts = _Step(learner, loss_fn, wrapped, mask_tx, uses, axis_name, frozen(method))
    if axis_name is not None:
        return parts.step
    if shardings is None:
        return jax.jit(parts.step, donate_argnums=0)
    return jax.jit(parts.step, donate_argnums=0, out_shardings=(shardings, None))


#: Total to differentiate, and (loss of `loss_fn`, penalties, further metrics).
Objective = tuple[Array, tuple[Array, Mapping[str, Array], Mapping[str, Array]]]


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """One step, from its parts: which objective, its gradients, what they move.

    Attributes:
      learner: the method, if it learns something; None trains the weights alone.
      loss_fn: of the model.
      tx: optimiser of the weights, wrapped; None if they are frozen.
      mask_tx: optimiser of what the method learns.
      uses: from `discover`.
      axis_name: mapped axis to average over, or None.
      frozen: whether the weights stay.
    """

    learner: Any
    loss_fn: Callable[..., Any]
    tx: Any
    mask_tx: optax.GradientTransformation
    uses: Any
    axis_name: str | None
    frozen: bool

    def weights(self, moving: Any, training: Training, key: Any, batch: Any) -> Any:
        """The objective of weights under fixed supports."""
        del training, key
        loss, extra = loss_of(self.loss_fn, moving["params"], batch)
        return loss, (loss, {}, extra)

    def relaxed(
        self, moving: Any, training: Training, key: Array, batch: Any
    ) -> Objective:
        """The objective of relaxed masks: their sample, differentiated."""
        params = moving.get("params", training.params)
        states = _with_learned(training.states, moving["learned"])
        params, terms = model_gates.sample(self.learner, states, params, self.uses, key)
        loss, extra = loss_of(self.loss_fn, params, batch)
        return sum(terms.values(), loss), (loss, terms, extra)

    def score(
        self, moving: Any, training: Training, key: Array, batch: Any
    ) -> Objective:
        """The objective of a `ScoreFunction`: no gradient goes through the model."""
        learner, uses = self.learner, self.uses
        states = _with_learned(training.states, moving["learned"])
        params = training.params
        sampled, terms = model_gates.sample(learner, training.states, params, uses, key)
        first = model_gates.baseline(learner, training.states, params, uses)
        loss, extra = loss_of(self.loss_fn, sampled, batch)
        gap = loss - loss_of(self.loss_fn, first, batch)[0]
        advantage = lax.stop_gradient(gap - training.gap)
        total = advantage * model_gates.log_prob(learner, states, uses, key)
        return total, (loss, terms, dict(extra) | {"gap": gap})

    @promotion.usual()
    def step(
        self, training: Training, *batch: Any
    ) -> tuple[Training, dict[str, Array]]:
        """The training after a step, and its metrics."""
        check_training(training)
        key, sample_key = jax.random.split(training.key)
        training, moving = self._moving(training)
        scored = isinstance(self.learner, ScoreFunction)
        objective = self.weights
        if self.learner is not None:
            objective = self.score if scored else self.relaxed
        grad_fn, seen = jax.value_and_grad(objective, has_aux=True), moving
        if self.axis_name is not None:
            seen = jax_versions.varying_over(moving, self.axis_name)
        (total, aux), grads = grad_fn(seen, training, sample_key, batch)
        if self.axis_name is not None:
            total, aux, grads = lax.pmean((total, aux, grads), self.axis_name)
        loss, terms, extra = aux
        norm = optax.tree.norm(optax.tree.cast(grads, jnp.float32))
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        metrics = {"loss": loss, **{f"penalty/{k}": v for k, v in terms.items()}}
        if terms:
            metrics["total"] = total
        after = _if(
            finite, training, lambda: self._moved(training, moving, grads, total)
        )
        if self.learner is not None:
            metrics |= model_gates.metrics(self.learner, training.states, self.uses)
        elif jax.tree.leaves(training.opt_state.keep):
            metrics["sparsity"] = _sparsity(training.opt_state.keep)
        if scored:
            gap = MEMORY * training.gap + (1 - MEMORY) * extra["gap"]
            gap = jnp.where(finite, gap, training.gap)
            after = dataclasses.replace(after, gap=gap)
        after = dataclasses.replace(
            after,
            key=key,
            step=training.step + 1,
            skipped=training.skipped + (1 - finite.astype(jnp.int32)),
        )
        metrics |= {"grad_norm": norm, "finite": finite.astype(jnp.float32)}
        return after, metrics | dict(extra)

    def _moving(self, training: Training) -> tuple[Training, dict[str, Any]]:
        """The training with its schedules at their progress, and what will move."""
        moving: dict[str, Any] = {}
        if not self.frozen:
            moving["params"] = training.params
        if self.learner is not None:
            with states_of(self.learner):
                states = model_gates.anneal(
                    self.learner, training.states, self.uses, training.progress
                )
            training = dataclasses.replace(training, states=states)
            moving["learned"] = learned_trees(states)
        return training, moving

    def _moved(
        self, training: Training, moving: Any, grads: Any, total: Array
    ) -> Training:
        """The training with new weights, and with new states inside their range."""
        after = training
        if "params" in moving:
            state = training.opt_state, training.params
            with arguments.noting(UPDATE):
                updates, opt = self.tx.update(grads["params"], *state, value=total)
            params = optax.apply_updates(training.params, updates)
            after = dataclasses.replace(after, params=params, opt_state=opt)
        if "learned" in moving:
            updates, opt = self.mask_tx.update(
                grads["learned"], training.learned_opt, moving["learned"]
            )
            learned: Any = optax.apply_updates(moving["learned"], updates)
            states = _with_learned(training.states, learned)
            states = model_gates.constrain(self.learner, states, self.uses)
            after = dataclasses.replace(after, states=states, learned_opt=opt)
        return after


def loss_of(
    loss_fn: Callable[..., Any], params: Any, batch: Any
) -> tuple[Array, Mapping[str, Array]]:
    """Loss f32[] and further metrics of a loss function.

    Raises:
      ValueError: what it returned is neither f[] nor (f[], metrics).
    """
    with arguments.calling(LOSS, batch):
        out = loss_fn(params, *batch)
    loss: Any
    loss, extra = out if isinstance(out, tuple) and len(out) == 2 else (out, {})
    scalar = isinstance(loss, jax.Array) and loss.shape == ()
    if not (scalar and jnp.issubdtype(loss.dtype, jnp.floating)):
        raise ValueError(
            f"loss_fn returned {arguments.shown(out)}: need one floating number f[] "
            "computed from params, or (f[], {name: metric})"
        )
    if not isinstance(extra, Mapping):
        raise ValueError(
            f"loss_fn returned metrics as {arguments.shown(extra)}: need {{name: f[]}}"
        )
    return loss.astype(jnp.float32), extra


def _with_learned(
    states: Mapping[str, State], learned: Mapping[str, Any]
) -> dict[str, State]:
    return {
        path: dataclasses.replace(state, learned=learned[path])
        for path, state in states.items()
    }


def _if(finite: Array, before: Training, moved: Callable[[], Training]) -> Training:
    """What `moved` returns, or what was before.

    The condition is a boundary: a compiler for CPUs would otherwise compute the
    gradient of a gated weight, which is elementwise, in every array that depends on it.
    """
    old, structure = jax.tree.flatten(before)
    places: list[int] = []

    def new() -> list[Array]:
        leaves = structure.flatten_up_to(moved())
        pairs = zip(leaves, old, strict=True)
        places[:] = [j for j, (a, b) in enumerate(pairs) if a is not b]
        return [leaves[j] for j in places]

    moves = lax.cond(finite, new, lambda: [old[j] for j in places])
    leaves = dict(enumerate(old)) | dict(zip(places, moves, strict=True))
    return structure.unflatten(leaves.values())


def _sparsity(keep: Any) -> Array:
    """Pruned fraction of the leaves that have a support."""
    masks = jax.tree.leaves(keep)
    kept = sum(jnp.sum(k, dtype=jnp.float32) for k in masks)
    return 1 - jnp.asarray(kept / max(sum(k.size for k in masks), 1), jnp.float32)
