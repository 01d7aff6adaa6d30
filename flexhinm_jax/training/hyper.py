"""HyperPrune over a model: one net for all matrices, layer by layer.

The net goes from matrix to matrix in order of execution. What it learned before is held
by a cache of earlier groups, and embeddings tell it where it is. Only one matrix, its
Gram and the net take part in a step, so memory is that of the largest layer.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax import arguments, promotion
from flexhinm_jax.methods.hyperprune import HyperPrune, check_hyperprune
from flexhinm_jax.ops import hypernet
from flexhinm_jax.pruning import solve
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.training.run import NotFinite
from flexhinm_jax.types import State, Stats, Uses

#: (layer, component) of a matrix.
Name = tuple[Hashable, Hashable]

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Hyper:
    """What `hyper_prune` found.

    Attributes:
      states: path -> state, for `decide`, with the leading stack axes of the leaf.
      theta: the net at the end.
      cache: groups of all matrices.
      layers: name of each layer embedding.
      components: name of each component embedding.
      rows: per matrix, in order: "path", "at" (its place in a stack), "layer",
        "component", "prior" and "error" (relative error of the outputs).
    """

    states: dict[str, State]
    theta: hypernet.Theta
    cache: hypernet.Cache
    layers: tuple[Hashable, ...]
    components: tuple[Hashable, ...]
    rows: list[Row]


def name(path: str, at: tuple[int, ...]) -> Name:
    """Layer and component of a matrix, from the path of its leaf.

    The first number in the path, and the place in a stack, are the layer; the path
    without that number is the component.

    Args:
      path: normalised leaf path.
      at: place in the stack of the leaf, () for a single matrix.

    Example:
      >>> name("layers/3/mlp/up/kernel", ())
      ((3,), 'layers/*/mlp/up/kernel')
      >>> name("blocks/attention/query", (5,))
      ((5,), 'blocks/attention/query')
    """
    number = re.search(r"\d+", path)
    if number is None:
        return at, path
    rest = path[: number.start()] + "*" + path[number.end() :]
    return (int(number[0]), *at), rest


@promotion.usual()
def hyper_prune(
    method: HyperPrune,
    key: Array,
    params: Any,
    uses: Uses,
    stats: Mapping[str, Stats],
    sparsity: float | Mapping[str, float] | None = None,
    *,
    identify: Callable[[str, tuple[int, ...]], Name] = name,
    progress: Callable[[Row], None] | None = None,
) -> Hyper:
    """Learns the masks of a model with one net.

    `embedding=0`, `outlier=0` and `continual=0` of the method switch parts off.

    Args:
      method: the configuration; `inner` finds the priors.
      key: PRNG key, consumed; a matrix uses key and path.
      params: the parameter tree; nothing moves.
      uses: from `discover`.
      stats: from `calibrate`, with Grams.
      sparsity: fraction of weights removed, one for all or one per path.
      identify: layer and component of a path and a place in its stack.
      progress: called with every row.

    Returns:
      States, the net, and the error of every matrix, never above that of its prior.
      Matrices that no calibration input reached are pruned as `solve` does.

    Raises:
      ValueError: missing Grams, a pattern or target that does not fit, a rule with
        another n:m than the method.
      NotFinite: the net diverged, with the leaf.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flexhinm_jax as fh
      >>> apply_fn = lambda p, x: jnp.tanh(x @ p["0/up"]) @ p["1/up"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {f"{j}/up": jax.random.normal(keys[j], (8, 8)) for j in range(2)}
      >>> x = jax.random.normal(keys[2], (32, 8))
      >>> uses = fh.discover(apply_fn, params, x)
      >>> stats = fh.calibrate(apply_fn, params, uses, [x])
      >>> method = fh.HyperPrune(fh.Wanda(fh.NM(2, 4)), steps=10)
      >>> result = hyper_prune(method, jax.random.key(1), params, uses, stats)
      >>> plans = fh.decide(method, result.states, params, uses)
      >>> all(row["error"] <= row["prior"] for row in result.rows), result.layers
      (True, ((0,), (1,)))
    """
    check_hyperprune(method)
    arguments.key(key)
    leaves = Leaves.of(params).dense(uses)
    solve.check_targets(sparsity, uses)
    arguments.by_path(stats, Stats, "stats", "calibrate()")
    if not uses.leaves:
        raise ValueError("uses holds no prunable leaf; describe(uses) says why")
    items = _items(uses)
    names = [identify(path, at) for path, at in items]
    for (path, at), found_name in zip(items, names, strict=True):
        if not isinstance(found_name, tuple) or len(found_name) != 2:
            raise ValueError(
                f"identify({path!r}, {at}) gave {arguments.shown(found_name)}: need a "
                "pair (layer, component)"
            )
    layers, components = (tuple(dict.fromkeys(x)) for x in zip(*names, strict=True))
    net_key, key = jax.random.split(key)
    tasks, around = {}, {}
    for path, use in uses.leaves.items():
        own: Any = solve.method_for(method, use)
        if own.form != method.form:
            raise ValueError(
                f"{path}: a rule asks for {own.pattern}, the net is for "
                f"{method.pattern}; prune such leaves apart, with rules that skip the "
                "others"
            )
        tasks[path], around[path] = solve.prepared(
            method, key, leaves, use, stats.get(path), sparsity
        )
    theta = method.net(net_key, len(layers), len(components))
    cache = hypernet.empty(method.cache, method.form["m"])
    solved: dict[str, list[State]] = {path: [] for path in uses.leaves}
    rows: list[Row] = []
    for (path, at), (layer, component) in zip(items, names, strict=True):
        place = hypernet.Place(
            jnp.asarray(layers.index(layer), jnp.int32),
            jnp.asarray(components.index(component), jnp.int32),
        )
        task = tasks[path]
        arrays = task.weight(), *task.others[:3]
        w, *rest = jax.tree.map(lambda x: x[at], arrays)  # noqa: B023
        state, theta, cache = _one(task.method, theta, cache, place, w, *rest)
        _check(theta, path)
        solved[path].append(state)
        row = {"path": path, "at": at, "layer": layer, "component": component}
        row["prior"] = float(state.fixed["prior_error"])
        row["error"] = float(state.fixed["error"])
        rows.append(row)
        if progress is not None:
            progress(row)
    states = {
        path: solve.with_around(_stacked(x, uses, path), around[path])
        for path, x in solved.items()
    }
    return Hyper(states, theta, cache, layers, components, rows)


@functools.partial(jax.jit, static_argnums=0)
def _one(method, theta, cache, place, w, key, stats, sparsity):
    return method.solve_with(theta, cache, place, key, w, stats, sparsity, None)


def _items(uses: Uses) -> list[tuple[str, tuple[int, ...]]]:
    """(path, place in the stack) of every matrix; the layers of stacks in turn."""
    items = [
        (path, at)
        for path, use in uses.leaves.items()
        for at in np.ndindex(*use.layout.stack_shape)
    ]
    return sorted(items, key=lambda item: item[1])


def _stacked(states: list[State], uses: Uses, path: str) -> State:
    shape = uses.leaves[path].layout.stack_shape
    assert len(states) == math.prod(shape)
    return jax.tree.map(lambda *x: jnp.stack(x).reshape(*shape, *x[0].shape), *states)


def _check(theta: hypernet.Theta, path: str) -> None:
    if all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(theta)):
        return
    raise NotFinite(
        f"{path}: the net is not finite after this matrix; lower learning_rate, or "
        "look at the Gram"
    )
