"""Sparsity budgets across layers.

Every layer offers increments: what its score gains when a column vector rises from
pruned to N:M, and from N:M to dense. Per kept weight they diminish within a vector, so
the best split of a common budget takes the best increments of all layers, whatever the
layer: exact for fixed vector scores, by one threshold. Scores of different layers are
made comparable by dividing by the mean of the layer. FlexHiNM-GP prunes every layer
alike; this allocation is ours.
"""

import dataclasses
import re
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
from flexhinm_jax.transforms.paths import leaf_paths
from flexhinm_jax.transforms.tree import method_for
from flexhinm_jax.transforms.views import matrix
from flexhinm_jax.types import Stats, Uses


@dataclasses.dataclass(frozen=True)
class Increments:
    """What a layer gains by keeping more.

    Attributes:
      gain: f64[c], score gained by each increment, non-negative.
      cost: f64[c], weights kept by each increment; positive.
      size: weights of the layer.
    """

    gain: np.ndarray
    cost: np.ndarray
    size: int


def increments(scores: Array, pattern: Pattern) -> Increments:
    """The increments of one layer, or of a stack that is to share a sparsity.

    Args:
      scores: f32[*stack, o, i], non-negative.
      pattern: `Vector`, `HiNM`, `FlexHiNM` or `Unstructured`.

    Returns:
      Two per column vector (one where the pattern has no dense or no N:M region): the
      score it keeps among its neighbours in strength, then the rest of it.

    Raises:
      ValueError: a pattern with a fixed sparsity, NaN.
    """
    checks.finite(scores, "scores")
    size = int(np.prod(scores.shape))
    flat = jnp.reshape(scores, (-1, scores.shape[-1])).astype(jnp.float32)
    if isinstance(pattern, Unstructured):
        gain = np.asarray(flat, np.float64).ravel()
        return Increments(gain, np.ones_like(gain), size)
    if not isinstance(pattern, Tiled):
        raise ValueError(
            f"{pattern} has one sparsity, there is nothing to allocate; choose Vector, "
            "HiNM, FlexHiNM or Unstructured"
        )
    pattern.check_shape(flat.shape)
    v, (n, m) = pattern.vector_size, pattern.n_of_m
    whole = np.asarray(masks.vectors(flat, v), np.float64).ravel()
    if not pattern.has_groups:
        return Increments(whole, np.full_like(whole, v), size)
    tiles = flat.reshape(-1, v, flat.shape[-1])
    order = regions.ranked(jnp.sum(tiles, axis=1))
    dealt = regions.column_order(
        order,
        jnp.zeros((), jnp.int32),
        jnp.asarray(flat.shape[1] // m, jnp.int32),
        m,
    )
    ends = jnp.zeros(len(tiles), jnp.int32), jnp.full(len(tiles), flat.shape[1])
    keep = regions.kept(tiles, dealt, *ends, n, m)
    part = np.asarray(jnp.sum(jnp.where(keep, tiles, 0), axis=1), np.float64).ravel()
    # A vector keeps at least its fair share, so increments per weight diminish.
    part = np.clip(part, whole * (n / m), whole)
    if not pattern.has_dense:
        return Increments(part, np.full_like(part, v * n / m), size)
    gain = np.concatenate([part, whole - part])
    cost = np.repeat([v * n / m, v * (1 - n / m)], whole.size)
    return Increments(gain, cost, size)


def allocate(
    mode: str | Mapping[str, float],
    layers: Mapping[str, Increments],
    sparsity: float,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    normalise: bool = True,
) -> dict[str, float]:
    """The sparsity of every layer, such that all together have the target exactly.

    Args:
      mode: "uniform"; "global", by the increments; or rules {regex: sparsity} on paths,
        the first match counts, and the other layers share what is left evenly.
      layers: path -> increments of `increments`; only their sizes matter unless the
        mode is "global".
      sparsity: fraction of all weights removed, in [0, 1].
      bounds: smallest and largest sparsity of a layer in mode "global".
      normalise: divide the gains by the mean score of their layer; False when the
        scores of different layers are comparable already, such as Fisher scores.

    Returns:
      path -> sparsity. The sum of size * sparsity is exact; a pattern then rounds each
      layer to its own granularity.

    Raises:
      ValueError: a target out of reach of the bounds or the rules, a rule that matches
        no layer, no layer at all.

    Example:
      >>> import numpy as np
      >>> one = np.array([1.0, 1.0])
      >>> weak = Increments(gain=np.array([2.0, 1.0]), cost=one, size=2)
      >>> strong = Increments(gain=np.array([9.0, 8.0]), cost=one, size=2)
      >>> allocate("global", {"a": weak, "b": strong}, 0.5, normalise=False)
      {'a': 1.0, 'b': 0.0}
    """
    if not layers:
        raise ValueError(
            "allocate: there is no layer to prune; print(describe(uses)) says why each "
            "leaf was skipped"
        )
    low, high = bounds
    if not 0 <= low <= high <= 1:
        raise ValueError(f"bounds={bounds}: need 0 <= low <= high <= 1")
    checks.sparsity(sparsity, 0.0, 1.0, "allocate", "all layers")
    if mode == "uniform":
        return dict.fromkeys(layers, float(sparsity))
    if mode == "global":
        if not low <= sparsity <= high:
            raise ValueError(
                f"sparsity={sparsity:g} cannot be met with every layer in "
                f"[{low:g}, {high:g}]; choose a target inside, or widen bounds="
            )
        return _global(layers, sparsity, low, high, normalise)
    if isinstance(mode, str):
        raise ValueError(
            f"unknown mode {mode!r}; choose 'uniform', 'global' or rules "
            "{regex: sparsity}"
        )
    return _by_rules(mode, layers, sparsity)


def budgets(
    method: Method,
    params: Any,
    uses: Uses,
    stats: Mapping[str, Stats] | None,
    sparsity: float,
    *,
    mode: str | Mapping[str, float] = "global",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> dict[str, float]:
    """The sparsity of every prunable leaf, for `solve(..., sparsity=budgets(...))`.

    Args:
      method: what will prune; its own scores are used where it has scores, Wanda's
        otherwise, and magnitudes without statistics.
      params: the parameter tree.
      uses: from `discover`; a leaf whose pattern comes from a rule counts with that
        pattern.
      stats: from `calibrate`, or None.
      sparsity: fraction of all prunable weights removed.
      mode: see `allocate`.
      bounds: see `allocate`.

    Returns:
      path -> sparsity, with the target met exactly over all leaves together. The leaves
      of a stack share one sparsity.

    Raises:
      ValueError: a pattern with only one sparsity, or a target out of reach.
    """
    leaves = dict(zip(leaf_paths(params), jax.tree.leaves(params), strict=True))
    layers = {}
    for path, use in uses.leaves.items():
        mine, given = method_for(method, use), (stats or {}).get(path)
        w = matrix(leaves[path], use.layout)
        depth = len(use.layout.stack)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[depth:]), (w, given))  # noqa: B023
        if isinstance(mine, ScoreMethod):
            scores = jax.vmap(mine.score)(*flat)
        elif given is not None:
            scores = jax.vmap(lambda w, s: saliency.wanda(w, s.sq_norm))(*flat)
        else:
            scores = saliency.magnitude(flat[0])
        layers[path] = increments(scores, mine.pattern)
    return allocate(mode, layers, sparsity, bounds=bounds)


