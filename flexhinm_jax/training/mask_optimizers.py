"""Optimisers of what chooses masks: gates, logits and orders."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from flexhinm_jax.types import State


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
