"""Optimisers of what chooses masks: gates and logits."""

from typing import Literal, get_args

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


def scale(
    name: Name, b1: float = 0.9, b2: float = 0.999
) -> optax.GradientTransformation:
    """The optimiser without its learning rate.

    Args:
      name: "adam"; "relative", under which large gradients move far and small ones
        little, see `fh.relative`; "sgd".
      b1: decay of the first moment, not for "sgd".
      b2: decay of Adam's second moment.
    """
    if name == "adam":
        return optax.scale_by_adam(b1=b1, b2=b2)
    return fh.relative(b1) if name == "relative" else optax.identity()
