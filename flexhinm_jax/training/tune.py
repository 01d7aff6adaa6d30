"""Trains what pruning left of a model, until it predicts what the dense one predicts.

All kept weights, biases and norms take a few hundred steps of Adam towards the outputs
of the dense model. Masks are fixed. Local reconstruction (`training.reconstruct`) asks
every window for the values that the dense model has there; this asks the whole model
for its outputs alone, and errors in between may be anything that cancels. A step costs
about as much as one of every window; the memory is that of the model, its gradients and
the moments of Adam beside the dense model.

Source: Hinton et al. 2015 (arXiv:1503.02531), with fixed supports.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax import arguments, promotion
from flexhinm_jax.io import fingerprint, programs
from flexhinm_jax.jax_versions import on_device
from flexhinm_jax.tracing.discover import Traced, discover
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.training import objectives
from flexhinm_jax.training.gradual import Saves, saves
from flexhinm_jax.training.optimizers import keep_from_zeros, warmed_adam
from flexhinm_jax.training.phases import Judge, Phase, Row
from flexhinm_jax.training.run import Run
from flexhinm_jax.training.schedules import shuffled
from flexhinm_jax.training.state import Training
from flexhinm_jax.training.step import make_step

logger = logging.getLogger("flexhinm_jax")

HELD = 8
"""One of so many batches judges."""

MOST_HELD = 8
"""Batches that judge, at most."""


class Told(Saves, total=False):
    """The further options of `tune`."""

    rules: Mapping[str, Any] | None
    token_mask: Callable[..., Array] | None
    progress: Callable[[Row], None] | None
    every: int


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What `tune` returns.

    Attributes:
      params: a tree like the pruned one, zero where that was.
      before: the loss on held-back batches at the start; on all where there is one.
      after: the same of `params`, never more.
      rows: of the run: step, loss and seconds a step.
      note: what to do where the end was not better than the start; None where it was.
    """

    params: Any
    before: float
    after: float
    rows: list[Row]
    note: str | None = None

    def __repr__(self) -> str:
        """The losses; the arrays are in the attributes."""
        return f"Tuned(before={self.before:.4g}, after={self.after:.4g})"


