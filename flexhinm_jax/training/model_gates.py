"""A learned method on all weights of a model: sampled weights, schedules, hardening.

The transformations of one matrix are mapped over the stack of every leaf. Leaves are
not concatenated, unlike in `pruning.solve`: inside a training step that would copy
every weight.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from flexhinm_jax.jax_versions import automatic
from flexhinm_jax.methods.learned import LearnedMethod
from flexhinm_jax.paths import over_stack
from flexhinm_jax.pruning import apply, solve
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import Plan, State, Uses

States = Mapping[str, State]


def sample(
    method: LearnedMethod,
    states: States,
    params: Any,
    uses: Uses,
    key: Array,
    *,
    lean: bool | None = None,
) -> tuple[Any, dict[str, Array]]:
    """The parameters under a sampled relaxation, and its loss terms.

    Args:
      method: the method.
      states: path -> state.
      params: the parameter tree.
      uses: from `discover`.
      key: consumed; a leaf uses key and path, nothing else.
      lean: whether the backward pass draws noise and relaxed choices, which are larger
        than the weight, again from the key instead of keeping them; the result is the
        same. None does so except on a CPU, where the compiler gains no memory by it.

    Returns:
      A tree like `params`, differentiable in `states[...].learned` and `params`, and
      name -> term f32[], what the method makes of the mean over the weights.
    """
    if lean is None:
        lean = jax.default_backend() != "cpu"
    draw = _lean_sample if lean else _sample

    def run(states: States, params: Any, key: Array) -> tuple[Any, dict[str, Array]]:
        plans: dict[str, Plan] = {}
        terms: list[tuple[int, dict[str, Array]]] = []
        for path, own, state, w in _matrices(method, states, params, uses):
            use = uses.leaves[path]
            keys = solve.keys_for(key, use)
            plans[path], own_terms = _over(draw, use, own)(state, w, keys)
            terms.append((int(np.prod(use.layout.shape)), own_terms))
        return apply.densify(plans, params, uses), method.combine(_means(terms))

    out = _shardings(params), P()
    return automatic(run, out, states, params, key)


def baseline(method: Any, states: States, params: Any, uses: Uses) -> Any:
    """The parameters with whose loss the samples of a score function are compared."""

    def run(states: States, params: Any) -> Any:
        plans = {
            path: _over(_baseline, uses.leaves[path], own)(state, w)
            for path, own, state, w in _matrices(method, states, params, uses)
        }
        return apply.densify(plans, params, uses)

    return automatic(run, _shardings(params), states, params)


def log_prob(method: Any, states: States, uses: Uses, key: Array) -> Array:
    """Log-probability of the whole sample that `sample` draws with this key, f32[]."""
    one = lambda own, state, key: own.log_prob(state, key=key)  # noqa: E731

    def run(states: States, key: Array) -> Array:
        total = jnp.zeros((), jnp.float32)
        for path, state in states.items():
            use = uses.leaves[path]
            own: Any = solve.method_for(method, use)
            total += jnp.sum(_over(one, use, own)(state, solve.keys_for(key, use)))
        return total

    return automatic(run, P(), states, key)


def anneal(
    method: LearnedMethod, states: States, uses: Uses, progress: Array | float
) -> dict[str, State]:
    """Every state with its schedules at `progress` in [0, 1] of the stage."""
    progress = jnp.asarray(progress, jnp.float32)
    run = lambda own, state: own.anneal(state, progress)  # noqa: E731
    return _map(run, method, states, uses)


def constrain(method: LearnedMethod, states: States, uses: Uses) -> dict[str, State]:
    """Every state with what was learned back in its range."""

    def run(states: States) -> dict[str, State]:
        return _map(lambda own, state: own.constrain(state), method, states, uses)

    return automatic(run, _shardings(dict(states)), dict(states))


def harden(
    method: LearnedMethod, states: States, params: Any, uses: Uses
) -> dict[str, State]:
    """Every state with all choices made.

    Weights with a rule's own pattern do not share in a budget of the model.
    """
    shared = {p: s for p, s in states.items() if uses.leaves[p].pattern is None}
    states = dict(states) | method.settle(shared)
    return {
        path: _over(_harden, uses.leaves[path], own)(state, w)
        for path, own, state, w in _matrices(method, states, params, uses)
    }


def metrics(method: LearnedMethod, states: States, uses: Uses) -> dict[str, Array]:
    """The figures of all states, means weighted by the size of the matrices."""
    one = lambda own, state: own.metrics(state)  # noqa: E731

    def run(states: States) -> dict[str, Array]:
        figures = []
        for path, state in states.items():
            use = uses.leaves[path]
            own: Any = solve.method_for(method, use)
            size = int(np.prod(use.layout.shape))
            figures.append((size, _over(one, use, own)(state)))
        return _means(figures)

    return automatic(run, P(), states)


def _map(
    run: Callable[..., State], method: LearnedMethod, states: States, uses: Uses
) -> dict[str, State]:
    out = {}
    for path, state in states.items():
        use = uses.leaves[path]
        out[path] = _over(run, use, solve.method_for(method, use))(state)
    return out


@functools.partial(jax.jit, static_argnums=0)
def _sample(method, state, w, key):
    return method.sample(state, w, key=key)


def _lean_sample(method, state, w, key):
    return jax.checkpoint(functools.partial(_sample, method))(state, w, key)


@functools.partial(jax.jit, static_argnums=0)
def _baseline(method, state, w):
    return method.baseline(state, w)


@functools.partial(jax.jit, static_argnums=0)
def _harden(method, state, w):
    return method.harden(state, w)


def _over(run: Callable[..., Any], use: Any, method: Any) -> Callable[..., Any]:
    """`run(method, ...)` mapped over the stack axes of a leaf."""
    return over_stack(functools.partial(run, method), len(use.layout.stack))


def _matrices(method: LearnedMethod, states: States, params: Any, uses: Uses):
    """(path, method, state, weight [*stack, o, i]) of every solved leaf."""
    leaves = Leaves.of(params)
    for path, state in states.items():
        use = uses.leaves[path]
        own: Any = solve.method_for(method, use)
        yield path, own, state, leaves.matrix(use)


def _means(parts: list[tuple[int, dict[str, Array]]]) -> dict[str, Array]:
    """Weighted means by name; stack axes are averaged first."""
    totals: dict[str, Array] = {}
    weights: dict[str, int] = {}
    for size, terms in parts:
        for name, term in terms.items():
            value = size * jnp.mean(term, dtype=jnp.float32)
            totals[name] = totals[name] + value if name in totals else value
            weights[name] = weights.get(name, 0) + size
    return {name: total / weights[name] for name, total in totals.items()}


def _shardings(x: Any) -> Any:
    """Where every array of a tree lives, also of tracers."""
    return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, x)
