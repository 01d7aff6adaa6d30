"""Dense training, then pruning and training on, for any task and recipe.

Recipes with fixed masks share one compiled step, whatever the mask, and so does the
dense model that trains on: only `keep` differs, and it is data.
"""

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flexhinm_jax as fh
from flexhinm_jax.io import checkpoints, fingerprint
from flexhinm_jax.methods import LearnedMethod
from flexhinm_jax.paths import leaf_paths
from train import log
from train.recipes import Recipe
from train.tasks import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What every program is told; subclasses add the model.

    Attributes:
      name: names the folder of the results.
      rules: (regex of leaf paths, pattern or "skip"), as in `fh.discover`.
      vector_size: rows of a tile of HiNM and FlexHiNM.
      dense_steps: steps of the dense model, before any pruning.
      steps: steps after it, the same for every recipe.
      batch_size: examples of a batch, per seed.
      learning_rate: peak of the dense training: warm-up, then cosine to a tenth.
      prune_rate: peak of the steps after it.
      weight_decay: of AdamW.
      clip: largest norm of the gradient of one seed.
      every: steps between two records.
    """

    name: str
    rules: tuple[tuple[str, Any], ...] = ()
    vector_size: int = 32
    dense_steps: int = 600
    steps: int = 600
    batch_size: int = 128
    learning_rate: float = 2e-3
    prune_rate: float = 2e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    every: int = 50

    def before_pruning(self) -> "Config":
        """The same with everything that the dense model does not depend on left out."""
        return dataclasses.replace(
            self, name="", rules=(), vector_size=1, steps=1, prune_rate=0.0, every=1
        )

    def optimizer(
        self, peak: float, steps: int, lanes: int
    ) -> optax.GradientTransformation:
        """AdamW with a gradient that is clipped lane by lane."""
        warm = max(1, steps // 20)
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, warm, steps, 0.1 * peak)
        # The loss is the mean over lanes, so that of one lane has 1 / lanes of it.
        return optax.chain(
            clip_lanes(self.clip / lanes),
            optax.adamw(rate, b2=0.98, weight_decay=self.weight_decay),
        )


def clip_lanes(limit: float) -> optax.GradientTransformation:
    """Scales the updates of every lane down to a norm of at most `limit`.

    `optax.clip_by_global_norm` would let the lanes scale each other.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        squares = [
            jnp.sum(x**2, tuple(range(1, x.ndim))) for x in jax.tree.leaves(updates)
        ]
        norm = jnp.sqrt(jnp.sum(jnp.stack(squares), 0))
        factor = limit / jnp.maximum(norm, limit)

        def scaled(x: jax.Array) -> jax.Array:
            return x * factor.reshape(-1, *(1,) * (x.ndim - 1)).astype(x.dtype)

        return jax.tree.map(scaled, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@dataclasses.dataclass(frozen=True)
class Saves:
    """Where a run keeps its checkpoints.

    Attributes:
      folder: of this run alone.
      resume: whether to continue from the newest one; else old ones are removed.
    """

    folder: Path
    resume: bool = False


class Trainer:
    """A task under a configuration, with its compiled steps."""

    def __init__(self, task: Task, config: Config):
        """Prepares the steps; nothing is compiled yet."""
        self.task, self.config = task, config
        self.tx = config.optimizer(config.prune_rate, config.steps, task.lanes)
        self.masked_step = fh.make_step(None, task.loss_fn, self.tx, None)
        self._steps: dict[Any, Any] = {}

    def dense(self, folder: Path | None = None) -> Any:
        """The trained dense model, read from `folder` if it was trained before.

        Args:
          folder: where metrics and checkpoint go; None keeps neither.

        Raises:
          Diverged: the loss is not finite.
        """
        task, config = self.task, self.config
        told = {"data": task.digest, "config": repr(config.before_pruning())}
        saved = None if folder is None else folder / "dense"
        if saved is not None and saved.exists():
            try:
                return checkpoints.restore(saved, task.params, told)
            except ValueError:
                pass  # of another configuration: trained anew below
        tx = config.optimizer(config.learning_rate, config.dense_steps, task.lanes)
        path = None if folder is None else folder / "dense.jsonl"
        keep = jax.tree.map(lambda _: None, task.params)
        start = fh.Training.under(keep, task.params, tx, key=jax.random.key(0))
        step = fh.make_step(None, task.loss_fn, tx, None)
        run = self._run(start, [fh.Phase(step, config.dense_steps)])
        log.follow(run, path, "dense", config.dense_steps)
        params = run.now().params
        if saved is not None:
            checkpoints.save(saved, params, told, overwrite=True)
        return params

    def prune(
        self,
        recipe: Recipe,
        sparsity: float,
        params: Any,
        key: jax.Array,
        path: Path | None = None,
        saves: "Saves | None" = None,
    ) -> tuple[Any, list[dict[str, Any]]]:
        """Prunes as the recipe says and trains on.

        Args:
          recipe: what to do.
          sparsity: fraction of the prunable weights that are zero in the end.
          params: the dense model; not changed.
          key: PRNG key, consumed.
          path: JSONL file for the records, or None.
          saves: where checkpoints are kept; None keeps none. A run that is stopped and
            resumed ends with the same bits as one that is not.

        Returns:
          Parameters with exact zeros, and the records.

        Raises:
          Diverged: the loss is not finite.
          ValueError: checkpoints of another run, or damaged ones.
        """
        title = recipe.title if recipe.method is None else f"{recipe.title} {sparsity}"
        told = {
            "data": self.task.digest,
            "config": repr(self.config),
            "recipe": repr(recipe),
            "sparsity": sparsity,
            "key": fingerprint.key_words(key),
        }
        options: dict[str, Any] = {"config": told}
        if saves is not None:
            if not saves.resume:
                shutil.rmtree(saves.folder, ignore_errors=True)
            every = self.config.every
            options["saves"] = checkpoints.Checkpoints(
                saves.folder, every, resume="auto"
            )
        learns = isinstance(recipe.method, LearnedMethod)
        parts = self._learned if learns else self._fixed
        start, phases, before = parts(recipe, sparsity, params, key)
        run = self._run(start, phases, before=before, **options)
        records = log.follow(run, path, title, self.config.steps)
        training = run.now()
        if learns and len(phases) == recipe.stages:
            training = fh.harden(recipe.method, training, self.task.uses)
        return training.params, records

    def _run(self, start: fh.Training, phases: Any, **options: Any) -> fh.Run:
        batch_at = lambda step: (self.task.batch_at(step),)  # noqa: E731
        return fh.Run(start, phases, batch_at, every=self.config.every, **options)

    def _next(self, recipe: Recipe, key: jax.Array, at: int, sparsity: float) -> Any:
        """What begins a stage at a step: hard masks, and the choice of new ones."""
        method, uses = recipe.method, self.task.uses
        assert method is not None

        def begin(training: fh.Training) -> fh.Training:
            training = fh.harden(method, training, uses)
            return fh.next_stage(
                method,
                training,
                uses,
                key=_key_at(key, at),
                sparsity=sparsity,
                mask_tx=recipe.mask_tx(),
            )

        return begin

    def _phases(
        self, recipe: Recipe, sparsity: float, key: jax.Array, step: Any, end: int
    ) -> list[fh.Phase]:
        """The stages of a recipe, up to step `end`."""
        schedule = recipe.schedule(self.config.steps, sparsity)
        ends = [*list(schedule)[1:], end]
        return [
            fh.Phase(step, last - at, self._next(recipe, key, at, target))
            for (at, target), last in zip(schedule.items(), ends, strict=True)
        ]

    def _fixed(self, recipe, sparsity, params, key):
        """Start and phases of masks that are chosen, not learned."""
        task, method, steps = self.task, recipe.method, self.config.steps
        run_key = jax.random.fold_in(key, steps)
        if method is None:
            leaves = zip(leaf_paths(params), jax.tree.leaves(params), strict=True)
            keep = [
                jnp.ones(leaf.shape, bool) if name in task.uses.leaves else None
                for name, leaf in leaves
            ]
            keep = jax.tree.unflatten(jax.tree.structure(params), keep)
            start = fh.Training.under(keep, params, self.tx, key=run_key)
            return start, [fh.Phase(self._masked, steps)], None
        target = recipe.schedule(steps, sparsity)[0]
        states = fh.solve(method, _key_at(key, 0), params, task.uses, None, target)
        start = fh.init_training(
            method, params, task.uses, states, self.tx, key=run_key
        )
        return start, self._phases(recipe, sparsity, key, self._masked, steps), None

    def _learned(self, recipe, sparsity, params, key):
        """Start and phases of masks that are learned, and then stay."""
        task, steps, method = self.task, self.config.steps, recipe.method
        target = recipe.schedule(steps, sparsity)[0]
        first_key = _key_at(key, 0)
        if method.adopts_plans:
            # The start that `solve` would find too, from the programs and with the key
            # of the fixed masks: gates begin exactly where those stay.
            scores = method.scores
            states = fh.solve(scores, first_key, params, task.uses, None, target)
            plans = fh.decide(scores, states, params, task.uses)
            states, params = fh.adopt(method, plans, params, task.uses)
        else:
            states = fh.solve(method, first_key, params, task.uses, None, target)
        start = fh.init_training(
            method,
            params,
            task.uses,
            states,
            self.tx,
            key=jax.random.fold_in(key, steps),
            mask_tx=recipe.mask_tx(),
        )
        last = min(steps, max(recipe.stages, int(recipe.pruning * steps)))
        step = self._learned_step(recipe)
        phases = self._phases(recipe, sparsity, key, step, last)
        if last < steps:
            # Hard masks train like fixed ones, without the price of sampling.
            hard = functools.partial(fh.harden, method, uses=task.uses)
            phases.append(fh.Phase(self._masked, steps - last, hard))
        length = last / recipe.stages
        return start, phases, lambda training, at: training.at(at.step / length % 1)

    def _masked(self, training: fh.Training, batch: Any) -> Any:
        """A step under fixed supports: one program for all, whatever chose them."""
        bare = dataclasses.replace(training, states={}, learned_opt=())
        after, metrics = self.masked_step(bare, batch)
        states, opt = training.states, training.learned_opt
        return dataclasses.replace(after, states=states, learned_opt=opt), metrics

    def _learned_step(self, recipe):
        # Recipes that differ in their schedule alone share a step.
        same = dataclasses.replace(recipe, title="", stages=1, pruning=1.0)
        if same not in self._steps:
            self._steps[same] = fh.make_step(
                recipe.method,
                self.task.loss_fn,
                self.tx,
                self.task.uses,
                mask_tx=recipe.mask_tx(),
            )
        return self._steps[same]


def _key_at(key: jax.Array, step: int) -> jax.Array:
    """The key of the choice made before a step."""
    return jax.random.fold_in(key, step)


def zeros(task: Task, params: Any) -> np.ndarray:
    """Fraction of the prunable weights that are exactly zero, per lane."""
    return 1 - _kept(task, params).mean(1)


def moved(task: Task, start: Any, params: Any) -> np.ndarray:
    """Fraction of the weights kept in `params` that were zero in `start`, per lane."""
    before, after = _kept(task, start), _kept(task, params)
    return (after & ~before).sum(1) / np.maximum(after.sum(1), 1)


def _kept(task: Task, params: Any) -> np.ndarray:
    """bool[lanes, prunable weights], True where a weight is not zero."""
    leaves = dict(zip(leaf_paths(params), jax.tree.leaves(params), strict=True))
    found = [np.asarray(leaves[path] != 0) for path in task.uses.leaves]
    return np.concatenate([x.reshape(task.lanes, -1) for x in found], axis=1)
