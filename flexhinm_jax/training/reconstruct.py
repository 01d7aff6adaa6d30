"""Local reconstruction: what is left of a window is trained to give what it gave.

After pruning, the weights that were kept, and the norms and biases beside them, take a
few hundred steps of Adam towards the outputs of the dense model where their window ends
(mean squared error on the calibration text). Masks are fixed. As soon as a window holds
something that is not linear, such as a block, this comes near to training the whole
model, at a fraction of its data and memory; single matrices gain least.

Source: "A Free Lunch in LLM Compression: Revisiting Retraining after Pruning",
arXiv:2510.14444. There the model is pruned first, and then reconstructed; here a window
is trained as soon as it is pruned, so what follows is pruned on what it gives.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from flexhinm_jax import arguments, promotion
from flexhinm_jax.io import fingerprint
from flexhinm_jax.io.shelf import Shelf
from flexhinm_jax.methods import Magnitude
from flexhinm_jax.patterns import Unstructured
from flexhinm_jax.pruning.prune import untouched
from flexhinm_jax.sequential.cuts import Walk
from flexhinm_jax.sequential.job import Job, keeping, on_device
from flexhinm_jax.sequential.request import Request
from flexhinm_jax.sequential.windows import Batch, Fit, Problem
from flexhinm_jax.tracing.discover import Traced, discover
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.training.optimizers import keep_from_zeros, warmed_adam
from flexhinm_jax.training.phases import Judge, Phase
from flexhinm_jax.training.run import Run
from flexhinm_jax.training.schedules import shuffled
from flexhinm_jax.training.state import Training
from flexhinm_jax.training.step import make_step


@dataclasses.dataclass(frozen=True)
class Reconstruct:
    """How the weights that are left in a window are trained.

    Attributes:
      window: what is trained together: "block"; "part", such as the attention or the
        MLP of a block; a number of consecutive blocks; or a regular expression: leaves
        that follow each other and have the same match are one window.
      steps: of Adam per window.
      rate: the highest learning rate; it rises for a twentieth of the steps and falls
        to zero along a cosine.
      target: "asym" trains towards what the dense model has where the window ends, so
        errors of earlier windows are repaired; "seq" towards what the dense weights of
        the window give for the inputs of the pruned model.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flexhinm_jax as fh
      >>> apply_fn = lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"in": jax.random.normal(keys[0], (8, 8)),
      ...           "out": jax.random.normal(keys[1], (8, 4))}
      >>> x = jax.random.normal(keys[2], (32, 8))
      >>> result = fh.prune_sequential(
      ...     apply_fn, params, [x], fh.Wanda(fh.NM(2, 4)), key=jax.random.key(1),
      ...     reconstruct=fh.Reconstruct(window=".*", steps=20, rate=0.01))
      >>> int((result.params["in"] == 0).sum())
      32
    """

    window: int | str = "block"
    steps: int = 200
    rate: float = 1e-3
    target: Literal["asym", "seq"] = "asym"

    def __post_init__(self):
        """Validates the configuration."""
        arguments.configuration(self)
        arguments.count(self.steps, "steps", 1)
        arguments.positive(self.rate, "rate")
        if self.target not in ("asym", "seq"):
            raise ValueError(f"target={self.target!r}: choose 'asym' or 'seq'")
        if isinstance(self.window, int):
            arguments.count(self.window, "window", 1)
        elif not isinstance(self.window, str):
            raise ValueError(
                f"window={self.window!r}: need 'block', 'part', a number of blocks or a"
                " regular expression"
            )
        else:
            try:
                re.compile(self.window)
            except re.error as error:
                raise ValueError(
                    f"window={self.window!r} is no regular expression: {error}"
                ) from error

    def fit(self, problem: Problem) -> Fit:
        """Trains one window; its end is kept where that is better than its start.

        Args:
          problem: the window, from `sequential.trained`.

        Returns:
          The arrays, and how far its outputs were and are from what is wanted.

        Raises:
          ValueError: the start is not finite, or the window cannot be differentiated.
        """
        dtypes = [x.dtype for x in problem.sources]
        scales = _scales(problem)
        parts = [self._parts(problem, n, dtypes) for n in range(problem.count)]
        chance = np.random.default_rng(fingerprint.key_words(problem.key))
        order = shuffled(problem.count, self.steps, chance)

        def batch_at(step: int) -> tuple[Any, ...]:
            return order[step], problem.batch(order[step]), scales

        def step(training: Training, n: int, batch: Batch, scales: Any) -> Any:
            return parts[n][0](training, batch, scales)

        def value(sources: Sequence[Array]) -> float:
            losses = [
                parts[n][1](sources, problem.batch(n), scales)
                for n in range(problem.count)
            ]
            return float(np.mean([float(x) for x in losses]))

        start = Training.under(
            problem.keep,
            [x.astype(jnp.float32) for x in problem.sources],
            warmed_adam(self.rate, self.steps),
            key=problem.key,
        )
        run = Run(
            start,
            [Phase(step, self.steps)],
            batch_at,
            judge=Judge(lambda training: training.params, value, looks=1),
            every=self.steps,
            max_skipped=self.steps,
        )
        try:
            rows = list(run)
        except ValueError as error:
            raise ValueError(f"window {problem.name}: {error}") from error
        best: Any = run.best
        arrays = [x.astype(dtype) for x, dtype in zip(best, dtypes, strict=True)]
        return Fit(arrays, rows[0]["value"], run.lowest)

    def _parts(self, problem: Problem, n: int, dtypes: list[Any]) -> tuple[Any, Any]:
        """(step, loss) for the shape of a batch, compiled once for equal windows."""
        program = problem.program(n)
        name = self, program, tuple(map(str, dtypes))
        if name not in problem.known:

            def loss_fn(sources: list[Array], batch: Batch, scales: Any) -> Array:
                cast = [x.astype(t) for x, t in zip(sources, dtypes, strict=True)]
                outs = program(*cast, *batch.frozen, *batch.inputs)
                return _distance(outs, batch, scales)

            step = make_step(None, loss_fn, warmed_adam(self.rate, self.steps), None)
            problem.known[name] = step, jax.jit(loss_fn)
        return problem.known[name]


@promotion.usual()
def reconstruct(
    apply_fn: Callable[..., Any],
    params: Any,
    dense: Any,
    batches: Iterable[Any],
    how: Reconstruct,
    *,
    key: Array,
    token_mask: Callable[..., Array] | None = None,
    progress: Callable[[Any], None] | None = None,
    resume: str | os.PathLike[str] | None = None,
    memory_limit: int | None = None,
) -> Any:
    """Trains what is left of a model that is pruned already, window by window.

    Prunable leaves keep their zeros; whatever else a window alone reads, norms and
    biases, moves too. A leaf that several windows read stays as it is.

    Args:
      apply_fn: pure function of (params, *batch).
      params: pruned parameters, zeros in place, such as `result.params` of `prune`.
      dense: the parameters before pruning, a tree of the same form.
      batches: as in `prune_sequential`; one is one step.
      how: windows, steps, rate and target.
      key: PRNG key, consumed: the order of the batches.
      token_mask: as in `prune_sequential`; masked tokens do not count where an output
        has the axes of the mask in front.
      progress: called with a `Trained` for every window.
      resume: folder in which finished windows are kept.
      memory_limit: bytes of activations kept in memory; None for any.

    Returns:
      A tree like `params`. No window is farther from its goal than it was. A function
      without a leaf to prune has no windows.

    Raises:
      InUse: another process writes the folder of `resume`.
      ValueError: trees that differ, no batches, a window that is not finite or cannot
        be differentiated.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flexhinm_jax as fh
      >>> apply_fn = lambda p, x: x @ p["w"]
      >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> x = jax.random.normal(jax.random.key(1), (32, 8))
      >>> pruned = fh.prune(apply_fn, params, [x], fh.Wanda(fh.NM(2, 4)),
      ...                   key=jax.random.key(2))
      >>> better = fh.reconstruct(
      ...     apply_fn, pruned.params, params, [x],
      ...     fh.Reconstruct(window=".*", steps=20), key=jax.random.key(3))
      >>> int((better["w"] == 0).sum())
      16
    """
    arguments.key(key)
    every = arguments.listed(batches)
    if not isinstance(how, Reconstruct):
        raise ValueError(f"how={how!r}: need a Reconstruct(window, steps, rate)")
    arguments.same_tree(params, dense)
    apply_fn = Traced.of(apply_fn)
    uses = discover(apply_fn, dense, *every[0])
    if not uses.leaves:
        return untouched(uses, uses, None, params).params
    leaves = Leaves.of(params).dense(uses)
    method = Magnitude(Unstructured())  # nothing is solved
    request = Request(method=method, key=key, sparsity=0.5, reconstruct=how)
    request.check()
    request.check_names(uses.leaves)
    job = Job(apply_fn, dense, every, uses, request, token_mask)
    job.current = {path: on_device(leaf) for path, leaf in leaves.items()}
    keep = keep_from_zeros(params, uses)
    supports = zip(leaves, jax.tree.leaves(keep, is_leaf=_is_none), strict=True)
    job.supports = {path: x for path, x in supports if x is not None}
    with keeping(job, resume, pruned=params):
        walk = Retrain(job, Shelf(memory_limit))
        walk.run(progress)
        walk.close()
    return job.tree(job.current)


class Retrain(Walk):
    """A walk of a model that is pruned already."""

    def members(self, k: int) -> dict[tuple, Any]:
        """Nothing is solved."""
        del k
        return {}

    def plain(self, cut: Any) -> dict[tuple, Any]:
        """Nothing is solved."""
        del cut
        return {}


def _is_none(x: Any) -> bool:
    return x is None


def _distance(outs: Sequence[Array], batch: Batch, scales: Sequence[Array]) -> Array:
    """|| y - goal ||^2 over the scale of a batch, the mean over outputs, f32[]."""
    parts = []
    for y, goal, scale in zip(outs, batch.goals, scales, strict=True):
        lost = jnp.square(y.astype(jnp.float32) - goal.astype(jnp.float32))
        parts.append(_counted(lost, batch.valid) / scale)
    return jnp.mean(jnp.stack(parts))


def _counted(squares: Array, valid: Array | None) -> Array:
    """The sum over the tokens that count, f32[]."""
    if valid is not None and squares.shape[: valid.ndim] == valid.shape:
        axes = (1,) * (squares.ndim - valid.ndim)
        squares = jnp.where(valid.reshape(*valid.shape, *axes), squares, 0.0)
    return jnp.sum(squares, dtype=jnp.float32)


@jax.jit
def _powers(batch: Batch) -> list[Array]:
    """|| goal ||^2 of a batch, per output."""
    goals = (jnp.square(goal.astype(jnp.float32)) for goal in batch.goals)
    return [_counted(squares, batch.valid) for squares in goals]


def _scales(problem: Problem) -> list[Array]:
    """The mean of || goal ||^2 over batches, per output; 1 where that is zero."""
    powers = [_powers(problem.batch(n)) for n in range(problem.count)]
    means = np.mean(np.asarray(jax.device_get(powers), np.float64), axis=0)
    return [jnp.asarray(x if x > 0 else 1.0, jnp.float32) for x in means]
