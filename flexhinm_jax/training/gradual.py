"""Gradual pruning: stage by stage solve, train, harden, with checkpoints between.

The same run serves methods with something to learn (gates are annealed and hardened)
and all others (the support is found anew and the optimiser keeps its zeros).
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from flexhinm_jax import arguments
from flexhinm_jax.io import fingerprint
from flexhinm_jax.methods import Method
from flexhinm_jax.methods.learned import LearnedMethod
from flexhinm_jax.pruning import apply, solve
from flexhinm_jax.training import sharding
from flexhinm_jax.training.phases import Duration, Phase, Row, Saves, saves
from flexhinm_jax.training.run import Run
from flexhinm_jax.training.schedules import Stage, check_stages
from flexhinm_jax.training.state import (
    MASK_TX,
    Training,
    frozen,
    harden,
    init_training,
    next_stage,
)
from flexhinm_jax.training.step import LOSS, Step, make_step
from flexhinm_jax.types import Plan, State, Stats, Uses


class Told(Saves, total=False):
    """The further options of `gradual`."""

    log_every: int
    config: Any
    max_skipped: int
    tracker: Callable[[int, Row], None] | None
    duration: Duration | None
    finish: int
    make_step: Callable[..., Step]


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
    **options: Unpack[Told],
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
      **options: further ones.
        log_every (10): steps between two rows.
        checkpoints (None): folder for checkpoints, or an `io.checkpoints.Checkpoints`,
        which has the next three itself.
        save_every (100): steps between two of them; one more ends every stage.
        keep_last (2): how many to keep.
        resume (False): True continues the newest checkpoint, "auto" begins where there
        is none, "older" passes over damaged ones.
        config (None): plain values that explain the run; a resumed run must give the
        same, and the same parameters.
        max_skipped (0): steps without a finite loss that are tolerated.
        tracker (None): called as tracker(step, row) with every row.
        duration (None): a `Duration` for the whole run; the steps of the stages are
        then their shares of it.
        finish (0): steps under the last masks, after the last stage: gates are closed,
        so that a step costs no more than one with fixed masks.
        make_step (`make_step`): makes the steps, called like it, without a method and
        uses for fixed masks; one that remembers shares compiled steps among runs.

    Returns:
      A `Run`: an iterable of rows, floats by name, with "step", "stage" and "kind",
      which is "step" or, at the end of a stage, "stage". After the last row `params`
      has exact zeros and `plans` are hard.

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
    arguments.function(loss_fn, "loss_fn", LOSS)
    if stats_fn is not None:
        arguments.function(stats_fn, "stats_fn", "stats_fn(params)")
    elif method.needs != "nothing":
        raise ValueError(
            f"gradual: {type(method).__name__} needs input statistics "
            f"({method.needs}); pass "
            "stats_fn=lambda params: calibrate(apply_fn, params, uses, batches)"
        )
    known = Told.__annotations__ | Saves.__annotations__
    arguments.options(options, known, "gradual")
    places, start = saves("gradual", options), None
    if places is not None:
        start = fingerprint.digest((params, [repr(use) for use in uses]))
    config = {
        "start": start,
        "method": method,
        "stages": {str(k): stage for k, stage in enumerate(stages)},
        "key": fingerprint.key_words(key),
        "run": options.pop("config", None),
    }
    finish = options.pop("finish", 0)
    arguments.count(finish, "gradual: finish", 0)
    if finish and frozen(method):
        raise ValueError(
            f"gradual: finish={finish}: {type(method).__name__} leaves the weights as "
            "they are, so that nothing moves under fixed masks"
        )
    if finish:
        config["finish"] = finish
    task = _Stages(method, params, uses, stages, tx, mask_tx, stats_fn, key)
    make = functools.partial(task.step, options.pop("make_step", make_step), loss_fn)
    return Gradual(
        task,
        task.phases(make, finish),
        batch_at,
        options.pop("duration", None),
        saves=places,
        config=config,
        every=options.pop("log_every", 10),
        **options,  # pyright: ignore[reportCallIssue]
    )


class Gradual(Run):
    """A run of `gradual`, with its results."""

    def __init__(self, task: "_Stages", *run: Any, **options: Any):
        """Keeps what the results need."""
        super().__init__(task.first, *run, **options)
        self._task = task

    def _begin(self) -> Iterator[Row]:
        if self.training is None:
            self._task.look()
        return super()._begin()

    def _shape(self, saved: Collection[str]) -> Training:
        return self._task.shape(saved)

    @property
    def params(self) -> Any:
        """The parameters; exact zeros once the run is over."""
        return self.now().params

    @property
    def plans(self) -> dict[str, Plan]:
        """Path -> hard plan."""
        return self._task.plans(self.now())


class _Stages:
    """What a gradual run does where its stages begin and end."""

    def __init__(
        self,
        method: Method,
        params: Any,
        uses: Uses,
        stages: Sequence[Stage],
        tx: optax.GradientTransformation | None,
        mask_tx: optax.GradientTransformation,
        stats_fn: Callable[[Any], Mapping[str, Stats]] | None,
        key: Array,
    ):
        """Keeps the arguments of `gradual`; nothing is computed yet."""
        self.method, self.params, self.uses = method, params, uses
        self.stages, self.tx, self.mask_tx = stages, tx, mask_tx
        self._stats_fn, self._stats = stats_fn, None
        self._solve_key, self._train_key = jax.random.split(key)

    def look(self) -> None:
        """Takes the statistics of the start, outside of what is traced."""
        self._stats = self._stats_of(self.params)

    def first(self) -> Training:
        """The training before its first step."""
        return self._begun(self._solved())

    def shape(self, saved: Collection[str]) -> Training:
        """Shapes of a training, and on a mesh where its arrays live; nothing is solved.

        Args:
          saved: names of the leaves of its checkpoint: which leaves of the model were
            of extreme size, or saw no input, differs from stage to stage.
        """
        states = {
            path: solve.around_as_saved(state, _around(saved, path))
            for path, state in jax.eval_shape(self._solved).items()
        }
        if sharding.mesh_of(self.params) is None:
            return jax.eval_shape(self._begun, states)
        return self._begun(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), states))

    def begin(self, number: int, training: Training) -> Training:
        """The training at the begin of a stage after the first."""
        return next_stage(
            self.method,
            training,
            self.uses,
            key=jax.random.fold_in(self._solve_key, number),
            stats=self._stats_of(training.params),
            sparsity=self.stages[number].sparsity,
            mask_tx=self.mask_tx,
        )

    def end(self, training: Training) -> tuple[Training, Row]:
        """The hard training at the end of a stage, and its row."""
        training = harden(self.method, training, self.uses)
        keeps = [np.asarray(p.support.keep) for p in self.plans(training).values()]
        kept, size = sum(k.sum() for k in keeps), sum(k.size for k in keeps)
        row = {"sparsity": 1 - float(kept) / max(size, 1)}
        return training, row | {"skipped": int(training.skipped)}

    def plans(self, training: Training) -> dict[str, Plan]:
        """Path -> plan."""
        return apply.decide(self.method, training.states, training.params, self.uses)

    def step(
        self, make: Callable[..., Step], loss_fn: Callable[..., Any], *, hard: bool
    ) -> Step:
        """A step that is made where it is first taken.

        Args:
          make: such as `make_step`.
          loss_fn: of the model.
          hard: whether masks are fixed, so that states are no business of the step.
        """
        steps: list[Step] = []

        def step(training: Training, *batch: Any) -> Any:
            moving, kept = training, {}
            if hard:
                kept = {"states": training.states, "learned_opt": training.learned_opt}
                moving = dataclasses.replace(training, states={}, learned_opt=())
            if not steps:
                where = sharding.places(moving)
                parts = (None, loss_fn, self.tx, None)
                if not hard:
                    parts = (self.method, loss_fn, self.tx, self.uses)
                steps.append(make(*parts, mask_tx=self.mask_tx, shardings=where))
            after, metrics = steps[0](moving, *batch)
            return dataclasses.replace(after, **kept), metrics

        return step

    def phases(self, make: Callable[..., Step], finish: int) -> list[Phase]:
        """A phase per stage, and one under the last masks; they share steps.

        Args:
          make: called with `hard`, see `step`.
          finish: steps of the last phase, 0 for none.
        """
        fixed = make(hard=True)
        learns = isinstance(self.method, LearnedMethod)
        step = make(hard=False) if learns else fixed
        phases = [
            Phase(step, s.steps, functools.partial(self.begin, k), self.end, s.progress)
            for k, s in enumerate(self.stages)
        ]
        return [*phases, Phase(fixed, finish)] if finish else phases

    def _solved(self) -> dict[str, State]:
        key, sparsity = jax.random.fold_in(self._solve_key, 0), self.stages[0].sparsity
        rest = self.uses, self._stats, sparsity
        return solve.solve(self.method, key, sharding.gather(self.params), *rest)

    def _begun(self, states: dict[str, State]) -> Training:
        return init_training(
            self.method,
            self.params,
            self.uses,
            states,
            self.tx,
            key=self._train_key,
            mask_tx=self.mask_tx,
        )

    def _stats_of(self, params: Any) -> Mapping[str, Stats] | None:
        return None if self._stats_fn is None else self._stats_fn(params)


def _around(saved: Collection[str], path: str) -> set[str]:
    """What a checkpoint holds around the state of a leaf, see `solve.around_as_saved`.

    Args:
      saved: names of its leaves.
      path: of the leaf of the model.
    """
    start = f"training/states/{path}/fixed/{solve.AROUND}/"
    return {
        name.removeprefix(start).partition("/")[0]
        for name in saved
        if name.startswith(start)
    }
