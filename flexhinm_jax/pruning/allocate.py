"""Sparsity budgets across layers.

"uniform" gives every layer the same. "owl" keeps more of blocks with many outliers
(`outliers`). "global" takes the best increments of all layers (`increments`): what a
layer's score gains when a column vector rises from pruned to N:M, and from N:M to
dense. Per kept weight they diminish within a vector, so this is the best split of a
common budget, whatever the layer: exact for fixed vector scores, by one threshold.
Scores of different layers are made comparable by dividing by the mean of the layer.
FlexHiNM-GP prunes every layer alike; the global allocation is ours.

Whatever the mode, every layer stays within what its pattern can express, exceptions
have what they ask for, and all layers together meet the target.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from flexhinm_jax import arguments, checks, promotion
from flexhinm_jax.methods import Method
from flexhinm_jax.pruning.gains import Increments, offered, plain
from flexhinm_jax.pruning.owl import OWL, densities, outlier_shares
from flexhinm_jax.types import Stats, Uses

Mode = Literal["uniform", "global", "owl"] | OWL
MODES = ("uniform", "global", "owl")

EXACT = 1e-6


@promotion.usual()
def allocate(
    mode: Mode | Mapping[str, float],
    layers: Mapping[str, Increments],
    sparsity: float,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    normalise: bool = True,
    exceptions: Mapping[str, float | None] | None = None,
    outliers: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The sparsity of every layer, such that all together have the target exactly.

    Args:
      mode: "uniform"; "global", by the increments; "owl" or an `OWL`, by the outliers.
        A mapping is "uniform" with these exceptions.
      layers: path -> increments of `increments`; only their sizes and spans matter
        unless the mode is "global".
      sparsity: fraction of all weights removed, in [0, 1].
      bounds: smallest and largest sparsity of a layer without an exception; one whose
        pattern cannot be within them comes as near as it can.
      normalise: divide the gains by the mean score of their layer; False when the
        scores of different layers are comparable already, such as Fisher scores.
      exceptions: {regex: sparsity} on paths, the first match counts; the other layers
        make up for them. None makes a layer one of the others, whatever follows.
      outliers: path -> share of outliers in its block, for "owl".

    Returns:
      path -> sparsity. The sum of size * sparsity is exact; a pattern then rounds each
      layer to its own granularity.

    Raises:
      ValueError: a target out of reach of the spans, the bounds or the exceptions, an
        exception that matches no layer or that its pattern cannot express, no layer at
        all.

    Example:
      >>> import numpy as np
      >>> one = np.array([1.0, 1.0])
      >>> weak = Increments(gain=np.array([2.0, 1.0]), cost=one, size=2)
      >>> strong = Increments(gain=np.array([9.0, 8.0]), cost=one, size=2)
      >>> allocate("global", {"a": weak, "b": strong}, 0.5, normalise=False)
      {'a': 1.0, 'b': 0.0}
      >>> allocate("uniform", {"a": weak, "b": strong}, 0.5, exceptions={"a": 0.25})
      {'a': 0.25, 'b': 0.75}
    """
    if not layers:
        raise ValueError(
            f"allocate: there is no layer to prune; {arguments.say('describe')} says "
            "why each leaf was skipped"
        )
    if isinstance(mode, Mapping):
        exceptions, mode = {**mode, **(exceptions or {})}, "uniform"
    check_mode(mode)
    low, high = bounds
    if not 0 <= low <= high <= 1:
        raise ValueError(f"bounds={bounds}: need 0 <= low <= high <= 1")
    checks.sparsity(sparsity, 0.0, 1.0, "allocate", "all layers")
    chosen = _exceptions(exceptions or {}, layers)
    rest = {path: x for path, x in layers.items() if path not in chosen}
    spans = {p: tuple(np.clip(bounds, *x.span).tolist()) for p, x in rest.items()}
    total = sum(x.size for x in layers.values())
    fixed = sum(layers[path].size * chosen[path] for path in chosen)
    removed = _reachable(sparsity * total, fixed, total, rest, spans)
    if mode == "uniform":
        shared = _filled(dict.fromkeys(rest, 0.0), rest, spans, removed)
    elif mode == "global":
        shared = _global(rest, spans, removed, normalise)
    else:
        if outliers is None:
            raise ValueError("owl needs outliers=, from outlier_shares()")
        free = {p: outliers[p] for p in rest if spans[p][0] < spans[p][1]}
        dense = densities(mode if isinstance(mode, OWL) else OWL(), free)
        wish = {path: -dense.get(path, 0.0) for path in rest}
        shared = _filled(wish, rest, spans, removed)
    return {path: chosen[path] if path in chosen else shared[path] for path in layers}


