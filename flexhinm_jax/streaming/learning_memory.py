"""How many bytes learning the masks of a block will take, known before it begins.

Counted from above: everything that the traced program of a block computes is kept for
its gradient, and nothing is compiled. What pruning takes is counted in `memory`.
"""

import math
from typing import Any

import jax

from flexhinm_jax.models.decoder_parameters import TABLE
from flexhinm_jax.pruning import solve
from flexhinm_jax.pruning.statistics import blank
from flexhinm_jax.sequential.windows import size
from flexhinm_jax.streaming.memory import Budget
from flexhinm_jax.streaming.work import Setting
from flexhinm_jax.types import Use

COPIES = 5
"""Of what is learned: itself, its gradient, two moments, the best so far."""


def learning_budget(
    setting: Setting, limit: int | None, *, trained: bool, goals: int
) -> Budget:
    """Plans a run, for the kind of block that takes most.

    Args:
      setting: what to do.
      limit: bytes; None for any amount.
      trained: whether the weights are trained too.
      goals: arrays of the size of the hidden states that are compared with.
    """
    kinds = setting.uses.kinds().values()
    plans = [_block_budget(setting, n, limit, trained, goals) for n in kinds]
    return max(plans, key=lambda plan: plan.least)


def _block_budget(
    setting: Setting, layer: int, limit: int | None, trained: bool, goals: int
) -> Budget:
    blocks, beside = setting.blocks, setting.request.beside
    count, (samples, length) = len(setting.batches), setting.batches[0].shape
    like, dtype = blocks.like(layer), blocks.computed(TABLE)
    h = jax.ShapeDtypeStruct((samples, length, blocks.config.hidden_size), dtype)
    sizes = [math.prod(x.shape) * x.dtype.itemsize for x in like.values()]
    gram, learned, largest = 0, 0, ("", 0)
    for path, use in setting.uses.of(layer).leaves.items():
        stack = math.prod(use.layout.stack_shape)
        gram += 4 * stack * use.layout.matrix_shape[1] ** 2
        most = stack * _learned_bytes(setting, use, like[path].dtype)
        learned += most
        largest = max(largest, (path, most), key=lambda pair: pair[1])
    program = jax.make_jaxpr(blocks.apply(layer))(like, h)
    step = 3 * _bytes_of_values(program.jaxpr)
    hidden = count * math.prod(h.shape) * dtype.itemsize
    return Budget(
        limit=limit,
        # dense, in the training, under the masks, and one on its way to the file
        weights=(3 + COPIES * trained) * sum(sizes) + 2 * max(sizes),
        gram=gram,
        solver=learned,
        step=step,
        working=gram + learned + step,
        hidden=hidden * (1 + goals + beside),
        files=2 * hidden * (1 + beside),
        leaf=largest[0],
    )


def _learned_bytes(setting: Setting, use: Use, dtype: Any) -> int:
    """Bytes of what is learned of one matrix, with its gradient and moments."""
    own = solve.method_for(setting.request.method, use)
    target = solve.target_for(own, use, setting.targets)
    shape = use.layout.matrix_shape
    w, key = jax.ShapeDtypeStruct(shape, dtype), jax.eval_shape(jax.random.key, 0)
    run = lambda key, w, stats: own.solve(key, w, stats, sparsity=target)  # noqa: E731
    state: Any = jax.eval_shape(run, key, w, blank(shape[1]))
    leaves = jax.tree.leaves(state.learned)
    moving = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    return COPIES * moving + 4 * math.prod(shape)


def _bytes_of_values(jaxpr: Any) -> int:
    """Bytes of everything that a program computes, inner programs included."""
    total = 0
    for eqn in jaxpr.eqns:
        total += sum(size(v) for v in eqn.outvars)
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "jaxpr"):
                total += _bytes_of_values(inner.jaxpr)
    return total
