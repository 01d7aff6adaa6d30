"""Optimisers of what chooses masks, gates and logits, and of several lanes at once."""

import math
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

    Without it `relative` and clipping would scale the lanes by each other's gradients.
    """

    def init(params: Any) -> Any:
        return jax.vmap(tx.init)(params) if jax.tree.leaves(params) else tx.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        if not jax.tree.leaves(updates):
            return tx.update(updates, state)
        return jax.vmap(lambda u, s: tx.update(u, s))(updates, state)

    return optax.GradientTransformation(init, update)


def warm_cosine(
    progress: float, peak: float, warmup: float, last: float = 0.0
) -> float:
    """A linear warm-up, then a cosine.

    Args:
      progress: spent fraction of a run; from 1 on the rate stays.
      peak: the highest rate.
      warmup: fraction in which it is reached, in [0, 1).
      last: the last rate, as a fraction of the peak.
    """
    if progress < warmup:
        return peak * (progress / warmup)
    part = min(1.0, (progress - warmup) / (1 - warmup))
    return peak * (last + (1 - last) * (0.5 * (1 + math.cos(math.pi * part))))


def at_rate(opt_state: Any, rate: float) -> Any:
    """The state of an optimiser with an injected learning rate, with another one."""
    value = jnp.asarray(rate, jnp.float32)
    return optax.tree_utils.tree_set(opt_state, learning_rate=value)