@promotion.usual()
def budgets(
    method: Method,
    params: Any,
    uses: Uses,
    stats: Mapping[str, Stats] | None,
    sparsity: float,
    *,
    mode: Mode | Mapping[str, float] = "global",
    bounds: tuple[float, float] = (0.0, 1.0),
    exceptions: Mapping[str, float | None] | None = None,
) -> dict[str, float]:
    """The sparsity of every prunable leaf, for `solve(..., sparsity=budgets(...))`.

    Args:
      method: what will prune; mode "global" uses its own scores where it has scores,
        Wanda's otherwise, and magnitudes without statistics.
      params: the parameter tree.
      uses: from `discover`; a leaf whose pattern comes from a rule counts with that
        pattern, a leaf that is skipped does not count.
      stats: from `calibrate`, or None; norms are enough.
      sparsity: fraction of all prunable weights removed.
      mode: see `allocate`.
      bounds: see `allocate`.
      exceptions: see `allocate`.

    Returns:
      path -> sparsity, with the target met exactly over all leaves together. The leaves
      of a stack share one sparsity.

    Raises:
      ValueError: patterns with only one sparsity, or a target out of reach.
    """
    layers, shares = plain(method, uses), None
    if mode != "uniform":
        check_free(method, layers)
    if mode == "global":
        layers = offered(method, params, uses, stats)
    elif mode == "owl" or isinstance(mode, OWL):
        owl = mode if isinstance(mode, OWL) else OWL()
        shares = outlier_shares(owl, params, uses, stats)
    return allocate(
        mode, layers, sparsity, bounds=bounds, exceptions=exceptions, outliers=shares
    )


def check_mode(mode: Any) -> None:
    """Raises ValueError for an unknown mode."""
    if mode not in MODES and not isinstance(mode, OWL):
        raise ValueError(
            f"unknown mode {mode!r} of allocation; choose"
            f" {', '.join(map(repr, MODES))} or an OWL()"
        )


def check_free(method: Method, layers: Mapping[str, Increments]) -> None:
    """Raises ValueError where every layer has only one sparsity."""
    if layers and all(low == high for low, high in (x.span for x in layers.values())):
        raise ValueError(
            f"{method.pattern} has one sparsity, there is nothing to allocate; choose"
            " Vector, HiNM, FlexHiNM, Tiles or Unstructured"
        )


def _exceptions(
    rules: Mapping[str, float | None], layers: Mapping[str, Increments]
) -> dict[str, float]:
    """Path -> sparsity of the first rule that matches.

    Raises:
      ValueError: a rule without a layer, or a sparsity that its pattern cannot have.
    """
    chosen: dict[str, float] = {}
    used: set[str] = set()
    for path, layer in layers.items():
        for rule, value in rules.items():
            if re.search(rule, path):
                used.add(rule)
                if value is None:
                    break
                low, high = layer.span
                if not low - EXACT <= value <= high + EXACT:
                    raise ValueError(
                        f"{rule!r} asks for sparsity {value:g} of {path}, whose pattern"
                        f" can have [{low:g}, {high:g}]; give it another pattern too,"
                        " or skip it to leave it dense"
                    )
                chosen[path] = float(value)
                break
    if unused := [rule for rule in rules if rule not in used]:
        raise ValueError(
            f"rules {unused} match no layer (or only layers of an earlier rule); the "
            f"layers are {', '.join(layers)}"
        )
    return chosen


