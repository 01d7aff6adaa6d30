"""What the layers of a model gain by keeping more weights, as budgets weigh it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax import checks
from flexhinm_jax.methods import Method, ScoreMethod
from flexhinm_jax.ops import masks, regions, saliency
from flexhinm_jax.patterns import Pattern, Unstructured
from flexhinm_jax.patterns.tiled import Tiled
from flexhinm_jax.pruning.statistics import blank
from flexhinm_jax.pruning.tree import leaves_for, method_for
from flexhinm_jax.tracing.views import matrix
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
    if isinstance(pattern, Tiled):
        pattern.check_shape(flat.shape)
    size = int(np.prod(scores.shape))
    return made(jax.device_get(levels(flat, pattern)), size, pattern)


def check(pattern: Pattern) -> None:
    """Raises ValueError for a pattern whose increments are not known."""
    if not isinstance(pattern, Unstructured | Tiled):
        low, high = pattern.sparsity_range()
        raise ValueError(
            f"{pattern} has one sparsity, there is nothing to allocate; choose Vector, "
            "HiNM, FlexHiNM or Unstructured"
            if low == high
            else f"increments of {pattern} are not known; allocate by 'uniform' or "
            "'owl', or choose Vector, HiNM, FlexHiNM or Unstructured"
        )


@functools.partial(jax.jit, static_argnums=1)
def levels(flat: Array, pattern: Pattern) -> tuple[Array, Array]:
    """(part, whole) per column vector, scores under N:M and dense; see `made`.

    Args:
      flat: f32[rows, i], non-negative.
      pattern: as in `increments`.
    """
    flat = flat.astype(jnp.float32)
    if isinstance(pattern, Unstructured):
        each = -(-flat.size // MOST)
        falling = jnp.pad(-jnp.sort(-flat.ravel()), (0, -flat.size % each))
        runs = jnp.sum(falling.reshape(-1, each), axis=1)
        return runs, runs
    assert isinstance(pattern, Tiled)
    v, (n, m) = pattern.vector_size, pattern.n_of_m
    whole = masks.vectors(flat, v).ravel()
    if not pattern.has_groups:
        return whole, whole
    tiles = flat.reshape(-1, v, flat.shape[-1])
    order = regions.ranked(jnp.sum(tiles, axis=1))
    dealt = regions.column_order(
        order,
        jnp.zeros((), jnp.int32),
        jnp.asarray(flat.shape[1] // m, jnp.int32),
        m,
    )
    none = jnp.zeros(len(tiles), jnp.int32)
    keep = regions.kept(tiles, dealt, none, none + flat.shape[1], n, m)
    return jnp.sum(jnp.where(keep, tiles, 0), axis=1).ravel(), whole


def made(
    found: tuple[np.ndarray, np.ndarray], size: int, pattern: Pattern
) -> Increments:
    """The increments that `levels` describes, at most `MOST` of them.

    Args:
      found: what `levels` returns.
      size: weights of the layer.
      pattern: as in `increments`.
    """
    part, whole = (np.asarray(x, np.float64) for x in found)
    span = pattern.sparsity_range()
    if isinstance(pattern, Unstructured):
        cost = np.full_like(whole, -(-size // MOST))
        cost[-1] = size - cost[:-1].sum()
        return Increments(whole, cost, size, span)
    assert isinstance(pattern, Tiled)
    v, (n, m) = pattern.vector_size, pattern.n_of_m
    if not pattern.has_groups:
        return condensed(Increments(whole, np.full_like(whole, v), size, span))
    # A vector keeps at least its fair share, so increments per weight diminish.
    part = np.clip(part, whole * (n / m), whole)
    few = np.full_like(part, v * n / m)
    if not pattern.has_dense:
        return condensed(Increments(part, few, size, span))
    gain = np.concatenate([part, whole - part])
    cost = np.concatenate([few, np.full_like(part, v * (1 - n / m))])
    return condensed(Increments(gain, cost, size, span))


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
    found = {}
    for path, use in uses.leaves.items():
        size, pattern = int(np.prod(use.layout.shape)), method_for(method, use).pattern
        found[path] = Increments(NOTHING, NOTHING, size, pattern.sparsity_range())
    return found


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
    leaves = leaves_for(params, uses)
    found = plain(method, uses)
    for path, use in uses.leaves.items():
        mine = method_for(method, use)
        low, high = found[path].span
        if low == high:
            continue
        check(mine.pattern)
        w = matrix(leaves[path], use.layout)
        checks.finite(w, "weight", path)
        pair = _flat(use, (w, (stats or {}).get(path)))
        result = jax.device_get(_scored(mine, *pair))
        found[path] = made(result, found[path].size, mine.pattern)
    return found


def scoring_bytes(method: Method, use: Use, dtype: Any) -> int:
    """Bytes that `offered` takes for one leaf, besides the weight."""
    mine = method_for(method, use)
    low, high = mine.pattern.sparsity_range()
    if low == high:
        return 0
    check(mine.pattern)
    stack, shape = use.layout.stack_shape, use.layout.matrix_shape
    norms = dataclasses.replace(blank(shape[1], stack), gram=None)
    w = jax.ShapeDtypeStruct((*stack, *shape), dtype)
    given = jax.eval_shape(lambda *pair: _flat(use, pair), w, norms)
    memory: Any = _scored.lower(mine, *given).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def _flat(use: Use, tree: Any) -> Any:
    """The stack axes as one."""
    depth = len(use.layout.stack)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[depth:]), tree)


@functools.partial(jax.jit, static_argnums=0)
def _scored(method: Method, w: Array, stats: Stats | None) -> tuple[Array, Array]:
    """`levels` of the scores of [stack, o, i]."""
    if isinstance(method, ScoreMethod):
        scores = jax.vmap(method.score)(w, stats)
    elif stats is not None:
        scores = jax.vmap(saliency.wanda)(w, stats.sq_norm)
    else:
        scores = saliency.magnitude(w)
    return levels(scores.reshape(-1, w.shape[-1]), method.pattern)
