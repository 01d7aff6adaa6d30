"""Prunes a whole function in one pass, every layer on what the pruned ones before give.

The program is cut where weights meet inputs (`straight`), and all calibration batches
walk from cut to cut (`segments`). At a cut the Gram matrix of the input is taken, the
matrices that read it are solved, and the walk goes on with the pruned weights. Only one
cut's Gram matrices exist at a time.

What a pruned matrix is fitted to is the `target`:

- "seq": the dense matrix on the inputs of the pruned model, W x (SparseGPT's pipeline).
- "asym": the output of the dense model, W x_dense: errors of earlier layers are
  repaired. The dense values run beside the pruned ones.
- "resid": as "asym"; and where the result is added to a stream that earlier pruning has
  changed, the target also contains what the stream lacks, x_dense - x_pruned.

The last two fit more and need more tokens: on a small sentence encoder they lose to
"seq" at 128 calibration sentences and win from 512 on.

Whose inputs a matrix is judged by are the `statistics`:

- "sequential": those that the pruned matrices before it give.
- "block": those that the dense weights of its own block give, which reads what the
  pruned blocks before it give: all matrices of a block are judged before one is pruned,
  as in the code of Wanda (arXiv:2306.11695) and SparseGPT (arXiv:2301.00774).
- "dense": those of the dense model.

Where none are named the method decides (`Method.statistics`): Wanda takes "block", as
published, the others "sequential".
"""

import os
from collections.abc import Callable, Iterable
from typing import Any

from jax import Array

from flexhinm_jax import arguments, promotion
from flexhinm_jax.io.shelf import Shelf
from flexhinm_jax.methods import Method
from flexhinm_jax.pruning import prune
from flexhinm_jax.pruning.solve import check_targets, fitting
from flexhinm_jax.sequential.cuts import Walk
from flexhinm_jax.sequential.job import Job, keeping
from flexhinm_jax.sequential.request import Request
from flexhinm_jax.tracing.discover import Traced, discover
from flexhinm_jax.tracing.tree import Leaves


@promotion.usual()
def prune_sequential(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    method: Method,
    *,
    key: Array,
    token_mask: Callable[..., Array] | None = None,
    progress: Callable[[Any], None] | None = None,
    resume: str | os.PathLike[str] | None = None,
    memory_limit: int | None = None,
    **options: Any,
) -> prune.Pruned:
    """Prunes the weights of any JAX function, in order of execution.

    A leaf that cannot be cut out (inside a `while`, a `cond` or a scan over time, or
    used on several inputs) is solved when it is first met, on statistics of a plain run
    of the model as pruned so far, with target "seq"; its record says why.

    Args:
      apply_fn: pure function of (params, *batch).
      params: its parameters, dense.
      batches: tuples of the remaining arguments; a batch that is no tuple is one
        argument. All are kept; few shapes and large batches are fast.
      method: what to prune with, such as `ALPS(NM(2, 4))`.
      key: PRNG key, consumed; the same keys per leaf as in `prune`.
      token_mask: called as token_mask(*batch), gives booleans over leading axes of the
        batch, such as [batch, length]; tokens with False are left out, as in
        `calibrate`.
      progress: called with a `Layer` for every matrix that is done, and with a
        `Trained` for every window that was reconstructed.
      resume: folder in which finished matrices are kept; a run that finds some there
        goes on behind them, with the same result as an uninterrupted run.
      memory_limit: bytes of activations kept in memory, the rest goes to temporary
        files; None for any.
      **options: the other fields of `sequential.request.Request`, by name:
        sparsity, fraction of weights removed, one for all or one per path; rules,
        {regex: pattern or "skip"}; target, what a weight is fitted to: "seq", its dense
        product on the inputs that the pruned model gives, "asym", the output of the
        dense model, or "resid", that and what the residual stream lacks; statistics,
        whose inputs judge a weight: "sequential", those that the pruned weights before
        it give, "block", those that the dense weights of its block give, or "dense",
        those of the dense model (None: as the method prefers); block, a regular
        expression for the blocks of statistics="block"; reconstruct, a `Reconstruct`
        that trains what is left of every window before the next is pruned; center=False
        for fits that are not around the means; on_mismatch, as in `prune`.

    Returns:
      Dense-with-zeros parameters, packed parameters, plans, uses and the report.

    Raises:
      InUse: another process writes the folder of `resume`.
      TypeError: an option that does not exist.
      ValueError: no batches, an unknown target or statistics, a method that needs
        gradients, a leaf that does not fit, statistics that are not finite, batches
        that use different weights, or a folder that belongs to another run.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flexhinm_jax as fh
      >>> apply_fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"a": jax.random.normal(keys[0], (8, 8)),
      ...           "b": jax.random.normal(keys[1], (8, 4))}
      >>> x = jax.random.normal(keys[2], (32, 8))
      >>> result = fh.prune_sequential(apply_fn, params, [x], fh.ALPS(fh.NM(2, 4)),
      ...                              key=jax.random.key(1), target="asym")
      >>> int((result.params["a"] == 0).sum())
      32
    """
    known = arguments.keywords(prune_sequential, Request)
    arguments.options(options, known, "prune_sequential")
    request = Request(method=method, key=key, **options)
    request.check()
    arguments.key(key)
    every = arguments.listed(batches)
    arguments.concrete(params)
    arguments.untraced(every, "batches")
    for function, name in (
        (token_mask, "token_mask(*batch)"),
        (progress, "progress(layer)"),
    ):
        if function is not None:
            arguments.function(function, name.partition("(")[0], name)
    if memory_limit is not None:
        arguments.count(memory_limit, "memory_limit", 0)
    apply_fn = Traced.of(apply_fn)
    rules: Any = request.rules
    every_use = discover(apply_fn, params, *every[0], rules=rules)
    stored = [*Leaves.of(params).on_grid]
    reason = "in eight bits with a scale: prune() and solve() take it"
    every_use = every_use.without({p: reason for p in stored if p in every_use.leaves})
    uses = fitting(method, every_use, request.on_mismatch)
    if not uses.leaves:
        return prune.untouched(every_use, uses, rules, params)
    check_targets(request.sparsity, uses)
    request.check_names(uses.leaves)
    job = Job(apply_fn, params, every, uses, request, token_mask)
    with keeping(job, resume):
        walk = Walk(job, Shelf(memory_limit))
        plans = walk.run(progress)
        walk.close()
    if request.reconstruct is not None:
        params = job.tree(job.current)
    return prune.applied(plans, params, uses, walk.unseen)
