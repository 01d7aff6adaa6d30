"""Leaves that move together: one order, or one mask, for several weights."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flexhinm_jax.types import State


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
