"""What the matrices of one cut are fitted to, summed over tokens beside their inputs.

Every batch adds X^T X of the operand and, where the target is not W x, T^T X; the
members of a cut share what does not depend on their weights.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax import Array
from jax import numpy as jnp

from flexhinm_jax.pruning import statistics
from flexhinm_jax.pruning.statistics import (
    CHUNK_BYTES,
    HIGHEST,
    Tokens,
    across,
)
from flexhinm_jax.sequential.job import Job
from flexhinm_jax.sequential.straight import Cut
from flexhinm_jax.tracing.contractions import Chunk
from flexhinm_jax.types import Stats


def inputs(
    cut: Cut,
    changed: Callable[[Any], bool],
    resid: bool,
    now: Callable[[Any], Any],
    dense: Callable[[Any], Any],
    weight: Callable[[str, tuple], Any],
) -> dict[str, Any]:
    """What `tokens_of` needs of one batch.

    Args:
      cut: the cut.
      changed: of a variable, whether the dense model has another value.
      resid: whether targets contain what the stream lacks.
      now: value of a variable in the pruned model.
      dense: the same in the dense model.
      weight: (path, at) -> dense weight.
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
        "routes": None if cut.routes is None else now(cut.routes),
        "dense": dense(cut.operand) if differs else None,
        "streams": streams,
        "direct": direct,
        "tokens": None if cut.valid is None else tokens_for(np.asarray(now(cut.valid))),
    }


def tokens_of(cut: Cut, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What one batch adds to the sums of a cut.

    Args:
      cut: the cut.
      inputs: "x" and "dense", the operand of the pruned and of the dense model; per
        member "direct", the dense weight where targets are computed token by token, and
        "streams", the stream of both models; "tokens", from `tokens_for`.

    Returns:
      What `statistics.sums_of` gives; and where the target differs from W x: "mixed"
      X_dense^T X and "total_dense", or per direct member "cross" T^T X and "target".
    """
    # Positions are those of all tokens; without, convolutions are read in chunks.
    tokens, product = inputs["tokens"], cut.members[0].product
    limit = None if tokens is not None and tokens.positions is not None else CHUNK_BYTES
    add = functools.partial(sums_of, cut, inputs)
    return product.summed(add, limit, inputs["routes"])


def sums_of(cut: Cut, inputs: Mapping[str, Any], chunk: Chunk) -> dict[str, Any]:
    """What a chunk of the tokens adds."""
    tokens = statistics.part(chunk, inputs["tokens"])
    factor = cut.members[0].product.factor
    x = dense = statistics.read(chunk, inputs["x"], tokens, factor)
    sums: dict[str, Any] = dict(statistics.sums_of(x, tokens))
    if inputs["dense"] is not None:
        dense = statistics.read(chunk, inputs["dense"], tokens, factor)
        if len(inputs["direct"]) < len(cut.members):
            sums |= {"mixed": across(dense, x), "total_dense": dense.sum(axis=-2)}
    sums |= {"cross": {}, "target": {}}
    for n, w in inputs["direct"].items():
        w = chunk.matrix(w).astype(jnp.float32)
        t = jnp.einsum("...ti,...oi->...to", dense, w, **HIGHEST)
        if n in inputs["streams"]:
            there, here = inputs["streams"][n]
            lacks = there.astype(jnp.float32) - here.astype(jnp.float32)
            lacks = cut.members[n].stream.back(lacks)  # type: ignore[union-attr]
            t = t + statistics.picked(chunk.rows(lacks, axis=-2), tokens)
        sums["cross"][n], sums["target"][n] = across(t, x), t.sum(axis=-2)
    return sums


def tokens_for(valid: np.ndarray | None) -> Tokens | None:
    """Which tokens of a product count; those that do not are left out where it pays.

    The number of positions is rounded up, so that few shapes are compiled.

    Args:
      valid: bool[t], or bool[*stacked, t] where that differs over a stack, or None.
    """
    if valid is None or valid.all():
        return None
    if valid.ndim > 1:
        return Tokens(valid)
    kept = np.flatnonzero(valid).astype(np.int32)
    step = max(64, -(-valid.size // 8))
    size = max(1, -(-kept.size // step)) * step
    if size >= valid.size:
        return Tokens(valid)
    positions = np.zeros(size, np.int32)
    positions[: kept.size] = kept
    return Tokens(np.arange(size) < kept.size, positions)


def finish(job: Job, cut: Cut, sums: dict[str, Any]) -> dict[tuple, Stats]:
    """(path, at) -> statistics of the members of a cut; shared arrays are the same.

    `sums` are used up.
    """
    own = {name: sums.pop(name) for name in ("total", "count", "gram")}
    shared = statistics.finish(cut.members[0].path, own, job.tree(job.leaves))
    count = jnp.maximum(own["count"], 1.0)[..., None]
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
