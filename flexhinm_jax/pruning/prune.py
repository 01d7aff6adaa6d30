"""One call from a function and its parameters to pruned ones.

What the steps of `tree` do one after the other: discover, calibrate, solve, decide, and
the plans in every form.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax import Array
from jax.typing import DTypeLike

from flexhinm_jax import arguments, kernels, promotion
from flexhinm_jax.methods import Method
from flexhinm_jax.methods.base import check_method
from flexhinm_jax.pruning.apply import decide_leaves, densify_leaves, pack_leaves
from flexhinm_jax.pruning.report import Report, notes, report
from flexhinm_jax.pruning.share_orders import share_orders as with_shared_orders
from flexhinm_jax.pruning.solve import OnMismatch, fitting, solve_leaves
from flexhinm_jax.pruning.statistics import (
    calibrate,
    calibrate_leaves,
    unseen_counts,
)
from flexhinm_jax.tracing import meshes
from flexhinm_jax.tracing.discover import Traced, discover_leaves
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import Plan, Stats, Uses

logger = logging.getLogger("flexhinm_jax")

#: A smaller share of the weights that is pruned is worth a warning.
LEAST_COVERAGE = 0.5


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What `prune` returns.

    Attributes:
      params: the tree with zeros in place.
      packed: the tree with packed leaves.
      plans: path -> Plan.
      uses: what was found, and what was skipped for which reason.
      report: the numbers.
    """

    params: Any
    packed: Any
    plans: dict[str, Plan]
    uses: Uses
    report: Report

    def __repr__(self) -> str:
        """The totals; the arrays are in the attributes."""
        return f"Pruned(uses={self.uses!r}, report={self.report!r})"


@promotion.usual()
def prune(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    method: Method,
    *,
    sparsity: float | Mapping[str, float] | None = None,
    key: Array,
    rules: dict[str, Any] | None = None,
    share_orders: bool = False,
    on_mismatch: OnMismatch = "error",
    **calibration: Any,
) -> Pruned:
    """Prunes the weights of any JAX function in one call.

    Args:
      apply_fn: pure function of (params, *batch).
      params: its parameters.
      batches: tuples of the remaining arguments; a batch that is no tuple is one
        argument.
      method: what to prune with, such as `Wanda(FlexHiNM(32))`.
      sparsity: fraction of weights removed; None for a pattern that has only one.
      key: PRNG key, consumed.
      rules: {regex: pattern or "skip"} on leaf paths; the first match wins.
      share_orders: searches one input order for all N:M weights that read the same
        input; see `pruning.share_orders`.
      on_mismatch: "skip" leaves weights dense whose sizes the pattern does not divide,
        each with a warning and a reason in the report; "error" refuses them.
      **calibration: options of `calibrate`, such as `token_mask`.

    Returns:
      Dense-with-zeros parameters, packed parameters, plans, uses and the report.

      A model in which no leaf can be pruned comes back as it is, and a warning says
      why.

    Raises:
      TypeError: an option that neither this function nor `calibrate` has.
      ValueError: no method, no batch, a rule that matches nothing, rules that leave
        nothing to prune, a leaf that does not fit, NaN.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flexhinm_jax as fh
      >>> apply_fn = lambda p, x: x @ p["w"]
      >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> result = fh.prune(apply_fn, params, [jnp.ones((2, 8))],
      ...                   fh.Wanda(fh.NM(2, 4)), key=jax.random.key(1))
      >>> int((result.params["w"] == 0).sum())
      16
    """
    arguments.options(calibration, arguments.keywords(prune, calibrate), "prune")
    check_method(method)
    arguments.key(key)
    arguments.batches(batches)
    arguments.parameters(params)
    arguments.concrete(params)
    batches = iter(batches)
    try:
        first = next(batches)
    except StopIteration:
        raise ValueError(
            "batches is empty: give at least one batch; its shapes are needed to find "
            "the weights"
        ) from None
    example = first if isinstance(first, tuple) else (first,)
    traced, leaves = Traced.of(apply_fn), Leaves.of(params)
    every_use = discover_leaves(traced, leaves, example, rules)
    uses = fitting(method, every_use, on_mismatch)
    leaves, stats = leaves.dense(uses), None
    if not uses.leaves:
        return untouched(every_use, uses, rules, leaves)
    if method.needs != "nothing":
        calibration.setdefault("gram", method.needs == "gram")
        every = itertools.chain([first], batches)
        stats = calibrate_leaves(traced, leaves, uses, every, **calibration)
    if share_orders:
        key, order_key = jax.random.split(key)
        method, stats = with_shared_orders(method, order_key, leaves, uses, stats)
    blind = unseen_counts(stats)
    plans = _planned(method, key, leaves, uses, stats, sparsity)
    return applied(plans, leaves, uses, blind)


