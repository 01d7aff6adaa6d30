"""Learns masks of frozen weights until a budget is spent.

Schedules and learning rate follow the spent fraction of the budget, so they always
reach their end, and the hard masks that validate best are kept, the first among them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import flexhinm_jax as fh
from flexhinm_jax.ops import gates
from flexhinm_jax.training.fit import Learn
from flexhinm_jax.training.phases import At
from flexhinm_jax.types import State, Uses
from train.lab import optimizers


@dataclasses.dataclass(frozen=True)
class Learner:
    """A learned method and how it is trained.

    Attributes:
      method: the method; its pattern is that of the row.
      rate: peak of the learning rate: linear warm-up, then cosine to `last` of it.
      optimizer: of what is learned.
      b1: decay of the first moment, not for "sgd".
      b2: decay of Adam's second moment.
      warmup: fraction of the budget.
      last: fraction of the peak at the end.
      looks: how often the hard masks are validated in the whole run.
    """

    method: fh.Method
    rate: float
    optimizer: optimizers.Name = "adam"
    b1: float = 0.9
    b2: float = 0.95
    warmup: float = 0.02
    last: float = 0.1
    looks: int = 20

    def __post_init__(self):
        """Validates the fields."""
        optimizers.check(self.optimizer)
        if not 0 < self.rate < math.inf or self.looks < 1:
            raise ValueError(
                f"rate={self.rate}, looks={self.looks}: need a positive rate and at "
                "least one look"
            )

    def tx(self) -> optax.GradientTransformation:
        """The optimiser; its learning rate is set in its state before every step."""

        @optax.inject_hyperparams
        def made(learning_rate: Any) -> optax.GradientTransformation:
            return optimizers.make(self.optimizer, learning_rate, self.b1, self.b2)

        return made(learning_rate=0.0)

    def rate_at(self, progress: float) -> float:
        """The learning rate when a fraction `progress` of the budget is spent."""
        return optimizers.warm_cosine(progress, self.rate, self.warmup, self.last)


def learning(
    learner: Learner,
    states: Mapping[str, State],
    params: Any,
    uses: Uses,
    task: tuple[Callable[..., Any], Callable[[int], tuple], Callable[[Any], float]],
    duration: fh.Duration,
    **options: Any,
) -> Learn:
    """A run of `fh.learn` with a row per step.

    Args:
      learner: what learns, and how.
      states: from `solve`.
      params: the dense parameters.
      uses: from `discover`.
      task: loss function, batch by step, and (parameters under hard masks) -> number;
        lower is better.
      duration: how long.
      **options: of `fh.learn`, such as `key`.
    """
    method: Any = learner.method
    loss_fn, batch_at, validate = task

    def before(training: fh.Training, at: At) -> fh.Training:
        opt = optimizers.at_rate(training.learned_opt, learner.rate_at(at.progress))
        return dataclasses.replace(training, learned_opt=opt)

    return fh.learn(
        *(method, states, loss_fn, params, uses, batch_at),
        tx=learner.tx(),
        steps=duration,
        evaluate=validate,
        every=1,
        looks=learner.looks,
        before=before,
        **options,
    )


def state_bytes(training: fh.Training) -> dict[str, int]:
    """Bytes of what is learned, of its gradient and of the optimiser's state."""
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    learned = size([s.learned for s in training.states.values()])
    optimizer = size(training.learned_opt)
    return {"learned": learned, "gradient": learned, "optimizer": optimizer}


def started_at(
    method: fh.Method, states: Mapping[str, State], keeps: Mapping[str, Any]
) -> dict[str, State]:
    """The states of a learned n:m method, with given masks as their start.

    Args:
      method: MaskLLM, MaskPro or Patch in natural order; the tiles of Patch stay.
      states: from `solve`.
      keeps: path -> bool[*stack, o, i], n of every m.

    Raises:
      ValueError: a method that has no masks to start from.
    """
    if not isinstance(method, fh.MaskLLM | fh.MaskPro | fh.Patch):
        raise ValueError(
            f"{type(method).__name__} does not start from masks; leave 'START>' out"
        )
    return {path: _started(method, s, keeps[path]) for path, s in states.items()}


def _started(method: Any, state: State, keep: Any) -> State:
    keep, fixed, learned = jnp.asarray(keep), dict(state.fixed), dict(state.learned)
    if isinstance(method, fh.Patch):
        fixed["inner"], n, m = keep, method.tiles.n, method.tiles.m
    else:
        support = fixed["support"]
        fixed["support"] = dataclasses.replace(support, keep=keep)
        n, m = support.regions.n, support.regions.m
    if "logits" in learned:
        grouped = keep.reshape(*keep.shape[:-1], -1, m)
        if isinstance(method, fh.MaskPro):
            logits = method.start * grouped.astype(jnp.float32)
        else:
            logits = gates.initial_logits(
                grouped,
                n=n,
                m=m,
                parameters=getattr(method, "parameters", "patterns"),
                prior=method.start / method.scale[0],
            )
        learned["logits"] = logits.reshape(learned["logits"].shape)
    return dataclasses.replace(state, learned=learned, fixed=fixed)