@promotion.usual()
def tune(
    apply_fn: Callable[..., Array],
    params: Any,
    dense: Any,
    batches: Iterable[Any],
    *,
    key: Array,
    steps: int = 200,
    rate: float = 3e-4,
    kind: Literal["kl", "cosine"] = "kl",
    **options: Unpack[Told],
) -> Tuned:
    """Distils the dense model into a pruned one under fixed masks.

    Prunable leaves keep their zeros; beside them whatever has one axis or none moves,
    norms and biases. Tables, weights that rules skip, and matrices that are those of
    the dense model stay. Leaves of less than 32 bits are trained as float32 and rounded
    in every step as they are stored, so that small steps add up.

    Args:
      apply_fn: pure function of (params, *batch), returns f[..., k]: logits for "kl",
        embeddings for "cosine".
      params: pruned parameters, zeros in place, such as `result.params` of `prune`.
      dense: the parameters before pruning, a tree of the same form.
      batches: tuples of the other arguments, or single arrays; one is one step.
      key: PRNG key, consumed: the order of the batches and which of them judge.
      steps: of Adam.
      rate: highest learning rate; rises for a twentieth of the steps, then falls to
        zero along a cosine.
      kind: of the distance, see `training.objectives.distillation`.
      **options: further ones.
        rules (None): as in `prune`.
        token_mask (None): called as token_mask(*batch), which positions count.
        progress (None): called with every row.
        every (10): steps between two rows.
        checkpoints (None), save_every (100), keep_last (2), resume (False): see `fit`.

    Returns:
      The better of start and end on the held-back batches, an eighth of them and at
      most eight, with both losses. A warning says where that is the start.

    Raises:
      ValueError: trees that differ, no batches, parameters without more zeros than the
        dense ones, a start that is not finite, a checkpoint of another run.
      NotFinite: a step without a finite loss or gradient.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flexhinm_jax as fh
      >>> apply_fn = lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"in": jax.random.normal(keys[0], (8, 8)),
      ...           "out": jax.random.normal(keys[1], (8, 4))}
      >>> batches = list(jax.random.normal(keys[2], (8, 16, 8)))
      >>> pruned = fh.prune(apply_fn, params, batches, fh.Wanda(fh.NM(2, 4)),
      ...                   key=jax.random.key(1))
      >>> tuned = fh.tune(apply_fn, pruned.params, params, batches,
      ...                 key=jax.random.key(2), steps=20, rate=0.01)
      >>> tuned.after < tuned.before, int((tuned.params["in"] == 0).sum())
      (True, 32)
    """
    arguments.options(options, Told.__annotations__ | Saves.__annotations__, "tune")
    arguments.key(key)
    arguments.apply_function(apply_fn)
    arguments.count(steps, "tune: steps", 1)
    arguments.positive(rate, "tune: rate")
    every = arguments.listed(batches)
    arguments.same_tree(params, dense)
    traced, mask = Traced.of(apply_fn), options.get("token_mask")
    leaves, keep = _moving(traced, params, dense, every[0], options.get("rules"))
    fixed = {path: leaf for path, leaf in leaves.items() if path not in keep}
    student = {path: _wide(on_device(leaves[path])) for path in keep}
    distance = objectives.distillation(apply_fn, kind=kind, token_mask=mask)
    distance = objectives.beside(apply_fn, distance)

    def stored(student: Any) -> dict[str, Array]:
        return {k: x.astype(jnp.result_type(leaves[k])) for k, x in student.items()}

    def loss_fn(student: Any, fixed: Any, dense: Any, *batch: Any) -> Array:
        return distance(leaves.tree({**fixed, **stored(student)}), dense, *batch)

    chance = np.random.default_rng(fingerprint.key_words(key))
    order = chance.permutation(len(every))
    held = min(-(-len(every) // HELD), MOST_HELD) if len(every) > 1 else 0
    judging = [every[n] for n in (order[:held] if held else order)]
    teaching = [every[n] for n in order[held:]]
    sequence = shuffled(len(teaching), steps, chance)
    value = jax.jit(loss_fn)

    def judged(student: Any) -> float:
        losses = [value(student, fixed, dense, *batch) for batch in judging]
        return float(np.mean([float(x) for x in losses]))

    tx, places = warmed_adam(rate, steps), saves("tune", options)
    progress = options.get("progress")
    config = {
        "steps": steps,
        "rate": rate,
        "kind": kind,
        "key": fingerprint.key_words(key),
    }
    if places is not None:
        config |= _given(traced, params, dense, every, mask)
    run = Run(
        Training.under(keep, student, tx, key=key),
        [Phase(make_step(None, loss_fn, tx, None), steps)],
        lambda step: (fixed, dense, *teaching[sequence[step]]),
        judge=Judge(lambda training: training.params, judged, looks=1),
        every=options.get("every", 10),
        config=config,
        saves=places,
    )
    for row in run:
        if progress is not None:
            progress(row)
    values = [row["value"] for row in run.rows if "value" in row]
    note = None
    if not values[-1] < values[0]:
        note = (
            f"{steps} steps at rate {rate:g} ended at a loss of {values[-1]:.4g} on"
            f" held-back data, no better than {values[0]:.4g} before them, so the"
            f" weights stay as they were: give a lower rate, such as {rate / 4:.1g}"
        )
        logger.warning("tune: %s", note)
    params = leaves.tree({**fixed, **stored(run.best)})
    return Tuned(params, values[0], run.lowest, run.rows, note)


def _given(
    traced: Traced,
    params: Any,
    dense: Any,
    every: list[tuple[Any, ...]],
    mask: Callable[..., Array] | None,
) -> dict[str, str | None]:
    """What tells a run from one of other trees, data or functions."""
    masks = None if mask is None else [mask(*batch) for batch in every]
    return {
        "start": fingerprint.digest((params, dense)),
        "batches": fingerprint.digest(every),
        "token_mask": None if masks is None else fingerprint.digest(masks),
        "program": programs.digest(traced.program(Leaves.of(params), every[0]).jaxpr),
    }


def _moving(
    apply_fn: Traced,
    params: Any,
    dense: Any,
    batch: tuple[Any, ...],
    rules: Any,
) -> tuple[Leaves, dict[str, Array | None]]:
    """The leaves, and path -> where one that moves may be other than zero."""
    uses = discover(apply_fn, params, *batch, rules=rules)
    leaves, before = Leaves.of(params).dense(uses), Leaves.of(dense)
    changed = [p for p in uses.leaves if not np.array_equal(leaves[p], before[p])]
    zeros = [sum(int((x[p] == 0).sum()) for p in changed) for x in (leaves, before)]
    if zeros[0] <= zeros[1]:
        raise ValueError(
            f"tune: params have {zeros[0]} zeros in the {len(changed)} matrices that"
            f" are not those of dense, which has {zeros[1]} there, so there is nothing"
            " to keep: give the pruned parameters, then the dense ones (the product of"
            " block-diagonal factors has no zeros and cannot be tuned)"
        )
    keep = jax.tree.leaves(keep_from_zeros(params, uses), is_leaf=lambda x: x is None)
    return leaves, {
        path: where
        for (path, leaf), where in zip(leaves.items(), keep, strict=True)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        and (path in changed or jnp.ndim(leaf) < 2)
    }


def _wide(x: Array) -> Array:
    """A leaf as it is trained: float32, or wider where it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
