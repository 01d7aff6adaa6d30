"""What learning masks can minimise: makers of `loss_fn(params, *batch)` for `fit`.

The fourth objective is any loss of the model itself. `layer_error` knows no data but
the Grams of `calibrate`, `output_error` is the reconstruction of whatever `apply_fn`
computes (a block, a model), `distillation` compares embeddings or distributions. All
three compare with the dense parameters and are 0 there.

Arrays that a loss closes over become constants of the compiled step. `taught` and
`layer_task` put them into the batch instead: for models that fill the memory, and so
that the dense outputs are computed once and not in every step.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax import arguments
from flexhinm_jax.ops import gram
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import Stats, Uses, brief

KINDS = ("cosine", "kl")

#: path -> {"weight": f32[*stack, o, i], "gram": f32[*stack, i, i], "total":
#: f32[*stack]}: what `layer_error` compares with.
Task = dict[str, dict[str, Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """The outputs of the dense model, as the last element of a batch.

    Attributes:
      outputs: what `apply_fn` returned.
    """

    outputs: Any

    __repr__ = brief


def taught(
    apply_fn: Callable[..., Any], params: Any, batches: Iterable[Any]
) -> list[tuple[Any, ...]]:
    """The batches with the outputs of the dense model appended, computed once.

    Args:
      apply_fn: pure function of (params, *batch).
      params: the dense parameters.
      batches: tuples of the other arguments, or single arguments.

    Returns:
      Batches for `fit` that end in a `Teacher`; all outputs stay in memory.
    """
    arguments.apply_function(apply_fn)
    run, every = jax.jit(apply_fn), arguments.listed(batches)
    return [(*batch, Teacher(run(params, *batch))) for batch in every]


def beside(
    apply_fn: Callable[..., Any], loss_fn: Callable[..., Array]
) -> Callable[..., Array]:
    """A loss whose batches begin with the dense parameters.

    The dense outputs are computed in every step and not kept: for outputs that are
    large, such as a distribution for every token. `taught` keeps them.

    Args:
      apply_fn: pure function of (params, *batch).
      loss_fn: takes batches that end in a `Teacher`.

    Returns:
      loss_fn(params, dense, *batch).

    Example:
      >>> apply_fn = lambda p, x: x * p
      >>> loss_fn = beside(apply_fn, output_error(apply_fn))
      >>> float(loss_fn(1.0, 2.0, jnp.ones(3)))
      0.25
    """

    def beside_dense(now: Any, dense: Any, *batch: Any) -> Array:
        return loss_fn(now, *batch, Teacher(apply_fn(dense, *batch)))

    return beside_dense


def layer_task(params: Any, uses: Uses, stats: Mapping[str, Stats]) -> Task:
    """The dense weights, their Grams and the energy of their outputs.

    Args:
      params: the dense parameters.
      uses: from `discover`.
      stats: from `calibrate`, with Grams.

    Raises:
      ValueError: a prunable leaf without a Gram.
    """
    leaves = Leaves.of(params).dense(uses)
    arguments.by_path(stats, Stats, "stats", "calibrate()")
    task: Task = {}
    for path, use in uses.leaves.items():
        one = stats.get(path)
        if one is None or one.gram is None:
            raise ValueError(
                f"{path}: the layer error needs its Gram; calibrate these parameters "
                "with gram=True"
            )
        w = leaves.matrix(use).astype(jnp.float32)
        total = gram.energy(w, one.gram)
        task[path] = {"weight": w, "gram": one.gram, "total": total}
    return task


def layer_error(
    params: Any, uses: Uses, stats: Mapping[str, Stats]
) -> Callable[..., Array]:
    """A loss: how much of the outputs of every layer is lost, by the Grams alone.

    Args:
      params: the dense parameters.
      uses: from `discover`.
      stats: from `calibrate`, with Grams; sums or means over tokens alike.

    Returns:
      loss_fn(params), f32[]: the mean over all prunable matrices of tr(D H D^T) /
      tr(W H W^T) with D what the weight lost; matrices that produce nothing count 0.
      Use it with `batches=[()]`, or give `(layer_task(...),)` as the batch.

    Raises:
      ValueError: a prunable leaf without a Gram.

    Example:
      >>> import jax.numpy as jnp
      >>> import flexhinm_jax as fh
      >>> apply_fn = lambda p, x: x @ p["w"]
      >>> params, x = {"w": jnp.ones((4, 2))}, jnp.diag(jnp.array([1.0, 2, 3, 4]))
      >>> uses = fh.discover(apply_fn, params, x)
      >>> stats = fh.calibrate(apply_fn, params, uses, [x])
      >>> loss_fn = layer_error(params, uses, stats)
      >>> bare = {"w": params["w"].at[:2].set(0)}
      >>> round(float(loss_fn(bare)), 4)  # (1 + 4) / (1 + 4 + 9 + 16)
      0.1667
    """
    own = layer_task(params, uses, stats)

    def loss_fn(params: Any, task: Task | None = None) -> Array:
        task = own if task is None else task
        leaves = Leaves.of(params).dense(uses)
        total, count = jnp.zeros((), jnp.float32), 0
        for path, mine in task.items():
            w = leaves.matrix(uses.leaves[path]).astype(jnp.float32)
            lost = gram.energy(mine["weight"] - w, mine["gram"])
            total += jnp.sum(gram.ratio(lost, mine["total"]))
            count += lost.size
        return total / max(count, 1)

    return loss_fn


def output_error(
    apply_fn: Callable[..., Any], params: Any = None
) -> Callable[..., Array]:
    """A loss: the relative squared error of what a function returns.

    With a block of a model as `apply_fn` it is the block's reconstruction.

    Args:
      apply_fn: pure function of (params, *batch), returns an array or a tree.
      params: the dense parameters; None if every batch ends in a `Teacher`.

    Returns:
      loss_fn(params, *batch), f32[]: || f(now) - f(dense) ||^2 / || f(dense) ||^2 over
      all outputs together.

    Example:
      >>> import jax.numpy as jnp
      >>> loss_fn = output_error(lambda p, x: x * p, jnp.array([1.0, 3.0]))
      >>> float(loss_fn(jnp.array([0.0, 3.0]), jnp.ones(2)))
      0.10000000149011612
    """
    arguments.apply_function(apply_fn)

    def loss_fn(now: Any, *batch: Any) -> Array:
        batch, wanted = _wanted(apply_fn, params, batch)
        outputs = apply_fn(now, *batch)
        pairs = list(
            zip(jax.tree.leaves(outputs), jax.tree.leaves(wanted), strict=True)
        )
        lost = sum((_squares(_f32(a) - _f32(b)) for a, b in pairs), _zero())
        return gram.ratio(lost, sum((_squares(_f32(b)) for _, b in pairs), _zero()))

    return loss_fn


def distillation(
    apply_fn: Callable[..., Array],
    params: Any = None,
    *,
    kind: Literal["cosine", "kl"] = "cosine",
    temperature: float = 1.0,
    token_mask: Callable[..., Array] | None = None,
) -> Callable[..., Array]:
    """A loss: the distance of the outputs from those of the dense model.

    Args:
      apply_fn: pure function of (params, *batch), returns f[..., k]: embeddings for
        "cosine", logits for "kl".
      params: the dense parameters; None if every batch ends in a `Teacher`.
      kind: "cosine" is 1 - cos of the angle, "kl" the divergence of the softmax from
        that of the dense model, times temperature^2 (arXiv:1503.02531).
      temperature: divides the logits of "kl"; above 0.
      token_mask: called as token_mask(*batch), gives booleans of the shape of the
        outputs without the last axis, or a prefix of it; True counts.

    Returns:
      loss_fn(params, *batch), f32[]: the mean over all positions that count.

    Raises:
      ValueError: an unknown kind or a temperature that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> loss_fn = distillation(lambda p, x: x @ p, jnp.eye(2))
      >>> turned = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
      >>> float(loss_fn(turned, jnp.ones((3, 2))))
      1.0
    """
    arguments.apply_function(apply_fn)
    if token_mask is not None:
        arguments.function(token_mask, "token_mask", "token_mask(*batch)")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
    if not isinstance(temperature, int | float) or not temperature > 0:
        raise ValueError(f"temperature={temperature!r}: need a number above 0")

    def loss_fn(now: Any, *batch: Any) -> Array:
        batch, wanted = _wanted(apply_fn, params, batch)
        if jax.tree.structure(wanted) != jax.tree.structure(0):
            raise ValueError(
                "distillation: apply_fn returns a tree; let it return the one array "
                "to compare, or use output_error"
            )
        outputs, wanted = _f32(apply_fn(now, *batch)), _f32(wanted)
        if kind == "cosine":
            each = 1 - _cosine(outputs, wanted)
        else:
            log_p = jax.nn.log_softmax(wanted / temperature, axis=-1)
            log_q = jax.nn.log_softmax(outputs / temperature, axis=-1)
            each = temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        if token_mask is None:
            return jnp.mean(each, dtype=jnp.float32)
        counts = token_mask(*batch)
        if counts.shape != each.shape[: counts.ndim]:
            raise ValueError(
                f"distillation: token_mask gave {list(counts.shape)} for outputs whose "
                f"positions are {list(each.shape)}; need that shape or a prefix of it"
            )
        counts = counts.reshape(counts.shape + (1,) * (each.ndim - counts.ndim))
        counts = jnp.broadcast_to(counts, each.shape)
        number = jnp.sum(counts, dtype=jnp.float32)
        total = jnp.sum(jnp.where(counts, each, 0), dtype=jnp.float32)
        return total / jnp.maximum(number, 1)

    return loss_fn


def _wanted(
    apply_fn: Callable[..., Any], params: Any, batch: tuple[Any, ...]
) -> tuple[tuple[Any, ...], Any]:
    """The batch without its teacher, and the outputs of the dense model."""
    if batch and isinstance(batch[-1], Teacher):
        return batch[:-1], jax.lax.stop_gradient(batch[-1].outputs)
    if params is None:
        raise ValueError(
            "no dense outputs: give the loss the dense parameters, or batches from "
            "taught(apply_fn, params, batches)"
        )
    return batch, jax.lax.stop_gradient(apply_fn(params, *batch))


def _cosine(a: Array, b: Array) -> Array:
    """Cosine along the last axis; 0 with the zero vector, with finite gradients."""
    size = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
    fine = size > 0
    return jnp.where(
        fine, jnp.sum(a * b, axis=-1) / jnp.sqrt(jnp.where(fine, size, 1)), 0
    )


def _squares(x: Array) -> Array:
    return jnp.sum(jnp.square(x), dtype=jnp.float32)


def _f32(x: Any) -> Array:
    return jnp.asarray(x, jnp.float32)


def _zero() -> Array:
    return jnp.zeros((), jnp.float32)
