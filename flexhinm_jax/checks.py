"""Every ValueError about shapes, dtypes, patterns and plans, in one place.

A message says what was given, what is needed, where (the leaf path) and what to do. The
functions run on the host, at the doors of the library: they look at concrete values and
let tracers pass, because inside jit there is no value to look at.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from flexhinm_jax import arguments
from flexhinm_jax.types import BlockDiagonal, Plan, Regions, Stats, Support


def is_concrete(x: Any) -> bool:
    """True when `x` holds a value that the host can read without tracing."""
    return not isinstance(x, Tracer | jax.ShapeDtypeStruct)


def are_concrete(tree: Any) -> bool:
    """`is_concrete` of every leaf of a tree."""
    return all(map(is_concrete, jax.tree.leaves(tree)))


def matrix(shape: tuple[int, ...], path: str = "weight") -> None:
    """Raises ValueError unless `shape` is that of one non-empty `[o, i]` matrix."""
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"{path}: expected one matrix [out, in] with both sides > 0, got shape "
            f"{tuple(shape)}; reshape it, or vmap over leading axes"
        )


def divisible(size: int, by: int, axis: str, unit: str, path: str = "weight") -> None:
    """Raises ValueError unless `size` is a multiple of `by`.

    Args:
      size: length of the axis.
      by: what must divide it.
      axis: the role of the axis, "in" or "out".
      unit: the hyper-parameter that asks for it, such as "m" or "vector_size".
      path: leaf path for the message.

    Raises:
      ValueError: with both numbers and the divisors of `size` next to `by`.
    """
    if size % by == 0:
        return
    near = sorted(
        {math.gcd(size, by), *(d for d in range(2, min(by, size + 1)) if size % d == 0)}
    )
    fits = ", ".join(str(d) for d in near[-4:]) or "none"
    raise ValueError(
        f"{path}: {axis}={size} is not a multiple of {unit}={by}; give a divisor of "
        f"{size} as {unit} (below {by}: {fits}), pad the weight, or exclude the leaf "
        f"with {arguments.say('skip')}"
    )


def sparsity(
    value: Any, low: float, high: float, pattern: Any, path: str = "weight"
) -> None:
    """Raises ValueError unless the target lies in the range of the pattern.

    Args:
      value: fraction of weights removed, or None for the pattern's own; a tracer
        passes.
      low: smallest sparsity the pattern can express.
      high: largest sparsity the pattern can express.
      pattern: the pattern, for the message.
      path: leaf path for the message.

    Raises:
      ValueError: when the target is missing, not a number, or out of range.
    """
    if value is None:
        if low == high:
            return
        raise ValueError(
            f"{path}: {pattern} needs a target: pass "
            f"{arguments.say('some sparsity')} in [{low:g}, {high:g}], the fraction of "
            "weights removed"
        )
    if not is_concrete(value):
        return
    try:
        targets = np.atleast_1d(np.asarray(value)).ravel()
        if targets.dtype.kind not in "iuf":
            raise TypeError
        targets = targets.astype(np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"{path}: {arguments.say('sparsity', arguments.shown(value))}: need a "
            "number, the fraction of weights removed, such as 0.75"
        ) from None
    for target in targets:
        if low - 1e-6 <= target <= high + 1e-6:
            continue
        if low == high:
            raise ValueError(
                f"{path}: {arguments.say('sparsity', f'{target:g}')}, but {pattern} "
                f"always removes {low:g}; {arguments.say('no sparsity')} or choose "
                "another pattern"
            )
        percent = f"; for {target:g} % give {target / 100:g}" * bool(1 < target <= 100)
        raise ValueError(
            f"{path}: {arguments.say('sparsity', f'{target:g}')} is outside "
            f"[{low:g}, {high:g}], what {pattern} can express; it is the fraction of "
            f"weights removed{percent}"
        )


def finite(x: Any, what: str, path: str = "weight") -> None:
    """Raises ValueError when a concrete array has a NaN or an infinity.

    Args:
      x: array or tracer; a tracer passes.
      what: "weight", "gram", ... for the message.
      path: leaf path for the message.

    Raises:
      ValueError: with the count and the first position.
    """
    if x is None or not is_concrete(x):
        return
    bad = ~np.isfinite(np.asarray(x, np.float32))
    if bad.any():
        first = tuple(int(p) for p in np.argwhere(bad)[0])
        raise ValueError(
            f"{path}: {what} has {int(bad.sum())} NaN or infinite values of "
            f"{bad.size}, the first at {first}; fix the checkpoint or the "
            "calibration data"
        )


def stats(
    value: Stats | None, shape: tuple[int, ...], needs: str, path: str = "weight"
) -> None:
    """Raises ValueError when a method lacks its statistics or they do not fit.

    Args:
      value: statistics of the inputs of this weight, or None.
      shape: (o, i) of the matrix.
      needs: "nothing", "norms", "gram" or "gradients": what the method reads.
      path: leaf path for the message.

    Raises:
      ValueError: missing statistics, a wrong size, no token, NaN or infinities.
    """
    if needs == "nothing" and value is None:
        return
    if value is None:
        raise ValueError(
            f"{path}: this method needs input statistics ({needs}); pass "
            "stats=calibrate(apply_fn, params, uses, batches)"
        )
    if not isinstance(value, Stats):
        raise ValueError(
            f"{path}: stats is {arguments.shown(value)}: need the Stats of this "
            "weight, as calibrate(...)[path]"
        )
    if needs == "gram" and value.gram is None:
        raise ValueError(
            f"{path}: this method needs the Gram matrix, but the statistics hold only "
            "norms; calibrate with gram=True"
        )
    if needs == "gradients" and value.sq_grad is None:
        raise ValueError(
            f"{path}: this method needs squared gradients of the loss, but the "
            "statistics hold none; add them with accumulate_gradients(stats, grad)"
        )
    if value.sq_norm.shape[-1] != shape[1]:
        raise ValueError(
            f"{path}: statistics of {value.sq_norm.shape[-1]} inputs for a weight with "
            f"in={shape[1]}; they belong to another weight"
        )
    if value.gram is not None and value.gram.shape[-2:] != (shape[1], shape[1]):
        raise ValueError(
            f"{path}: Gram of shape {value.gram.shape[-2:]} for in={shape[1]}; "
            f"expected {(shape[1], shape[1])}"
        )
    if is_concrete(value.count) and (np.asarray(value.count) <= 0).any():
        raise ValueError(
            f"{path}: no calibration token reached this weight; pass batches that run "
            f"it or exclude the leaf with {arguments.say('skip')}"
        )
    finite(value.sq_norm, "input norms", path)
    finite(value.gram, "gram", path)
    for name in ("cross", "target_mean", "sq_grad"):
        finite(getattr(value, name), name, path)


def _permutation(order: np.ndarray, what: str, path: str) -> None:
    if not (np.sort(order, -1) == np.arange(order.shape[-1])).all():
        raise ValueError(
            f"{path}: {what} is not a permutation of its {order.shape[-1]} channels; "
            "take the regions from decide(), or order the channels anew"
        )


def regions(value: Regions, keep: Any, path: str = "weight") -> None:
    """Raises ValueError unless `keep` has exactly the structure the regions promise.

    Args:
      value: concrete regions.
      keep: bool[o, i] in original order.
      path: leaf path for the message.

    Raises:
      ValueError: orders that are no permutations, boundaries out of order, a column or
        group with the wrong number of kept weights.
    """
    keep = np.asarray(keep)
    out_order, in_order = np.asarray(value.out_order), np.asarray(value.in_order)
    _permutation(out_order, "out_order", path)
    _permutation(in_order, "in_order", path)
    rows = keep.shape[0] // in_order.shape[0]
    if rows * in_order.shape[0] != keep.shape[0]:
        raise ValueError(
            f"{path}: {in_order.shape[0]} tiles do not divide out={keep.shape[0]}"
        )
    for t, order in enumerate(in_order):
        dense, nm = int(value.dense_end[t]), int(value.nm_end[t])
        if not 0 <= dense <= nm <= keep.shape[1] or (nm - dense) % value.m:
            raise ValueError(
                f"{path}: tile {t} has dense_end={dense}, nm_end={nm} of "
                f"{keep.shape[1]} columns; they must be ordered and {value.m} must "
                "divide the N:M columns"
            )
        tile = keep[out_order[t * rows : (t + 1) * rows]][:, order]
        if not tile[:, :dense].all():
            raise ValueError(f"{path}: tile {t} removes weights of a dense column")
        if tile[:, nm:].any():
            raise ValueError(f"{path}: tile {t} keeps weights of a pruned column")
        kept = tile[:, dense:nm].reshape(rows, -1, value.m).sum(-1)
        if (kept != value.n).any():
            row, group = (int(p) for p in np.argwhere(kept != value.n)[0])
            raise ValueError(
                f"{path}: tile {t}, row {row}, group {group} keeps "
                f"{int(kept[row, group])} of {value.m}, not {value.n}"
            )


def _blocks(block: BlockDiagonal | None, side: int, what: str, path: str) -> None:
    if block is None:
        return
    k, b = block.blocks.shape[:2]
    if k * b != side or block.blocks.shape[2] != b:
        raise ValueError(
            f"{path}: {what} blocks {block.blocks.shape} do not tile {side} channels"
        )
    finite(block.blocks, f"{what} blocks", path)
    if block.order is not None:
        if block.order.shape != (side,):
            raise ValueError(
                f"{path}: {what} order of shape {block.order.shape} for {side} channels"
            )
        _permutation(np.asarray(block.order), f"{what} order", path)


def verify(plan: Plan, path: str = "weight") -> None:
    """Raises ValueError unless a concrete plan of one matrix keeps all its promises.

    Args:
      plan: the plan of one matrix `[o, i]`.
      path: leaf path for the message.

    Raises:
      ValueError: shapes that disagree, weights outside the support, NaN, or a support
        without the structure of its regions.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flexhinm_jax as fh
      >>> w = jnp.arange(8.0).reshape(2, 4)
      >>> method = fh.Magnitude(fh.NM(2, 4))
      >>> fh.verify(method.decide(method.solve(jax.random.key(0), w, None), w))
    """
    if not isinstance(plan, Plan) or not isinstance(plan.support, Support):
        raise ValueError(
            f"{path}: verify got {arguments.shown(plan)}: need one Plan with its "
            "support, such as decide(...)[path]"
        )
    if not is_concrete(plan.weight):
        raise ValueError(f"{path}: verify reads values; call it outside jit")
    matrix(plan.weight.shape, path)
    if plan.support.keep.shape != plan.weight.shape:
        raise ValueError(
            f"{path}: support of shape {plan.support.keep.shape} for a weight of shape "
            f"{plan.weight.shape}"
        )
    finite(plan.weight, "weight", path)
    outside = np.asarray(plan.weight, np.float32)[~np.asarray(plan.support.keep)]
    if outside.any():
        raise ValueError(
            f"{path}: {np.count_nonzero(outside)} weights outside the support are not "
            "zero; decide() must return a masked weight"
        )
    _blocks(plan.left, plan.weight.shape[0], "left", path)
    _blocks(plan.right, plan.weight.shape[1], "right", path)
    if plan.support.regions is not None:
        regions(plan.support.regions, plan.support.keep, path)
