"""What the layers of a model gain by keeping more weights, as budgets weigh it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

from flexhinm_jax import checks
from flexhinm_jax.methods import Method
from flexhinm_jax.patterns import Levels, Pattern
from flexhinm_jax.pruning.solve import method_for
from flexhinm_jax.pruning.statistics import blank, informed, unseen
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import Stats, Use, Uses

#: Increments kept per leaf; of more, neighbours in strength become one.
MOST = 1 << 14

NOTHING = np.zeros(0)


@dataclasses.dataclass(frozen=True)
class Increments:
    """What a layer gains by keeping more.

    Attributes:
      gain: f64[c], score gained by each increment, non-negative.
      cost: f64[c], weights kept by each increment; positive.
      size: weights of the layer.
      span: smallest and largest sparsity that the layer can have.
    """

    gain: np.ndarray
    cost: np.ndarray
    size: int
    span: tuple[float, float] = (0.0, 1.0)


def increments(scores: Array, pattern: Pattern) -> Increments:
    """The increments of one layer, or of a stack that is to share a sparsity.

    Args:
      scores: f32[*stack, o, i], non-negative.
      pattern: `Vector`, `HiNM`, `FlexHiNM` or `Unstructured`.

    Returns:
      Two per column vector (one where the pattern has no dense or no N:M region): the
      score it keeps among its neighbours in strength, then the rest of it. Of a large
      unstructured matrix, runs of sorted scores.

    Raises:
      ValueError: a pattern with a fixed sparsity, NaN.
    """
    checks.finite(scores, "scores")
    check(pattern)
    flat = scores.reshape(-1, scores.shape[-1])
    pattern.check_shape(flat.shape)
    size = int(np.prod(scores.shape))
    return made(jax.device_get(levels(flat, pattern)), size, pattern)


def check(pattern: Pattern) -> None:
    """Raises ValueError for a pattern with a single sparsity."""
    low, high = pattern.sparsity_range()
    if low == high:
        raise ValueError(
            f"{pattern} has one sparsity, there is nothing to allocate; choose Vector, "
            "HiNM, FlexHiNM or Unstructured"
        )


@functools.partial(jax.jit, static_argnums=1)
def levels(flat: Array, pattern: Pattern) -> Levels:
    """`Pattern.levels`, or a ValueError where they are not known."""
    known = pattern.levels(flat)
    if known is None:
        raise ValueError(
            f"increments of {pattern} are not known; allocate by 'uniform' or 'owl', "
            "or choose Vector, HiNM, FlexHiNM or Unstructured"
        )
    return known


def made(host: Levels, size: int, pattern: Pattern) -> Increments:
    """The increments from level to level, at most `MOST` of them.

    Args:
      host: on the host.
      size: weights of the layer.
      pattern: what it may have.
    """
    gain = np.diff(np.asarray(host.scores, np.float64), axis=0, prepend=0)
    kept = np.diff(np.asarray(host.kept, np.float64), prepend=0)
    cost = np.repeat(kept[:, None], gain.shape[1], axis=1)
    cost[-1, -1] -= max(cost.sum() - size, 0)
    span = pattern.sparsity_range()
    return condensed(Increments(gain.ravel(), cost.ravel(), size, span))


def condensed(layer: Increments) -> Increments:
    """At most `MOST` increments: neighbours in gain per weight become one."""
    if len(layer.gain) <= MOST:
        return layer
    order = np.argsort(-layer.gain / layer.cost, kind="stable")
    starts = np.linspace(0, len(order), MOST, endpoint=False).astype(int)
    gain, cost = (np.add.reduceat(x[order], starts) for x in (layer.gain, layer.cost))
    return dataclasses.replace(layer, gain=gain, cost=cost)


def plain(method: Method, uses: Uses) -> dict[str, Increments]:
    """Path -> size and span of every prunable leaf, without increments."""
    layers = {}
    for path, use in uses.leaves.items():
        size, pattern = int(np.prod(use.layout.shape)), method_for(method, use).pattern
        layers[path] = Increments(NOTHING, NOTHING, size, pattern.sparsity_range())
    return layers


def offered(
    method: Method, params: Any, uses: Uses, stats: Mapping[str, Stats] | None
) -> dict[str, Increments]:
    """Path -> increments of every prunable leaf.

    Args:
      method: its own scores are used where it has scores, Wanda's otherwise, and
        magnitudes without statistics.
      params: the parameter tree.
      uses: from `discover`; a leaf whose pattern comes from a rule counts with that
        pattern.
      stats: from `calibrate`, or None; norms are enough.

    Raises:
      ValueError: a pattern whose increments are not known; NaN.
    """
    leaves = Leaves.of(params).dense(uses)
    layers = plain(method, uses)
    for path, use in uses.leaves.items():
        own = method_for(method, use)
        low, high = layers[path].span
        if low == high:
            continue
        check(own.pattern)
        w = leaves.matrix(use)
        checks.finite(w, "weight", path)
        known = (stats or {}).get(path)
        if known is not None:
            known = informed(
                known, unseen(known), functools.partial(leaves.matrix, use)
            )
        pair = _flat(use, (w, known))
        result = jax.device_get(_scored(own, *pair))
        layers[path] = made(result, layers[path].size, own.pattern)
    return layers


def scoring_program(method: Method, use: Use, dtype: Any) -> Any:
    """What `offered` runs for one leaf, lowered; None where nothing is offered."""
    own = method_for(method, use)
    low, high = own.pattern.sparsity_range()
    if low == high:
        return None
    check(own.pattern)
    stack, shape = use.layout.stack_shape, use.layout.matrix_shape
    norms = dataclasses.replace(blank(shape[1], stack), gram=None)
    w = jax.ShapeDtypeStruct((*stack, *shape), dtype)
    return _scored.lower(own, *jax.eval_shape(lambda *pair: _flat(use, pair), w, norms))


def _flat(use: Use, tree: Any) -> Any:
    """The stack axes as one."""
    depth = len(use.layout.stack)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[depth:]), tree)


@functools.partial(jax.jit, static_argnums=0)
def _scored(method: Method, w: Array, stats: Stats | None) -> Levels:
    """`levels` of the scores of [stack, o, i]."""
    scores = jax.vmap(method.importance)(w, stats)
    return levels(scores.reshape(-1, w.shape[-1]), method.pattern)