def _global(layers, sparsity, low, high, normalise):
    rates, costs = {}, {}
    for path, layer in layers.items():
        rate = layer.gain / layer.cost
        mean = layer.gain.sum() / layer.size if normalise else 1.0
        rate = rate / (mean if mean > 0 else 1.0)
        order = np.argsort(-rate, kind="stable")
        rates[path] = rate[order]
        costs[path] = np.concatenate([[0.0], np.cumsum(layer.cost[order])])
    size = {path: layer.size for path, layer in layers.items()}
    budget = (1 - sparsity) * sum(size.values())

    def kept(threshold, side):
        """Weights that stay in every layer: the increments above the threshold."""
        found = {}
        for path, rate in rates.items():
            count = np.searchsorted(-rate, -threshold, side=side)
            most, least = (1 - low) * size[path], (1 - high) * size[path]
            found[path] = float(np.clip(costs[path][count], least, most))
        return found

    pooled = np.unique(np.concatenate(list(rates.values())))
    first, last = 0, len(pooled) - 1  # the largest threshold that keeps enough
    while first < last:
        middle = (first + last + 1) // 2
        if sum(kept(pooled[middle], "right").values()) >= budget:
            first = middle
        else:
            last = middle - 1
    # Ties at the threshold, in every layer alike; then what no increment covers.
    few, many = kept(pooled[first], "left"), kept(pooled[first], "right")
    few = _towards(few, many, budget)
    full = {path: (1 - low) * size[path] for path in size}
    few = _towards(few, full, budget)
    return {path: 1 - few[path] / size[path] for path in size}


def _towards(few, many, budget):
    """The mix of two allocations that keeps the budget, or the closer one."""
    a, b = sum(few.values()), sum(many.values())
    part = min(max((budget - a) / (b - a), 0.0), 1.0) if b > a else 0.0
    return {path: few[path] + part * (many[path] - few[path]) for path in few}


def _by_rules(rules, layers, sparsity):
    chosen: dict[str, float] = {}
    used: set[str] = set()
    for path in layers:
        for pattern, value in rules.items():
            if re.search(pattern, path):
                chosen[path] = float(value)
                used.add(pattern)
                break
    if unused := [rule for rule in rules if rule not in used]:
        raise ValueError(
            f"rules {unused} match no layer (or only layers of an earlier rule); the "
            f"layers are {', '.join(layers)}"
        )
    total = sum(layer.size for layer in layers.values())
    rest = [path for path in layers if path not in chosen]
    removed = sum(layers[path].size * chosen[path] for path in chosen)
    rest_size = sum(layers[path].size for path in rest)
    if not rest:
        if abs(removed - sparsity * total) > 1e-6 * total:
            raise ValueError(
                f"the rules cover every layer and remove {removed / total:g} of all "
                f"weights, not sparsity={sparsity:g}; leave one layer without a rule"
            )
        return chosen
    share = (sparsity * total - removed) / rest_size
    if not -1e-9 <= share <= 1 + 1e-9:
        raise ValueError(
            f"the rules remove {removed / total:g} of all weights, so the other layers "
            f"would need sparsity {share:g} to meet {sparsity:g}"
        )
    share = min(max(share, 0.0), 1.0)
    return {path: chosen.get(path, share) for path in layers}
