"""Dense training, then pruning and training on, for any task and recipe.

Recipes with fixed masks share one compiled step, whatever the mask, and so does the
dense model that trains on: only `keep` differs, and it is data. Learned masks use
`fh.make_step`.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flexhinm_jax as fh
from flexhinm_jax.io import checkpoints, fingerprint
from flexhinm_jax.methods import LearnedMethod
from flexhinm_jax.methods.gated import Gated
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


def _unchanged(step, carry):
    return carry


@dataclasses.dataclass
class Run:
    """One pass of the training loop.

    Attributes:
      title: names it beside the progress bar.
      steps: how many.
      path: JSONL file for the records, or None.
      before: (step, carry) -> carry before every step.
      kept: where checkpoints go, and what a run must agree on to continue; or None.
      memory: what `before` remembers, saved with the carry.
      like: (steps done, carry before the first) -> a tree like the carry then.
    """

    title: str
    steps: int
    path: Path | None = None
    before: Callable[[int, Any], Any] = _unchanged
    kept: tuple[Saves, dict[str, Any]] | None = None
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    like: Callable[[int, Any], Any] = _unchanged

    def restore(self, carry: Any) -> tuple[int, Any]:
        """Steps done and the carry, from the newest checkpoint if there is one."""
        if self.kept is None:
            return 0, carry
        saves, told = self.kept
        if not saves.resume:
            shutil.rmtree(saves.folder, ignore_errors=True)

        def like(done: int) -> Any:
            return {"carry": self.like(done, carry), "memory": self.memory}

        found = checkpoints.Checkpoints(saves.folder, resume="auto").load(like, told)
        if found is None:
            return 0, carry
        done, tree = found
        self.memory.update(tree["memory"])
        return done, tree["carry"]

    def save(self, done: int, carry: Any) -> None:
        """Keeps a checkpoint."""
        if self.kept is not None:
            saves, told = self.kept
            tree = {"carry": carry, "memory": self.memory}
            checkpoints.Checkpoints(saves.folder).save(done, tree, told)


class Trainer:
    """A task under a configuration, with its compiled steps."""

    def __init__(self, task: Task, config: Config):
        """Prepares the steps; nothing is compiled yet."""
        self.task, self.config = task, config
        self.tx = config.optimizer(config.prune_rate, config.steps, task.lanes)
        self._learned: dict[Any, Any] = {}

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
        carry = jax.tree.map(jnp.array, task.params), tx.init(task.params)
        run = Run("dense", config.dense_steps, path)
        (params, _), _ = self._run(self._plain_step(tx), carry, run)
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
        learns = isinstance(recipe.method, LearnedMethod)
        run = self._prune_learned if learns else self._prune_fixed
        told = {
            "data": self.task.digest,
            "config": repr(self.config),
            "recipe": repr(recipe),
            "sparsity": sparsity,
            "key": fingerprint.key_words(key),
        }
        kept = None if saves is None else (saves, told)
        return run(recipe, sparsity, params, key, title, path, kept)

    def _prune_fixed(self, recipe, sparsity, params, key, title, path, kept):
        task, config = self.task, self.config
        schedule = recipe.schedule(config.steps, sparsity)
        memory = {"states": None}
        keep = [
            jnp.ones(leaf.shape, bool) if name in task.uses.leaves else None
            for name, leaf in zip(
                leaf_paths(params), jax.tree.leaves(params), strict=True
            )
        ]
        keep = jax.tree.unflatten(jax.tree.structure(params), keep)
        carry = (
            jax.tree.map(jnp.array, params),
            fh.keep_sparse(self.tx, keep).init(params),
        )

        def before(step, carry):
            if step not in schedule:
                return carry
            (params, opt), method = carry, recipe.method
            step_key, states = _key_at(key, step), memory["states"]
            states = fh.solve(
                method, step_key, params, task.uses, None, schedule[step], states
            )
            memory["states"] = states
            plans = fh.decide(method, states, params, task.uses)
            keep = fh.keep_tree(plans, params, task.uses)
            params = fh.densify(plans, params, task.uses)
            return params, opt.under(keep)

        run = Run(title, config.steps, path, before, kept, memory)
        (params, _), records = self._run(self._masked_step(), carry, run)
        return params, records

    def _prune_learned(self, recipe, sparsity, params, key, title, path, kept):
        task, config, method = self.task, self.config, recipe.method
        schedule = recipe.schedule(config.steps, sparsity)
        mask_tx = recipe.mask_tx()
        step = self._learned_step(recipe)
        target = schedule.pop(0)
        run_key, first_key = jax.random.fold_in(key, config.steps), _key_at(key, 0)
        if isinstance(method, Gated):
            # The start that `solve` would find too, from the programs and with the key
            # of the fixed masks: gates begin exactly where those stay.
            scores = method.scores
            states = fh.solve(scores, first_key, params, task.uses, None, target)
            plans = fh.decide(scores, states, params, task.uses)
            states, params = fh.adopt(method, plans, params, task.uses)
        else:
            states = fh.solve(method, first_key, params, task.uses, None, target)
        carry = fh.init_training(
            method, params, task.uses, states, self.tx, key=run_key, mask_tx=mask_tx
        )
        last = max(recipe.stages, int(recipe.pruning * config.steps))
        length = last / recipe.stages

        def before(step, carry):
            if step == last:
                carry = fh.harden(method, carry, task.uses)
                return carry.params, carry.opt_state
            if step > last:
                return carry
            if step in schedule:
                carry = fh.harden(method, carry, task.uses)
                carry = fh.next_stage(
                    method,
                    carry,
                    task.uses,
                    key=_key_at(key, step),
                    sparsity=schedule[step],
                    mask_tx=mask_tx,
                )
            return carry.at(step / length % 1)

        # Hard masks train like fixed ones, without the price of sampling.
        def either(carry, batch):
            hard = isinstance(carry, tuple)
            return (self._masked_step() if hard else step)(carry, batch)

        def like(done, carry):
            return (carry.params, carry.opt_state) if done > last else carry

        run = Run(title, config.steps, path, before, kept, like=like)
        carry, records = self._run(either, carry, run)
        if last >= config.steps:
            carry = before(last, carry)
        return carry[0], records

    def _run(self, step_fn, carry, run):
        """The loop itself: batches in, records out, losses averaged between records."""
        carry = run.before(0, carry)
        done, carry = run.restore(carry)
        with log.Log(run.path, run.steps, run.title, start=done) as records:
            losses = []
            for step in range(done, run.steps):
                if step:
                    carry = run.before(step, carry)
                carry, metrics = step_fn(carry, self.task.batch_at(step))
                losses.append(metrics["loss"])
                done = step + 1
                if done % self.config.every == 0 or done == run.steps:
                    found = jax.device_get(metrics) | {"loss": np.mean(losses)}
                    records.write(done, **found)
                    losses = []
                    run.save(done, carry)
            return carry, records.records

    def _plain_step(self, tx):
        def step(carry, batch):
            params, opt = carry
            loss, grads = jax.value_and_grad(self.task.loss_fn)(params, batch)
            updates, opt = tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), opt), {"loss": loss}

        return jax.jit(step, donate_argnums=0)

    def _masked_step(self):
        if "masked" not in self._learned:
            wrapped = fh.keep_sparse(self.tx, None)
            plain = self._plain_step(wrapped)

            def step(carry, batch):
                carry, metrics = plain(carry, batch)
                kept = jax.tree.leaves(carry[1].keep)
                total = sum(k.size for k in kept)
                pruned = total - sum(jnp.sum(k, dtype=jnp.int32) for k in kept)
                return carry, metrics | {"sparsity": pruned / total}

            self._learned["masked"] = jax.jit(step, donate_argnums=0)
        return self._learned["masked"]

    def _learned_step(self, recipe):
        # Recipes that differ in their schedule alone share a step.
        same = dataclasses.replace(recipe, title="", stages=1, pruning=1.0)
        if same not in self._learned:
            self._learned[same] = fh.make_step(
                recipe.method,
                self.task.loss_fn,
                self.tx,
                self.task.uses,
                mask_tx=recipe.mask_tx(),
            )
        return self._learned[same]


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