def _reachable(
    wanted: float,
    fixed: float,
    total: int,
    rest: Mapping[str, Increments],
    spans: Mapping[str, tuple[float, float]],
) -> float:
    """Weights that the layers without an exception have to remove.

    Raises:
      ValueError: more or fewer than they can.
    """
    if not rest:
        if abs(fixed - wanted) > EXACT * total:
            raise ValueError(
                f"{arguments.say('exceptions')} cover every layer and remove"
                f" {fixed / total:g} of all weights, not"
                f" {arguments.say('sparsity', f'{wanted / total:g}')}; leave one layer"
                " without"
            )
        return 0.0
    size = sum(x.size for x in rest.values())
    least, most = (sum(x.size * spans[p][k] for p, x in rest.items()) for k in (0, 1))
    needed = wanted - fixed
    if not least - EXACT * total <= needed <= most + EXACT * total:
        raise ValueError(
            f"{arguments.say('sparsity', f'{wanted / total:g}')} cannot be met: the"
            f" {len(rest)} layers without an exception would need sparsity"
            f" {needed / size:g}, and patterns and bounds let them have"
            f" [{least / size:g}, {most / size:g}]; choose a target in"
            f" [{(fixed + least) / total:g}, {(fixed + most) / total:g}], or"
            " change patterns, bounds or exceptions"
        )
    return min(max(needed, least), most)


def _filled(
    wish: Mapping[str, float],
    layers: Mapping[str, Increments],
    spans: Mapping[str, tuple[float, float]],
    removed: float,
) -> dict[str, float]:
    """Every layer at its wish plus one common shift, cut off at its span.

    The total is piecewise linear in the shift, so the shift is found exactly.
    """
    if not layers:
        return {}
    base = np.array([wish[path] for path in layers])
    size = np.array([x.size for x in layers.values()], np.float64)
    low, high = np.array([spans[path] for path in layers]).T
    knots = np.unique(np.concatenate([low - base, high - base]))
    totals = [size @ np.clip(base + knot, low, high) for knot in knots]
    shift = np.interp(removed, totals, knots)
    return dict(zip(layers, np.clip(base + shift, low, high).tolist(), strict=True))


def _global(layers, spans, removed, normalise):
    rates, costs = {}, {}
    for path, layer in layers.items():
        rate = layer.gain / layer.cost
        mean = layer.gain.sum() / layer.size if normalise else 1.0
        rate = rate / (mean if mean > 0 else 1.0)
        order = np.argsort(-rate, kind="stable")
        rates[path] = rate[order]
        costs[path] = np.concatenate([[0.0], np.cumsum(layer.cost[order])])
    size = {path: layer.size for path, layer in layers.items()}
    budget = sum(size.values()) - removed
    full = {path: (1 - spans[path][0]) * size[path] for path in size}

    def kept(threshold, side):
        """Weights that stay in every layer: the increments above the threshold."""
        weights = {}
        for path, rate in rates.items():
            count = np.searchsorted(-rate, -threshold, side=side)
            least = (1 - spans[path][1]) * size[path]
            weights[path] = float(np.clip(costs[path][count], least, full[path]))
        return weights

    pooled = np.unique(np.concatenate([np.zeros(1), *rates.values()]))
    first, last = 0, len(pooled) - 1  # the largest threshold that keeps enough
    while first < last:
        middle = (first + last + 1) // 2
        if sum(kept(pooled[middle], "right").values()) >= budget:
            first = middle
        else:
            last = middle - 1
    # Ties at the threshold, in every layer alike; then what no increment covers.
    few, many = kept(pooled[first], "left"), kept(pooled[first], "right")
    few = _towards(_towards(few, many, budget), full, budget)
    return {path: 1 - few[path] / size[path] for path in size}


def _towards(few, many, budget):
    """The mix of two allocations that keeps the budget, or the closer one."""
    a, b = sum(few.values()), sum(many.values())
    part = min(max((budget - a) / (b - a), 0.0), 1.0) if b > a else 0.0
    return {path: few[path] + part * (many[path] - few[path]) for path in few}
