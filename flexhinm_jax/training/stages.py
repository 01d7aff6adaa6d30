"""Gradual pruning: stage by stage solve, train, harden, with checkpoints between.

The same loop serves methods with something to learn (gates are annealed and hardened)
and all others (the support is found anew and the optimiser keeps its zeros).
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from flexhinm_jax import arguments
from flexhinm_jax.methods import Method
from flexhinm_jax.pruning import apply, solve
from flexhinm_jax.training import resume as saved
from flexhinm_jax.training import sharding
from flexhinm_jax.training.schedules import Stage, check_stages
from flexhinm_jax.training.state import (
    MASK_TX,
    Training,
    harden,
    init_training,
    next_stage,
)
from flexhinm_jax.training.step import LOSS, make_step
from flexhinm_jax.types import Plan, Stats, Uses

Row = dict[str, Any]


class NotFinite(RuntimeError):
    """A loss or gradient was NaN or infinite."""


def gradual(
    method: Method,
    loss_fn: Callable[..., Any],
    params: Any,
    uses: Uses,
    batch_at: Callable[[int], tuple[Any, ...]],
    stages: Sequence[Stage],
    tx: optax.GradientTransformation | None,
    *,
    key: Array,
    mask_tx: optax.GradientTransformation = MASK_TX,
    stats_fn: Callable[[Any], Mapping[str, Stats]] | None = None,
    log_every: int = 10,
    checkpoints: str | os.PathLike | None = None,
    save_every: int = 100,
    keep_last: int = 2,
    resume: saved.Resume = False,
    config: Any = None,
    max_skipped: int = 0,
) -> "Gradual":
    """A gradual pruning run; iterate over it to run it.

    Every stage solves for its sparsity inside what the stage before kept, trains, and
    hardens: from then on the zeros are exact. A run that is killed and resumed gives
    bit for bit the result of one that was not.

    Args:
      method: learned (`HardConcrete`, ...) or not (`Wanda`, ...).
      loss_fn: pure function of (params, *batch), see `make_step`.
      params: the dense parameters.
      uses: from `discover`.
      batch_at: the batch of a step, a tuple; the same for the same step, which is what
        makes a resumed run see the same data.
      stages: sparsity and steps of each stage, see `schedules` and `flexhinm_gp`.
      tx: optimiser of the weights, not wrapped in `keep_sparse`.
      key: PRNG key, consumed.
      mask_tx: optimiser of what the method learns; begins anew in every stage.
      stats_fn: statistics for given parameters, called where a stage begins.
      log_every: steps between two rows.
      checkpoints: folder for checkpoints, or None.
      save_every: steps between two of them; one more ends every stage.
      keep_last: how many to keep.
      resume: True continues the newest checkpoint, "auto" begins where there is none,
        "older" passes over damaged ones.
      config: plain values that explain the run; a resumed run must give the same.
      max_skipped: steps without a finite loss that are tolerated.

    Returns:
      An iterable of rows: floats by name, with "step", "stage" and "kind", which is
      "step" or, at the end of a stage, "stage". After the last row `params` has exact
      zeros and `plans` are hard.

    Raises:
      ValueError: stages that fall or do not fit, before any work; a checkpoint of
        another run.
      NotFinite: while iterating, with the step and the last good checkpoint.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flexhinm_jax as fh
      >>> apply_fn = lambda p, x: x @ p["w"]
      >>> loss_fn = lambda p, x: jnp.mean(apply_fn(p, x) ** 2)
      >>> params = {"w": jax.random.normal(jax.random.key(0), (16, 8))}
      >>> x = jnp.ones((2, 16))
      >>> uses = fh.discover(apply_fn, params, x)
      >>> method = fh.Magnitude(fh.FlexHiNM(8, permute=None))
      >>> run = fh.gradual(method, loss_fn, params, uses, lambda step: (x,),
      ...                  [fh.Stage(0.5, 2), fh.Stage(0.75, 2)], optax.adam(1e-3),
      ...                  key=jax.random.key(1), log_every=2)
      >>> [(row["kind"], row["step"]) for row in run]
      [('step', 2), ('stage', 2), ('step', 4), ('stage', 4)]
      >>> float((run.params["w"] == 0).mean())
      0.75
    """
    check_stages(stages, method, params, uses)
    arguments.key(key)
    arguments.function(batch_at, "batch_at", "batch_at(step)")
    arguments.function(loss_fn, "loss_fn", LOSS)
    if stats_fn is not None:
        arguments.function(stats_fn, "stats_fn", "stats_fn(params)")
    elif method.needs != "nothing":
        raise ValueError(
            f"gradual: {type(method).__name__} needs input statistics "
            f"({method.needs}); pass "
            "stats_fn=lambda params: calibrate(apply_fn, params, uses, batches)"
        )
    arguments.count(log_every, "log_every", 1)
    arguments.count(save_every, "save_every", 1)
    arguments.count(keep_last, "keep_last", 1)
    arguments.count(max_skipped, "max_skipped", 0)
    saved.check_resume(resume)
    if resume and checkpoints is None:
        raise ValueError(f"resume={resume!r} needs the folder: checkpoints=")
    return Gradual(
        method=method,
        loss_fn=loss_fn,
        dense=params,
        uses=uses,
        batch_at=batch_at,
        stages=tuple(stages),
        tx=tx,
        key=key,
        mask_tx=mask_tx,
        stats_fn=stats_fn,
        log_every=log_every,
        folder=checkpoints,
        save_every=save_every,
        keep_last=keep_last,
        resume=resume,
        config=config,
        max_skipped=max_skipped,
    )


@dataclasses.dataclass
class Gradual:
    """A run of `gradual`; its arguments, and where it stands.

    Attributes:
      training: the training now; None before the first row.
      stage: number of the stage.
      done: steps done in the stage.
      last: the last good checkpoint.
    """

    method: Method
    loss_fn: Callable[..., Any]
    dense: Any
    uses: Uses
    batch_at: Callable[[int], tuple[Any, ...]]
    stages: tuple[Stage, ...]
    tx: optax.GradientTransformation | None
    key: Array
    mask_tx: optax.GradientTransformation
    stats_fn: Callable[[Any], Mapping[str, Stats]] | None
    log_every: int
    folder: str | os.PathLike | None
    save_every: int
    keep_last: int
    resume: saved.Resume
    config: Any
    max_skipped: int
    training: Training | None = None
    stage: int = 0
    done: int = 0
    last: Any = None

    @property
    def params(self) -> Any:
        """The parameters; exact zeros once the run is over."""
        return self._now().params

    @property
    def plans(self) -> dict[str, Plan]:
        """Path -> hard plan."""
        now = self._now()
        return apply.decide(self.method, now.states, now.params, self.uses)

    def __iter__(self) -> Iterator[Row]:
        """Runs, and yields metrics."""
        self._begin()
        training = self._now()
        step = make_step(
            self.method,
            self.loss_fn,
            self.tx,
            self.uses,
            mask_tx=self.mask_tx,
            shardings=sharding.places(training),
        )
        while True:
            yield from self._steps(step)
            if self.done == self.stages[self.stage].steps:
                yield self._end_stage()
            if self.stage == len(self.stages) - 1:
                return
            self._next_stage()

    def _steps(self, step: Any) -> Iterator[Row]:
        stage, pending = self.stages[self.stage], []
        clock = time.perf_counter()
        while self.done < stage.steps:
            training = self._now()
            number = int(training.step)
            batch = self.batch_at(number)
            arguments.batch(batch, f"batch_at({number})")
            training = training.at(stage.progress(self.done))
            self.training, metrics = step(training, *batch)
            self.done += 1
            pending.append(metrics["finite"])
            log = self.done % self.log_every == 0 or self.done == stage.steps
            save = (number + 1) % self.save_every == 0
            if log or save:
                self._check_finite(pending, number + 1)
            if save and self.done < stage.steps:
                self._save()
            if log:
                seconds = time.perf_counter() - clock
                row = {name: float(value) for name, value in metrics.items()}
                where: Row = {"kind": "step", "step": number + 1, "stage": self.stage}
                yield where | row | {"seconds": seconds / len(pending)}
                pending, clock = [], time.perf_counter()

    def _begin(self) -> None:
        """Solves the first stage, or restores."""
        if self.training is not None:
            return
        stats = None if self.stats_fn is None else self.stats_fn(self.dense)
        restored = None
        if self.folder is not None:
            like = jax.eval_shape(
                lambda p: self._saved(self._first(p, stats)), self.dense
            )
            restored = saved.load(self.folder, like, self._config(), self.resume)
        if restored is None:
            self.training = self._first(self.dense, stats)
            if self.folder is not None:
                self._save()
            return
        found, self.last = restored
        self.training = found["training"]
        self.stage, self.done = int(found["stage"]), int(found["done"])

    def _first(self, params: Any, stats: Any) -> Training:
        solve_key, train_key = jax.random.split(self.key)
        states = solve.solve(
            self.method,
            jax.random.fold_in(solve_key, 0),
            params,
            self.uses,
            stats,
            self.stages[0].sparsity,
        )
        return init_training(
            self.method,
            params,
            self.uses,
            states,
            self.tx,
            key=train_key,
            mask_tx=self.mask_tx,
        )

    def _next_stage(self) -> None:
        training = self._now()
        self.stage, self.done = self.stage + 1, 0
        solve_key, _ = jax.random.split(self.key)
        self.training = next_stage(
            self.method,
            training,
            self.uses,
            key=jax.random.fold_in(solve_key, self.stage),
            stats=None if self.stats_fn is None else self.stats_fn(training.params),
            sparsity=self.stages[self.stage].sparsity,
            mask_tx=self.mask_tx,
        )

    def _end_stage(self) -> Row:
        """Hardens, saves, and reports the stage."""
        self.training = harden(self.method, self._now(), self.uses)
        if self.folder is not None:
            self._save()
        keeps = [np.asarray(p.support.keep) for p in self.plans.values()]
        kept, size = sum(k.sum() for k in keeps), sum(k.size for k in keeps)
        return {
            "kind": "stage",
            "step": int(self.training.step),
            "stage": self.stage,
            "sparsity": 1 - float(kept) / max(size, 1),
            "skipped": int(self.training.skipped),
        }

    def _saved(self, training: Training) -> dict[str, Any]:
        where = {"stage": self.stage, "done": self.done}
        return {"training": training} | {
            name: jnp.asarray(value, jnp.int32) for name, value in where.items()
        }

    def _save(self) -> None:
        training = self._now()
        if self.folder is None:
            return
        self.last = saved.save(
            self.folder,
            self._saved(training),
            int(training.step),
            self._config(),
            self.keep_last,
        )

    def _config(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "stages": {str(k): stage for k, stage in enumerate(self.stages)},
            "key": saved.key_words(self.key),
            "run": self.config,
        }

    def _check_finite(self, pending: list[Array], step: int) -> None:
        """Raises when too many steps were skipped."""
        if int(self._now().skipped) <= self.max_skipped:
            return
        finite = [bool(x) for x in pending]
        bad = step - len(finite) + 1 + finite.index(False)
        advice = "give checkpoints= a folder to be able to resume"
        if self.last is not None:
            advice = f"the last good checkpoint is {self.last}"
        raise NotFinite(
            f"step {bad}: loss or gradient is not finite; parameters were not updated "
            f"in {int(self._now().skipped)} steps. Lower the learning rate, clip "
            f"gradients or look at the batch; {advice}"
        )

    def _now(self) -> Training:
        if self.training is None:
            raise ValueError("the run has not begun: iterate over it first")
        return self.training
