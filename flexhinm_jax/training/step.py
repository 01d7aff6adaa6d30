"""One training step for any method, as a pure jitted function.

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

from flexhinm_jax import arguments
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

Step = Callable[..., tuple[Training, dict[str, Array]]]


def make_step(
    method: Method,
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation | None,
    uses: Uses,
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
      method: learned or not.
      loss_fn: pure function of (params, *batch), returns the loss f[] or (loss, dict
        of further metrics f[]).
      tx: optimiser of the weights, as given to `init_training`.
      uses: from `discover`.
      mask_tx: optimiser of what the method learns, as given to `init_training`.
      axis_name: mapped axis over which gradients and metrics are averaged; the step is
        then not jitted, and meant for `jax.pmap` or `jax.shard_map`.
      shardings: a tree like the training that says where each array stays, such as
        `jax.tree.map(lambda x: x.sharding, training)`; None lets the compiler choose.

    Returns:
      A jitted function that gives the memory of its first argument to the result. The
      metrics, f32[] each: "loss" (of `loss_fn`), "penalty/..." and "total" when there
      are penalties, "grad_norm", "finite" (1 or 0), "sparsity", and those of `loss_fn`
      and of the method (`LearnedMethod.metrics`), such as "expected_sparsity" and
      "temperature".

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
    check_method(method)
    arguments.function(loss_fn, "loss_fn", LOSS)
    if tx is not None:
        arguments.optimiser(tx, "tx")
    elif not frozen(method):
        raise ValueError(
            f"tx=None: {type(method).__name__} trains the weights; give the optax "
            "optimiser that init_training got"
        )
    learner = method if isinstance(method, LearnedMethod) else None
    wrapped = None if tx is None else keep_sparse(tx, None)

    def objective(moving, training, key, batch):
        params = moving.get("params", training.params)
        terms: dict[str, Array] = {}
        if learner is not None:
            states = _with_learned(training.states, moving["learned"])
            params, terms = model_gates.sample(learner, states, params, uses, key)
        loss, extra = loss_of(loss_fn, params, batch)
        total = sum(terms.values(), loss)
        return total, (loss, terms, extra)

    def score(moving, training, key, batch):
        """The objective of a `ScoreFunction`: no gradient goes through the model."""
        assert learner is not None
        states = _with_learned(training.states, moving["learned"])
        params = training.params
        sampled, terms = model_gates.sample(learner, training.states, params, uses, key)
        first = model_gates.baseline(learner, training.states, params, uses)
        loss, extra = loss_of(loss_fn, sampled, batch)
        gap = loss - loss_of(loss_fn, first, batch)[0]
        advantage = lax.stop_gradient(gap - training.gap)
        total = advantage * model_gates.log_prob(learner, states, uses, key)
        return total, (loss, terms, dict(extra) | {"gap": gap})

    scored = isinstance(method, ScoreFunction)

    def step(training: Training, *batch: Any) -> tuple[Training, dict[str, Array]]:
        check_training(training)
        key, sample_key = jax.random.split(training.key)
        moving = {}
        if not frozen(method):
            moving["params"] = training.params
        if learner is not None:
            with states_of(learner):
                progress = training.progress
                states = model_gates.anneal(learner, training.states, uses, progress)
            training = dataclasses.replace(training, states=states)
            moving["learned"] = learned_trees(states)
        grad_fn = jax.value_and_grad(score if scored else objective, has_aux=True)
        (total, found), grads = grad_fn(moving, training, sample_key, batch)
        if axis_name is not None:
            total, found, grads = lax.pmean((total, found, grads), axis_name)
        loss, terms, extra = found
        norm = _norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        metrics = {"loss": loss, **{f"penalty/{k}": v for k, v in terms.items()}}
        if terms:
            metrics["total"] = total
        after = training
        if "params" in moving:
            assert wrapped is not None
            updates, opt = wrapped.update(
                grads["params"], training.opt_state, training.params, value=total
            )
            params = optax.apply_updates(training.params, updates)
            after = dataclasses.replace(after, params=params, opt_state=opt)
        if learner is not None:
            updates, opt = mask_tx.update(
                grads["learned"], training.learned_opt, moving["learned"]
            )
            learned: Any = optax.apply_updates(moving["learned"], updates)
            states = _with_learned(training.states, learned)
            states = model_gates.constrain(learner, states, uses)
            after = dataclasses.replace(after, states=states, learned_opt=opt)
            metrics |= model_gates.metrics(learner, training.states, uses)
        else:
            metrics["sparsity"] = _sparsity(training.opt_state.keep)
        if scored:
            gap = MEMORY * training.gap + (1 - MEMORY) * extra["gap"]
            after = dataclasses.replace(after, gap=gap)
        after = jax.tree.map(lambda a, b: _select(finite, a, b), after, training)
        after = dataclasses.replace(
            after,
            key=key,
            step=training.step + 1,
            skipped=training.skipped + (1 - finite.astype(jnp.int32)),
        )
        metrics |= {"grad_norm": norm, "finite": finite.astype(jnp.float32)}
        return after, metrics | dict(extra)

    if axis_name is not None:
        return step
    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


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


def _norm(grads: Any) -> Array:
    squares = [
        jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)
    ]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))


def _select(finite: Array, new: Array, old: Array) -> Array:
    return old if new is old else jnp.where(finite, new, old)


def _sparsity(keep: Any) -> Array:
    """Pruned fraction of the leaves that have a support."""
    masks = jax.tree.leaves(keep)
    kept = sum(jnp.sum(k, dtype=jnp.float32) for k in masks)
    return 1 - jnp.asarray(kept / max(sum(k.size for k in masks), 1), jnp.float32)
