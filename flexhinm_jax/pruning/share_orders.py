"""One input order for all weights that read the same input.

Query, key and value, or gate and up, contract the same activation. With one order for
all of them it is gathered once at run time, or not at all where the order folds into
what produces the activation (`kernels.fold_inputs`). The rows of the sharing matrices
are stacked for the search (Zhang et al. 2024, RIA, ICLR); then every leaf is solved by
its own method in that order, see `methods.ordered`.
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax import arguments, checks, promotion
from flexhinm_jax.methods import LearnedMethod, Method
from flexhinm_jax.methods.base import check_method
from flexhinm_jax.methods.ordered import Ordered
from flexhinm_jax.paths import over_stack
from flexhinm_jax.patterns import NM, ChannelSearch
from flexhinm_jax.pruning.statistics import informed, unseen
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import Stats, Use, Uses


@promotion.usual()
def share_orders(
    method: Method,
    key: Array,
    params: Any,
    uses: Uses,
    stats: Mapping[str, Stats] | None = None,
    *,
    search: ChannelSearch | None = None,
    within: Mapping[str, int] | None = None,
) -> tuple[Method, dict[str, Stats]]:
    """Searches the orders and returns what `solve` needs to use them.

    Args:
      method: any method that solves; scores of a `ScoreMethod`, squared Wanda scores
        otherwise, decide about the order. For `PermLLM` the orders are the start; to
        keep them equal while they are learned, give `ties(uses)` to `training.fit`.
      key: PRNG key, consumed.
      params: the parameter tree.
      uses: from `discover`.
      stats: from `calibrate`; not needed by a method that needs nothing.
      search: how to search; None for that of the pattern, or `ChannelSearch()`.
      within: regex on leaf paths -> size of the blocks of consecutive inputs that
        channels stay in: the head size of an output projection whose order is to fold
        into the values.

    Returns:
      The method that solves in a given order, and the statistics with the orders.
      Leaves whose pattern is not N:M are untouched.

    Raises:
      ValueError: no leaf has an N:M pattern; blocks that do not divide the inputs or
        are no multiple of m, or that differ inside one group; a regex that matches no
        leaf; another method that learns.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flexhinm_jax as fh
      >>> apply_fn = lambda p, x: (x @ p["gate"]) * (x @ p["up"])
      >>> gate, up, x = jax.random.normal(jax.random.key(0), (3, 8, 8))
      >>> params = {"gate": gate, "up": up}
      >>> uses = fh.discover(apply_fn, params, x)
      >>> stats = fh.calibrate(apply_fn, params, uses, [x])
      >>> method, stats = share_orders(
      ...     fh.SparseGPT(fh.NM(2, 4)), jax.random.key(1), params, uses, stats)
      >>> states = fh.solve(method, jax.random.key(2), params, uses, stats)
      >>> plans = fh.decide(method, states, params, uses)
      >>> one, other = (p.support.regions.in_order for p in plans.values())
      >>> bool((one == other).all())
      True
    """
    check_method(method)
    arguments.key(key)
    if isinstance(method, LearnedMethod) and not method.follows_order:
        raise ValueError(
            f"share_orders: {type(method).__name__} learns; give a method that solves, "
            "such as Wanda(NM(2, 4)), or PermLLM"
        )
    if not method.pattern.one_order:
        raise ValueError(
            f"{arguments.say('share orders')}: {method.pattern} has no one order for "
            "all rows; give a method with an N:M pattern, such as NM(2, 4)"
        )
    if search is not None and type(search) is not ChannelSearch:
        raise ValueError(
            f"share_orders: search={arguments.shown(search)}: need ChannelSearch(), "
            "or None"
        )
    ordered = method if method.follows_order else Ordered(method)
    orders = shared_orders(
        method, key, params, uses, stats, search=search, within=within
    )
    with_orders = dict(stats or {})
    for path, order in orders.items():
        one = with_orders.get(path)
        if one is None:  # a method that looks at no input still carries the order
            ones = jnp.ones(order.shape, jnp.float32)
            one = Stats(ones, jnp.zeros_like(ones), ones[..., 0])
        with_orders[path] = dataclasses.replace(one, order=order)
    return ordered, with_orders


def shared_orders(
    method: Method,
    key: Array,
    params: Any,
    uses: Uses,
    stats: Mapping[str, Stats] | None = None,
    *,
    search: ChannelSearch | None = None,
    within: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """Path -> i32[*stack, i], the order of its group; see `share_orders`."""
    leaves = Leaves.of(params).dense(uses)
    patterns: dict[str, Any] = {
        path: use.pattern or method.pattern
        for path, use in uses.leaves.items()
        if (use.pattern or method.pattern).one_order
    }
    if not patterns:
        raise ValueError(
            f"share_orders: no leaf has an N:M pattern; {method.pattern} has no groups "
            "along one order of all rows"
        )
    blocks = _blocks(within or {}, list(uses.leaves))
    orders = {}
    for group in groups(uses):
        for pattern in dict.fromkeys(patterns.get(p) for p in group):
            paths = [p for p in group if patterns.get(p) == pattern]
            if pattern is None:
                continue
            sizes = {blocks.get(p) for p in paths}
            if len(sizes) > 1:
                raise ValueError(
                    f"share_orders: {', '.join(paths)} read the same input, but "
                    f"within asks for blocks of {sizes}; give all of them the same"
                )
            searched = dataclasses.replace(
                pattern, permute=search or pattern.permute or ChannelSearch()
            )
            use = uses.leaves[paths[0]]
            block = sizes.pop() or use.layout.matrix_shape[1]
            checks.divisible(
                use.layout.matrix_shape[1], block, "in", "within", paths[0]
            )
            checks.divisible(block, pattern.m, "within", "m", paths[0])
            rows = []
            for p in paths:
                w = leaves.matrix(uses.leaves[p])
                one = (stats or {}).get(p)
                if one is not None:
                    load = functools.partial(leaves.matrix, uses.leaves[p])
                    one = informed(one, unseen(one), load)
                own = method.with_pattern(pattern)
                own.check(jax.eval_shape(_last, w), one, None, p)
                rows.append(_scores(own, w, one, w.ndim - 2))
            own = jax.random.fold_in(key, zlib.crc32(paths[0].encode()) & 0x7FFFFFFF)
            order = _search(searched, block, own, jnp.concatenate(rows, axis=-2))
            orders |= dict.fromkeys(paths, order)
    return orders


def groups(uses: Uses) -> list[list[str]]:
    """Leaves that read the same input, in order of execution; every leaf once.

    A leaf that is used several times brings all its inputs into one group: it has one
    order whatever it reads. Leaves that share an input at different positions of their
    stacks, or with different stacks, stay alone.
    """
    members: dict[str, set[str]] = {path: {path} for path in uses.leaves}
    readers: dict[int, list[Use]] = {}
    for use in uses:
        readers.setdefault(use.source, []).append(use)
    for sharing in readers.values():
        forms = {
            (u.at, u.layout.stack_shape, u.layout.matrix_shape[1]) for u in sharing
        }
        if len(forms) == 1:
            joined = set().union(*(members[u.path] for u in sharing))
            for path in joined:
                members[path] = joined
    together: list[list[str]] = []
    for path in uses.leaves:
        if not any(path in group for group in together):
            together.append([p for p in uses.leaves if p in members[path]])
    return together


def ties(uses: Uses) -> dict[str, str]:
    """Path -> first leaf of its group: what `training.fit` takes as `ties`."""
    return {path: group[0] for group in groups(uses) for path in group}


def _blocks(within: Mapping[str, int], paths: list[str]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for regex, size in within.items():
        hits = [p for p in paths if re.search(regex, p)]
        arguments.count(size, f"share_orders: within[{regex!r}]", 1)
        if not hits:
            raise ValueError(
                f"share_orders: within={{{regex!r}: {size}}} matches no leaf; "
                f"{arguments.nearest(regex, paths)}"
            )
        sizes = dict.fromkeys(hits, size) | sizes
    return sizes


def _last(w: Array) -> Array:
    return w.reshape(-1, *w.shape[-2:])[0]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _scores(method: Method, w: Array, stats: Stats | None, stack: int) -> Array:
    """f32[*stack, o, i]: what decides about the order."""
    return over_stack(method.order_scores, stack)(w, stats)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _search(pattern: NM, block: int, key: Array, scores: Array) -> Array:
    """i32[*stack, i], searched for every matrix and every block of inputs."""
    *stack, rows, i = scores.shape
    cut = scores.reshape(-1, rows, i // block, block).swapaxes(1, 2)
    cut = cut.reshape(-1, rows, block)

    def one(key: Array, scores: Array) -> Array:
        regions = pattern.project(key, scores).regions
        assert regions is not None
        return regions.in_order[0]

    order = jax.vmap(one)(jax.random.split(key, cut.shape[0]), cut)
    first = jnp.arange(0, i, block, dtype=jnp.int32)[:, None]
    return (order.reshape(-1, i // block, block) + first).reshape(*stack, i)
