"""Optimisers of what chooses masks: gates and logits."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

import flexhinm_jax as fh

Name = Literal["adam", "relative", "sgd"]


def check(name: str) -> None:
    """Refuses an unknown optimiser.

    Raises:
      ValueError: it is none of `Name`.
    """
    if name not in get_args(Name):
        raise ValueError(f"optimizer={name!r}; known: {', '.join(get_args(Name))}")


def make(
    name: Name, rate: Any, b1: float = 0.9, b2: float = 0.999
) -> optax.GradientTransformation:
    """An optimiser.

    Args:
      name: "adam"; "relative", under which large gradients move far and small ones
        little, see `fh.relative`; "sgd".
      rate: learning rate.
      b1: decay of the first moment, not for "sgd".
      b2: decay of Adam's second moment.
    """
    scales = {
        "adam": optax.scale_by_adam(b1=b1, b2=b2),
        "relative": fh.relative(b1),
        "sgd": optax.identity(),
    }
    return optax.chain(scales[name], optax.scale_by_learning_rate(rate))


def lanewise(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimiser of its own for every entry of the first axis of all leaves.

    Without it `relative` would scale the lanes by each other's gradients.
    """

    def init(params: Any) -> Any:
        return jax.vmap(tx.init)(params) if jax.tree.leaves(params) else tx.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        if not jax.tree.leaves(updates):
            return tx.update(updates, state)
        return jax.vmap(lambda u, s: tx.update(u, s))(updates, state)

    return optax.GradientTransformation(init, update)


def at_rate(opt_state: Any, rate: float) -> Any:
    """The state of an optimiser with an injected learning rate, with another one."""
    value = jnp.asarray(rate, jnp.float32)
    return optax.tree_utils.tree_set(opt_state, learning_rate=value)
