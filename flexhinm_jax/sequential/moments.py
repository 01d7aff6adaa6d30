"""What one cut of the program sums over its tokens, and the statistics it makes of it.

Every batch adds X^T X of the operand and, where the target is not W x, T^T X; the
members of a cut share what does not depend on their weights.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from flexhinm_jax.pruning.statistics import finite_parameters
from flexhinm_jax.sequential.job import Job
from flexhinm_jax.sequential.straight import Cut
from flexhinm_jax.types import Stats

HIGHEST: dict[str, Any] = {
    "precision": lax.Precision.HIGHEST,
    "preferred_element_type": jnp.float32,
}


def inputs(
    cut: Cut,
    changed: Callable[[Any], bool],
    resid: bool,
    now: Callable[[Any], Any],
    dense: Callable[[Any], Any],
    weight: Callable[[str, tuple], Any],
    mask: np.ndarray | None,
) -> dict[str, Any]:
    """What `tokens_of` needs of one batch.

    Args:
      cut: the cut.
      changed: of a variable, whether the dense model has another value.
      resid: whether targets contain what the stream lacks.
      now: value of a variable in the pruned model.
      dense: the same in the dense model.
      weight: (path, at) -> dense weight.
      mask: tokens that count, or None.
    """
    differs = changed(cut.operand)
    streams = {
        n: (dense(m.stream.var), now(m.stream.var))
        for n, m in enumerate(cut.members)
        if resid and m.stream and changed(m.stream.var)
    }
    o = sum(m.product.layout.matrix_shape[0] for m in cut.members)
    i = cut.members[0].product.layout.matrix_shape[1]
    # Target by target where X_dense^T X would be the larger product.
    written = differs and 2 * o < i
    direct = {
        n: weight(m.path, m.at)
        for n, m in enumerate(cut.members)
        if written or n in streams
    }
    return {
        "x": now(cut.operand),
        "dense": dense(cut.operand) if differs else None,
        "streams": streams,
        "direct": direct,
        "rows": rows(mask, cut.members[0].product.free),
    }


def tokens_of(cut: Cut, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What one batch adds to the sums of a cut.

    Args:
      cut: the cut.
      inputs: "x" and "dense", the operand of the pruned and of the dense model; per
        member "direct", the dense weight where targets are computed token by token, and
        "streams", the stream of both models; "rows", from `rows`.

    Returns:
      "upper": f32[*stack, i, i], X^T X, right only on and above the diagonal; "total"
      f32[*stack, i]; "count" f32[]; and where the target differs from W x: "mixed"
      X_dense^T X and "total_dense", or per direct member "cross" T^T X and "target".
    """
    product = cut.members[0].product

    def picked(x: Array) -> Array:
        x = x.astype(jnp.float32)
        if inputs["rows"] is None:
            return x
        positions, valid = inputs["rows"]
        if positions is not None:
            x = jnp.take(x, positions, axis=-2)
        return x * valid[:, None]

    x = picked(product.tokens(inputs["x"]))
    dense = x
    count = jnp.asarray(x.shape[-2], jnp.float32)
    if inputs["rows"] is not None:
        count = jnp.sum(inputs["rows"][1], dtype=jnp.float32)
    found = {"upper": upper(x), "total": x.sum(axis=-2), "count": count}
    if inputs["dense"] is not None:
        dense = picked(product.tokens(inputs["dense"]))
        if len(inputs["direct"]) < len(cut.members):
            found |= {"mixed": across(dense, x), "total_dense": dense.sum(axis=-2)}
    found |= {"cross": {}, "target": {}}
    for n, w in inputs["direct"].items():
        t = jnp.einsum("...ti,...oi->...to", dense, w.astype(jnp.float32), **HIGHEST)
        if n in inputs["streams"]:
            there, here = inputs["streams"][n]
            lacks = there.astype(jnp.float32) - here.astype(jnp.float32)
            t = t + picked(cut.members[n].stream.back(lacks))  # type: ignore[union-attr]
        found["cross"][n], found["target"][n] = across(t, x), t.sum(axis=-2)
    return found


