"""Learns orders or masks of frozen weights with a loss of the whole model.

`fit` runs `make_step` for a method with `frozen_weights` and keeps the states whose
hard plans evaluate best, the first ones among them: learning never ends worse than it
began. PermLLM (arXiv:2510.10136) and the cost predictor (arXiv:2601.22980) train so.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from flexhinm_jax.methods.learned import LearnedMethod
from flexhinm_jax.training import relax
from flexhinm_jax.training.state import init_training
from flexhinm_jax.training.step import make_step
from flexhinm_jax.transforms import tree
from flexhinm_jax.types import State, Uses

History = list[dict[str, float]]


def fit(
    method: LearnedMethod,
    states: Mapping[str, State],
    loss_fn: Callable[..., Any],
    params: Any,
    uses: Uses,
    batches: Sequence[tuple[Any, ...]],
    *,
    key: Array,
    tx: optax.GradientTransformation,
    steps: int,
    evaluate: Callable[[Any], Any] | None = None,
    every: int = 10,
    ties: Mapping[str, str] | None = None,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> tuple[dict[str, State], History]:
    """Moves what the states have learned by the gradient of a loss of the whole model.

    Args:
      method: the method that solved the states; it leaves the weights as they are.
      states: from `solve`.
      loss_fn: called as loss_fn(params, *batch), lower is better, f32[] or (f32[],
        metrics); gets the parameters with the relaxed weights in place.
      params: the dense parameters.
      uses: from `discover`.
      batches: tuples of the other arguments, taken in turn. Batches of equal shapes
        share one compiled step.
      key: PRNG key, consumed.
      tx: optax optimiser of what is learned.
      steps: updates.
      evaluate: called with parameters under hard plans, returns a number, lower is
        better; None for the mean of `loss_fn` over all batches.
      every: updates between two evaluations; start and end are evaluated as well.
      ties: path -> path of the leaf whose updates it shares; see `tied`.
      progress: called with every entry of the history.

    Returns:
      The hardened states with the best evaluation, and the history: "step", "loss" (of
      the relaxation, mean since the last entry; NaN in the first) and "value" (of the
      evaluation).

    Raises:
      ValueError: a method whose weights move, no batch, a tie to an unknown leaf.
    """
    if not isinstance(method, LearnedMethod) or not method.frozen_weights:
        raise ValueError(
            f"fit: {type(method).__name__} does not learn with frozen weights; use "
            "make_step, or apply its plans"
        )
    if not batches or steps < 0 or every < 1:
        raise ValueError(
            f"fit: {len(batches)} batches, steps={steps}, every={every}: need at least "
            "1, 0 and 1"
        )
    if ties:
        _check_ties(states, ties)
        tx = tied(tx, ties)
    step = make_step(method, loss_fn, None, uses, mask_tx=tx)
    now = init_training(method, params, uses, states, None, key=key, mask_tx=tx)

    @jax.jit
    def hard(states, params):
        settled = relax.harden(method, states, params, uses)
        plans = tree.decide(method, settled, params, uses)
        return tree.densify(plans, params, uses)

    @jax.jit
    def value_of(params, *batch):
        out = loss_fn(params, *batch)
        return out[0] if isinstance(out, tuple) else out

    def measure(states):
        sparse = hard(states, params)
        if evaluate is not None:
            return float(evaluate(sparse))
        return float(np.mean([value_of(sparse, *batch) for batch in batches]))

    def hardened(states):
        # copied, because a step gives the memory of its argument away
        found = relax.harden(method, states, params, uses)
        return jax.tree.map(lambda x: jnp.array(x, copy=True), found)

    best = hardened(now.states)
    lowest = measure(best)
    history = [{"step": 0, "loss": float("nan"), "value": lowest}]
    losses: list[Array] = []
    for k in range(steps):
        batch = batches[k % len(batches)]
        now, metrics = step(now.at(k / max(steps - 1, 1)), *batch)
        losses.append(metrics["loss"])
        if (k + 1) % every and k + 1 < steps:
            continue
        found = measure(now.states)
        entry = {"step": k + 1, "loss": float(np.mean(losses)), "value": found}
        history.append(entry)
        losses = []
        if progress is not None:
            progress(entry)
        if found < lowest:
            lowest, best = found, hardened(now.states)
    return best, history


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


def _check_ties(states: Mapping[str, State], ties: Mapping[str, str]) -> None:
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
