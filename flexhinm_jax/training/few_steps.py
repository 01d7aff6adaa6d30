"""Masks in few steps: the settings, rates, optimisers and starts that we measured.

The published schedules are for thousands of steps. With few steps from good masks the
noise of sampling costs more than it finds, so what samples gates is told to decide
without noise, and begins from the masks of a method that needs no steps.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax
from jax import Array

from flexhinm_jax import methods
from flexhinm_jax.methods import LearnedMethod, Method, RefineMask
from flexhinm_jax.patterns import Pattern
from flexhinm_jax.pruning import apply, solve
from flexhinm_jax.training.mask_optimizers import relative
from flexhinm_jax.training.warm_start import adopt
from flexhinm_jax.types import State, Stats, Uses

#: Learning rates, of the optimiser that `optimiser` gives the method.
RATES = {
    "hard_concrete": 1e-2,
    "hyperprune": 2e-2,
    "maskllm": 2e-4,
    "maskpro": 50.0,
    "patch": 2e-4,
    "permllm": 5e-2,
    "proxsparse": 1e-4,
}

DECIDED: dict[str, Any] = {
    "relaxation": "decided",
    "scale": (100.0, 100.0),
    "temperature": (1.0, 1.0),
    "reward": 0.0,
}
NOISE_RATE = 1e-2
"""Of what is learned under noise, by Adam."""

SETTINGS: dict[str, dict[str, Any]] = {
    "hard_concrete": {
        "relaxation": "decided",
        "start": 0.5,
        "temperature": (2 / 3, 2 / 3),
        "sparsity_weight": 0.0,
    },
    "maskllm": DECIDED,
    "patch": DECIDED,
    "permllm": {"steps": 0},  # the loss is that of the model
}


def method(name: str, pattern: Pattern, noise: bool = False) -> Method:
    """The method of that name, set for few steps.

    Args:
      name: a key of `RATES`.
      pattern: the supports to choose from.
      noise: gates are sampled, with the published schedules; for methods that have
        such noise.

    Raises:
      ValueError: the method does not work with the pattern, or has no noise.
    """
    parsed: Any = methods.parse(name, pattern)
    settings = SETTINGS.get(name, {})
    if noise and "relaxation" not in settings:
        noisy = [known for known, set_to in SETTINGS.items() if "relaxation" in set_to]
        raise ValueError(
            f"{name} has no noise to add: that is for {', '.join(noisy)}; leave it out"
        )
    return dataclasses.replace(parsed, **({} if noise else settings))


def rate(name: str, noise: bool = False) -> float:
    """The learning rate for a method."""
    return NOISE_RATE if noise else RATES[name]


def optimiser(
    name: str, rate: float, steps: int, noise: bool = False
) -> optax.GradientTransformation:
    """The optimiser of what a method learns.

    Args:
      name: a key of `RATES`.
      rate: learning rate, first of a cosine that ends at a tenth; constant for maskpro.
      steps: updates.
      noise: as in `method`.
    """
    if name == "maskpro":
        return optax.sgd(rate)
    decay = optax.cosine_decay_schedule(rate, steps, 0.1)
    if name in ("hard_concrete", "maskllm", "patch") and not noise:
        return optax.chain(relative(0.95), optax.sgd(decay))
    return optax.adam(decay, b2=0.95)


def start(name: str | None, method: Method) -> Method | None:
    """The method whose plans come first; None for a start of the method's own.

    Args:
      name: of a method; "own" for the own start; None for `RefineMask` where the
        pattern allows it.
      method: what learns.

    Raises:
      ValueError: a method that takes no plans, or one that needs gradients or steps.
    """
    if not method.adopts_plans:
        if name not in (None, "own"):
            raise ValueError(
                f"start {name}: {type(method).__name__} begins with a start of its own;"
                " leave the option out"
            )
        return None
    if name == "own" or (name is None and not RefineMask.fits(method.pattern)):
        return None
    first = methods.parse(name or "refine_mask", method.pattern).for_fixed_weights()
    if isinstance(first, LearnedMethod) or first.needs == "gradients":
        raise ValueError(f"start {name}: need a method that 'flexhinm prune' runs")
    return first


def first_states(
    method: Method,
    begin: Method | None,
    key: Array,
    params: Any,
    uses: Uses,
    stats: Mapping[str, Stats],
    sparsity: float | Mapping[str, float] | None,
) -> dict[str, State]:
    """Where learning begins.

    Args:
      method: what learns.
      begin: from `start`.
      key: PRNG key, consumed.
      params: the dense parameters.
      uses: from `discover`.
      stats: from `calibrate`.
      sparsity: fraction of weights removed.
    """
    if begin is None:
        return solve.solve(method, key, params, uses, stats, sparsity)
    states = solve.solve(begin, key, params, uses, stats, sparsity)
    plans = apply.decide(begin, states, params, uses)
    # The weights and biases of these plans are not used: nothing but masks moves.
    gated: Any = method  # the one kind that adopts plans
    return adopt(gated, plans, params, uses)[0]