def rows(mask: np.ndarray | None, free: tuple[int, ...]) -> Any:
    """Which tokens count: (positions or None, 1 or 0 per position); None for all.

    The number of positions is rounded up, so that few shapes are compiled.
    """
    if mask is None or mask.shape != free[: mask.ndim]:
        return None
    keep = np.broadcast_to(
        mask.reshape(mask.shape + (1,) * (len(free) - mask.ndim)), free
    ).reshape(-1)
    if keep.all():
        return None
    found = np.flatnonzero(keep).astype(np.int32)
    step = max(64, -(-keep.size // 8))
    size = max(1, -(-found.size // step)) * step
    if size >= keep.size:
        return None, keep.astype(np.float32)
    padded = np.zeros(size, np.int32)
    padded[: found.size] = found
    return padded, (np.arange(size) < found.size).astype(np.float32)


def across(t: Array, x: Array) -> Array:
    """T^T X."""
    return jnp.einsum("...to,...ti->...oi", t, x, **HIGHEST)


def upper(x: Array) -> Array:
    """X^T X on and above the diagonal; wide ones in blocks, which saves a third."""
    size = x.shape[-1]
    if size < 768:
        return across(x, x)
    edges = np.linspace(0, size, 5).astype(int)
    bands = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        band = across(x[..., low:high], x[..., low:])
        bands.append(jnp.pad(band, [(0, 0)] * (band.ndim - 1) + [(int(low), 0)]))
    return jnp.concatenate(bands, axis=-2)


def finish(job: Job, cut: Cut, sums: dict[str, Any]) -> dict[tuple, Stats]:
    """(path, at) -> statistics of the members of a cut; shared arrays are the same.

    `sums` are used up.
    """
    finite = jax.device_get(jnp.isfinite(sums["upper"].sum()))
    if not finite:
        finite_parameters(job.tree(job.leaves))
        raise ValueError(
            f"the inputs of {cut.members[0].path!r} contain NaN or Inf, or overflow; "
            "look at the calibration batches and at the activations before this leaf "
            "(the parameters are finite)"
        )
    gram = symmetric(sums.pop("upper"))
    count = jnp.maximum(sums["count"], 1.0)
    shared = Stats(
        sq_norm=jnp.diagonal(gram, axis1=-2, axis2=-1),
        mean=sums["total"] / count,
        count=jnp.broadcast_to(sums["count"], gram.shape[:-2]),
        gram=gram,
    )
    out = {}
    for n, m in enumerate(cut.members):
        stats = shared
        if n in sums["cross"]:
            stats = dataclasses.replace(
                shared,
                cross=sums["cross"][n],
                target_mean=sums["target"][n] / count,
            )
        elif "mixed" in sums:
            w = job.weight(m.path, m.at).astype(jnp.float32)
            stats = dataclasses.replace(
                shared,
                cross=jnp.einsum("...oi,...ij->...oj", w, sums["mixed"], **HIGHEST),
                target_mean=jnp.einsum(
                    "...oi,...i->...o", w, sums["total_dense"] / count, **HIGHEST
                ),
            )
        out[m.path, m.at] = stats
    return out


@functools.partial(jax.jit, donate_argnums=0)
def symmetric(upper: Array) -> Array:
    """The matrix of which only the part on and above the diagonal is right."""
    return jnp.triu(upper) + jnp.swapaxes(jnp.triu(upper, 1), -1, -2)


def with_targets(w: Array, stats: Stats) -> Stats:
    """The same statistics with the targets W x written out, if there are no others."""
    if stats.cross is not None:
        return stats
    w = w.astype(jnp.float32)
    return dataclasses.replace(
        stats,
        cross=jnp.einsum("...oi,...ij->...oj", w, stats.gram, **HIGHEST),
        target_mean=jnp.einsum("...oi,...i->...o", w, stats.mean, **HIGHEST),
    )