@meshes.under_automatic_axes
def _planned(
    method: Method,
    key: Array,
    leaves: Leaves,
    uses: Uses,
    stats: Mapping[str, Stats] | None,
    sparsity: float | Mapping[str, float] | None,
) -> dict[str, Plan]:
    """Every leaf solved and decided; a warning says where solving went badly."""
    states = solve_leaves(method, key, leaves, uses, stats, sparsity)
    for path, text in notes(method, states, uses).items():
        logger.warning("%s: %s", path, text)
    return decide_leaves(method, states, leaves, uses)


def untouched(
    every_use: Uses, uses: Uses, rules: Mapping[str, Any] | None, params: Any
) -> Pruned:
    """A model without a leaf to prune, as it is; a warning says why.

    Args:
      every_use: from `discover`.
      uses: those that the pattern fits: none.
      rules: as in `prune`.
      params: the parameter tree.

    Raises:
      ValueError: rules or the pattern, and not the model alone, leave nothing.
    """
    first = "; ".join(f"{p}: {why}" for p, why in list(uses.skipped.items())[:3])
    text = f"none of the {len(uses.skipped)} leaves can be pruned ({first})"
    if every_use.leaves or "skip" in list((rules or {}).values()):
        raise ValueError(f"{text}; discover() and describe() show all")
    logger.warning("%s: params come back as they are", text)
    return applied({}, params, uses)


def applied(
    plans: dict[str, Plan],
    params: Any,
    uses: Uses,
    blind: Mapping[str, int] | None = None,
) -> Pruned:
    """The plans in every form that `prune` returns: dense, packed, reported."""
    plans, leaves = meshes.whole(plans), Leaves.of(params)
    packed, dense = _forms(plans, leaves, uses)
    told = report(plans, packed, uses, blind)
    if plans and told.coverage < LEAST_COVERAGE:
        logger.warning("%s", "\n".join(told.coverage_lines))
    return Pruned(
        params=jax.tree.map(_where, dense, leaves).tree(),
        packed=packed.tree(),
        plans=plans,
        uses=uses,
        report=told,
    )


@meshes.under_automatic_axes
def _forms(plans: dict[str, Plan], leaves: Leaves, uses: Uses) -> tuple[Leaves, Leaves]:
    """The leaves packed, and with zeros in place."""
    return pack_leaves(plans, leaves, uses), densify_leaves(plans, leaves, uses)


def with_values(result: Pruned, values: DTypeLike) -> Pruned:
    """The result with its packed values in eight bits, and a report that says so.

    Args:
      result: of any pruning.
      values: as in `pack`.
    """
    packed = kernels.quantise(result.packed, values)
    unseen = {row.path: row.unseen for row in result.report.rows}
    told = report(result.plans, packed, result.uses, unseen)
    return dataclasses.replace(result, packed=packed, report=told)


def _where(new: Any, old: Any) -> Any:
    """The new leaf where the old one lives, if that is on several devices."""
    if not isinstance(old, jax.Array) or len(old.sharding.device_set) == 1:
        return new
    if new.sharding.is_equivalent_to(old.sharding, old.ndim):
        return new
    return jax.device_put(meshes.host(new), old.sharding)
